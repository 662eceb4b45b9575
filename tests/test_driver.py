"""The driver: episodes together, three ways, a line each that is never counted twice, a table."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import genpi
import lora
from benchmarks import driver, web_shopping
from benchmarks.driver import (
    Sample,
    Way,
    command,
    mean_interval,
    play,
    results,
    show_oracle,
    speak,
    table,
    three_ways,
)
from prompt import parse_prompt
from runs import text_hash

TINY = Path(__file__).parent.parent / "tiny"
PROMPT = parse_prompt("<USER>:\nSay Act: first. My problem: {user_input}")


def counting(goal: int, log: list | None = None):
    """An episode that ends when the agent has said so many words; its score is their share of x."""
    texts = ["x"]
    words = []
    try:
        while len(words) < goal:
            reply = yield list(texts)
            words.append(reply)
            texts += [reply, f"heard {reply}"]
    finally:
        if log is not None:
            log.append(len(words))
    return {"score": words.count("x") / goal, "ended": "enough"}


def sample(name: str, goal: int = 1, **more) -> Sample:
    return Sample(name, f"{name}{goal}", lambda: counting(goal), **more)


# ------------------------------------------------------------------------------------------- play


def test_episodes_are_stepped_together():
    """Three in play at a time, asked in one batch; a place that is free is taken at once."""
    batches = []

    def agent(games):
        batches.append([game.sample.id for game in games])
        return ["x"] * len(games)

    samples = [sample("a"), sample("b", 2), sample("c"), sample("d")]
    games = list(play(samples, agent, 3))
    assert batches == [["a", "b", "c"], ["b", "d"]]
    assert [game.sample.id for game in games] == ["a", "c", "b", "d"]
    assert all(game.result["score"] == 1 for game in games)


def test_a_conversation_without_room_is_over():
    """It scores 0 and says why, its episode is closed, and the others go on."""
    log: list[int] = []
    samples = [Sample("a", "", lambda: counting(2, log)), sample("b", 2)]

    def agent(games):
        return [None if g.sample.id == "a" and len(g.texts) > 1 else "x" for g in games]

    found = {game.sample.id: game.result for game in play(samples, agent, 2)}
    assert found["a"] == {"score": 0.0, "ended": "no room in the context"}
    assert found["b"]["score"] == 1 and log == [1]


def test_an_interrupted_play_closes_its_episodes():
    """What an episode holds open, as a sandbox, is closed also where the agent fails."""
    log: list[int] = []

    def agent(games):
        if log or len(games[0].texts) > 1:
            raise KeyboardInterrupt
        return ["x"] * len(games)

    with pytest.raises(KeyboardInterrupt):
        list(play([Sample(name, "", lambda: counting(3, log)) for name in "ab"], agent, 2))
    assert log == [1, 1]


# ------------------------------------------------------------------------------------------- ways


class Actor:
    """A voice that has room for a word or more, and says what a function of what it reads says."""

    def __init__(self, words=lambda on, messages: "x"):
        self.words = words
        self.model = torch.nn.Sequential(lora.LoRALinear(torch.nn.Linear(2, 2), 1, 1, 0))
        self.chat = SimpleNamespace(format="f")
        self.asked = []

    def fits(self, messages, new_tokens):
        return len(messages) < 5

    def speak(self, conversations, sampling, seeds=None):
        for number, messages in enumerate(conversations):
            self.asked.append((self.model[0].enabled, sampling, messages))
            yield number, self.words(self.model[0].enabled, messages), True


@pytest.fixture
def run(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"adapter")
    return SimpleNamespace(folder=tmp_path, model_sha256="m", bits=4, prompt=PROMPT, full=False)


def test_three_ways_to_ask_the_same(run):
    """Teacher: with p, adapter off; base: without, off; adapter: without, on. All are greedy."""
    actor = Actor()
    for way in three_ways(run, actor, 7):
        list(play([sample("a", 2)], way.agent, 1))
    firsts, seconds = actor.asked[::2], actor.asked[1::2]
    assert [on for on, _, _ in firsts] == [False, False, True]
    assert [messages[-1]["content"] for _, _, messages in firsts] == [
        "Say Act: first. My problem: x", "x", "x"
    ]  # fmt: skip
    for _, sampling, messages in seconds:
        assert [m["content"] for m in messages[-2:]] == ["x", "heard x"]
        assert (sampling.max_new_tokens, sampling.temperature) == (7, 0)


def test_no_room_is_no_reply():
    """Of three conversations the one that is too long is not asked."""
    actor = Actor()
    games = [SimpleNamespace(texts=["x"] * n) for n in (1, 5, 3)]
    opening = lambda x: [{"role": "user", "content": x}]  # noqa: E731
    assert speak(actor, opening, True, 7, games) == ["x", None, "x"]
    assert len(actor.asked) == 2


# ----------------------------------------------------------------------------------------- results


def way(agent, name="teacher", made_of="") -> Way:
    return Way(name, f"{name}, told", made_of, agent)


def always(word: str, asked: list):
    def agent(games):
        asked.extend(game.sample.id for game in games)
        return [word] * len(games)

    return agent


def test_a_half_is_resumed_and_counted_once(tmp_path):
    """What is there is not played again; half a line, and a line twice, change nothing."""
    path = tmp_path / "os.jsonl"
    asked: list[str] = []
    samples = [sample(name) for name in "abc"]

    def tired(games):
        if any(game.sample.id == "c" for game in games):
            raise KeyboardInterrupt
        return always("x", asked)(games)

    with pytest.raises(KeyboardInterrupt):
        results(path, samples, [way(tired)], 1)
    assert asked == ["a", "b"]
    lines = path.read_text()
    path.write_text(lines + lines.splitlines()[0] + "\n" + lines[:20])
    found = results(path, samples, [way(always("x", asked))], 1)
    assert asked == ["a", "b", "c"]
    assert [row["id"] for row in found["teacher, told"]] == ["a", "b", "c"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "b", "a", "c"]
    assert rows[0] == {
        "way": "teacher", "id": "a", "of": text_hash("a1"),
        "score": 1.0, "ended": "enough", "texts": ["x", "x"],
    }  # fmt: skip
    results(path, samples, [way(always("x", asked))], 1)
    assert len(asked) == 3


def test_what_was_made_of_something_else_does_not_count(tmp_path):
    """Another way, a changed sample or a changed adapter is played; the old lines stay."""
    path = tmp_path / "os.jsonl"
    asked: list[str] = []
    agent = always("x", asked)
    for ways, samples in [
        ([way(agent)], [sample("a")]),
        ([way(agent, "adapter")], [sample("a")]),
        ([way(agent, "adapter", "trained more")], [sample("a")]),
        ([way(agent)], [sample("a", 2)]),
    ]:
        results(path, samples, ways, 1)
    assert len(asked) == 5 and len(path.read_text().splitlines()) == 4
    results(path, [sample("a")], [way(agent), way(agent, "adapter")], 1)
    assert len(asked) == 5


def test_a_corrupt_line_is_named(tmp_path):
    """A line in the middle that is none of ours stops it, with its number."""
    path = tmp_path / "os.jsonl"
    path.write_text('{"way": "teacher"}\n{}\n')
    with pytest.raises(ValueError, match="line 1 is corrupt"):
        results(path, [sample("a")], [way(always("x", []))], 1)


def rows(*scores: float, ended: str = "answer") -> list[dict]:
    return [{"score": score, "ended": ended} for score in scores]


def test_zeros_and_ones_are_counted_with_wilsons_interval():
    """3 of 4 are 30 to 95 %; the adapter's 1 of 4 is a third of that."""
    page = table({"teacher": rows(1, 1, 1, 0), "adapter": rows(1, 0, 0, 0, ended="rounds")})
    assert "| teacher | 3 of 4 (30 to 95 %) | 1.00 | answer 4 |" in page
    assert "| adapter | 1 of 4 (5 to 70 %) | 0.33 | rounds 4 |" in page


