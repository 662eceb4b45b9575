"""What a model may run: the sandbox keeps a shell as it should be, and holds what it must.

The tests run in each kind of sandbox that works here, and are skipped for the others. None of them
can get out of hand: a sandbox that does not prove its bounds is refused, and so skipped.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import namespaces
from benchmarks.driver import Sample, play
from benchmarks.os_interaction import Problem, episode
from benchmarks.sandbox import (
    KINDS,
    Box,
    Docker,
    Limits,
    Namespaces,
    Wrecked,
    find_sandbox,
    make_groups,
    spawn,
)

LIMITS = Limits(output=1 << 20, processes=64, memory=1 << 27, disk=1 << 25)


@pytest.fixture(scope="module", params=KINDS)
def sandbox(request):
    return find(request.param)


def find(kind: str) -> Docker | Namespaces:
    try:
        return find_sandbox([kind], limits=LIMITS)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def box(sandbox):
    with sandbox.open() as box:
        box.open_shell()
        yield box


# -------------------------------------------------------------------------------- shell, processes


def test_the_shell_lasts(box):
    """Folder, variables and another user stay from one command to the next; mistakes end none."""
    assert box.execute("pwd; id -un; umask") == "/\nroot\n0022\n"
    assert box.execute("cd /tmp; x=3") == ""
    assert box.execute("echo $x; pwd; echo wrong >&2") == "3\n/tmp\nwrong\n"
    assert "unexpected EOF" in box.execute("echo 'it")
    assert box.execute("useradd -m -s /bin/bash ana && su - ana") == ""
    assert box.execute("id -un; pwd") == "ana\n/home/ana\n"
    box.execute("exit")
    assert box.execute("id -un; pwd") == "root\n/tmp\n"


def test_a_shell_that_was_left_has_ended(box):
    """exit ends it after what was said; the next command finds none, a process still runs."""
    assert box.execute("echo bye; exit 3; echo more") == "bye\n"
    with pytest.raises(Wrecked, match="the shell has ended"):
        box.execute("echo again")
    assert box.run(["echo", "here"]) == (0, "here\n")


def test_a_process_has_a_status_and_parameters(box):
    """Parameters arrive whole; a missing program is no error of ours; files are shared."""
    assert box.run(["bash", "-c", "echo $2 >&2; exit 3", "--", "a b", "c  d"]) == (3, "c d\n")
    assert box.run(["no-such-program"])[0] in (126, 127)
    box.execute("echo 7 > /srv/x")
    assert box.run(["cat", "/srv/x"]) == (0, "7\n")
    assert box.run(["bash", "-c", "ls | head -n 1"])[1].count("\n") == 1  # SIGPIPE ends ls


def test_a_command_ends_though_what_it_started_goes_on(box):
    """A child in the background holds the output open, which is not waited for."""
    assert box.execute("(sleep 1000; echo late) & echo now") == "now\n"
    assert box.run(["bash", "-c", "sleep 1000 & echo now"]) == (0, "now\n")


def test_boxes_know_nothing_of_each_other(sandbox):
    """What one writes the other has not, nor the same box opened again."""
    with sandbox.open() as one, sandbox.open() as other:
        one.run(["touch", "/srv/x", "/usr/x"])
        assert one.run(["ls", "/srv/x", "/usr/x"])[0] == 0
        assert other.run(["ls", "/srv/x", "/usr/x"])[1].count("cannot access") == 2


def test_a_command_that_waits_for_input_runs_out_of_time(sandbox):
    """There is nobody to answer it: what it reads is the end of the command."""
    with sandbox.open() as box:
        box.limits = Limits(seconds=0.5)
        box.open_shell()
        with pytest.raises(Wrecked, match="more than 0.5 s"):
            box.execute("cat")


def test_who_fills_the_shells_input_runs_out_of_time(sandbox):
    """What we tell a shell that reads nothing must not make us wait."""
    with sandbox.open() as box:
        box.open_shell()
        box.execute("exec 3>/proc/$$/fd/0; (sleep 0.2; kill -STOP $$; yes >&3) > /dev/null 2>&1 &")
        time.sleep(0.5)
        box.limits = Limits(seconds=0.5)
        with pytest.raises(Wrecked, match="more than 0.5 s"):
            box.execute(f"echo {'x' * 100_000}")


# ------------------------------------------------------------------------------------------- bounds


def test_without_bounds_there_is_no_sandbox(tmp_path, monkeypatch):
    """Folders that are no control groups are refused before anything is started."""
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("benchmarks.sandbox.group_folders", lambda name: [tmp_path / name])
    monkeypatch.setattr("benchmarks.sandbox.spawn", None)
    with pytest.raises(ValueError, match="no control groups that bound processes and memory"):
        Namespaces(LIMITS).open()
    assert not list(tmp_path.iterdir())


def test_a_limit_that_is_not_kept_is_refused(tmp_path, monkeypatch):
    """The kernel must give the number back."""
    (tmp_path / "group").mkdir()
    (tmp_path / "group/pids.max").symlink_to("/dev/null")
    monkeypatch.setattr(Path, "mkdir", lambda path: None)
    with pytest.raises(ValueError):
        make_groups([tmp_path / "group"], LIMITS)


def test_who_is_in_no_group_runs_nothing(tmp_path):
    """A process that the kernel does not list in its control group ends."""
    with pytest.raises(OSError, match="did not get into"):
        namespaces.join(str(tmp_path))


def test_docker_without_bounds_is_no_sandbox(monkeypatch):
    """A daemon whose kernel cannot bound processes drops that flag with a warning."""
    monkeypatch.setattr(Docker, "ask", staticmethod(lambda *command: ""))
    said = ["sh", "-c", "echo max 134217728; read x"]
    monkeypatch.setattr("benchmarks.sandbox.spawn", lambda command: spawn(said))
    with pytest.raises(ValueError, match="does not prove its bounds.*max 134217728"):
        Docker(LIMITS).open()


def test_every_command_is_bounded(sandbox):
    """A process that is let in later counts like those that it starts."""
    with sandbox.open() as box:
        box.open_shell()
        box.execute("for i in {1..40}; do sleep 1000 & done")
        said = box.run(["sh", "-c", "for i in $(seq 40); do sleep 1000 & done"])[1]
        assert "Cannot fork" in said or "temporarily unavailable" in said  # dash, bash


def test_who_lets_a_command_in_stays_outside():
    """Else its Python, which may still do all, would import what a model has written."""

    def files_of(pid: int) -> str:
        return os.readlink(f"/proc/{pid}/ns/mnt")

    with find("namespaces").open() as box:
        door = box.start(["sleep", "1000"], subprocess.DEVNULL)
        children = Path(f"/proc/{door.pid}/task/{door.pid}/children")
        wait_until(children.read_text)
        child = int(children.read_text())
        wait_until(lambda: files_of(child) != files_of(os.getpid()))
        assert files_of(door.pid) == files_of(os.getpid())
    door.communicate()


# ------------------------------------------------------------------------------------------ attacks


def attack(sandbox, code: str, seconds: float = LIMITS.seconds) -> list[str]:
    """An agent that runs some code and gives a wrong answer, and then one that gives the right one.

    Returns what the first reads, and how it ends. Asserts that the run goes on and leaves nothing.
    """

    def opened() -> Box:
        boxes.append(sandbox.open())
        boxes[0].limits = replace(LIMITS, seconds=seconds)
        return boxes[-1]

    def agent(games) -> list[str]:
        bad = [f"Act: bash\n\n```bash\n{code}\n```", "Act: answer(8)"]
        return [bad[len(g.texts) // 2] if g.sample.id == "bad" else "Act: answer(7)" for g in games]

    boxes: list[Box] = []
    problem = Problem("x", "Say 7.", answer="7")
    samples = [Sample(name, "", lambda: episode(problem, opened)) for name in ("bad", "good")]
    games = {game.sample.id: game for game in play(samples, agent, at_once=1)}
    assert games["bad"].result["score"] == 0
    assert games["good"].result["score"] == 1
    assert all(box.first.poll() is not None for box in boxes)
    return [*games["bad"].texts[2:3], games["bad"].result["ended"]]


def test_rm_rf_root(sandbox):
    """Everything is deleted, and nothing of the host."""
    before = {path: path.stat() for path in map(Path, ("/usr/bin/env", "/etc/passwd", "/dev/null"))}
    attack(sandbox, "rm -rf --no-preserve-root /etc /home /root /opt /dev /usr/bin /proc /", 3)
    assert {path: path.stat().st_mode for path in before} == {
        path: stat.st_mode for path, stat in before.items()
    }


def test_fork_bomb(sandbox):
    """No more processes are made than are allowed, and none is left."""
    test_every_command_is_bounded(sandbox)  # else the bomb is not thrown

    def shells() -> int:
        return [line.strip() for line in command_lines()].count("bash --login")

    before = shells()
    most = before
    code = "bomb() { bomb | bomb & }; bomb; sleep 1"
    with ThreadPoolExecutor(1) as pool:
        thrown = pool.submit(attack, sandbox, code, 2)
        while not thrown.done():
            most = max(most, shells())
            time.sleep(0.05)
    thrown.result()
    assert 3 < most - before <= LIMITS.processes
    wait_until(lambda: shells() <= before)


def test_endless_loop(sandbox):
    """It has its seconds."""
    assert attack(sandbox, "while :; do :; done", 0.5) == ["a command took more than 0.5 s"]


def test_endless_output(sandbox):
    """It has its bytes."""
    assert attack(sandbox, "yes") == ["a command wrote more than 1,048,576 bytes"]


def test_full_disk(sandbox):
    """No more is written than there is room for, and the host's disk stays as it was."""
    free = shutil.disk_usage("/tmp").free
    ended = attack(sandbox, "head -c 1G /dev/zero > /home/big; head -c 1G /dev/zero > /usr/big")
    assert "No space left" in ended[0] or "more than 32 MiB of files" in ended[0]
    assert shutil.disk_usage("/tmp").free > free - (1 << 28)


