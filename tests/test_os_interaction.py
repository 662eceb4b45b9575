"""OS interaction: AgentBench's format read in all its variants, and its protocol turn by turn."""

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks.driver import Game, Sample
from benchmarks.os_interaction import (
    OURS,
    Problem,
    Script,
    check_interpreters,
    episode,
    load,
    observation,
    oracle,
    samples,
)
from benchmarks.sandbox import Wrecked, find_sandbox

BASH = "Think: I look.\n\nAct: bash\n\n```bash\n{}\n```"


@pytest.fixture
def folder(tmp_path):
    """An empty data folder, and how to put problems into it."""

    def write(problems, name="data/1/a.json", **scripts: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = problems if isinstance(problems, str) else json.dumps(problems)
        path.write_text(text)
        for script, code in scripts.items():
            (tmp_path / "scripts/1").mkdir(parents=True, exist_ok=True)
            (tmp_path / "scripts/1" / script).write_text(code)
        return tmp_path

    return write


# ------------------------------------------------------------------------------------------ format


def test_a_problem_is_read_whole(folder):
    """Scripts are texts, code or files; null among the checks is the example."""
    path = folder(
        {
            "description": "Count.",
            "create": {"local": "default", "init": ["a", {"file": "b.sh"}]},
            "start": "cd /srv",
            "evaluation": {
                "check": [None, {"language": "python", "code": "exit()"}],
                "example": {"code": "ls"},
            },
            "labels": ["x"],
        },
        **{"b.sh": "b"},
    )
    example = Script("bash", "ls")
    assert load(path) == [
        Problem(
            "std-001-a-00000", "Count.", (Script("bash", "a"), Script("bash", "b")),
            Script("bash", "cd /srv"), (example, Script("python", "exit()")), example=example,
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("evaluation", "found"),
    [
        ({"match": "7"}, {"answer": "7"}),
        ({"match": {"answer": "7", "strip": True}}, {"answer": "7"}),
        ({"match": {"regex": "^7"}}, {"pattern": "^7"}),
        ({"match": "7", "check": "true"}, {"answer": "7"}),
        ({"check": "true"}, {"checks": (Script("bash", "true"),)}),
        ({"check": {"code": "true"}}, {"checks": (Script("bash", "true"),)}),
    ],
)
def test_ways_to_evaluate(folder, evaluation, found):
    """An answer, a pattern, or checks; an answer goes before checks."""
    path = folder([{"description": "x", "evaluation": evaluation}])
    assert load(path) == [Problem("std-001-a-00000", "x", **found)]


def test_odd_problems_of_agentbench(folder):
    """A create that is a list makes nothing; an example may stand beside the evaluation."""
    made = {"description": "x", "create": [None, {"file": "no"}], "evaluation": {"check": "true"}}
    shown = {"description": "x", "evaluation": {"match": "7"}, "example": "ls"}
    empty = {"description": "x", "create": {"init": None}, "evaluation": {"match": "7"}}
    found = load(folder([made, shown, empty]))
    assert [problem.init for problem in found] == [()] * 3
    assert found[1].example == Script("bash", "ls")


def test_ids_are_agentbenchs(folder):
    """Folder, file and place; other files are not read; one file alone has its own folder name."""
    one = {"description": "x", "evaluation": {"match": "7"}}
    folder([one, one], "data/7/b.json")
    folder(json.dumps(one) + "\n" + json.dumps(one), "data/4/N4.jsonl")
    path = folder([one], "data/dev.json")
    names = [problem.id for problem in load(path)]
    assert names == [
        "std-004-N4-00000", "std-004-N4-00001", "std-007-b-00000", "std-007-b-00001"
    ]  # fmt: skip
    assert [problem.id for problem in load(path / "data/dev.json")] == ["dev-001-dev-00000"]
    (path / "scripts/7").mkdir(parents=True)
    (path / "scripts/7/x.sh").write_text("ls")
    folder([{"description": "x", "evaluation": {"check": {"file": "x.sh"}}}], "data/7/b.json")
    (alone,) = load(path / "data/7/b.json")
    assert (alone.id, alone.checks[0].code) == ("std-007-b-00000", "ls")
    folder([one, one], "data/7/b.json")
    around = path.rename(path.with_name("x")).parent
    (around / "repository/data").mkdir(parents=True)
    (around / "x").rename(around / "repository/data/os_interaction")
    assert [problem.id for problem in load(around / "repository")] == names


@pytest.mark.parametrize(
    ("problems", "word"),
    [
        ([{"description": "x"}], "evaluation"),
        ([{"evaluation": {"match": "7"}}], "description"),
        ([{"description": 7, "evaluation": {"match": "7"}}], "7 is no text"),
        ([{"description": "x", "evaluation": {}}], "check"),
        ([{"description": "x", "evaluation": {"check": []}}], "no check"),
        ([{"description": "x", "evaluation": {"check": [None]}}], "example"),
        ([{"description": "x", "evaluation": {"match": {"is": 7}}}], "regex"),
        ([{"description": "x", "evaluation": {"check": {"language": "c", "code": ""}}}], "'c'"),
        ([{"description": "x", "evaluation": {"check": {"file": "none.sh"}}}], "none.sh"),
        ([{"description": "x", "evaluation": {"check": {"file": "../../a"}}}], "outside"),
        ([{"description": "x", "evaluation": {"check": 7}}], "7 is no object"),
        ([{"description": "x", "evaluation": 7}], "7 is no object"),
        ([{"description": "x", "evaluation": {"check": "x" * 100_001}}], "at most 100,000 bytes"),
        ([{"description": "x", "evaluation": {"match": {"regex": "("}}}], "unterminated"),
        (["x"], "'x' is no object"),
        ("{", "not JSON"),
        ("[]" + "[" * 99999, "not JSON"),
    ],
)
def test_what_is_no_problem_is_named(folder, problems, word):
    """A file of another version or format is one line that names it."""
    with pytest.raises(ValueError, match=word) as error:
        load(folder(problems))
    assert "a.json" in str(error.value)


def test_a_foreign_folder_is_told_from_ours(tmp_path):
    """Without data/1/*.json it is not AgentBench's; the cure says where that is."""
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="github.com/THUDM/AgentBench"):
            load(path)


def test_our_own_problems():
    """A dozen, each with an example, and of each kind of evaluation at least one."""
    problems = load(OURS)
    assert len(problems) == 12 and all(problem.example for problem in problems)
    assert any(p.answer for p in problems) and any(p.pattern for p in problems)
    assert any(p.checks for p in problems) and any(p.start for p in problems)


# ---------------------------------------------------------------------------------------- protocol


class Machine:
    """A box that notes what it is asked to do, and answers what it is told to."""

    def __init__(self, output: str = "", results=()):
        self.output = output
        self.results = list(results)
        self.done: list = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.done.append("end")

    def open_shell(self):
        self.done.append("shell")

    def execute(self, code):
        self.done.append(code)
        if isinstance(self.output, Exception):
            raise self.output
        return self.output

    def run(self, command):
        self.done.append(command)
        return self.results.pop(0) if self.results else (0, "")


def played(problem: Problem, machine: Machine, replies: list[str]) -> Game:
    game = Game(Sample("x", "", None), episode(problem, lambda: machine))
    for reply in [None, *replies]:
        assert game.result is None
        game.go_on(reply)
    return game


def test_the_shell_is_open_before_init_and_start_runs_in_it():
    """Shell, init whatever its status, start, the agent's code, the checks with its answer."""
    check = Script("python", "c1"), Script("bash", "c2")
    problem = Problem("x", "Do.", (Script("bash", "i1"),), Script("bash", "s"), check)
    machine = Machine("out", [(1, "failed"), (0, "first"), (0, "")])
    game = played(problem, machine, [BASH.format("ls"), "Act: answer( 7 )"])
    assert machine.done == [
        "shell", "true", ["bash", "-c", "i1"], "s", "ls",
        ["python3", "-c", "c1", "7"], ["bash", "-c", "c2", "--", "7", "first"], "end",
    ]  # fmt: skip
    assert game.result == {"score": 1.0, "ended": "answer", "answer": "7"}
    assert game.texts == [
        "Do.", BASH.format("ls"), "The output of the OS:\n\nout", "Act: answer( 7 )"
    ]  # fmt: skip


def test_the_first_check_that_fails_ends_it():
    """A status other than 0 is failure, and the checks behind it do not run."""
    problem = Problem("x", "Do.", checks=(Script("bash", "a"), Script("bash", "b")))
    machine = Machine(results=[(1, "")])
    assert played(problem, machine, ["Act: finish"]).result["score"] == 0
    assert machine.done[2:] == [["bash", "-c", "a", "--", "None"], "end"]


@pytest.mark.parametrize(
    ("problem", "right", "wrong"),
    [
        ({"answer": "7"}, ["answer(7)", "answer( 7 )"], ["answer(07)", "answer()", "finish"]),
        ({"pattern": "^0?7$"}, ["answer(7)", "answer(07)"], ["answer(77)", "finish"]),
    ],
)
def test_an_answer_is_exact_but_for_the_space_around_it(problem, right, wrong):
    """finish is no answer, not even None."""
    problem = Problem("x", "Do.", **problem)
    for act in (*right, *wrong):
        result = played(problem, Machine(), [f"Act: {act}"]).result
        assert result["score"] == (act in right)


def test_eight_rounds_and_no_more():
    """The eighth command is the last: without an answer by then the problem is failed."""
    machine = Machine("x")
    game = played(Problem("x", "Do.", answer="x"), machine, [BASH.format("ls")] * 8)
    assert game.result == {"score": 0.0, "ended": "rounds", "answer": None}
    assert machine.done.count("ls") == 8


def test_no_action_and_a_wreck_are_failures():
    """Prose is no action; a machine that has come to its end says why."""
    problem = Problem("x", "Do.", answer="7")
    assert played(problem, Machine(), ["You could use ls."]).result["ended"] == "no action"
    machine = Machine(Wrecked("too many"))
    game = Game(Sample("x", "", None), episode(problem, lambda: machine))
    game.go_on(None)
    assert game.result == {"score": 0.0, "ended": "too many", "answer": None}
    assert machine.done[-1] == "end"


def test_the_observation_is_cut_above_800_letters():
    """800 are shown whole, of 801 the first 780 and a line that says so; nothing has a text too."""
    assert observation("7\n") == "The output of the OS:\n\n7"
    assert observation("\n") == observation("") == "The output of the OS is empty."
    assert observation("x" * 800 + "\n") == "The output of the OS:\n\n" + "x" * 800
    cut = "x" * 780 + "\n[truncated because the output is too long]"
    assert observation("x" * 801) == "The output of the OS:\n\n" + cut


def test_parameters_that_linux_would_refuse_are_cut():
    """An output of megabytes, or with a NUL, can still be a parameter."""
    command = Script("bash", "c").command(["\0a", "é" * 200_000])
    assert command[:5] == ["bash", "-c", "c", "--", "a"]
    assert 0 < len(command[5].encode()) <= 100_000


def test_the_oracle_runs_the_example_and_answers_with_its_output():
    """Or finishes, where it prints nothing; a Python example is run by the shell."""
    say = partial(oracle, Script("bash", "ls | wc -l"))
    assert "```bash\nls | wc -l\n```" in say(["x"])
    assert say(["x", "a", observation("7\n")]) == "Act: answer(7)"
    assert say(["x", "a", observation("")]) == "Act: finish"
    assert "python3 -c 'print(7)'" in oracle(Script("python", "print(7)"), ["x"])


# ------------------------------------------------------------------------------------ for real


@pytest.fixture(scope="module")
def sandbox():
    try:
        return find_sandbox()
    except ValueError as error:
        pytest.skip(str(error))


def test_the_oracle_solves_our_own_problems(sandbox):
    """Each example passes its own checks, and the bare answer 'no' passes none of them."""
    for problem in load(OURS):
        game = Game(Sample(problem.id, "", None), episode(problem, sandbox.open))
        game.go_on(None)
        while not game.result:
            game.go_on(oracle(problem.example, game.texts))
        assert game.result["score"] == 1, (problem.id, game.texts)
        game = Game(Sample(problem.id, "", None), episode(problem, sandbox.open))
        game.go_on(None)
        game.go_on("Act: answer(no)")
        assert game.result["score"] == 0, problem.id


def test_a_sandbox_without_an_interpreter_is_refused():
    """A check that could not run would fail every agent."""
    box = Machine(results=[(127, "python3: not found\n")])
    sandbox = type("Kind", (), {"name": "docker", "open": lambda self: box})()
    problem = Problem("x", "Do.", checks=(Script("python", ""),))
    with pytest.raises(ValueError, match="docker.*no python: python3: not found"):
        check_interpreters([problem], sandbox)


def test_samples_differ_in_what_they_are_made_of(sandbox):
    """The same data gives the same hashes, a changed problem another."""
    flags = type("Flags", (), {"data": OURS, "sandbox": None, "image": "x"})
    first, second = samples(flags), samples(flags)
    assert [s.made_of for s in first] == [s.made_of for s in second]
    assert len({s.made_of for s in first}) == 12
