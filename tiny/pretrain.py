"""Make the embedded model from nothing: corpus, tokenizer, training.

    python tiny/pretrain.py                          one process (a GPU if there is one)
    torchrun --nproc_per_node=2 tiny/pretrain.py     two one-thread processes: the fastest on two CPU cores

A LLaMA of 2.1M parameters is trained on chats that `corpus.py` draws without end. The block
matrices are updated by Muon: the momentum G of a matrix is replaced by the nearest semi-orthogonal
matrix U V^T (G = U S V^T), found by Newton-Schulz steps, so that every direction learns at the same
rate. All other parameters take AdamW. The rate is flat, then falls linearly to 0. In the last part
every other step sees its block matrices rounded to NF4, so that the model is good both quantised
and not.

Source: Muon, Keller Jordan 2024; NF4, QLoRA (arXiv 2305.14314) section 3.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the modules of the project; no package is installed

from corpus import random_chat, short_chat  # noqa: E402
from world import USERS, WORDS  # noqa: E402

from chat import Chat  # noqa: E402
from model import Config, Llama  # noqa: E402
from quant import dequantize_nf4, quantize_nf4  # noqa: E402

SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
VOCABULARY = 1792
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 192,
    "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 4,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def train_tokenizer(chats=4000):
    """A byte-level BPE with single digits, learnt from the corpus, with Llama-3's control tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random("tokenizer")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = [m["content"] for _ in range(chats) for m in random_chat(rng)[0]]
    names = " ".join(
        ["", *WORDS, *USERS]
    )  # each name one token, after a space too: half of copying is done
    tokenizer.train_from_iterator([*texts, *[names] * 500], trainer)
    return tokenizer


def write_folder(folder):
    """Everything of a checkpoint folder but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    files = {
        "config.json": SHAPE,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": [1, 4]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[4],
            "model_max_length": SHAPE["max_position_embeddings"], "chat_template": template,
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def batches(chat, rng, tokens, short_until):
    """Yield (ids, weights) (B, T) without end; chats of like length share a batch of `tokens`.

    short_until: () -> bool, whether only short chats are drawn now.
    """
    while True:
        rows = []
        draw = short_chat if short_until() else random_chat
        for _ in range(64):
            messages, weights = draw(rng)
            ids, owner = chat.encode(messages)
            rows.append((ids, [weights[o] if o >= 0 else 0.0 for o in owner]))
        rows.sort(key=lambda row: len(row[0]))
        groups, group = [], []
        for row in rows:
            if group and len(row[0]) * (len(group) + 1) > tokens:
                groups, group = [*groups, group], []
            group.append(row)
        groups.append(group)
        rng.shuffle(groups)
        for group in groups:
            T = max(len(ids) for ids, _ in group)
            pad = [[*ids, *[0] * (T - len(ids))] for ids, _ in group]
            yield torch.tensor(pad), torch.tensor([[*w, *[0.0] * (T - len(w))] for _, w in group])


def orthogonalise(g, steps=5):
    """g (n, m) -> about U V^T. The quintic pushes every singular value towards 1."""
    x = g / (g.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


class Muon:
    """Momentum SGD whose update is orthogonalised; for matrices only."""

    def __init__(self, params, lr, decay, momentum=0.95):
        self.params, self.lr, self.decay, self.momentum = list(params), lr, decay, momentum
        self.buffers = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, scale):
        for p, m in zip(self.params, self.buffers, strict=True):
            m.lerp_(p.grad, 1 - self.momentum)
            update = orthogonalise(p.grad.lerp(m, self.momentum))  # Nesterov
            p.mul_(1 - self.lr * scale * self.decay)
            p.add_(update, alpha=-self.lr * scale * max(1, p.size(0) / p.size(1)) ** 0.5)


def weighted_nll(model, ids, weights):
    """Sum over the batch of weight * NLL (nats), and the sum of weights."""
    logits = model(ids[:, :-1])
    nll = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    w = weights[:, 1:].flatten()
    return (nll * w).sum(), w.sum()


def average_gradients(params, total):
    """Divide summed gradients by the summed weights of all processes."""
    flat = torch.cat([p.grad.flatten() for p in params] + [total.view(1)])
    if dist.is_initialized():
        dist.all_reduce(flat)
    flat /= flat[-1].clone()
    for p, g in zip(params, flat[:-1].split([p.numel() for p in params]), strict=True):
        p.grad.copy_(g.view_as(p))


def initialise(model):
    """Tokens of unit size in a residual stream to which no block adds anything yet.

    Muon makes the blocks grow fast. A stream that begins with small embeddings is drowned by the first block, and
    then no later layer can tell one name from another, which is what copying needs.
    """
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(p)
        elif p.ndim == 2:
            torch.nn.init.normal_(p, std=1.0 if "embed" in name else p.size(1) ** -0.5)
    torch.nn.init.constant_(model.model.norm.weight, 0.05)  # the head is the embedding: small logits


def train(folder, args):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    chat = Chat(folder, SHAPE["max_position_embeddings"])
    model = Llama(Config.from_dict(SHAPE)).to(device)
    initialise(model)
    params = list(model.parameters())
    blocks = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    rest = [p for p in params if all(p is not b for b in blocks)]
    muon = Muon(blocks, args.muon_lr, args.muon_decay)
    adamw = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    clock, step = time.time(), 0
    data = batches(
        chat,
        random.Random(f"{args.seed}-{rank}"),
        args.tokens,
        lambda: step < args.short * args.steps,
    )
    for step in range(args.steps):
        ids, weights = (t.to(device) for t in next(data))
        scale = min(1.0, (step + 1) / 50, (1 - step / args.steps) / args.decay)
        master = [b.detach().clone() for b in blocks]
        if step > (1 - args.round) * args.steps and step % 2:
            for b in blocks:
                b.data.copy_(dequantize_nf4(quantize_nf4(b.data)))
        nll, total = weighted_nll(model, ids, weights)
        for p in params:
            p.grad = None
        nll.backward()
        for b, w in zip(blocks, master, strict=True):
            b.data.copy_(w)
        average_gradients(params, total)
        muon.step(scale)
        for group in adamw.param_groups:
            group["lr"] = args.lr * scale
        adamw.step()
        if rank == 0 and (step % 20 == 0 or step + 1 == args.steps):
            seconds = time.time() - clock
            print(
                f"step {step} loss {nll.item() / total.item():.4f} scale {scale:.3f} {seconds:.0f} s",
                flush=True,
            )
        if rank == 0 and (step % 100 == 99 or step + 1 == args.steps):
            save(model, folder)


def save(model, folder):
    """Write the weights in bfloat16, beside, then rename."""
    named = model.named_parameters()  # the tied head is listed once, as its embedding
    state = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in named}
    save_file(state, folder / "model.safetensors.new", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.new", folder / "model.safetensors")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE, help="checkpoint folder")
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens of a batch, a process")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW: embeddings and norms")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="Muon: block matrices")
    parser.add_argument("--muon-decay", type=float, default=0.3, help="weight decay of Muon")
    parser.add_argument(
        "--short", type=float, default=0.15, help="share of the steps on short prompts, at the start"
    )
    parser.add_argument(
        "--decay", type=float, default=0.45, help="share of the steps in which the rate falls to 0"
    )
    parser.add_argument(
        "--round", type=float, default=0.3, help="share of the steps with NF4 rounding, at the end"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_folder(args.out)
    if dist.is_initialized():
        dist.barrier()
    train(args.out, args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
