"""What a run will take on this machine: records, tokens, steps, hours and memory; --dry-run.

    texts    two records are made for real: so long are the turns, the reasons, the sequences
    rates    tokens/s of sampling with all slots in flight, and of training on full micro-batches
    hours    the tokens of all records at these rates

Left out: what a server needs for its part, what --cover adds and --from keeps, what the report
takes, and that the last conversations of a wave run alone, so that synthesis takes longer than at
full rate.
"""

import math
import resource
import statistics
import time
from itertools import cycle, islice

import torch

import lora
from chat import Chat
from loss import Sequence
from model import Llama
from objectives import prepend
from prompt import Prompt
from runs import Record
from sampler import Sampling, Voice
from server import Server
from train import Recipe, train_step

TIMED = 32  # tokens of each conversation whose sampling is timed


def dry_run(
    voice: Voice,
    generator: Voice | Server,
    prompt: Prompt,
    records: list[Record],
    pairs: tuple[list[Sequence], list[Sequence]],
    recipe: Recipe,
    counts: tuple[int, int],
) -> str:
    """Measure and tell what a run takes. voice: its model has the adapter. records: made for this.

    pairs: their SFT and PG sequences; counts: the samples and the held-out ones.
    """
    with lora.adapter_off(voice.model):
        rates = {"model": sampling_rate(voice, prompt, records)}
    rates["generator"] = rates["model"]
    if isinstance(generator, Server):
        rates["generator"] = None
    elif generator is not voice:
        rates["generator"] = sampling_rate(generator, prompt, records)
    rates["training"] = training_rate(voice.model, *pairs, recipe)
    lengths = text_lengths(voice.chat, records) | sequence_lengths(*pairs, recipe)
    found = forecast(lengths, rates, counts, recipe)
    return page(found, lengths, recipe, peak_bytes(voice.model.lm_head.weight.device))


def text_lengths(chat: Chat, records: list[Record]) -> dict[str, float]:
    """Mean tokens of a record: what the model writes, what the generator writes."""

    def written(texts: list[str]) -> int:
        return sum(len(chat.tokens(text)) + 1 for text in texts)  # and the end of the turn

    rows = [
        {
            "model": written([*record.turns, record.student]),
            "generator": written([record.pseudo_input, record.reason]),
        }
        for record in records
    ]
    return {key: statistics.mean(row[key] for row in rows) for key in rows[0]}


def sequence_lengths(sft: list[Sequence], pg: list[Sequence], recipe: Recipe) -> dict[str, float]:
    """Mean tokens of the sequences that a step reads, without the teacher's."""
    if recipe.objective == "prepend":
        sft = sum((prepend(sft, recipe.prepend_prob, recipe.seed, step) for step in range(99)), [])
    means = [statistics.mean(len(sequence.ids) for sequence in each) for each in (sft, pg)]
    return dict(zip(("sft", "pg"), means, strict=True))


def sampling_rate(voice: Voice, prompt: Prompt, records: list[Record]) -> float:
    """tokens/s of the first tokens of the teacher, with all slots in flight."""
    inputs = islice(cycle(record.pseudo_input for record in records), voice.slots)
    asked = [prompt.teacher(x) for x in inputs]
    start = time.perf_counter()
    texts = [text for _, text, _ in voice.speak(asked, Sampling(TIMED, temperature=1.0))]
    seconds = time.perf_counter() - start
    return sum(len(voice.chat.tokens(text)) + 1 for text in texts) / seconds


def training_rate(model: Llama, sft: list[Sequence], pg: list[Sequence], recipe: Recipe) -> float:
    """tokens/s of a step on a full micro-batch of each kind. The model has an adapter; it stays."""
    sft = sft if recipe.lam > 0 else []
    pg = pg if recipe.lam < 1 else []
    rows = max(1, recipe.micro_tokens // max(map(len, sft + pg)))
    sft, pg = (list(islice(cycle(each), rows)) for each in (sft, pg))
    if recipe.objective == "prepend":
        sft = prepend(sft, recipe.prepend_prob, recipe.seed, 0)
    still = torch.optim.AdamW(lora.trainable(model), lr=0.0)
    model.train()
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        train_step(model, still, sft, pg, recipe)  # ends with a look at the norm, so it is done
        seconds = time.perf_counter() - start
    return sum(len(sequence.ids) for sequence in sft + pg) / seconds


def forecast(lengths: dict, rates: dict, counts: tuple[int, int], recipe: Recipe) -> dict:
    """Tokens, steps and seconds of a run. rates: tokens/s of model, generator (None: a server's)
    and training.
    """
    samples = counts[0]
    records = sum(counts)
    sft = lengths["sft"] * (recipe.lam > 0)
    pg = lengths["pg"] * (recipe.lam < 1) * recipe.pg_share
    tokens = {key: records * lengths[key] for key in ("model", "generator")}
    tokens["training"] = samples * recipe.epochs * (sft + pg)
    seconds = {key: n / rates[key] for key, n in tokens.items() if rates[key]}
    steps = math.ceil(samples * recipe.epochs / recipe.batch)
    return {
        "tokens": tokens,
        "rates": rates,
        "seconds": seconds,
        "steps": steps,
        "records": records,
    }


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def page(found: dict, lengths: dict, recipe: Recipe, memory: int) -> str:
    """The forecast as a table."""
    names = {
        "model": "turns and student outputs",
        "generator": "inputs and reasons",
        "training": "training",
    }
    rows = []
    for key, name in names.items():
        rate = f"{found['rates'][key]:,.0f}" if found["rates"][key] else "the server's"
        took = duration(found["seconds"][key]) if key in found["seconds"] else "not timed"
        rows.append(f"| {name} | {found['tokens'][key]:,.0f} | {rate} | {took} |")
    return f"""nothing is written; {found["records"]:,} records, {found["steps"]:,} steps of \
{recipe.batch} samples, sequences of {lengths["sft"]:.0f} (SFT) and {lengths["pg"]:.0f} (PG) tokens

| | tokens | tokens/s | time |
|---|---|---|---|
{chr(10).join(rows)}

{duration(sum(found["seconds"].values()))} in all, without the report; {memory / 2**30:.1f} GiB in \
use at most so far"""


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"
