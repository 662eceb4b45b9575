"""Plays a benchmark of the paper: many episodes together, in three ways, and tells the scores.

    python evaluate.py os|web_browsing|web_shopping --run runs/NAME [--data PATH]

    teacher    the base model with the prompt
    base       the base model without it
    adapter    the same with the adapter

An episode is a generator for one sample. It yields the texts of the conversation so far, [x, agent,
environment, agent, ...], where x is the first user message as it arrives when the prompt is gone;
it is sent what the agent says next; in the end it returns {"score": float, ...}. The replies of all
episodes in play are sampled together, greedily. An episode that is over is a line of
RUN/BENCHMARK.jsonl, at once. A line counts for what it was made of, told by a hash: what is there
is not played again, and what was made of other data, another prompt, model or adapter is not read.

The module of a benchmark has REPLY_TOKENS, the limit of a reply; MEASURES, names of what its
results hold beside the score and is averaged; add_flags(add); and samples(args) -> [Sample].

Left out: sampling at a temperature, several tries at a sample. Sources: GenPI (arXiv 2411.15927),
AgentBench (arXiv 2308.03688).
"""

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from checkpoint import hash_file, weight_files
from files import append_row, check_kinds, markdown_table, read_rows, write_rows
from flags import WHOLE, Flags, device_flag
from prompt import conversation, student_messages
from runs import Run, load_run, locked, text_hash
from sampler import Sampling, Voice, say
from stats import wilson
from train import open_model

BENCHMARKS = {  # name, which is that of the prompt's task too: module
    "os": "os_interaction", "web_browsing": "web_browsing", "web_shopping": "web_shopping",
}  # fmt: skip
NO_ROOM = {"score": 0.0, "ended": "no room in the context"}
RESAMPLES = 10_000

Episode = Generator[list[str], str, dict]


@dataclass(frozen=True)
class Sample:
    """One sample of a benchmark."""

    id: str
    made_of: str  # a hash of all that decides its score but the agent
    episode: Callable[[], Episode]
    oracle: Callable[[list[str]], str] | None = None  # texts so far -> what one says that knows


# ----------------------------------------------------------------------------------------- play


@dataclass
class Game:
    """An episode in play."""

    sample: Sample
    episode: Episode
    texts: list[str] = field(default_factory=list)
    result: dict | None = None  # it is over

    def go_on(self, reply: str | None) -> None:
        """Give the episode the agent's reply; None begins it, and later means no room for one."""
        if reply is None and self.texts:
            self.episode.close()
            self.result = NO_ROOM
            return
        try:
            self.texts = self.episode.send(reply)
        except StopIteration as end:
            self.result = end.value
            self.texts = self.texts if reply is None else [*self.texts, reply]


Agent = Callable[[list[Game]], list[str | None]]


def play(samples: Iterable[Sample], agent: Agent, at_once: int) -> Iterator[Game]:
    """Yield games as they are over; so many are in play at a time.

    agent: what is said next in each game. Environments work beside each other, in threads.
    """
    waiting = deque(samples)
    games: list[Game] = []
    threads = min(at_once, 2 * (os.cpu_count() or 1))  # more would only keep each other waiting
    try:
        with ThreadPoolExecutor(threads) as pool:
            while waiting or games:
                fresh = [waiting.popleft() for _ in range(min(len(waiting), at_once - len(games)))]
                fresh = [Game(sample, sample.episode()) for sample in fresh]
                games += fresh
                list(pool.map(Game.go_on, fresh, [None] * len(fresh)))
                asked = [game for game in games if not game.result]
                list(pool.map(Game.go_on, asked, agent(asked) if asked else []))
                yield from (game for game in games if game.result)
                games = [game for game in games if not game.result]
    finally:  # the threads have come to their end
        for game in games:
            game.episode.close()  # and so what it holds open


# ----------------------------------------------------------------------------------------- ways


@dataclass(frozen=True)
class Way:
    """One of the ways to play, and all that tells it from others."""

    name: str
    title: str
    made_of: str
    agent: Agent


def speak(
    voice: Voice, opening: Callable[[str], list[dict]], adapter: bool, limit: int, games: list[Game]
) -> list[str | None]:
    """What the model says next in each game, at most so many tokens; None where there is no room.

    opening: x -> the messages that end with it.
    """
    asked = [conversation(opening(game.texts[0]), game.texts[1:]) for game in games]
    room = [voice.fits(messages, 1) for messages in asked]
    fitting = [messages for messages, fits in zip(asked, room, strict=True) if fits]
    with nullcontext() if adapter else lora.adapter_off(voice.model):
        said = iter(say(voice, fitting, Sampling(limit)))
    return [next(said) if fits else None for fits in room]


def three_ways(run: Run, voice: Voice, limit: int) -> list[Way]:
    trained = weight_files(run.folder)[0] if run.full else run.folder / lora.WEIGHTS
    weights = hash_file(trained).hex()
    base = [run.model_sha256, run.bits, voice.chat.format, limit]
    ways = [
        ("teacher", "teacher, prompt", run.prompt.text, run.prompt.teacher, False),
        ("base", "base, no prompt", None, student_messages, False),
        ("adapter", "adapter, no prompt", weights, student_messages, True),
    ]
    return [
        Way(
            name,
            title,
            json.dumps([*base, made_of]),
            partial(speak, voice, opening, adapter, limit),
        )
        for name, title, made_of, opening, adapter in ways
    ]


# -------------------------------------------------------------------------------------- results


