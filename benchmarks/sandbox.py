"""Machines that a model may wreck: they run its commands, and the host takes no harm.

    Docker        where its daemon answers and has the image
    Namespaces    on Linux, as root (namespaces.py)

and never the host itself. A Box is one machine, with a login shell that lasts and with processes of
their own. It has no network and no folder of the host's, and ends at the latest when this process
does, however that ends (a Docker container that holds out against it, a day later). It is held to
its Limits; where that takes its end, it is Wrecked.

The kernel bounds processes and memory, by control groups. What we watch ourselves, as the time that
a command takes, we could be kept from watching by a thousand processes. So each machine is asked
for its bounds before anything runs there, and one that cannot prove them is no sandbox.

What reads from a terminal reads the shell's input instead. So `su` goes on as another user, and a
command that waits for an answer runs out of time.

Left out: terminals, several images.
"""

import os
import secrets
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
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


def spawn(command: list[str], stdin: int = subprocess.PIPE, **more) -> subprocess.Popen:
    """Start a process whose output is one pipe, out of reach of a Ctrl-C that is meant for us."""
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, start_new_session=True, **pipes, **more)


def give(process: subprocess.Popen, text: bytes) -> bytes:
    """Write what a process's input has room for -> the rest. Raises Wrecked if nobody reads it.

    It never waits: who runs there may have filled its own input, and not read it.
    """
    os.set_blocking(process.stdin.fileno(), False)
    try:
        return text[os.write(process.stdin.fileno(), text) :]
    except BlockingIOError:
        return text
    except BrokenPipeError:
        raise Wrecked("the shell has ended") from None


def expect(process: subprocess.Popen, line: bytes) -> None:
    """Raise ValueError, with all that a process says, if it does not say this line first."""
    said = process.stdout.readline()
    if said != line:
        process.kill()
        raise ValueError((said + process.communicate()[0]).decode(errors="replace").strip())


@dataclass(eq=False)
class Box:
    """A machine. `with` ends it."""

    first: subprocess.Popen  # the machine ends with it
    prefix: list[str]  # stands before a command that shall run there
    limits: Limits
    end: Callable[[], None]  # removes what is left of it
    door: tuple[int, ...] = ()  # open files that the prefix needs
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
        return spawn([*self.prefix, *command], stdin, pass_fds=self.door)

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
        told = asked.encode(errors="replace")
        return self.gather(self.shell, self.limits.seconds, word, told).partition(word)[0]

    def gather(
        self, process: subprocess.Popen, seconds: float, word: str = "", told: bytes = b""
    ) -> str:
        """What a process that is told a text writes until it says a word, or ends.

        Not what it writes until the pipe is closed, which those that it leaves behind hold open.
        Raises: Wrecked at a limit.
        """
        deadline = time.monotonic() + seconds
        pipe = process.stdout.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        output = bytearray()
        while True:
            told = told and give(process, told)
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
        groups: list[Path] = []
        try:
            groups = group_folders(f"genpi-{secrets.token_hex(8)}")
            make_groups(groups, self.limits)
            joined = ":".join(map(str, groups))
            first = spawn([*self.program, "make", joined, str(self.limits.disk)])
            expect(first, b"unshared\n")
            for users in ("uid_map", "gid_map"):
                Path(f"/proc/{first.pid}/{users}").write_text("0 0 65536")
            first.stdin.write(b"\n")
            first.stdin.flush()
            expect(first, b"made\n")
            child = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text()
            door = os.pidfd_open(int(child))
        except (OSError, ValueError) as error:
            remove_groups(groups)
            raise ValueError(f"this Linux allows none ({error})") from None
        prefix = [*self.program, "enter", joined, str(door)]

        def end() -> None:
            os.close(door)
            remove_groups(groups)

        return Box(first, prefix, self.limits, end, (door,))


