"""A Linux machine of its own, made of the host's /usr and /etc by namespaces and overlays.

    what it sees      /usr and /etc (and /bin, /lib ... which lead there) as the host has them, less
                      the host's people and what not all of them may read; everything else is new:
                      no home, no disk, no /sys; /proc shows its own processes
    what it changes   is kept in memory, in one file system of limited size, and ends with it
    what it may       its root is root of a user namespace, and may chown, kill, or be another user;
                      it may not mount, make devices, open a network or make further namespaces

Root has the same number there as on the host. So whatever is the host's own is mounted read-only:
/proc (else kernel.core_pattern would lead out) and the devices (else chmod /dev/null would be felt
outside). Namespaces are no virtual machine: they hold what a model does by mistake, not somebody
who has a hole in the kernel at hand.

This file is also a program, of the standard library alone, which sandbox.py starts as root:

    namespaces.py make GROUPS BYTES           a machine with so much room on its disk; it ends with
                                              this process, and this with its standard input
    namespaces.py enter GROUPS FD COMMAND     a command in it; exits as the command does

GROUPS are folders of control groups, parted by colons, which bound its processes and memory. FD is
a pidfd of the first process of the machine.

Nothing that can still do more than the machine may runs Python after it has gone in, but what leads
to an exec: an import would read files that the model may have written.

Left out: other users than root, who cannot bring users of their own. Sources: namespaces(7),
setns(2), capabilities(7), pivot_root(2), the kernel's Documentation/filesystems/overlayfs.rst.
"""

import ctypes
import fcntl
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
NAMESPACES = {  # name in /proc/PID/ns: flag; the user's comes first, since it owns the others
    "user": 0x10000000, "mnt": 0x20000, "pid": 0x20000000, "net": 0x40000000,
    "ipc": 0x8000000, "uts": 0x4000000, "cgroup": 0x2000000,
}  # fmt: skip
READ_ONLY, NO_SUID, NO_DEV, NO_EXEC = 1, 2, 4, 8  # of mount
REMOUNT, BIND, RECURSIVE, PRIVATE = 0x20, 0x1000, 0x4000, 0x40000
DETACH = 2  # of umount2
PARENT_DIES, DUMPABLE, DROP_BOUNDING = 1, 4, 24  # of prctl
INTERFACE_FLAGS = 0x8914  # of ioctl

# chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, sys_chroot,
# audit_write, setfcap: what Docker leaves to a container, but mknod and net_raw
CAPABILITIES = {0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 29, 31}
SHARED = "bin sbin lib lib32 lib64 libx32 usr etc".split()
FRESH = "dev/pts dev/shm home media mnt opt proc root run srv sys tmp var/cache var/lib var/log"
FRESH = f"{FRESH} var/mail var/spool var/tmp".split()
LOGS = "btmp faillog lastlog wtmp".split()
FOR_ALL = "tmp var/tmp dev/shm".split()
DEVICES = "full null random tty urandom zero".split()
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb",
}  # fmt: skip
PLACE = Path("/tmp")  # where the file system is put together, unseen by the host
ROOT = PLACE / "root"


def call(name: str, *args) -> None:
    """Call a function of the C library that returns 0. Raises OSError if it does not."""
    if getattr(LIBC, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, target: Path, kind: str, flags: int = 0, options: str = "") -> None:
    names = [text.encode() for text in (source, str(target), kind)]
    call("mount", *names, ctypes.c_ulong(flags), options.encode())


def prctl(option: int, value: int = 0) -> bool:
    """Set an attribute of this process. Returns whether the kernel knows it."""
    return LIBC.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))) == 0


# ----------------------------------------------------------------------------------------- make


def make(size: int) -> int:
    """Start the first process of a new machine and wait for its end.

    Says "unshared" and waits for a byte: by then the parent must have mapped the users, which only
    a process outside can. Then says "made".
    """
    call("unshare", NAMESPACES["mnt"])  # a first one, so that the host does not see what is mounted
    build(size)
    call("unshare", sum(NAMESPACES.values()))
    print("unshared", flush=True)
    if not os.read(0, 1):
        return 1
    waits, _ = os.pipe()  # for what never comes; it has no link to the host's standard input
    if os.fork():  # the pid namespace begins with a child
        try:
            os.read(0, 1)
        finally:
            os._exit(0)  # and so the child: no process in there can hold this one up
    prctl(PARENT_DIES, signal.SIGKILL)
    settle()
    print("made", flush=True)
    os.dup2(waits, 0)
    for output in (1, 2):
        os.dup2(os.open("/dev/null", os.O_WRONLY), output)
    drop_capabilities()
    # bash, since it buries orphans; with it all processes end
    return os.execve("/bin/bash", ["bash", "-c", "read"], ENVIRONMENT)


def build(size: int) -> None:
    """Put the file system together at ROOT, with room for so many bytes."""
    mount("none", Path("/"), "none", RECURSIVE | PRIVATE)
    mount("tmpfs", PLACE, "tmpfs", NO_DEV, f"size={size},nr_inodes=200k,mode=755")
    for name in FRESH:
        (ROOT / name).mkdir(parents=True)
        (ROOT / name).chmod(0o1777 if name in FOR_ALL else 0o755)
    for name in LOGS:
        (ROOT / "var/log" / name).touch()
    for name in SHARED:
        share(name)
    forget(ROOT / "etc")
    forget_people()
    add_devices()


