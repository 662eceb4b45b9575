"""Files: what is written is read back, and no crash and no link does harm."""

import pytest

from files import append_row, read_text, replacing, write_text

# --------------------------------------------------------------------------------- replaced files


@pytest.fixture
def path(tmp_path):
    """A file with old content, alone in its folder."""
    path = tmp_path / "run" / "file.txt"
    path.parent.mkdir()
    path.write_text("old")
    return path


def test_a_file_is_replaced_at_once(path):
    """Until the block has ended the old file is there, afterwards the new one, alone."""
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_whole(path, error):
    """A write that fails half-way, or is interrupted, changes nothing and leaves nothing beside."""
    with pytest.raises(error):
        with replacing(path) as beside:
            beside.write_text("ne")
            raise error
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("hard", [False, True], ids=["symbolic", "hard"])
def test_a_link_beside_is_not_followed(path, tmp_path, hard):
    """Where NAME.new is a link, its target keeps its content, and the new file is no link."""
    target = tmp_path / "target.txt"
    target.write_text("not yours")
    beside = path.with_name("file.txt.new")
    beside.hardlink_to(target) if hard else beside.symlink_to(target)
    write_text(path, "new")
    assert target.read_text() == "not yours"
    assert path.read_text() == "new" and not path.is_symlink()
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_appended_to_a_link(path, tmp_path):
    """A folder that came by mail may hold a link to any file; its target keeps its content."""
    (tmp_path / "data.jsonl").symlink_to(path)
    with pytest.raises(ValueError, match="data.jsonl is a link"):
        append_row(tmp_path / "data.jsonl", {})
    assert path.read_text() == "old"


# -------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("text", ["a\r\nb\rc", "\ufeff\ufeffa", " \ufeffa\r", "a\x0bb\u2028c\x85"])
def test_a_text_is_read_as_it_was_written(path, text):
    """Whatever line ends and marks a text has, what is read is read the same once written."""
    path.write_bytes(text.encode())
    read = read_text(path, "prompt")
    write_text(path, read.strip())
    assert read_text(path, "prompt") == read.strip() and not set(read) & set("\r\ufeff")