def test_other_scores_have_a_mean_with_a_bootstrap_interval():
    """One score between 0 and 1 makes all of them means; the draws are always the same."""
    scores = [0.0, 1.0, 0.5, 0.25]
    low, high = mean_interval(scores)
    assert (low, high) == mean_interval(scores) and 0 <= low < 0.4375 < high <= 1
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5)
    page = table({"teacher": rows(*scores), "base": rows(0, 0, 0, 0)})
    assert f"| teacher | 43.8 ({100 * low:.1f} to {100 * high:.1f}), n = 4 | 1.00 |" in page
    assert "| base | 0.0 (0.0 to 0.0), n = 4 | 0.00 |" in page


def test_what_else_was_measured_is_averaged():
    """A row that has it not, as one without room in the context, counts 0."""
    found = [*rows(1, ended="right"), *rows(0, ended="no room")]
    found[0] |= {"element": True, "f1": 0.5}
    page = table({"teacher": found}, ("element", "f1"))
    assert "| of the teacher's | element | f1 | episodes" in page
    assert "| 1.00 | 50.0 | 25.0 | right 1, no room 1 |" in page


def test_nothing_is_compared_with_a_teacher_that_scores_nothing():
    page = table({"teacher": rows(0, 0), "adapter": rows(1, 0)})
    assert page.count("none to compare with") == 2


