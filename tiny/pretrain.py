"""Make the embedded model from nothing: corpus, tokenizer, training.

    torchrun --nproc_per_node=2 tiny/pretrain.py --out FOLDER    two one-thread processes on two CPU cores
    python tiny/pretrain.py --out FOLDER                         one process (a GPU if there is one)
    ... --grow OTHER                                              from the weights in OTHER, not from nothing

A LLaMA of 3.0M parameters is trained on chats that `corpus.py` draws without end, from plain
protocols to seven house rules. With --grow it starts from another such model; one of four layers gets two
between them that add nothing yet. The block matrices are updated by Muon: the momentum G of a
matrix is replaced by the nearest semi-orthogonal matrix U V^T (G = U S V^T), found by Newton-Schulz steps, so that every direction learns at the same rate. All other parameters
take AdamW. The rate is flat, then falls linearly to 0. In the last part every other step sees its
block matrices rounded to NF4, so that the model is good both quantised and not. Matrix products are
in bfloat16 where the processor multiplies it fast, weights and their updates in float32. What is
measured and kept is a running mean of the weights, which is about what a lower rate would come to.

Lengths vary from step to step, and what the libraries keep for each adds up. On a CPU set
ONEDNN_PRIMITIVE_CACHE_CAPACITY=128 and MALLOC_MMAP_THRESHOLD_=2000000: with both a process held
2 GB after 600 steps, without them 6 GB after 500.

The batch of a step follows from seed, process and step, and all else that a run needs to go on is
in FOLDER/state.pt, so the same command goes on where it stopped.

Source: Muon, Keller Jordan 2024; NF4, QLoRA (arXiv 2305.14314) section 3.
"""

import argparse
import copy
import json
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the modules of the project; no package is installed

from corpus import AGENT, OS, agent_chat, agent_chats, draw, one_problem, os_prompt  # noqa: E402
from rules import FAMILIES, OS_RULES, problem_for, random_rules  # noqa: E402
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
    "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 4,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def train_tokenizer(draws=4000):
    """A byte-level BPE with single digits, learnt from the corpus, with Llama-3's control tokens.

    The prompts of the project are read too, a few times, so that their words are whole; the model
    itself never sees them.
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
    texts = [m["content"] for _ in range(draws) for chat, _ in draw(rng, 0.7) for m in chat]
    prompts = [path.read_text(encoding="utf-8") for path in sorted(HERE.parent.glob("*.txt"))]
    texts += [text for text in prompts if "<USER>:" in text] * 60
    names = " ".join(
        ["", *WORDS, *USERS]
    )  # each name one token, after a space too: half of copying is done
    tokenizer.train_from_iterator([*texts, *[names] * 500], trainer)
    return tokenizer


def write_folder(folder, start=None):
    """Everything of a checkpoint folder but the weights. start: the folder whose tokenizer is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(start / "tokenizer.json")) if start else train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
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


MEAN = 50  # steps over which the weights are averaged, about
BLOCK = 16  # steps whose chats are drawn together, so that chats of like length can share a batch


def block_of_batches(chat, seed, tokens, share):
    """The batches of one process for BLOCK steps: [(ids, weights), ...], each (B, T), B T <= tokens
    where a single chat is no longer than that.
    """
    rng, rows, size = random.Random(seed), [], 0
    while True:
        while size < tokens * BLOCK:
            for messages, weights in draw(rng, share):
                ids, owner = chat.encode(messages)
                weights = [*weights, 0.0]  # a header is nobody's: owner -1
                rows.append((ids, [weights[o] for o in owner]))
                size += len(ids)
        groups, group = [], []
        for row in sorted(rows, key=lambda row: len(row[0])):
            if group and len(row[0]) * (len(group) + 1) > tokens:
                groups, group = [*groups, group], []
            group.append(row)
        if len(groups) >= BLOCK:  # the last group may be half full, and is left out
            return [pad(group) for group in rng.sample(groups, BLOCK)]
        size -= tokens


def pad(group):
    """Rows [(ids, weights), ...] as two tensors (B, T)."""
    T = max(len(ids) for ids, _ in group)
    ids = torch.tensor([[*ids, *[0] * (T - len(ids))] for ids, _ in group])
    return ids, torch.tensor([[*w, *[0.0] * (T - len(w))] for _, w in group])


def orthogonalise(g, steps=5):
    """g (n, m) -> about U V^T. The quintic pushes every singular value towards 1; what bfloat16
    rounds away is small beside what five steps leave.
    """
    x = (g / (g.norm() + 1e-7)).to(torch.bfloat16 if FAST else g.dtype)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if tall else x).to(g.dtype)


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


