"""Machines that a model may wreck: they run its commands, and the host takes no harm.

    Docker        where its daemon answers and has the image
    Namespaces    on Linux, as root (namespaces.py)

and never the host itself. A Box is one machine, with a login shell that lasts and with processes of
their own. It has no network and no folder of the host's, and ends at the latest when this process
does, however that ends. A box that takes more than its Limits is ended at once: it is Wrecked.

What reads from a terminal reads the shell's input instead. So `su` goes on as another user, and a
command that waits for an answer runs out of time.

Left out: terminals, several images, anything that another user than root could do.
"""

import os
import secrets
import select
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import namespaces

IMAGE = "local-os/default"  # as AgentBench calls its own
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


class Wrecked(Exception):
    """A machine has come to its end; says why."""


@dataclass(frozen=True)
class Limits:
    seconds: float = 30  # that a command in the shell may take
    process_seconds: float = 120  # that another process may take
    output: int = 1 << 24  # bytes that either may write
    processes: int = 256
    memory: int = 1 << 30  # bytes of all processes together
    disk: int = 1 << 29  # bytes of all files together


LIMITS = Limits()


# ------------------------------------------------------------------------------------------ box


@dataclass(eq=False)
class Box:
    """A machine. `with` ends it."""

    name: str  # of its container, or of its pid namespace
    first: subprocess.Popen  # the machine ends with it
    prefix: list[str]  # stands before a command that shall run there
    limits: Limits
    remove: list[str] = field(default_factory=list)  # a command that ends it for certain
    why: str | None = None  # it is wrecked
    shell: subprocess.Popen | None = None

    def __enter__(self) -> "Box":
        return self

    def __exit__(self, *error) -> None:
        self.kill()
        for process in filter(None, (self.shell, self.first)):
            process.kill()
            process.communicate()

    def kill(self) -> None:
        """End every process of it."""
        self.first.kill()
        if self.remove:
            subprocess.run(self.remove, **QUIET)

    def wreck(self, why: str) -> None:
        """End it for a reason, which its commands then raise; from any thread."""
        self.why = self.why or why
        self.kill()

    def start(self, command: list[str], stdin: int) -> subprocess.Popen:
        """Start a process there, out of reach of a Ctrl-C that is meant for this one."""
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        whole = [*self.prefix, *command]
        return subprocess.Popen(whole, stdin=stdin, start_new_session=True, **both)

    def run(self, command: list[str]) -> tuple[int, str]:
        """Run a process of its own -> exit status, all that it wrote. Raises Wrecked."""
        with self.start(command, subprocess.DEVNULL) as process:
            try:
                output = self.gather(process, self.limits.process_seconds)
            finally:
                process.kill()
        return process.returncode, output

    def open_shell(self) -> None:
        """Start the login shell that `execute` needs."""
        self.shell = self.start(["bash", "--login"], subprocess.PIPE)

    def execute(self, code: str) -> str:
        """Run bash code in the shell -> what it wrote. Raises Wrecked.

        Its end is told by a word that the shell says next and that the code cannot know.
        """
        word = secrets.token_hex(16)
        code = shlex.quote(code.replace("\0", ""))
        asked = f"eval {code}\necho {word[:16]}''{word[16:]}\n"  # no echo of this is the word
        if self.shell.poll() is not None:
            raise Wrecked(self.why or "the shell has ended")
        try:
            self.shell.stdin.write(asked.encode(errors="replace"))
            self.shell.stdin.flush()
        except BrokenPipeError:
            raise Wrecked(self.why or "the shell has ended") from None
        return self.gather(self.shell, self.limits.seconds, word).partition(word)[0]

    def gather(self, process: subprocess.Popen, seconds: float, word: str = "") -> str:
        """What a process writes until it says a word, or ends. Raises Wrecked at a limit.

        Not what it writes until the pipe is closed, which those that it leaves behind hold open.
        """
        deadline = time.monotonic() + seconds
        pipe = process.stdout.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        output = bytearray()
        while True:
            ended = process.poll() is not None  # asked before the look, so that nothing is missed
            chunk = os.read(pipe, 1 << 16) if poll.poll(0 if ended else 20) else b""
            output += chunk
            if word and word.encode() in output[-len(chunk) - len(word) :]:
                break
            if not chunk:
                if ended:
                    break
                time.sleep(0.001)  # the pipe may be closed, and the process not ended
            if time.monotonic() > deadline:
                self.wreck(f"a command took more than {seconds:g} s")
            if len(output) > self.limits.output:
                self.wreck(f"a command wrote more than {self.limits.output:,} bytes")
            if self.why:
                break
        if self.why:
            raise Wrecked(self.why)
        return output.decode(errors="replace")


# ---------------------------------------------------------------------------------------- kinds


