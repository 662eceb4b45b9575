"""One measurement of bench.py, in a process of its own: settings as JSON in, figures as JSON out.

The two sides, ours and the peer's, stand beside each other; then each figure is a function of the
settings, by its name.
"""

import argparse
import contextlib
import json
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import genpi  # noqa: E402
import lora  # noqa: E402
import quant  # noqa: E402
from chat import Chat  # noqa: E402
from files import read_json  # noqa: E402
from loss import padded, pg_sequence, sft_sequence  # noqa: E402
from model import Config, Llama, load_model  # noqa: E402
from prompt import Prompt  # noqa: E402
from runs import read_records  # noqa: E402
from sampler import Sampling, Voice, say  # noqa: E402
from train import Recipe, draw_share, micro_batches, sample_order, train_step  # noqa: E402

SMOL = Config(  # SmolLM2-135M
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
    rms_norm_eps=1e-5, tie_word_embeddings=True, rope_theta=100000.0,
)  # fmt: skip
LLAMA3 = Config(  # Llama-3-8B
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
    rms_norm_eps=1e-5, rope_theta=500000.0,
)  # fmt: skip
LLAMA1B = replace(  # Llama-3.2-1B
    LLAMA3, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
    tie_word_embeddings=True,
)  # fmt: skip
QWEN = replace(  # Qwen2.5-0.5B, but for its bias of q, k and v
    LLAMA1B, vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2,
)  # fmt: skip
TINY = Config.from_dict(read_json(ROOT / "tiny" / "config.json"))
CONFIGS = {"tiny": TINY, "smol": SMOL, "qwen0.5b": QWEN, "llama1b": LLAMA1B, "llama3": LLAMA3}
BF16_PEAK = 990e12  # operations/s of an H200's tensor cores, dense, by its data sheet
RANK, ALPHA, DROPOUT, LAM = 16, 32, 0.05, 0.7
LONG = 1400  # tokens of the paper's prompts, with Llama 3's tokenizer

# ------------------------------------------------------------------------------------ the two sides


def write_checkpoint(config: Config, folder: Path) -> None:
    """A checkpoint of random weights in bfloat16, a file a layer, with tiny/'s tokenizer."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(config).named_parameters()}
    files: dict[str, dict] = {}
    for name in shapes:
        files.setdefault(".".join(name.split(".")[:3]) + ".safetensors", {})[name] = None
    for file, names in files.items():
        for name in names:
            ones = len(shapes[name]) == 1
            weight = torch.ones(shapes[name]) if ones else torch.randn(shapes[name]) * 0.02
            names[name] = weight.bfloat16()
        save_file(names, folder / file, {"format": "pt"})
        names.update(dict.fromkeys(names, file))
    index = {name: file for names in files.values() for name, file in names.items()}
    index = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fields = asdict(config) | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    del fields["rope_scaling"]
    (folder / "config.json").write_text(json.dumps(fields))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny" / name, folder)


def checkpoint_of(settings: dict, scratch: Path) -> Path:
    config = CONFIGS[settings["config"]]
    config = replace(config, vocab_size=settings.get("vocabulary", config.vocab_size))
    folder = scratch / f"{settings['config']}-{config.vocab_size}"
    if not folder.exists():
        folder.mkdir()
        write_checkpoint(config, folder)
    return folder


def load_ours(args, adapter: bool):
    dtype = args.dtype and getattr(torch, args.dtype)
    model, _ = load_model(args.folder, args.device, dtype, args.bits)
    if adapter:
        lora.add_lora(model, RANK, ALPHA, DROPOUT).train()
        model.checkpointing = args.checkpointing
    return model


def load_peer(args, adapter: bool):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    how = {"dtype": getattr(torch, dtype)}
    if args.bits == 4:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    how["device_map"] = {"": args.device}
    model = AutoModelForCausalLM.from_pretrained(args.folder, attn_implementation="sdpa", **how)
    if adapter:
        targets = list(lora.TARGETS)
        sizes = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT}
        if args.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model = get_peft_model(model, LoraConfig(**sizes, target_modules=targets))
        model.train()
    return model


# -------------------------------------------------------------------------------------- the figures


def batch_of(args, records: int, long: int = 0, times: int = 1):
    """SFT and PG sequences of the first records; p is written `times` over, or to `long` tokens."""
    chat = Chat(ROOT / "tiny", 8192)
    text = (ROOT / "os.txt").read_text(encoding="utf-8")
    text = "\n\n".join([text] * (times if not long else -(-long // len(chat.tokens(text)))))
    if long:
        text = chat.decode(chat.tokens(text)[:long])
    rows = read_records(ROOT / "tests" / "fixtures" / "records.jsonl")[:records]
    sft = [sft_sequence(chat, r) for r in rows]
    return sft, [pg_sequence(chat, Prompt(text), r) for r in rows]


def peers_step(model, optimizer, sft, pg, tokens: int, device: str) -> tuple[float, float]:
    """train_step in the peer's terms -> mean sft and pg loss."""
    optimizer.zero_grad(set_to_none=True)
    means, parameters = [0.0, 0.0], [p for p in model.parameters() if p.requires_grad]
    for term, sequences in enumerate((sft, pg)):
        n_tokens = sum(s.n_targets for s in sequences)
        lengths = sorted((len(s.ids) for s in sequences), reverse=True)
        for ids, labels in (padded(rows, device) for rows in micro_batches(sequences, tokens)):
            own = torch.tensor([lengths.pop(0) for _ in ids], device=device)
            mask = (torch.arange(ids.size(1), device=device) < own[:, None]).long()
            batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            mean = model(**batch, num_items_in_batch=n_tokens, use_cache=False).loss
            (mean * (LAM, 1 - LAM)[term]).backward()
            means[term] += mean.item()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return tuple(means)


