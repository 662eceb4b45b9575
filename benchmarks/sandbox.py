"""Machines that a model may wreck: they run its commands, and the host takes no harm.

    Docker        where its daemon answers and has the image
    Namespaces    on Linux, as root (namespaces.py)

and never the host itself. A Box is one machine, with a login shell that lasts and with processes of
their own. It has no network and no folder of the host's, and ends at the latest when this process
does, however that ends. It is held to its Limits; where that takes its end, it is Wrecked.

What reads from a terminal reads the shell's input instead. So `su` goes on as another user, and a
command that waits for an answer runs out of time.

Left out: terminals, several images.
"""

import os
import secrets
import select
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import namespaces

IMAGE = "local-os/default"  # as AgentBench calls its own
GROUPS = Path("/sys/fs/cgroup")


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


def spawn(command: list[str], stdin: int = subprocess.PIPE) -> subprocess.Popen:
    """Start a process whose output is one pipe, out of reach of a Ctrl-C that is meant for us."""
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, start_new_session=True, **pipes)


def expect(process: subprocess.Popen, line: bytes) -> None:
    """Raise ValueError, with all that a process says, if it does not say this line first."""
    said = process.stdout.readline()
    if said != line:
        process.kill()
        raise ValueError((said + process.communicate()[0]).decode(errors="replace").strip())


@dataclass(eq=False)
class Box:
    """A machine. `with` ends it."""

    name: str
    first: subprocess.Popen  # the machine ends with it
    prefix: list[str]  # stands before a command that shall run there
    limits: Limits
    end: Callable[[], None]  # removes what is left of it
    why: str | None = None  # it is wrecked
    shell: subprocess.Popen | None = None

    def __enter__(self) -> "Box":
        return self

    def __exit__(self, *error) -> None:
        processes = [self.first, self.shell] if self.shell else [self.first]
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
        self.end()

    def wreck(self, why: str) -> None:
        """End every process of it, for a reason that its commands then raise; from any thread."""
        self.why = self.why or why
        self.first.kill()

    def start(self, command: list[str], stdin: int) -> subprocess.Popen:
        """Start a process there."""
        return spawn([*self.prefix, *command], stdin)

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
    """Machines out of this Linux. Raises ValueError, with a cure, where there can be none."""

    name = "namespaces"
    program = [sys.executable, "-I", "-S", namespaces.__file__]

    def __init__(self, limits: Limits):
        if sys.platform != "linux" or os.geteuid() != 0:
            raise ValueError("needs root on Linux (sudo)")
        self.limits = limits

    def open(self) -> Box:
        name = f"genpi-{secrets.token_hex(8)}"
        groups: list[Path] = []
        try:
            groups = group_folders(name)
            make_groups(groups, self.limits)
            joined = ":".join(map(str, groups))
            first = spawn([*self.program, "make", joined, str(self.limits.disk)])
            expect(first, b"unshared\n")
            for users in ("uid_map", "gid_map"):
                Path(f"/proc/{first.pid}/{users}").write_text("0 0 65536")
            first.stdin.write(b"\n")
            first.stdin.flush()
            expect(first, b"made\n")
            child = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().strip()
        except (OSError, ValueError) as error:
            remove_groups(groups)
            raise ValueError(f"the kernel allows none ({error})") from None
        prefix = [*self.program, "enter", joined, child]
        return Box(name, first, prefix, self.limits, partial(remove_groups, groups))


def group_folders(name: str) -> list[Path]:
    """Folders of control groups, to be made, that bound processes and memory.

    Version 1 has a tree for each. Version 2 has one, where a group can be made below the nearest
    that grants both to its children. Source: the kernel's cgroup-v1/ and cgroup-v2.rst.
    """
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    ours = {kind: path.strip("/") for _, kinds, path in lines for kind in kinds.split(",")}
    needed = {"pids", "memory"}
    if needed <= ours.keys():
        return [GROUPS / kind / ours[kind] / name for kind in sorted(needed)]
    folder = GROUPS / ours.get("", "")
    for parent in (folder, *folder.parents):
        grants = parent / "cgroup.subtree_control"
        if grants.exists() and needed <= set(grants.read_text().split()):
            return [parent / name]
    raise ValueError("no control group grants pids and memory")