def settle() -> None:
    """Go into the file system for good, and give up what could undo that."""
    for kind in NAMESPACES:  # this binds all that belong to the user namespace
        Path(f"/proc/sys/user/max_{kind}_namespaces").write_text("0")
    socket.sethostname("sandbox")
    request = struct.pack("16sH14x", b"lo", 1)  # up
    fcntl.ioctl(socket.socket(), INTERFACE_FLAGS, request)
    mount(str(ROOT), ROOT, "none", BIND | RECURSIVE)  # pivot_root wants a mount of this namespace
    mount("proc", ROOT / "proc", "proc", READ_ONLY | NO_SUID | NO_DEV | NO_EXEC)
    pts = ROOT / "dev/pts"
    mount("devpts", pts, "devpts", NO_SUID | NO_EXEC, "newinstance,ptmxmode=0666,mode=620")
    os.chdir(ROOT)
    subprocess.run(["pivot_root", ".", "."], check=True)  # which the C library has not
    call("umount2", b".", DETACH)  # the host's root, on top of ours since
    os.chdir("/")


def share(name: str) -> None:
    """Let a folder of the host's root be seen: a link as it is, a folder under an overlay."""
    host = Path("/", name)
    if host.is_symlink():
        (ROOT / name).symlink_to(os.readlink(host))
    elif host.is_dir():
        upper = PLACE / "upper" / name
        work = PLACE / "work" / name
        for folder in (upper, work, ROOT / name):
            folder.mkdir(parents=True)
        options = f"lowerdir={host},upperdir={upper},workdir={work}"
        mount("overlay", ROOT / name, "overlay", NO_DEV, options)


def forget(folder: Path) -> None:
    """Leave out what not everybody may read."""
    for path in folder.iterdir():
        if path.is_symlink():
            continue
        mode = path.stat().st_mode
        if path.is_dir():
            forget(path) if mode & 0o1 else shutil.rmtree(path)
        elif not mode & 0o4:
            path.unlink()


def forget_people() -> None:
    """Leave out the host's people and their passwords; give root an empty home."""
    for name, shadow, line in (
        ("passwd", "shadow", "{}:*:19000:0:99999:7:::\n"),
        ("group", "gshadow", "{}:*::\n"),
    ):
        path = ROOT / "etc" / name
        known = [told.split(":") for told in path.read_text().splitlines()]
        known = [told for told in known if told[2:] and told[2].isdecimal()]
        kept = [told for told in known if int(told[2]) < 1000 or int(told[2]) == 65534]
        path.write_text("".join(":".join(told) + "\n" for told in kept))
        (ROOT / "etc" / shadow).write_text("".join(line.format(told[0]) for told in kept))
        (ROOT / "etc" / shadow).chmod(0o640)
    (ROOT / "root").chmod(0o700)
    for name in (".bashrc", ".profile"):
        skeleton = ROOT / "etc/skel" / name
        if skeleton.exists():
            (ROOT / "root" / name).write_bytes(skeleton.read_bytes())


def add_devices() -> None:
    """The devices that hold nothing. Read-only is the node, its mode and owner, not what it is."""
    dev = ROOT / "dev"
    for name in DEVICES:
        (dev / name).touch()
        mount(f"/dev/{name}", dev / name, "none", BIND)
        mount("none", dev / name, "none", BIND | REMOUNT | READ_ONLY | NO_SUID | NO_EXEC)
    links = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd"}
    links |= {name: f"/proc/self/fd/{i}" for i, name in enumerate(("stdin", "stdout", "stderr"))}
    for name, target in links.items():
        (dev / name).symlink_to(target)


# ---------------------------------------------------------------------------------------- enter


def enter(first: int, command: list[str]) -> int:
    """Run a command in the machine with this first process, a pidfd -> its exit status."""
    prctl(DUMPABLE, 0)  # nobody in there shall look at this process while it still has everything
    call("setns", first, NAMESPACES["pid"])  # of the children; this process stays outside
    child = os.fork()
    if child == 0:
        try:
            call("setns", first, sum(NAMESPACES.values()))
            os.close(first)
            drop_capabilities()
            os.umask(0o022)
            os.execvpe(command[0], command, ENVIRONMENT)
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


def join(groups: str) -> None:
    """Put this process, and so its children, into control groups, and behind all others.

    Python ignores two signals, which children inherit, so that `ls | head` would complain.
    Raises: OSError if the kernel does not list it there, so that nothing runs unbounded.
    """
    for group in groups.split(":"):
        members = Path(group, "cgroup.procs")
        members.write_text("0")
        if str(os.getpid()) not in members.read_text().split():
            raise OSError(f"{members}: this process did not get into the control group")
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    Path("/proc/self/oom_score_adj").write_text("1000")
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def drop_capabilities() -> None:
    """From the next exec on, root is left those of CAPABILITIES and can get no other."""
    number = 0
    while number in CAPABILITIES or prctl(DROP_BOUNDING, number):
        number += 1


def main(argv: list[str]) -> int:
    what, groups, number, *command = argv
    try:
        join(groups)
        return enter(int(number), command) if what == "enter" else make(int(number))
    except (OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", flush=True)
        return 125


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