def fast_bfloat16():
    """Does the processor multiply bfloat16 faster than float32?"""
    return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def autocast():
    """Matrix products in bfloat16, if that is FAST."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=FAST)


FAST = fast_bfloat16()


def weighted_nll(model, ids, weights):
    """Sum over the batch of weight * NLL (nats), and the sum of weights."""
    targets, w = ids[:, 1:], weights[:, 1:]
    counted = w > 0  # the head reads no place without a loss
    with autocast():
        logits = model(ids[:, :-1], at=counted)
    nll = F.cross_entropy(logits.float(), targets[counted], reduction="none")
    return (nll * w[counted]).sum(), w.sum()


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
    torch.nn.init.constant_(model.model.norm.weight, 0.03)  # the head is the embedding: small logits


GROWN = {4: [0, 1, None, 2, None, 3], 6: [0, 1, 2, 3, 4, 5]}  # layers before -> which of them each is; None: a new one


def grow(model, weights):
    """Start from the weights of a model of four or six layers (its state_dict).

    The output matrices of a new layer are zero, so the grown model computes what the smaller one did.
    """
    before = GROWN[1 + max(int(name.split(".")[2]) for name in weights if ".layers." in name)]
    for name, p in model.named_parameters():
        old = name
        if ".layers." in name:
            head, index, tail = re.split(r"(?<=layers\.)(\d+)", name)
            if before[int(index)] is None:
                continue
            old = f"{head}{before[int(index)]}{tail}"
        p.data.copy_(weights[old])


# ------------------------------------------------------------------------------------------- gate


def gate_cases(n, seed="gate"):
    """name of a rate -> n chats (messages, weights) of one problem behind a prompt; what the agent
    writes there has the weight AGENT.

    "obeys": one house rule among three, and it applies; "lacks": the same without its line;
    "spares": it does not apply. "os": under os.txt, half of them problems for its rules.
    """
    rng = random.Random(seed)
    os_txt = os_prompt()
    asked = [problem_for(rng, OS_RULES, share=0.5) for _ in range(4 * n)]
    cases = {"os": [agent_chat(OS, os_txt, [x], OS_RULES) for x in asked], "plain": []}
    while len(cases["plain"]) < n:
        cases["plain"] += agent_chats(rng, 0, problems=1)
    for family in FAMILIES:
        for name in ("obeys", "lacks", "spares"):
            cases[f"{family} {name}"] = []
        while len(cases[f"{family} obeys"]) < n:
            rules = random_rules(rng, 3)
            due = [rule for rule in rules if rule.family == family]
            if not due:
                continue
            problem, other = problem_for(rng, due, share=1), problem_for(rng, rules, share=0)
            if due[0].applies(problem) and not due[0].applies(other):
                seed = rng.getrandbits(32)
                rest = [rule for rule in rules if rule is not due[0]]
                for name, some, asked in (("obeys", rules, problem), ("lacks", rest, problem), ("spares", rules, other)):
                    cases[f"{family} {name}"].append(one_problem(seed, some, asked))
    return cases


@torch.no_grad()
def gate(model, chat, cases, tokens=16000):
    """name of a rate -> share of the chats whose last problem the model solves greedily.

    A greedy agent writes what the chat has if and only if each of its tokens is the likeliest after
    the ones before, so one pass over the chat is enough.
    """
    rows = []
    for name, chats in cases.items():
        for messages, weights in chats:
            ids, owner = chat.encode(messages)
            rows.append((ids, [float(o >= 0 and weights[o] == AGENT) for o in owner], name))
    rows.sort(key=lambda row: len(row[0]))
    solved = {name: [] for name in cases}
    while rows:
        B = max(1, min(len(rows), tokens // len(rows[-1][0])))
        part, rows = rows[-B:], rows[:-B]
        ids, mine = pad([row[:2] for row in part])
        device = model.lm_head.weight.device
        ids, mine = ids.to(device), mine.to(device)[:, 1:] > 0
        with autocast():
            best = model(ids[:, :-1], at=mine).argmax(-1)
        right = torch.ones_like(mine).masked_scatter(mine, best == ids[:, 1:][mine]).all(-1)
        for row, ok in zip(part, right.tolist(), strict=True):
            solved[row[2]].append(ok)
    return {name: sum(oks) / len(oks) for name, oks in solved.items()}


def print_gate(step, rates):
    """One line: plain work, then obeys / lacks / spares of every family, in per cent."""
    rows = [f"{name} {100 * rates[name]:.0f}" for name in ("os", "plain")]
    for family in FAMILIES:
        parts = [f"{100 * rates[f'{family} {name}']:.0f}" for name in ("obeys", "lacks", "spares")]
        rows.append(f"{family} {'/'.join(parts)}")
    print(f"gate {step}: " + "  ".join(rows), flush=True)


# ------------------------------------------------------------------------------------------ train


def train(folder, args):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    chat = Chat(folder, SHAPE["max_position_embeddings"])
    model = Llama(Config.from_dict(SHAPE)).to(device)
    initialise(model)
    if args.grow:
        grow(model, load_file(args.grow / "model.safetensors"))
    params = list(model.parameters())
    blocks = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    rest = [p for p in params if all(p is not b for b in blocks)]
    muon = Muon(blocks, args.muon_lr, args.muon_decay)
    adamw = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    mean = copy.deepcopy(model)  # of the weights of the last steps
    first = resume(folder, model, mean, muon, adamw, args.steps)
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    cases = gate_cases(args.gate_cases) if rank == 0 else None
    clock = told = saved = time.time()
    drawing = 0.0
    batches = None
    for step in range(first, args.steps):
        if batches is None or step % BLOCK == 0:
            t = time.time()
            share = ((step - step % BLOCK) / args.steps - args.plain) / (1 - args.plain)
            batches = block_of_batches(chat, f"{args.seed}-{rank}-{step // BLOCK}", args.tokens, share)
            drawing += time.time() - t
        ids, weights = (t.to(device) for t in batches[step % BLOCK])
        scale = min(1.0, (step + 1) / 100, (1 - step / args.steps) / args.decay)
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
        if rank > 0:
            continue
        torch._foreach_lerp_([p.data for p in mean.parameters()], [p.data for p in params], 1 / MEAN)
        now, last = time.time(), step + 1 == args.steps
        if step % 20 == 0 or last:
            speed = (step + 1 - first) * args.tokens * world / (now - clock)
            print(f"step {step} loss {nll.item() / total.item():.4f} scale {scale:.3f} {now - clock:.0f} s "
                  f"{speed:.0f} tokens/s, drawing {100 * drawing / (now - clock):.0f} %", flush=True)  # fmt: skip
        if now - told > 60 * args.gate or last:
            print_gate(step, gate(mean, chat, cases))
            told = time.time()
        if now - saved > 60 * args.save or last:
            save(mean, folder)
            save_state(folder, model, mean, muon, adamw, step + 1, args.steps)
            saved = time.time()


def save(model, folder):
    """Write the weights in bfloat16, beside, then rename."""
    named = model.named_parameters()  # the tied head is listed once, as its embedding
    state = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in named}
    save_file(state, folder / "model.safetensors.new", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.new", folder / "model.safetensors")


def save_state(folder, model, mean, muon, adamw, step, steps):
    """Write all that a run needs to go on, beside, then rename."""
    state = {"model": model.state_dict(), "mean": mean.state_dict(), "muon": muon.buffers, "adamw": adamw.state_dict(),
             "step": step, "steps": steps}  # fmt: skip
    torch.save(state, folder / "state.pt.new")
    os.replace(folder / "state.pt.new", folder / "state.pt")


def resume(folder, model, mean, muon, adamw, steps):
    """Take up the state of the folder, if there is one -> the next step."""
    if not (folder / "state.pt").exists():
        return 0
    state = torch.load(folder / "state.pt", map_location=model.lm_head.weight.device)
    if state["steps"] != steps:
        sys.exit(f"{folder} holds a run of {state['steps']} steps, not {steps}; give --steps {state['steps']} or another --out")
    model.load_state_dict(state["model"])
    mean.load_state_dict(state["mean"])
    for mine, kept in zip(muon.buffers, state["muon"], strict=True):
        mine.copy_(kept)
    adamw.load_state_dict(state["adamw"])
    print(f"going on at step {state['step']}", flush=True)
    return state["step"]


def main():
    global FAST
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--grow", type=Path, help="folder of a model of four or six layers to start from")
    parser.add_argument("--plain", type=float, help="share of the steps before the house rules, default: 0 with --grow, else 0.4; below 0: these have begun before")
    parser.add_argument("--steps", type=int, default=3600, help="optimiser steps")
    parser.add_argument("--tokens", type=int, default=3000, help="tokens of a batch, a process")
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW: embeddings and norms")
    parser.add_argument("--muon-lr", type=float, default=0.01, help="Muon: block matrices")
    parser.add_argument("--muon-decay", type=float, default=0.3, help="weight decay of Muon")
    parser.add_argument(
        "--decay", type=float, default=0.8, help="share of the steps in which the rate falls to 0"
    )
    parser.add_argument(
        "--round", type=float, default=0.25, help="share of the steps with NF4 rounding, at the end"
    )
    parser.add_argument("--gate", type=float, default=8, help="minutes between two measurements")
    parser.add_argument("--gate-cases", type=int, default=10, help="problems of a rate in them")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=bool(shutil.which("g++")),
        help="compile the blocks; default: where there is a C++ compiler",
    )  # fmt: skip
    parser.add_argument(
        "--bfloat16", action=argparse.BooleanOptionalAction, default=FAST,
        help="matrix products in bfloat16; default: where the processor is made for it",
    )  # fmt: skip
    parser.add_argument("--save", type=float, default=3, help="minutes between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    FAST = args.bfloat16
    if args.plain is None:
        args.plain = 0.0 if args.grow else 0.4
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    if not dist.is_initialized() or dist.get_rank() == 0:
        if not (args.out / "state.pt").exists():
            write_folder(args.out, args.grow)
    if dist.is_initialized():
        dist.barrier()
    train(args.out, args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
