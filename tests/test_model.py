"""The forward pass against transformers, the cache against the forward pass, and loading.

The fixtures in fixtures/model/weights are random checkpoints that transformers wrote, with its
logits; fixtures/make_model_fixtures.py made them.
"""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import nn

import attention
from attention import Chunked, attention_by_definition, causal_attention
from linear import onednn_is_faster
from model import (
    Config,
    KVCache,
    Llama,
    cached_attention,
    default_dtype,
    load_model,
    rotate,
)
from quant import NF4Linear, dequantize_nf4, quantize_nf4

FIXTURES = Path(__file__).parent / "fixtures" / "model"
WEIGHTS = sorted(folder.name for folder in (FIXTURES / "weights").iterdir())
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def folder(tmp_path):
    """A complete checkpoint folder: the weights called "grouped" and a tokenizer."""
    return checkpoint(tmp_path, "grouped")


def checkpoint(to: Path, name: str, spelling: str = "config.json") -> Path:
    shutil.copytree(FIXTURES / "chat" / "llama-3", to, dirs_exist_ok=True)
    shutil.copytree(FIXTURES / "weights" / name, to, dirs_exist_ok=True)
    (to / "config.json").write_bytes((to / spelling).read_bytes())
    return to


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def difference(folder: Path) -> float:
    """Largest distance between our logits and those of transformers."""
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        return (load_model(folder)[0](expected["ids"]) - expected["logits"]).abs().max().item()


def random_model() -> Llama:
    """A small model in float64, so that equal means 1e-10, with attention that is not flat."""
    torch.manual_seed(0)
    model = Llama(Config.from_dict(SHAPE)).double()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


# ----------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("many", [1, 64], ids=["joined", "apart"])
@pytest.mark.parametrize("K", [2, 4], ids=["grouped", "ungrouped"])
def test_fast_attention_is_its_definition(K, many, monkeypatch):
    """At once, in ragged parts through a cache, or behind a shared prefix: softmax(q k^T) v."""
    monkeypatch.setattr(attention, "MANY_QUERIES", many)
    model = Llama(Config.from_dict(SHAPE | {"num_key_value_heads": K})).double()
    texts = torch.randn(3, 4 + K + K, 12, 8, dtype=torch.float64)  # 3 texts of 12 tokens, hd = 8
    texts[:, :, :5] = texts[0, :, :5]  # which begin with the same 5
    q, k, v = texts.split((4, K, K), dim=1)
    expected = attention_by_definition(q, k, v)
    torch.testing.assert_close(causal_attention(q, k, v), expected, rtol=0, atol=1e-10)

    def attend(cache, P, counts):
        """Queries, keys and values of the next counts[b] tokens of text b, right-padded."""
        start = [P + length for length in cache.lengths.tolist()]
        place = torch.tensor(start)[:, None] + torch.arange(max(counts))
        new = texts[torch.arange(len(texts))[:, None], :, place.clamp(max=11)].transpose(1, 2)
        layout = model.model.lay_out(max(counts), cache, torch.float64)
        y = cached_attention(*new.split((4, K, K), dim=1), layout, layer=0)
        cache.advance(counts)
        for b, count in enumerate(counts):
            own = expected[b, :, start[b] : start[b] + count]
            torch.testing.assert_close(y[b, :, :count], own, rtol=0, atol=1e-10)

    shared = KVCache(model, 1, 5)
    shared.k[0] = k[:1, :, :5]
    shared.v[0] = v[:1, :, :5]
    shared.advance(5)
    for prefix, P in ((None, 0), (shared, 5)):
        cache = KVCache(model, 3, 12, prefix)
        for counts in ([3, 1, 2], [1, 1, 1], [2, 4, 0]):
            attend(cache, P, counts)