def test_the_oracle_names_what_fails(capsys):
    """Samples that know their solution are played; a failure is told with its last words."""
    samples = [
        sample("good", oracle=lambda texts: "x"), sample("bad", oracle=lambda texts: "y"),
        sample("unknown"),
    ]  # fmt: skip
    show_oracle(samples, 2)
    out = capsys.readouterr().out
    assert "bad: enough 'y'" in out and "good:" not in out
    assert "the oracle scores 1 of 2; 1 have none" in out


# ----------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A finished run of each task with the random checkpoint, without their reports."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "os.txt").write_text("Act.\n")
    (folder / "shop").mkdir()
    for file in web_shopping.OURS.iterdir():
        text = file.read_text().replace('"pricing": "$', '"pricing": "EUR ')
        (folder / "shop" / file.name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genpi, "report", lambda *about, **more: None)
        for task in ("any", *driver.BENCHMARKS):
            inputs = folder / f"{task}-inputs.txt"
            inputs.write_text("Count to 3.\nName a tree.\nSpell cat.\n")
            flags = "--samples 2 --held-out 1 --epochs 1 --batch 2 --max-new-tokens 8"
            flags = f"{flags} --max-turns 1 --max-reason-tokens 8 --bits 16 --device cpu"
            paths = {"--model": checkpoint, "--prompt": folder / "os.txt", "--inputs": inputs}
            paths["--out"] = folder / task
            words = [str(word) for pair in paths.items() for word in pair]
            assert genpi.main([*flags.split(), "--task", task, *words]) == 0
    return folder


def benchmark(samples: list[Sample]) -> SimpleNamespace:
    """A benchmark as a module would be."""
    return SimpleNamespace(
        __doc__="A benchmark.", REPLY_TOKENS=4, MEASURES=(), add_flags=lambda add: None,
        samples=lambda args: samples,
    )  # fmt: skip


def test_the_command_plays_a_run_three_ways(finished, monkeypatch, capsys):
    """A table of three rows, and a line a sample and way; again, nothing is added."""
    samples = [sample("a", 2), sample("b")]
    monkeypatch.setattr(driver, "import_module", lambda name: benchmark(samples))
    for _ in range(2):
        assert evaluate.main(["os", "--run", str(finished / "os")]) == 0
        out = capsys.readouterr().out
        assert [line.split(" | ")[0] for line in out.splitlines() if ", " in line][-3:] == [
            "| teacher, prompt", "| base, no prompt", "| adapter, no prompt"
        ]  # fmt: skip
        lines = (finished / "os/os.jsonl").read_text().splitlines()
        assert len(lines) == 6
        assert len({(row["way"], row["id"]) for row in map(json.loads, lines)}) == 6


