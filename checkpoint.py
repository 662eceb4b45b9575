"""The files of a checkpoint: found on the disk or downloaded, told apart, checked before use.

A checkpoint is a folder as Hugging Face's Hub keeps it: config.json, tokenizer.json with some small
files beside it, and *.safetensors. Each fault is one ValueError that names file or field, value,
limit or cure. Left out: weights of any other kind (a pickle can run code), other model families.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from files import read_json

CURE = "download it again"
FILES = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.json "
    "chat_template.jinja special_tokens_map.json *.safetensors *.safetensors.index.json"
).split()
IGNORED = ["*/*", "consolidated*"]  # the same weights once more, in another layout


def find_folder(path_or_id: str, download: bool = True) -> Path:
    """The folder of a checkpoint; a Hub id is downloaded into Hugging Face's cache first.

    download: False takes what is in the cache. Raises: ValueError, with the cure, for what is
    neither or cannot be had.
    """
    folder = Path(os.path.expanduser(path_or_id))
    if path_or_id and folder.is_dir():
        return folder
    owner_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path_or_id)
    if not owner_name or "--" in path_or_id or ".." in path_or_id:
        raise ValueError(f"{path_or_id}: no such folder, and no Hub id, which is owner/name")
    try:
        which = {"allow_patterns": FILES, "ignore_patterns": IGNORED}
        return Path(snapshot_download(path_or_id, local_files_only=not download, **which))
    except GatedRepoError:
        cure = "accept its licence on huggingface.co, then `hf auth login` or set HF_TOKEN"
    except RepositoryNotFoundError:
        cure = "check the name on huggingface.co; if private, `hf auth login` or set HF_TOKEN"
    except Exception as error:  # its text may hold a token or signed address, its type says enough
        cure = f"{type(error).__name__}, check the network or pass a local checkpoint folder"
    if not download:
        cure = "nothing is here, and a run folder starts no download; pass the folder of its model"
    raise ValueError(f"{path_or_id}: no folder here, and not downloaded: {cure}")


def read_settings(folder: Path) -> dict:
    """What the small files of a checkpoint say: BOS, EOS and, "" if it has none, chat_template."""
    settings = {}
    for part in ("special_tokens_map", "tokenizer_config", "chat_template", "generation_config"):
        name = f"{part}.json"
        if (folder / name).is_file():
            settings |= read_json(folder / name, CURE)
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            settings["chat_template"] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{file}: not UTF-8; {CURE}") from None
    template = settings.get("chat_template") or ""
    if isinstance(template, list):  # several with names
        template = {entry["name"]: entry["template"] for entry in template}.get("default", "")
    return settings | {"chat_template": template}


def token_names(settings: dict) -> dict[str, str]:
    """What a checkpoint calls its special tokens: bos_token, eos_token, ... -> a name."""
    found = {slot: name for slot, name in settings.items() if slot.endswith("_token")}
    found = {k: name["content"] if isinstance(name, dict) else name for k, name in found.items()}
    return {slot: name for slot, name in found.items() if isinstance(name, str)}


# ------------------------------------------------------------------------------------ fingerprint

WHOLE = 2**28  # bytes of a weight file that is hashed whole, in under a second
PIECES = 16  # of each tensor in a larger one
PIECE = 4096  # bytes


def fingerprint(folder: Path) -> str:
    """A hash that tells checkpoints apart: settings, chat template and weights.

    Of a weight file above WHOLE bytes its header and PIECES pieces spread over every tensor are
    read. What escapes is a change that lies between the pieces, such as a few numbers of a large
    tensor; whatever training, merging or damage of a whole page does is seen.
    """
    digest = hashlib.sha256()
    for pattern in ("*.json", "*.jinja", "*.safetensors"):
        for path in sorted(folder.glob(pattern)):
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + hash_file(path))
    return digest.hexdigest()[:16]


def hash_file(path: Path) -> bytes:
    """The hash of a file, or of a large weight file's sample."""
    with path.open("rb") as file:
        if path.suffix != ".safetensors" or path.stat().st_size <= WHOLE:
            return hashlib.file_digest(file, "sha256").digest()
        digest = hashlib.sha256()
        for start, length in list(pieces(file)):
            file.seek(start)
            digest.update(file.read(length))
    return digest.digest()