@pytest.mark.parametrize("library", ["MKL", "oneDNN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [2, 6], ids=["grouped", "ungrouped"])
@pytest.mark.parametrize("T", [1, 12, 50])
def test_attention_in_chunks_and_its_gradients(T, K, dtype, library, monkeypatch):
    """12 queries to a key head at a time; both are float32 inside, so the type tells the digits.
    A second derivative, which would be wrong, is refused.
    """
    monkeypatch.setattr(attention, "CHUNK", 12)
    if library == "MKL":
        monkeypatch.setattr(attention, "onednn", nullcontext)
    elif not onednn_is_faster():
        pytest.skip("oneDNN rounds, or is not asked, on this processor")
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(2, T, n, 8, generator=generator) for n in (6, K, K)]
    dy = torch.randn(2, 6, T, 8, generator=generator)
    found = []
    for attend, kind in ((Chunked.apply, dtype), (attention_by_definition, torch.float64)):
        own = [x.to(dtype, copy=True).to(kind).requires_grad_() for x in heads]
        y = attend(*(x.transpose(1, 2) for x in own))
        y.backward(dy.to(dtype).to(kind))
        found.append([y, *(x.grad for x in own)])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, exact in zip(*found, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in heads)
    (dq,) = torch.autograd.grad(Chunked.apply(q, k, v).sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize(
    "T, faster, cut", [(50, True, True), (49, True, False), (50, False, False)]
)
def test_only_many_queries_go_in_chunks_and_only_where_that_pays(T, faster, cut, monkeypatch):
    """Either way it is the definition; what will compute the gradient tells which it was."""
    monkeypatch.setattr(attention, "LEAST", 2 * 6 * 50 * 8)
    monkeypatch.setattr(attention, "onednn_is_faster", lambda: faster)
    monkeypatch.setattr(attention, "onednn", nullcontext)
    q, k, v = (torch.randn(2, n, T, 8).requires_grad_() for n in (6, 2, 2))
    y = causal_attention(q, k, v)
    assert ("Chunked" in y.grad_fn.name()) == cut
    torch.testing.assert_close(y, attention_by_definition(q, k, v), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------- the forward pass


@pytest.mark.parametrize("spelling", ["config.json", "config.4.json"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_logits_are_those_of_transformers(name, spelling, tmp_path):
    """Every kind of checkpoint gives its logits, with a config.json of transformers 5 or 4."""
    assert difference(checkpoint(tmp_path, name, spelling)) < 2e-5


@pytest.mark.parametrize("name", ["grouped", "rope_llama3", "rope_linear"])
def test_rope_is_read_from_the_config(name, tmp_path):
    """With the usual RoPE in place of that of the checkpoint the logits are wrong."""
    folder = checkpoint(tmp_path, name)
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert difference(folder) > 0.01


def test_rope_sees_distances_only():
    """<R(m) q, R(n) k> = <R(m + 9) q, R(n + 9) k>."""
    decoder = random_model().model
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def turn(x, place):
        return rotate(x, *decoder.rope(torch.tensor([place]), x.dtype))

    def score(m, n):
        return (turn(q, m) * turn(k, n)).sum()

    assert score(3, 1).item() == pytest.approx(score(12, 10).item(), abs=1e-4)
    assert score(3, 1).item() != pytest.approx(score(3, 2).item(), abs=1e-2)


def test_nobody_looks_ahead():
    """A token changes no logits before it, so padding on the right needs no mask."""
    model, ids = random_model(), torch.randint(50, (2, 12))
    padded = ids.clone()
    padded[:, 8:] = 0
    before, after = model(ids), model(padded)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_at_picks_positions():
    """model(ids, at=mask) is model(ids)[mask], in that order."""
    model, ids = random_model(), torch.randint(50, (3, 10))
    mask = torch.rand(3, 10) < 0.4
    torch.testing.assert_close(model(ids, at=mask), model(ids)[mask])


def test_checkpointing_trades_memory_for_time():
    """Computed twice, a block gives the same loss and gradients."""
    model, ids = random_model(), torch.randint(50, (2, 10))
    gradients, calls = [], []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    for model.checkpointing in (False, True):
        model.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)
    assert len(calls) == 1 + 2


# ---------------------------------------------------------------------------------------- the cache


def prefilled(model: Llama, ids: torch.Tensor) -> KVCache:
    """The cache of one row after reading ids (P,); None if there is nothing to read."""
    if not len(ids):
        return None
    cache = KVCache(model, 1, len(ids))
    model(ids[None], cache)
    cache.advance(len(ids))
    return cache


def read_in_parts(model, ids, cache, parts, padding=7) -> list[list[torch.Tensor]]:
    """Feed ids (B, T) in ragged, right-padded parts; parts[s][b] is what row b gets in step s.

    Returns for each row the log-probabilities at its real tokens.
    """
    rows = [[] for _ in ids]
    for counts in parts:
        padded = torch.full((len(ids), max(counts)), padding)
        for b, count in enumerate(counts):
            padded[b, :count] = ids[b, int(cache.lengths[b]) :][:count]
        logits = model(padded, cache).log_softmax(-1)
        for b, count in enumerate(counts):
            rows[b] += logits[b, :count]
        cache.advance(counts)
        cache.bound = int(cache.lengths.max())
    return rows


PARTS = [[5, 2, 9], [1, 1, 1], [3, 4, 0], [1, 1, 1], [0, 6, 2]]  # tokens a row in each pass


@torch.no_grad()
@pytest.mark.parametrize("P", [0, 6])
def test_cached_is_one_full_forward(P):
    """Ragged parts through the cache give the log-probs of one pass over prefix + text."""
    model, ids = random_model(), torch.randint(50, (3, 20))
    ids[:, :P] = ids[0, :P]
    full = model(ids).log_softmax(-1)[:, P:]
    cache = KVCache(model, 3, 20, prefilled(model, ids[0, :P]))
    rows = read_in_parts(model, ids[:, P:], cache, PARTS)
    assert cache.lengths.tolist() == [10, 14, 13] and cache.bound == 14
    for b, row in enumerate(rows):
        torch.testing.assert_close(torch.stack(row), full[b, : len(row)], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_biases_and_norms_go_through_the_cache(name, tmp_path):
    """Behind a prefix, token by token, the logits of Qwen2 and Qwen3 are those of transformers."""
    folder = checkpoint(tmp_path, name)
    expected = load_file(folder / "expected.safetensors")
    model, ids = load_model(folder)[0], expected["ids"]
    cache = KVCache(model, 1, 48, prefilled(model, ids[0, :6]))
    rows = read_in_parts(model, ids[:, 6:], cache, [[20], *[[1]] * 22])
    wanted = expected["logits"][0, 6:].log_softmax(-1)
    torch.testing.assert_close(torch.stack(rows[0]), wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_padding_is_never_seen():
    """Other padding in the cache, bit for bit the same log-probs."""
    model, ids = random_model(), torch.randint(50, (3, 20))
    runs = []
    for padding in (7, 8):
        cache = KVCache(model, 3, 20)
        runs.append(read_in_parts(model, ids, cache, PARTS, padding))
    assert all(torch.equal(torch.stack(a), torch.stack(b)) for a, b in zip(*runs, strict=True))


@torch.no_grad()
def test_rows_can_leave_and_be_replaced():
    """keep() and put() move whole conversations: each goes on as if it were alone."""
    model, ids = random_model(), torch.randint(50, (3, 20))
    full = model(ids).log_softmax(-1)
    cache = KVCache(model, 2, 20)
    read_in_parts(model, ids[:2], cache, [[4, 7]])
    fresh = KVCache(model, 1, 9)
    read_in_parts(model, ids[2:], fresh, [[9]])
    cache.put([0], fresh)  # the third text in the slot of the first
    assert cache.lengths.tolist() == [9, 7]
    cache.keep([1, 0])
    assert cache.lengths.tolist() == [7, 9]
    rows = read_in_parts(model, ids[1:], cache, [[1, 1], [4, 2]])
    torch.testing.assert_close(torch.stack(rows[0]), full[1, 7:12], rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.stack(rows[1]), full[2, 9:12], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_full_cache_is_an_error():
    """Writing past the end stops the program instead of another row."""
    model = random_model()
    cache = KVCache(model, 1, 4)
    with pytest.raises(AssertionError, match="5 tokens in a cache of 4"):
        model(torch.zeros(1, 5, dtype=torch.int64), cache)


# ------------------------------------------------------------------------------------------ loading


def test_the_base_is_frozen(folder):
    """Nothing that load_model returns is trainable, and dropout is off."""
    model, _ = load_model(folder, dtype=torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    exact = model.model.frequencies.clone()
    assert exact.dtype == torch.float32
    assert torch.equal(model.half().model.frequencies, exact)


@pytest.mark.parametrize(
    ("device", "native", "expected"),
    [("cpu", False, "float32"), ("cuda", True, "bfloat16"), ("cuda", False, "float16")],
)
def test_a_gpu_without_bfloat16_gets_float16(device, native, expected, monkeypatch):
    """Emulated bfloat16 does not count: a T4 has it, at a fraction of its speed."""
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    assert default_dtype(torch.device(device)) == getattr(torch, expected)


@pytest.mark.parametrize("name", ["grouped", "qwen2", "qwen3"])
def test_float16_gives_the_logits_nearly(name, tmp_path):
    """A norm squares in float32 (300 squared is more than float16 holds); scores stay in range."""
    folder = checkpoint(tmp_path, name)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 300  # the stream of a real model has such outliers
    save_file(tensors, folder / "model.safetensors")
    ids = load_file(folder / "expected.safetensors")["ids"]
    half, whole = (load_model(folder, dtype=dtype)[0](ids) for dtype in (torch.half, torch.float))
    assert (half.float() - whole).norm() < 0.01 * whole.norm()


def test_tied_embeddings_are_one_tensor(tmp_path):
    """The output projection is the embedding; a second copy in the file is ignored."""
    folder = checkpoint(tmp_path, "tied")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(64, 32)}, folder / "model.safetensors")
    model, _ = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert difference(folder) < 2e-5


def test_old_rotary_tensors_are_ignored(folder):
    """Checkpoints of transformers 4.30 and before carry inv_freq in each layer."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.zeros(4)}, folder / "model.safetensors")
    assert difference(folder) < 2e-5


@pytest.mark.parametrize("name", ["grouped", "qwen2", "qwen3"])
def test_four_bits_are_for_the_linear_layers_of_blocks(name, tmp_path):
    """bits=4 is the model whose block matrices went through NF4, and no other tensor did."""
    folder = checkpoint(tmp_path, name)
    ids = torch.arange(20)[None]
    model, _ = load_model(folder, bits=4)
    names = {name for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    assert len(names) == 2 * 7 and all(".layers." in name for name in names)
    rounded, _ = load_model(folder)
    for name in names:
        weight = rounded.get_submodule(name).weight
        weight.copy_(dequantize_nf4(quantize_nf4(weight)))
    torch.testing.assert_close(model(ids), rounded(ids))
    assert not torch.allclose(model(ids), load_model(folder)[0](ids), atol=1e-2)


def rewrite(change):
    """A fault: the weights after change(tensors)."""

    def fault(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return fault


def cut(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def lost_shard(folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NORM, ZERO = "model.norm.weight", torch.zeros(5)
FAULTS = {
    "config.json: No such file": lambda f: (f / "config.json").unlink(),
    "config.json: not JSON": lambda f: (f / "config.json").write_text('{"vocab_size": '),
    "config.json: holds no JSON object": lambda f: (f / "config.json").write_text("[]"),
    "tokenizer.json: No such file": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer.json: not JSON": lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe{"),
    "damaged tokenizer.json": lambda f: (f / "tokenizer.json").write_text('{"model": 3}'),
    "no model.safetensors": lambda f: (f / "model.safetensors").unlink(),
    "no model-00001-of-00002.safetensors": lost_shard,
    "damaged or cut short": lambda f: cut(f, -1),
    "cut short .*download it again": lambda f: cut(f, 5),
    r"norm.weight is not there, config.json says \(32,\)": rewrite(lambda t: t.pop(NORM)),
    r"norm.weight is \(5,\), config.json says \(32,\)": rewrite(lambda t: t.update({NORM: ZERO})),
    r"norm.bias is \(5,\), config.json says no such tensor": rewrite(
        lambda t: t.update({"model.norm.bias": ZERO})
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_broken_folder_is_one_clear_line(message, folder):
    """Each way in which a checkpoint can be broken is named, in one line."""
    FAULTS[message](folder)
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures = .'GPT2LMHeadModel'. .*Llama"),
        ({"architectures": "Qwen2ForCausalLM"}, "architectures = Qwen2ForCausalLM"),
        ({"model_type": "gemma"}, "architectures = .'GemmaForCausalLM'. .*Llama"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = True"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9}, "window = 9"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu is not supported, only silu"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"sliding_window": 1024}, "sliding_window = 1024"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"architectures": ["MistralForCausalLM"]}, "sliding_window = 4096"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = yarn is not supported, only"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor = None is not supported"),
        ({"hidden_size": None}, "hidden_size = None .* only a positive integer"),
        ({"num_key_value_heads": 3}, "3 key/value heads do not divide 4 heads"),
    ],
)
def test_what_is_not_supported_is_refused(changes, message):
    """A config that we would run wrongly raises ValueError with field and value."""
    with pytest.raises(ValueError, match=message):
        Config.from_dict(SHAPE | changes)


def test_a_family_is_named_by_its_class_or_its_type():
    """Qwen2 has biases and Qwen3 norms of q and k, in heads of 128 if nothing else is said."""
    for said in ({"architectures": ["Qwen2ForCausalLM"]}, {"model_type": "qwen2"}):
        assert Config.from_dict(SHAPE | said).qkv_bias
    config = Config.from_dict(SHAPE | {"model_type": "qwen3"})
    assert config.qk_norm and not config.qkv_bias and config.head_dim == 128
    assert Config.from_dict(SHAPE) == Config.from_dict(SHAPE | {"model_type": "llama"})


def test_other_bits_are_refused(folder):
    """Only bits 4 and 16 exist."""
    with pytest.raises(ValueError, match="bits = 8 .* only 4 or 16"):
        load_model(folder, bits=8)


# ---------------------------------------------------------------------------------------------- Hub


def offline(error):
    """A stand-in for snapshot_download that fails with a secret in its message."""

    class Failure(error):
        def __init__(self):
            Exception.__init__(self, "hf_secret")

    def download(*args, **kwargs):
        raise Failure()

    return download


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "accept its licence .* `hf auth login` or set HF_TOKEN"),
        (RepositoryNotFoundError, "check the name"),
        (LocalEntryNotFoundError, "check the network or pass a local checkpoint folder"),
        (OSError, "check the network"),
    ],
)
def test_a_failed_download_says_what_to_do(error, message, monkeypatch):
    """Gated, unknown, offline: one line with the cure, and never with the token."""
    monkeypatch.setattr("checkpoint.snapshot_download", offline(error))
    with pytest.raises(ValueError, match=f"^owner/name: .*{message}") as caught:
        load_model("owner/name")
    assert "hf_secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_wrong_path_is_not_looked_up(monkeypatch):
    """What can be no Hub id is a missing folder."""
    monkeypatch.setattr("checkpoint.snapshot_download", offline(OSError))
    for path in ("/no/such/folder", "./missing/folder", "missing"):
        with pytest.raises(ValueError, match="no such folder"):
            load_model(path)


def test_only_needed_files_are_downloaded(monkeypatch, folder):
    """Of a repository we take configuration, tokenizer and the safetensors beside them."""
    asked = {}
    monkeypatch.setattr(
        "checkpoint.snapshot_download", lambda name, **kw: asked.update(kw) or folder
    )
    load_model("owner/name")
    assert asked.pop("local_files_only") is False
    wanted = """config.json generation_config.json tokenizer.json tokenizer_config.json
        chat_template.jinja model.safetensors.index.json model-00001-of-00002.safetensors""".split()
    other = """consolidated.safetensors original/model.safetensors pytorch_model.bin README.md
        original/params.json""".split()
    assert set(filter_repo_objects(wanted + other, **asked)) == set(wanted)
