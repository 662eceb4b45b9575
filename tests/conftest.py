"""Shared by the tests: a random checkpoint so small that a whole run of genpi.py takes a second.

It says nonsense, so a test that needs pseudo inputs writes inputs.json itself.
"""

import json
import os
import signal
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before quant makes its kernels: they run on the CPU here

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model import Config, Llama

# a shell that runs the tests in the background has them ignore Ctrl-C, which some tests press
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # matrices this small are slower on two

CONTROL = "<|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|>".split()
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256 + len(CONTROL),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def hook(monkeypatch):
    """An interrupt changes what Python does with an error as it ends; each test has its own."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a LLaMA of 25,952 random weights that reads bytes, in Llama 3's chat format."""
    folder = tmp_path_factory.mktemp("models") / "random"
    folder.mkdir()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=CONTROL,
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(SHAPE))
    torch.manual_seed(0)
    weights = dict(Llama(Config.from_dict(SHAPE)).named_parameters())  # a tied lm_head comes once
    save_file({name: w.detach() for name, w in weights.items()}, folder / "model.safetensors")
    return folder