def test_all_weights_are_played_as_an_adapter_is(finished, tmp_path, monkeypatch, capsys):
    """A run of --full has no adapter; what was trained plays in its place."""
    args = json.loads((finished / "os" / "args.json").read_text())
    flags = "--full --samples 2 --held-out 1 --epochs 1 --batch 2 --max-new-tokens 8 --task os"
    flags = f"{flags} --max-turns 1 --max-reason-tokens 8 --device cpu --out {tmp_path}/run"
    paths = ["--model", args["model"], "--prompt", finished / "os.txt"]
    paths += ["--inputs", finished / "os-inputs.txt"]
    monkeypatch.setattr(genpi, "report", lambda *about, **more: None)
    assert genpi.main([*flags.split(), *map(str, paths)]) == 0
    monkeypatch.setattr(driver, "import_module", lambda name: benchmark([sample("a", 2)]))
    assert evaluate.main(["os", "--run", f"{tmp_path}/run"]) == 0
    assert "| adapter, no prompt | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "ended"), [("web_browsing", "none chosen"), ("web_shopping", "no action")]
)
def test_the_web_benchmarks_play_data_of_our_own(finished, capsys, name, ended):
    """Of nonsense comes neither a choice nor an action; played again, nothing is added."""
    for _ in range(2):
        assert evaluate.main([name, "--run", str(finished / name), "--samples", "3"]) == 0
        page = capsys.readouterr().out
        assert page.count("| 0 of 3 (0 to 56 %) |") == page.count(f"| {ended} 3 |") == 3
        lines = (finished / name / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == 9


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["chess"], ["chess: no such command; give os, web_browsing"]),
        (["os"], ["--run", "--oracle"]),
        (["os", "--run", "{}/none"], ["no args.json"]),
        (["os", "--run", "{}/any"], ["task any", "--task os"]),
        (["os", "--run", "{}/os", "--model", str(TINY)], ["tiny has changed since {}/os was made"]),
        (["web_browsing", "--run", "{}/os"], ["task os", "--task web_browsing"]),
        (["web_browsing", "--run", "{}/web_browsing", "--data", "{}/x"], ["{}/x", "Mind2Web"]),
        (["web_browsing", "--run", "{}/web_browsing", "--data", "{}/os"], ["no scores_all_data"]),
        (["web_browsing", "--run", "{}/web_browsing", "--seed", "-1"], ["-1 is out of range"]),
        (["web_browsing", "--oracle"], ["no sample here brings a solution"]),
        (["web_shopping", "--run", "{}/web_shopping", "--data", "{}/os"], ["items_ins", "WebShop"]),
        (["web_shopping", "--run", "{}/web_shopping", "--data", "{}/shop"], ["'EUR", "no price"]),
        (["os", "--run", "{}/os", "--data", "{}"], ["has no data/1/*.json", "AgentBench"]),
        (["os", "--oracle", "--data", "{}/os.txt"], ["not JSON"]),
        (["os", "--oracle", "--at-once", "0"], ["1 to 1000000000"]),
        (["os", "--oracle", "--sandbox", "jail"], ["jail"]),
    ],
)
def test_a_mistake_is_one_line(finished, capsys, argv, words):
    """It names what is wrong; exit code 2."""
    assert evaluate.main([word.format(finished) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word.format(finished) in line for word in words)


def test_without_a_sandbox_nothing_runs(monkeypatch, capsys):
    """Neither Docker nor root: one line that says what to install, and no command on the host."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nowhere")
    assert evaluate.main(["os", "--oracle"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "install Docker" in line and "no daemon answers" in line and "needs root" in line


def test_the_commands_own_file_stays_small():
    """The benchmarks are imported only where one is played."""
    source = Path(evaluate.__file__).read_text()
    assert "import benchmarks" not in source and "from benchmarks" not in source
    assert command.__module__ == "benchmarks.driver"