def pieces(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of the header of a safetensors file, and of a sample of each tensor.

    Raises: ValueError if the header is damaged.
    """
    first = 8 + int.from_bytes(file.read(8), "little")  # byte of the first tensor
    yield 0, min(first, 10**8)
    file.seek(8)
    try:
        header = json.loads(file.read(min(first - 8, 10**8)))
        ends = [each["data_offsets"] for name, each in header.items() if name != "__metadata__"]
        for start, end in ends:
            step = max(PIECE, (end - start - PIECE) // (PIECES - 1))
            yield from ((first + at, min(PIECE, end - at)) for at in range(start, end, step))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{file.name}: damaged header; download it again") from None


# --------------------------------------------------------------------------------- tokenizer.json


def read_tokenizer(folder: Path) -> tuple[Tokenizer, dict, tuple[str, str]]:
    """A tokenizer that neither adds control tokens nor finds them in text, their ids, and the rule
    for a leading space. Raises: ValueError for a damaged tokenizer.json."""
    parsed = read_json(folder / "tokenizer.json", CURE)
    try:
        control = control_tokens(parsed.get("added_tokens") or [])
        space_rule = take_space(parsed)
        parsed |= {"truncation": None, "padding": None}
        tokenizer = Tokenizer.from_str(json.dumps(parsed))
    except Exception as error:  # tokenizers has no narrower type
        raise ValueError(f"{folder}: damaged tokenizer.json ({error}); {CURE}") from None
    tokenizer.encode_special_tokens = True
    return tokenizer, control, space_rule


def control_tokens(added: list[dict]) -> dict[str, int]:
    """Name -> id of the control tokens; flags those that lack the flag."""
    for token in added:  # some fine-tuned models do not flag what they added
        token["special"] |= bool(re.fullmatch(r"<\|\w+\|>", token["content"]))
    return {token["content"]: token["id"] for token in added if token["special"]}


def take_space(parsed: dict) -> tuple[str, str]:
    """Take the rule that puts a space before text out of a parsed tokenizer.json, and return it.

    SentencePiece's kind of tokenizer reads "hello" as " hello" where a text begins. A reply whose
    header was tokenised apart must not gain a space, so we add it ourselves: always ("every"),
    where no space is yet ("missing"), or that only at the start of a conversation ("first").
    """
    rule = ("", "every")
    for slot, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        outer = parsed.get(slot) or {}
        for part in outer.get(inner, [outer]):
            kind = part.get("type")
            if kind == "Prepend":
                rule = (part["prepend"], "every")
                part["prepend"] = ""
            elif kind == "Metaspace":
                scheme = part.get("prepend_scheme", "always")
                part["prepend_scheme"] = "never"
                if scheme != "never":
                    rule = (part["replacement"], "first" if scheme == "first" else "missing")
            elif kind == "ByteLevel" and part["add_prefix_space"]:
                rule = (" ", "missing")
                part["add_prefix_space"] = False
    return rule


# ------------------------------------------------------------------------------------ config.json


FAMILIES = {  # the models that are read, and what each means by a field that is not there
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 4096},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True, "head_dim": 128},
}


def set_fields(d: dict) -> dict:
    """The fields of a config.json that have a value, those of RoPE among them.

    transformers 4 writes rope_scaling beside rope_theta, 5 both in rope_parameters.
    """
    rope = d.get("rope_parameters") or d.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_scaling = {rope}, an object is needed")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope = rope | {"rope_type": kind}
    family = d.get("architectures") or [f"{d.get('model_type', 'llama')}".title() + "ForCausalLM"]
    unsaid = next((fields for name, fields in FAMILIES.items() if family == [name]), {})
    d = unsaid | d | {"architectures": family}
    if d.get("use_sliding_window") is False:  # Qwen names a window even where it has none
        d["sliding_window"] = None
    fields = d | rope | {"rope_scaling": None if kind == "default" else rope}
    return {name: value for name, value in fields.items() if value is not None}


def one_of(*values):
    return values.__contains__, " or ".join(map(str, values))


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads")  # fmt: skip
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_NEEDS = {"default": (), "linear": ("factor",), "llama3": LLAMA3}
COUNT = (lambda x: isinstance(x, int) and x > 0, "a positive integer")
NUMBER = (lambda x: isinstance(x, int | float) and 0 < x < math.inf, "a positive number")
ALLOWED = {  # field of config.json: a test of its value, and what passes
    "architectures": one_of(*([family] for family in FAMILIES)),
    "hidden_act": one_of("silu"),
    "attention_bias": one_of(False),
    "mlp_bias": one_of(False),
    "sliding_window": one_of(None),
    "quantization_config": one_of(None),
    "rope_type": one_of(*ROPE_NEEDS),
    **dict.fromkeys((*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"), COUNT),
    **dict.fromkeys((*LLAMA3, "rope_theta", "rms_norm_eps"), NUMBER),
}


def check_config(fields: dict) -> None:
    """Raise ValueError for the first field that is needed and not there, or that is not ALLOWED."""
    needed = (*SIZES, *ROPE_NEEDS.get(str(fields["rope_type"]), ()))
    for field, (fits, limit) in ALLOWED.items():
        value = fields.get(field)
        if (field in fields or field in needed) and not fits(value):
            raise ValueError(f"config.json: {field} = {value} is not supported, only {limit}")
    heads = fields["num_attention_heads"]
    kv_heads = fields.get("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"config.json: {kv_heads} key/value heads do not divide {heads} heads")


# ---------------------------------------------------------------------------------------- weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the index names, or the only one; ValueError if one is missing."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    why = "the only kind read"
    if index.is_file():
        file_of = read_json(index, CURE, {"weight_map": dict})["weight_map"]  # by name of tensor
        names = sorted({str(name) for name in file_of.values()})
        why = f"which {index.name} names"
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}, {why}; {CURE}")
    return [folder / name for name in names]


def check_weights(files: list[Path], needed: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError where the files' headers differ from name -> shape; reads no tensor."""
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or cut short ({error}); {CURE}") from None
    if "lm_head.weight" not in needed:  # it is the embedding, which some files hold twice
        found.pop("lm_head.weight", None)
    for name in needed | found:
        here = found.get(name, "not there")
        said = needed.get(name, "no such tensor")
        if here != said and not name.endswith("rotary_emb.inv_freq"):  # which old files bring
            raise ValueError(f"{files[0].parent}: {name} is {here}, config.json says {said}")