class Namespaces:
    """Boxes out of this Linux. Raises ValueError, with a cure, where there can be none."""

    name = "namespaces"
    pause = 0.1  # seconds between two looks at what boxes take
    program = [sys.executable, "-I", "-S", namespaces.__file__]

    def __init__(self):
        if sys.platform != "linux" or os.geteuid() != 0:
            raise ValueError("needs root on Linux (sudo)")

    def open(self, limits: Limits) -> Box:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = [*self.program, "make", str(limits.disk)]
        first = subprocess.Popen(command, start_new_session=True, **pipes)
        try:
            self.expect(first, b"unshared\n")
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{first.pid}/{name}").write_text("0 0 65536")
            first.stdin.write(b"\n")
            first.stdin.flush()
            self.expect(first, b"made\n")
            child = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().strip()
            name = os.readlink(f"/proc/{child}/ns/pid")
        except (OSError, ValueError) as error:
            first.kill()
            first.communicate()
            raise ValueError(f"the kernel allows none ({error})") from None
        return Box(name, first, [*self.program, "enter", child], limits)

    @staticmethod
    def expect(first: subprocess.Popen, line: bytes) -> None:
        said = first.stdout.readline()
        if said != line:
            raise ValueError((said + first.stdout.read()).decode().strip())

    @staticmethod
    def excess(boxes: list[Box]) -> dict[Box, str]:
        """Which boxes have too many processes or take too much memory, and what to say of it."""
        takes: dict[str, list[int]] = {box.name: [] for box in boxes}  # memory of each process
        for process in Path("/proc").glob("[0-9]*"):
            try:
                name = os.readlink(process / "ns/pid")
                if name in takes:
                    takes[name].append(own_memory((process / "status").read_text()))
            except OSError:  # it has just ended
                continue
        found = {}
        for box in boxes:
            if len(takes[box.name]) > box.limits.processes:
                found[box] = f"more than {box.limits.processes} processes"
            elif sum(takes[box.name]) > box.limits.memory:
                found[box] = f"more than {box.limits.memory >> 20} MiB of memory"
        return found


def own_memory(status: str) -> int:
    """The bytes in /proc/PID/status that are not of a file."""
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return sum(1024 * int(lines.get(k, "0").split()[0]) for k in ("RssAnon", "RssShmem"))


class Docker:
    """Boxes out of a Docker image. Raises ValueError, with a cure, where there can be none."""

    name = "docker"
    pause = 1.0
    capabilities = (
        "CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE SYS_CHROOT "
        "AUDIT_WRITE SETFCAP"
    ).split()  # Docker's own but MKNOD and NET_RAW

    def __init__(self, image: str = IMAGE):
        self.image = image
        if self.ask("version") is None:
            raise ValueError("no daemon answers")
        if self.ask("image", "inspect", image) is None:
            raise ValueError(
                f"it has no image {image} (docker build -t {image} FOLDER, or --image)"
            )

    @staticmethod
    def ask(*command: str) -> str | None:
        """What a docker command says; None if it fails."""
        try:
            asked = subprocess.run(["docker", *command], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return asked.stdout if asked.returncode == 0 else None

    def open(self, limits: Limits) -> Box:
        name = f"genpi-{secrets.token_hex(8)}"
        flags = [f"--cap-add={capability}" for capability in self.capabilities]
        flags += "--cap-drop=ALL --network=none --ulimit=core=0 --log-driver=none".split()
        flags += f"--pull=never --rm --name={name} --workdir=/ --user=0".split()
        flags += [f"--pids-limit={limits.processes}"]
        flags += [f"--memory={limits.memory}", f"--memory-swap={limits.memory}"]
        command = ["docker", "run", "-i", *flags, "--entrypoint=bash", self.image, "-c"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        whole = [*command, "echo made; read"]
        first = subprocess.Popen(whole, start_new_session=True, **pipes)
        prefix, remove = (["docker", *words, name] for words in (["exec", "-i"], ["rm", "-f"]))
        box = Box(name, first, prefix, limits, remove)
        said = first.stdout.readline()
        if said != b"made\n":
            with box:
                raise ValueError((said + first.stdout.read()).decode().strip())
        return box

    @staticmethod
    def excess(boxes: list[Box]) -> dict[Box, str]:
        """Which boxes fill the disk; Docker itself sees to processes and memory."""
        names = [box.name for box in boxes]
        form = "{{.Name}} {{.SizeRw}}"
        told = Docker.ask("inspect", "--size", "--format", form, *names) or ""
        sizes = dict(line.strip("/").split() for line in told.splitlines())
        return {
            box: f"more than {box.limits.disk >> 20} MiB of files"
            for box in boxes
            if int(sizes.get(box.name, 0)) > box.limits.disk
        }


KINDS = {"docker": Docker, "namespaces": Namespaces}


# -------------------------------------------------------------------------------------- sandbox


class Sandbox:
    """Opens boxes of one kind, and wrecks those that take more than their limits."""

    def __init__(self, kind: Docker | Namespaces, limits: Limits = LIMITS):
        self.kind = kind
        self.limits = limits
        self.boxes: set[Box] = set()
        threading.Thread(target=self.watch, daemon=True).start()

    def open(self) -> Box:
        box = self.kind.open(self.limits)
        self.boxes.add(box)
        return box

    def watch(self) -> None:
        while True:
            time.sleep(self.kind.pause)
            self.boxes -= {box for box in list(self.boxes) if box.first.poll() is not None}
            boxes = list(self.boxes)
            for box, why in (self.kind.excess(boxes) if boxes else {}).items():
                box.wreck(why)


def find_sandbox(names: Iterable[str] = KINDS, image: str = IMAGE) -> Sandbox:
    """A sandbox of the first kind that works here, tried with a command.

    Raises: ValueError that says what each kind lacks.
    """
    lacks = []
    for name in names:
        try:
            sandbox = Sandbox(Docker(image) if name == "docker" else Namespaces())
            with sandbox.open() as box:
                code, said = box.run(["bash", "-c", "echo $((6 * 7))"])
            if (code, said) == (0, "42\n"):
                return sandbox
            lacks.append(f"{name}: {said.strip()}")
        except (ValueError, Wrecked) as error:
            lacks.append(f"{name}: {error}")
    cure = "install Docker and start it, or work as root on Linux 5.11 or later"
    raise ValueError(f"no sandbox for the commands of a model; {cure} ({'; '.join(lacks)})")
