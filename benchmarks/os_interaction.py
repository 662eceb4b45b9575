"""OS interaction: an agent at a bash shell solves a problem, and scripts check what it did.

    python evaluate.py os --run runs/os                  a dozen problems of our own
    python evaluate.py os --run runs/os --data PATH      AgentBench's, from its folder
    python evaluate.py os --oracle [--data PATH]         each problem's own example in the agent's
                                                         place: does this machine's sandbox do?

A problem is played in a machine of its own (sandbox.py):

    1  a login shell is opened, and stays open
    2  the init scripts run as processes of their own; how they end does not matter
    3  the start script runs in the shell, so that its cd, variables and su last
    4  the agent's commands run in the shell; it reads what they print, cut to 780 letters if there
       are more than 800; it has 8 turns of at most 512 tokens
    5  its answer is what is asked for, or passes the checks: processes of their own, each given the
       answer and the output of those before; the first that exits with another status than 0 fails

Departures: a command that is not done in 30 seconds fails the problem (AgentBench goes on while it
runs); the shell has no terminal, so nothing echoes or asks; C and C++ scripts, which no problem
has. Source: AgentBench (arXiv 2308.03688), its commit 41e6807.
"""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.driver import Episode, Sample
from benchmarks.sandbox import IMAGE, KINDS, Box, Docker, Namespaces, Wrecked, find_sandbox
from files import read_text
from prompt import OS
from runs import text_hash

REPLY_TOKENS = 512
MEASURES = ()
ROUNDS = 8
SHOWN = 800  # letters of output that are shown whole; of more, so many less than these:
CUT = 780
SAYS = "The output of the OS:\n\n"
LONGEST = 100_000  # bytes of a script or parameter; Linux takes 131,071
OURS = Path(__file__).parent / "data/os"
CURE = "give the folder data/os_interaction of AgentBench (github.com/THUDM/AgentBench, v0.2)"
INTERPRETERS = {"bash": ["bash", "-c"], "python": ["python3", "-c"]}


# ------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Script:
    language: str
    code: str

    def command(self, parameters: list[str]) -> list[str]:
        """The command that runs it; a parameter is cut where Linux would refuse it."""
        told = [text.replace("\0", "").encode()[:LONGEST] for text in parameters]
        dashes = ["--"] if self.language == "bash" and parameters else []
        texts = [text.decode(errors="ignore") for text in told]
        return [*INTERPRETERS[self.language], self.code, *dashes, *texts]


@dataclass(frozen=True)
class Problem:
    """A problem of AgentBench. It has checks, or an answer, or a pattern of answers."""

    id: str
    description: str
    init: tuple[Script, ...] = ()
    start: Script | None = None
    checks: tuple[Script, ...] = ()
    answer: str | None = None
    pattern: str | None = None
    example: Script | None = None


def load(path: Path) -> list[Problem]:
    """The problems in a folder data/os_interaction, or around it, or in one file of it.

    Raises: ValueError naming what is missing, or is no problem as we know them.
    """
    if path.is_file():
        within = path.parent.parent if path.parent.name.isdecimal() else path.parent  # data/
        folder, files = within.parent, [path]
    else:
        within = path / "data/os_interaction"
        folder = within if within.is_dir() else path
        files = sorted(folder.glob("data/[0-9]*/*.json*"))
    if not files:
        raise ValueError(f"{path}: has no data/1/*.json; {CURE}")
    problems = []
    for file in files:
        numbered = file.parent.name.isdecimal()
        group = file.parent.name if numbered else file.stem
        prefix = f"std-{int(group):03}" if numbered else f"{group}-001"
        scripts = folder / "scripts" / group
        for number, raw in enumerate(read_tasks(file)):
            name = f"{prefix}-{file.stem}-{number:05}"
            try:
                problems.append(read_problem(name, raw, scripts))
            except (ValueError, KeyError, re.error) as error:
                what = f"has no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{file}: problem {number}: {what}; {CURE}") from None
    return problems


def read_tasks(file: Path) -> list:
    """A list of problems, one problem, or one a line."""
    text = read_text(file, "problems")
    try:
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); {CURE}") from None
    return found if isinstance(found, list) else [found]


def read_problem(name: str, raw: dict, scripts: Path) -> Problem:
    """A problem as AgentBench writes it. Raises what is wrong with it."""
    read = partial(read_script, scripts=scripts)
    created = an_object(raw).get("create")
    asked = an_object(raw["evaluation"])
    found = {
        "init": tuple(read(one) for one in listed(created, "init") if one is not None),
        "start": read(raw.get("start")),
        "example": read(asked.get("example") or raw.get("example")),
    }
    if "match" in asked:
        match = asked["match"]
        match = an_object({"answer": match} if isinstance(match, str) else match)
        if "answer" in match:
            found["answer"] = a_text(match["answer"])
        else:
            found["pattern"] = re.compile(a_text(match["regex"])).pattern
    else:
        checks = [read(one) or found["example"] for one in listed(asked, "check")]
        if not checks or None in checks:
            raise ValueError("it has no match and no check, or lacks the example that a check asks")
        found["checks"] = tuple(checks)
    return Problem(name, a_text(raw["description"]), **found)


def an_object(value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.40} is no object")
    return value