def read_results(path: Path) -> dict[tuple, dict]:
    """The lines of a results file by (way, id, of); of several the first counts.

    Raises: ValueError naming a line that is corrupt.
    """

    def parse(row: dict) -> dict:
        check_kinds(row, {"way": str, "id": str, "of": str, "score": float, "ended": str})
        return row

    if not path.exists():
        return {}
    rows, whole = read_rows(path, parse)
    if not whole:
        write_rows(path, rows)
    found: dict[tuple, dict] = {}
    for row in rows:
        found.setdefault((row["way"], row["id"], row["of"]), row)
    return found


def results(path: Path, samples: list[Sample], ways: list[Way], at_once: int) -> dict:
    """{title of a way: a row a sample}; what the file lacks is played and added to it."""
    known = read_results(path)
    found = {}
    for way in ways:
        keys = {s.id: (way.name, s.id, text_hash(way.made_of + s.made_of)) for s in samples}
        missing = [sample for sample in samples if keys[sample.id] not in known]
        with tqdm(total=len(samples), desc=way.name, unit="sample") as bar:
            bar.update(len(samples) - len(missing))
            for game in play(missing, way.agent, at_once):
                name, which, of = keys[game.sample.id]
                row = {"way": name, "id": which, "of": of, **game.result, "texts": game.texts}
                append_row(path, row)
                known[keys[which]] = row
                bar.update()
        found[way.title] = [known[keys[sample.id]] for sample in samples]
    return found


def mean_interval(scores: list[float]) -> tuple[float, float]:
    """The 95 % interval of a mean: bootstrap over the samples, always with the same draws."""
    draw = torch.Generator().manual_seed(0)
    values = torch.tensor(scores, dtype=torch.float64)
    resamples = torch.randint(len(values), (RESAMPLES, len(values)), generator=draw)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = values[resamples].mean(1).quantile(ends).tolist()
    return low, high


def table(found: dict[str, list[dict]], measures: Sequence[str] = ()) -> str:
    """A row a way: score with its 95 % interval, share of the first way's, how episodes ended.

    measures: of the rows, whose means are columns too; a row that has it not counts 0.
    """
    lines = []
    scores = {title: [row["score"] for row in rows] for title, rows in found.items()}
    whole = all(score in (0, 1) for each in scores.values() for score in each)
    means = [sum(each) / len(each) for each in scores.values()]
    for (title, rows), mean in zip(found.items(), means, strict=True):
        told = successes(scores[title]) if whole else average(scores[title])
        share = f"{mean / means[0]:.2f}" if means[0] else "none to compare with"
        ends = Counter(row["ended"] for row in rows).most_common()
        ended = ", ".join(f"{how} {count}" for how, count in ends)
        also = [f"{100 * sum(row.get(m, 0) for row in rows) / len(rows):.1f}" for m in measures]
        lines.append([title, told, share, *also, ended])
    head = ["", "score (95 %)", "of the teacher's", *measures, "episodes ended with"]
    return markdown_table(head, lines)


def successes(scores: list[float]) -> str:
    k = int(sum(scores))
    found = wilson(k, len(scores))
    return f"{k} of {len(scores)} ({100 * found['low']:.0f} to {100 * found['high']:.0f} %)"


def average(scores: list[float]) -> str:
    low, high = (f"{100 * end:.1f}" for end in mean_interval(scores))
    return f"{100 * sum(scores) / len(scores):.1f} ({low} to {high}), n = {len(scores)}"


# -------------------------------------------------------------------------------------- command


def show_oracle(samples: list[Sample], at_once: int) -> None:
    """Play the samples with those who know in the agent's place; tell what fails all the same."""
    known = [sample for sample in samples if sample.oracle]
    if not known:
        raise ValueError("no sample here brings a solution that --oracle could play; give --run")
    solved = 0.0
    with tqdm(total=len(known), desc="oracle", unit="sample") as bar:
        for game in play(known, lambda games: [g.sample.oracle(g.texts) for g in games], at_once):
            score = game.result["score"]
            solved += score
            if score < 1:
                last = f"{game.texts[-1]!r:.200}" if game.texts else ""
                tqdm.write(f"{game.sample.id}: {game.result['ended']} {last}")
            bar.update()
    print(f"the oracle scores {solved:g} of {len(known)}; {len(samples) - len(known)} have none")


def command(argv: list[str]) -> None:
    """Play a benchmark with a run and print its table."""
    name, *flags = argv
    benchmark = import_module(f"benchmarks.{BENCHMARKS[name]}")
    parser = Flags(prog=f"evaluate.py {name}", description=benchmark.__doc__.split("\n")[0])
    add = parser.add_argument
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--run", type=Path, help="run folder of genpi.py")
    who.add_argument("--oracle", action="store_true", help="play known solutions, without a model")
    add("--device", type=device_flag, choices=("cpu", "cuda"), help="by default the run's own")
    add("--model", help="folder or Hub id of the base model, if it is no more where it was")
    add("--at-once", type=WHOLE, default=16, help="episodes in play at a time")
    benchmark.add_flags(add)
    args = parser.parse_args(flags)
    if args.oracle:
        show_oracle(benchmark.samples(args), args.at_once)
        return
    run = load_run(args.run, args.device, args.model)
    if run.task.name != name:
        told = f"{args.run} is of task {run.task.name}; give a run of genpi.py --task {name}"
        raise ValueError(told)
    samples = benchmark.samples(args)
    with locked(run.folder):
        voice = Voice(*open_model(run), run.slots)
        ways = three_ways(run, voice, benchmark.REPLY_TOKENS)
        found = results(run.folder / f"{name}.jsonl", samples, ways, args.at_once)
    print(f"\n# {name}: {args.run}, {len(samples)} samples\n\n{table(found, benchmark.MEASURES)}")