def make_groups(folders: list[Path], limits: Limits) -> None:
    """Make control groups with these limits; memory is that of processes and of files in memory."""
    values = {
        "pids.max": limits.processes, "memory.max": limits.memory, "memory.swap.max": 0,
        "memory.limit_in_bytes": limits.memory, "memory.memsw.limit_in_bytes": limits.memory,
    }  # fmt: skip
    for folder in folders:
        folder.mkdir()
        for file, value in values.items():
            if (folder / file).exists():
                (folder / file).write_text(str(value))


def remove_groups(folders: list[Path]) -> None:
    """Remove control groups as soon as their last process is buried."""
    for folder in folders:
        for _ in range(100):
            if not folder.exists():
                break
            try:
                folder.rmdir()
            except OSError:
                time.sleep(0.01)


class Docker:
    """Machines out of a Docker image. Raises ValueError, with a cure, where there can be none."""

    name = "docker"
    capabilities = (
        "CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE SYS_CHROOT "
        "AUDIT_WRITE SETFCAP"
    ).split()  # Docker's own but MKNOD and NET_RAW

    def __init__(self, limits: Limits, image: str = IMAGE):
        self.limits = limits
        self.image = image
        self.boxes: set[Box] = set()
        if self.ask("version") is None:
            raise ValueError("no daemon answers")
        if self.ask("image", "inspect", image) is None:
            raise ValueError(f"no image {image} is there; build it, or name another with --image")
        threading.Thread(target=self.watch, daemon=True).start()

    @staticmethod
    def ask(*command: str) -> str | None:
        """What a docker command says; None if it fails."""
        try:
            asked = subprocess.run(["docker", *command], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return asked.stdout if asked.returncode == 0 else None

    def open(self) -> Box:
        name = f"genpi-{secrets.token_hex(8)}"
        limits = self.limits
        flags = [f"--cap-add={capability}" for capability in self.capabilities]
        flags += "--cap-drop=ALL --network=none --ulimit=core=0 --log-driver=none".split()
        flags += f"--pull=never --rm --name={name} --workdir=/ --user=0".split()
        flags += [f"--pids-limit={limits.processes}"]
        flags += [f"--memory={limits.memory}", f"--memory-swap={limits.memory}"]
        # its first process ends with its standard input, as that in namespaces.py
        command = ["--entrypoint=bash", self.image, "-c", "echo made; read"]
        first = spawn(["docker", "run", "-i", *flags, *command])
        expect(first, b"made\n")
        end = partial(self.ask, "rm", "-f", name)
        # Docker would pass the two outputs on as two, in no order
        prefix = ["docker", "exec", "-i", name, "bash", "-c", 'exec "$@" 2>&1', "--"]
        box = Box(name, first, prefix, limits, end)
        self.boxes.add(box)
        return box

    def watch(self) -> None:
        """Wreck boxes that fill the disk, which not every storage driver bounds by itself."""
        while True:
            time.sleep(1)
            boxes = {box.name: box for box in list(self.boxes)}
            self.boxes -= {box for box in boxes.values() if box.first.poll() is not None}
            form = "{{.Name}} {{.SizeRw}}"
            told = self.ask("inspect", "--size", "--format", form, *boxes) if boxes else None
            for name, size in map(str.split, (told or "").splitlines()):
                if int(size) > self.limits.disk:
                    why = f"more than {self.limits.disk >> 20} MiB of files"
                    boxes[name.strip("/")].wreck(why)


KINDS = {"docker": Docker, "namespaces": Namespaces}


def find_sandbox(
    names: Iterable[str] = KINDS, image: str = IMAGE, limits: Limits = LIMITS
) -> Docker | Namespaces:
    """The first kind of sandbox that works here, tried with a command.

    Raises: ValueError that says what each lacks.
    """
    lacks = []
    for name in names:
        try:
            sandbox = Docker(limits, image) if name == "docker" else Namespaces(limits)
            with sandbox.open() as box:
                found = box.run(["bash", "-c", "echo $((6 * 7))"])
            if found == (0, "42\n"):
                return sandbox
            lacks.append(f"{name}: {found[1].strip()}")
        except (ValueError, Wrecked) as error:
            lacks.append(f"{name}: {error}")
    cure = "install Docker and start it, or work as root on Linux"
    raise ValueError(f"no sandbox for the commands of a model; {cure} ({'; '.join(lacks)})")