def test_full_memory(sandbox):
    """Who takes too much is ended."""
    said, _ = attack(sandbox, "tail /dev/zero || echo $?")
    assert "137" in said


def test_the_hosts_home_is_not_there(sandbox, tmp_path):
    """Neither a home, nor a temporary folder, nor a password, nor a variable of the host."""
    (tmp_path / "secret").write_text("open sesame")
    os.environ["SECRET"] = "open sesame"
    home = " ".join(map(str, (tmp_path, Path.home(), "/home", Path(__file__).parent)))
    said, _ = attack(sandbox, f"cat {tmp_path}/secret; ls -A {home}; env; cat /etc/shadow")
    del os.environ["SECRET"]
    assert "sesame" not in said
    assert "test_sandbox" not in said and "$" not in said
    found = Path.home().iterdir() if Path.home() != Path("/root") else []
    assert not [path.name for path in found if path.name in said.split()]


def test_no_network(sandbox):
    """Not even the host's own ports can be reached."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"echo hello > /dev/tcp/127.0.0.1/{port} && echo sent; cat /proc/net/dev"
        said, _ = attack(sandbox, code)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert "refused" in said and "sent" not in said
    assert [line.split(":")[0].strip() for line in said.splitlines() if ":" in line][-1:] == ["lo"]


def test_nothing_is_left_behind(sandbox):
    """What a problem starts in the background ends with it, however it detaches itself."""
    mark = f"{os.getpid()}.25"
    attack(sandbox, f"sleep 7{mark} & nohup setsid sleep 8{mark} & (sleep 9{mark} &) ; disown -a")
    time.sleep(0.2)
    assert not [line for line in command_lines() if mark in line and "sleep" in line]


def command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_a_killed_run_leaves_nothing(tmp_path):
    """A kill -9 of our process ends the machine, though that holds its first process's input."""
    mark = f"sleep 7{os.getpid()}.5"
    code = f"exec 3<>/proc/1/fd/0 >/dev/null; {mark}"
    script = f"""if True:
        import os, signal, time
        from pathlib import Path
        from benchmarks.sandbox import find_sandbox
        box = find_sandbox(["namespaces"]).open()
        box.start(["bash", "-c", {code!r}], -3)
        while not Path({str(tmp_path)!r}, "go").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    find("namespaces")
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", script], cwd=root) as process:
        wait_until(lambda: [line for line in command_lines() if line.strip() == mark])
        (tmp_path / "go").touch()
        assert process.wait() == -signal.SIGKILL
    wait_until(lambda: not [line for line in command_lines() if mark in line])


def wait_until(true: Callable[[], object]) -> None:
    """Wait for at most 20 s. Raises AssertionError then."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_no_way_out_through_proc(sandbox):
    """What steers the kernel cannot be written; the first process is one of its own."""
    path = Path("/proc/sys/kernel/core_pattern")
    before = path.read_text()
    said, _ = attack(
        sandbox,
        f"echo '|/tmp/x' > {path}; echo c > /proc/sysrq-trigger; mount -o remount,rw /proc; "
        f"echo '|/tmp/x' > {path}; ls /proc/1/root/; kill -9 1; cat /proc/kcore | head -c 1",
    )
    assert path.read_text() == before
    assert said.count("Read-only file system") >= 2
    assert "denied" in said or "not permitted" in said


def test_no_way_out_through_devices_and_mounts(sandbox):
    """No device can be made, nothing be mounted, no namespace be entered, no node be changed."""
    mode = Path("/dev/null").stat().st_mode
    said, _ = attack(
        sandbox,
        "mknod /tmp/disk b 254 0 || echo no 1; mount -t tmpfs none /mnt || echo no 2\n"
        "unshare --user --mount true || echo no 3; unshare --mount true || echo no 4\n"
        "nsenter --target 1 --mount true || echo no 5; chmod 000 /dev/null; rm -f /dev/null\n"
        "ls /sys/class /dev/sd* /dev/vd* /dev/mem || echo no 6",
    )
    assert [f"no {i}" for i in range(1, 7)] == [x for x in said.splitlines() if x[:3] == "no "]
    assert Path("/dev/null").stat().st_mode == mode