def group_folders(name: str) -> list[Path]:
    """Folders of control groups, to be made, that bound processes and memory.

    Version 1 has a tree for each, and one in which all of a group get the share of the processor of
    one process. Version 2 has one tree, where a group can be made below the nearest that grants
    both to its children. Source: the kernel's cgroup-v1/ and cgroup-v2.rst.
    """
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    ours = {kind: path.strip("/") for _, kinds, path in lines for kind in kinds.split(",")}
    needed = {"pids", "memory"}
    if needed <= ours.keys():
        folders = {kind: GROUPS / kind / ours[kind] for kind in ("cpu", *needed) if kind in ours}
        return [
            folder / name for kind, folder in folders.items() if kind in needed or folder.is_dir()
        ]
    folder = GROUPS / ours.get("", "")
    for parent in (folder, *folder.parents):
        grants = parent / "cgroup.subtree_control"
        if grants.exists() and needed <= set(grants.read_text().split()):
            return [parent / name]
    raise ValueError("no control group grants pids and memory")


def make_groups(folders: list[Path], limits: Limits) -> None:
    """Make control groups with these limits; memory is that of processes and of files in memory.

    Raises: ValueError if the kernel does not give the limits back.
    """
    values = {
        "pids.max": limits.processes, "memory.max": limits.memory, "memory.swap.max": 0,
        "memory.limit_in_bytes": limits.memory, "memory.memsw.limit_in_bytes": limits.memory,
    }  # fmt: skip
    held = set()
    for folder in folders:
        folder.mkdir()
        for path in [folder / name for name in values if (folder / name).exists()]:
            path.write_text(str(values[path.name]))
            if int(path.read_text()) != values[path.name]:
                raise ValueError(f"{path} is not {values[path.name]} when it is told so")
            held.add(path.name)
    if "pids.max" not in held or not held & {"memory.max", "memory.limit_in_bytes"}:
        raise ValueError(f"{folders[0].parent}: no control groups that bound processes and memory")


def remove_groups(folders: list[Path]) -> None:
    """End what is left in control groups, and remove them."""
    for folder in folders:
        for _ in range(500):
            try:
                folder.rmdir()
            except FileNotFoundError:
                break
            except OSError:
                for pid in map(int, (folder / "cgroup.procs").read_text().split()):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)


class Docker:
    """Machines out of a Docker image. Raises ValueError, with a cure, where there can be none."""

    name = "docker"
    capabilities = (
        "CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE SYS_CHROOT "
        "AUDIT_WRITE SETFCAP"
    ).split()  # Docker's own but MKNOD and NET_RAW
    bounds = "pids.max pids/pids.max memory.max memory/memory.limit_in_bytes".split()  # v2, v1

    def __init__(self, limits: Limits, image: str = IMAGE):
        self.limits = limits
        self.image = image
        self.boxes: dict[str, Box] = {}
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
        # the first process tells its bounds, and ends with its standard input
        code = f"cd /sys/fs/cgroup; echo $(cat {' '.join(self.bounds)} 2>/dev/null); read -t 86400"
        first = spawn(["docker", "run", "-i", *flags, "--entrypoint=bash", self.image, "-c", code])
        end = partial(self.ask, "rm", "-f", name)
        try:
            expect(first, f"{limits.processes} {limits.memory}\n".encode())
        except ValueError as error:
            end()
            raise ValueError(f"a machine does not prove its bounds ({error})") from None
        # Docker would pass the two outputs on as two, in no order
        prefix = ["docker", "exec", "-i", name, "bash", "-c", 'exec "$@" 2>&1', "--"]
        box = Box(first, prefix, limits, end)
        self.boxes[name] = box
        return box

    def watch(self) -> None:
        """Wreck boxes that fill the disk, which not every storage driver bounds by itself."""
        while True:
            time.sleep(1)
            for name, box in list(self.boxes.items()):
                size = self.ask("inspect", "--size", "--format", "{{.SizeRw}}", name)
                if box.first.poll() is not None:
                    del self.boxes[name]
                elif size and int(size) > self.limits.disk:
                    box.wreck(f"more than {self.limits.disk >> 20} MiB of files")


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