def a_text(value: object) -> str:
    """A text of less than Linux allows of a parameter."""
    if not isinstance(value, str) or len(value.encode(errors="replace")) > LONGEST:
        raise ValueError(f"{value!r:.40} is no text of at most {LONGEST:,} bytes")
    return value.replace("\0", "")


def listed(raw: dict | list | None, name: str) -> list:
    """What an object holds under a name, as a list; an object that is none holds nothing."""
    value = raw.get(name, []) if isinstance(raw, dict) else []
    return value if isinstance(value, list) else [value]


def read_script(raw: str | dict | None, scripts: Path) -> Script | None:
    """A script: bash code, or an object with code or file, and perhaps language."""
    if raw is None:
        return None
    if isinstance(raw, str):
        raw = {"code": raw}
    language = an_object(raw).get("language", "bash")
    if language not in INTERPRETERS:
        raise ValueError(f"language {language!r:.20} is none of {', '.join(INTERPRETERS)}")
    if "file" not in raw:
        return Script(language, a_text(raw["code"]))
    path = (scripts / a_text(raw["file"])).resolve()
    if not path.is_relative_to(scripts.resolve()):
        raise ValueError(f"file {raw['file']!r:.40} lies outside {scripts}")
    return Script(language, a_text(read_text(path, "script")))


# --------------------------------------------------------------------------------------- playing


def episode(problem: Problem, open_box: Callable[[], Box]) -> Episode:
    """Play a problem in a machine of its own."""
    ended, answer = "rounds", None
    texts = [problem.description]
    try:
        with open_box() as box:
            prepare(problem, box)
            for _ in range(ROUNDS):
                reply = yield texts
                action = OS.act(reply)
                texts = [*texts, reply]
                if action is None:
                    return outcome(False, "no action")
                if action[0] != "bash":
                    ended, answer = action[0], (*action, None)[1]
                    return outcome(is_solved(problem, box, answer), ended, answer)
                texts = [*texts, observation(box.execute(action[1]))]
    except Wrecked as error:
        return outcome(False, str(error), answer)
    return outcome(False, "rounds")


def outcome(solved: bool, ended: str, answer: str | None = None) -> dict:
    return {"score": float(solved), "ended": ended, "answer": answer}


def prepare(problem: Problem, box: Box) -> None:
    """Everything before the agent's first turn."""
    box.open_shell()
    box.execute("true")  # the login is over before init changes what it reads
    for script in problem.init:
        box.run(script.command([]))
    if problem.start:
        box.execute(problem.start.code)


def observation(output: str) -> str:
    """What the agent reads of a command's output."""
    output = output.rstrip("\n")
    if len(output) > SHOWN:
        output = output[:CUT] + "\n[truncated because the output is too long]"
    return f"{SAYS}{output}" if output else "The output of the OS is empty."


def is_solved(problem: Problem, box: Box, answer: str | None) -> bool:
    """Is it the answer, or does it pass the checks? Without an answer these read None."""
    if problem.answer is not None:
        return answer is not None and answer.strip() == problem.answer.strip()
    if problem.pattern is not None:
        return answer is not None and re.search(problem.pattern, answer.strip()) is not None
    parameters = [str(answer)]
    for script in problem.checks:
        status, output = box.run(script.command(parameters))
        if status != 0:
            return False
        parameters.append(output)
    return True


# --------------------------------------------------------------------------------------- command


def oracle(example: Script, texts: list[str]) -> str:
    """What an agent says that knows the example: runs it, and answers with what it printed."""
    if len(texts) == 1:
        bash = example.language == "bash"
        code = example.code if bash else shlex.join(example.command([]))
        return f"Act: bash\n\n```bash\n{code}\n```"
    output = texts[-1].removeprefix(SAYS)
    return "Act: finish" if output == texts[-1] else f"Act: answer({output})"


def add_flags(add: Callable) -> None:
    add("--data", type=Path, default=OURS, help="AgentBench's folder data/os_interaction")
    add("--sandbox", choices=KINDS, help="by default docker, and namespaces where it is not")
    add("--image", default=IMAGE, help="Docker image of the machines")


def samples(args) -> list[Sample]:
    """The problems at --data, to be played in the sandbox of this machine."""
    problems = load(args.data)
    sandbox = find_sandbox([args.sandbox] if args.sandbox else KINDS, args.image)
    check_interpreters(problems, sandbox)
    print(f"{len(problems)} problems, each in a sandbox of its own ({sandbox.name})")
    return [sample(problem, sandbox) for problem in problems]


def check_interpreters(problems: list[Problem], sandbox: Docker | Namespaces) -> None:
    """Raise ValueError if the sandbox cannot run the scripts of all problems."""
    scripts = [script for problem in problems for script in (*problem.init, *problem.checks)]
    with sandbox.open() as box:
        for language in {script.language for script in scripts}:
            status, said = box.run(Script(language, "").command([]))
            if status != 0:
                told = f"the sandbox ({sandbox.name}) has no {language}: {said.strip()}"
                raise ValueError(f"{told}; install it where /usr/bin is, or in the image")


def sample(problem: Problem, sandbox: Docker | Namespaces) -> Sample:
    play = partial(episode, problem, sandbox.open)
    knows = partial(oracle, problem.example) if problem.example else None
    return Sample(problem.id, text_hash(json.dumps(asdict(problem))), play, knows)