def step(args) -> dict:
    """The second of two optimiser steps."""
    torch.manual_seed(0)
    model = (load_ours if args.who == "ours" else load_peer)(args, adapter=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def take(sft, pg):
        if args.who == "peer":
            return peers_step(model, optimizer, sft, pg, args.micro_tokens, args.device)
        return train_step(model, optimizer, sft, pg, recipe_of(args))[:2]

    sft, pg = batch_of(args, args.records, LONG if args.device == "cuda" else 0)
    take(sft, pg)  # the second step finds its memory mapped already
    seconds, losses = timed(args.device, lambda: take(sft, pg))
    tokens, rate = sum(len(s.ids) for s in sft + pg), useful_flops(args, sft + pg) / seconds
    found = {"tokens_per_second": tokens / seconds, "peak_bytes": peak(args.device)}
    found |= {"loss": losses, "useful_tflops_per_second": rate / 1e12}
    return found | ({"mfu": rate / BF16_PEAK} if args.device == "cuda" else {})


def recipe_of(args) -> Recipe:
    return Recipe(lam=LAM, clip=1.0, micro_tokens=args.micro_tokens)


def useful_flops(args, sequences) -> float:
    """What a step cannot do without: 2 operations forwards and 2 backwards for every frozen weight,
    of the blocks at each token, of lm_head at each target. Attention and LoRA come on top."""
    c = CONFIGS[args.config]
    attention = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    block = c.hidden_size * (attention + 3 * c.intermediate_size)
    tokens = sum(len(s.ids) for s in sequences)
    targets = sum(s.n_targets for s in sequences)
    return 4 * (tokens * c.num_hidden_layers * block + targets * c.vocab_size * c.hidden_size)


class Ids:
    """A chat whose messages are token ids already and which never stops."""

    stops, context = (), 8192

    def encode(self, ids, reply):
        return ids, None

    def decode(self, ids):
        return " ".join(map(str, ids))


def generation(args) -> dict:
    """rows x new greedy tokens after a prompt of which `shared` tokens are the same in all rows,
    by the time of reading and writing.
    """
    model = (load_peer if args.who == "peer" else load_ours)(args, adapter=args.who == "adapter")
    model.eval()
    if args.who == "packed":
        model.to(model.lm_head.weight.dtype)  # a move, after which the codes alone are left
    how = {"temperature": 1.0, "top_p": 0.9} if args.who == "nucleus" else {}
    draw = torch.Generator().manual_seed(1)
    own = torch.randint(3, 1000, (args.rows, 20), generator=draw)
    shared = torch.randint(3, 1000, (args.shared,), generator=draw).expand(args.rows, -1)
    ids = torch.cat((shared, own), 1)

    def write(new: int):
        if args.who != "peer":
            texts = say(Voice(model, Ids(), args.rows), ids.tolist(), Sampling(new, **how))
            return [text.split() for text in texts]
        batch, fixed = ids.to(args.device), {"min_new_tokens": new, "max_new_tokens": new}
        options = fixed | {"do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            out = model.generate(batch, attention_mask=torch.ones_like(batch), **options)
        return out[:, ids.size(1) :].tolist()

    write(args.new if args.device == "cuda" else 2)  # compiles, captures, picks algorithms
    seconds, rows = timed(args.device, lambda: write(args.new))
    assert [len(row) for row in rows] == [args.new] * args.rows
    rate = args.rows * args.new / seconds
    return {"tokens_per_second": rate, "peak_bytes": peak(args.device)}


def nf4(args) -> dict:
    """Microseconds of one product, its weights cold: copies that exceed the cache take turns.

    With 0 rows, of W (N, K) unpacked in bfloat16.
    """
    n, k, rows = args.matrix
    w = torch.randn(n, k, device=args.device, dtype=torch.bfloat16) * 0.02
    x = torch.randn(rows, k, device=args.device, dtype=torch.bfloat16)
    copies = 1 + 200_000_000 // (n * k // 2)
    if args.who == "ours":
        packed = [(quant.quantize_nf4(w + 0),) for _ in range(copies)]
        unpack, multiply = quant.dequantize_nf4, lambda q: quant.nf4_matmul(x, q)
    else:
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        how = {"quant_type": "nf4", "compress_statistics": True}
        packed = [quantize_4bit(w + 0, **how) for _ in range(copies)]
        unpack, multiply = dequantize_4bit, lambda p, s: matmul_4bit(x, p.t(), quant_state=s)

    def all_of_them():
        last = None
        for codes in packed:
            last = multiply(*codes) if rows else unpack(*codes)
        return last

    exact = x.double() @ w.double().T if rows else w.double()
    error = (all_of_them().double() - exact).norm() / exact.norm()
    seconds = min(timed(args.device, all_of_them)[0] for _ in range(10)) / copies
    moved = n * k * (4.127 / 8 if rows else 2 + 4.127 / 8)
    return {"microseconds": 1e6 * seconds, "bytes_per_second": moved / seconds,
            "relative_error": error.item()}  # fmt: skip


def grows(args) -> dict:
    """Processor seconds of an optimiser step of ours on some records, with p `times` as long, and
    of 32 tokens in each of `rows` rows after p.
    """
    torch.manual_seed(0)
    model = load_ours(args, adapter=True)
    optimizer = torch.optim.AdamW(lora.adapter_parameters(model), lr=1e-4)
    sft, pg = batch_of(args, args.records, times=args.times)
    p = args.times * Chat(ROOT / "tiny", 8192).tokens((ROOT / "os.txt").read_text("utf-8"))
    recipe = recipe_of(args)

    def step():
        train_step(model, optimizer, sft, pg, recipe)

    def write():
        say(Voice(model, Ids(), args.rows), [p + [n + 9] for n in range(args.rows)], Sampling(32))

    work = {"step": step, "write": write}[args.part]
    work()  # the second time finds its memory mapped already
    start = time.process_time()
    work()
    return {"processor_seconds": time.process_time() - start, "peak_bytes": peak(args.device)}


def first(args) -> dict:
    """The first command in a folder of its own: seconds of its stages, and what came out."""
    flags = ["--prompt", str(ROOT / "os.txt"), "--dtype", args.dtype or "auto"]
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        out = Path(scratch) / "os"
        seconds, code = timed("cpu", lambda: genpi.main([*flags, "--out", str(out)]))
        assert code == 0
        told = read_json(out / "report.json")
    loop = told["closed_loop"]["conversations"]
    kept = {"seconds": told["seconds"], "nll": told["nll"], "recall": told["recall"]["ratio"]}
    agreed = {"first": told["agreement"]["adapter"]["k"], "closed_loop": loop["k"], "of": loop["n"]}
    return {"whole_seconds": seconds, "peak_bytes": peak("cpu"), "agreement": agreed} | kept


def packing(args) -> dict:
    """Tokens that a training computes for each real one; rows without padding would compute one.

    So it bounds what packed rows could win where time is linear in the tokens; their attention, to
    which a mask of blocks is new work, comes on top. Of the first command's settings and the
    paper's.
    """
    chat = Chat(ROOT / "tiny", 8192)
    run = Path(args.run) if args.run else ROOT / "tests" / "fixtures"
    rows = read_records(run / ("data.jsonl" if args.run else "records.jsonl"), mend=False)
    rows = [r for r in rows if not (r.overlong or r.no_reason)]
    prompt = Prompt((ROOT / "os.txt").read_text(encoding="utf-8"))
    both = [sft_sequence(chat, r) for r in rows], [pg_sequence(chat, prompt, r) for r in rows]
    found = {}
    for name, batch, share in (("first_command", 8, 1 / 8), ("paper", 32, 1.0)):
        recipe = Recipe(batch=batch, pg_share=share, epochs=4)
        order = sample_order(len(rows), recipe.epochs, 0)
        real, computed = 0, 0
        for step in range(len(order) // batch):
            taken = order[step * batch : (step + 1) * batch]
            sft, pg = ([each[i] for i in taken] for each in both)
            for some in (sft, draw_share(pg, recipe, step)):
                for micro in micro_batches(some, recipe.micro_tokens):
                    real += sum(map(len, micro))
                    computed += len(micro) * len(micro[0])
        found[f"{name}_computed_for_a_real_token"] = computed / real
    return found | {"records": len(rows)}


def timed(device: str, work):
    """(seconds, result), and from here on a fresh peak of GPU memory."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - clock, result


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(settings: str) -> None:
    args = argparse.Namespace(**{"checkpointing": False} | json.loads(settings))
    torch.set_num_threads(args.threads)
    works = (step, generation, nf4, first, packing, grows)
    work = {work.__name__: work for work in works}[args.work]
    print(json.dumps(work(args)))


if __name__ == "__main__":
    main(sys.argv[1])
