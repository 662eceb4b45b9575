"""The files of a base model: whatever changes in them is noticed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import checkpoint as checkpoints
from checkpoint import fingerprint


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def weights(tmp_path):
    """A file of two tensors: (path, first byte of the larger one)."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(256, 256), "b": torch.zeros(3)}, path)
    return path, path.stat().st_size - 4 * (256 * 256 + 3)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.77, 0.999])
def test_a_changed_byte_of_a_small_file(weights, part):
    """A file that is hashed whole has another hash if any byte is another."""
    path, _ = weights
    before = fingerprint(path.parent)
    flip(path, int(part * path.stat().st_size))
    assert fingerprint(path.parent) != before


@pytest.mark.parametrize("nth", range(16))
def test_a_changed_byte_of_a_large_file(weights, monkeypatch, nth):
    """Above the limit the header and 16 pieces spread over every tensor are hashed."""
    path, first = weights
    monkeypatch.setattr(checkpoints, "WHOLE", 1000)
    before = fingerprint(path.parent)
    starts = [start for start, _ in checkpoints.pieces(path.open("rb"))]
    size = 4 * 256 * 256
    at = round(nth * (size - 4096) / 15) + 2048  # the middle of its piece
    assert len(starts) == 1 + 16 + 1
    flip(path, first + at)
    assert fingerprint(path.parent) != before


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja"])
def test_settings_and_chat_template_are_told_apart(tmp_path, name):
    """What a conversation looks like is part of a model."""
    before = fingerprint(tmp_path)
    (tmp_path / name).write_text("{}")
    once = fingerprint(tmp_path)
    (tmp_path / name).write_text("[]")
    assert len({before, once, fingerprint(tmp_path)}) == 3
