"""Runs a program that nobody has read, and brings back plain data.

    with Sandbox() as sandbox:
        with sandbox.open(program, entry_point="solve") as run:
            run.call([3], {}, seconds=1.0).value        # 9
        sandbox.script(program, stdin="3\\n", seconds=1.0).stdout

The caller keeps the expected outputs; they never enter the sandbox. Inputs enter one call at a time. What comes back is
bounded JSON text, never unpickled or evaluated, and only ever a claim: whoever forges a reply must know the right
output to gain by it. Knows nothing of tests or scores. Neighbours: `jail` is the inside; `code` and `arc` judge with
it.

Levels of isolation, in each `level` and so in each verdict:
    namespaces   own user, pid, mount, net, ipc, uts and cgroup namespaces through a warm fork server; fresh pid, mount
                 and ipc namespaces for every run. Needs unprivileged user namespaces, or root. Nothing has to be
                 installed.
    bubblewrap   the same walls built by `bwrap` anew for each run, which is slower: for machines that allow new user
                 namespaces to bwrap alone. The program shares its user with the server there, and may end it; that
                 counts against the program.
    none         rlimits only. Never chosen by itself: the program could read and write whatever this process can.

What stands in the way of a program: no file of the machine but system libraries, commands, Python's standard library
and numpy, all read-only (other packages are hidden: they may hold benchmarks with answers); no network; no
capabilities, no way to new ones, none to further namespaces; an empty tmpfs of bounded size; bounds on memory (per
process by rlimit, together by the server's watch), processes, open files, wall-clock time and output; its end ends all
it started.

What it does not stop: a hole in the kernel's system calls, which are filtered but not emulated (on processors other
than x86-64 not filtered either, which leaves a virtual machine's vsock open); side channels such as timing and caches;
loading the machine within its limits while it runs; a memory burst in the 10 ms between two looks of the watch, up to
the number of processes times the rlimit (where a container masks /proc there is no watch); and a program that learns
its inputs and guesses. It is built against what a policy under optimisation finds; against people, put a virtual
machine around it.
"""

from __future__ import annotations

import array
import importlib.util
import json
import marshal
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from verifiers import jail

LEVELS = ("namespaces", "bubblewrap", "none")
GRACE_S = 1.0  # how long the server may take to answer before it is given up and killed


@dataclass(frozen=True)
class Limits:
    """What one run may take. `output_bytes` bounds what it prints, and each reply."""

    memory_mb: int = 512
    processes: int = 20  # threads count
    disk_mb: int = 64
    output_bytes: int = 4 << 20


@dataclass(frozen=True)
class Reply:
    """What a call came to: a value, or `error` says why there is none. `over`: the run has ended with it."""

    value: Any = None
    error: str = ""
    over: bool = False


@dataclass(frozen=True)
class Output:
    """What a script printed and how it ended. `error` is "" when it ended by itself with status 0."""

    stdout: str
    stderr: str
    error: str


class NoIsolation(RuntimeError):
    """The machine offers no isolation at all, or not the one asked for."""


class Sandbox:
    """A server for runs, one at a time; started when first needed, and again when lost. For one thread at a time."""

    def __init__(
        self, isolation: str = "auto", limits: Limits = Limits(), packages: tuple[str, ...] = ("numpy",)
    ) -> None:
        if isolation not in ("auto", *LEVELS):
            raise ValueError(f'isolation="{isolation}": choose one of auto, {", ".join(LEVELS)}')
        self.isolation, self.limits, self.packages = isolation, limits, packages
        self._server: _Server | None = None

    @property
    def level(self) -> str:
        """The isolation in use."""
        return detect() if self.isolation == "auto" else self.isolation

    def open(self, program: str, *, entry_point: str, limits: Limits | None = None, seconds: float = 5.0) -> Run:
        """Start the program and load it, within `seconds`; then `call` it."""
        run = self._begin({"mode": "call", "code": program, "entry_point": entry_point}, limits)
        run.loaded = run.reply(seconds)
        return run

    def script(self, program: str, *, stdin: str, seconds: float, limits: Limits | None = None) -> Output:
        """Run the program as a script to its end."""
        with self._begin({"mode": "stdio", "code": program}, limits) as run:
            return run.communicate(stdin.encode("utf-8", "surrogatepass"), seconds)

    def _begin(self, order: dict[str, str], limits: Limits | None) -> Run:
        for _ in range(2):  # a server that died since the last run is replaced once
            if self._server is None or self._server.lost or self._server.process.poll() is not None:
                self.close()
                self._server = _Server(self.level, _folders(self.packages))
            try:
                return Run(self._server, order, limits or self.limits)
            except OSError:
                self._server.lost = True
        raise RuntimeError(f'the sandbox ("{self.level}") was lost twice before a program could start')

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Run:
    """One program in the sandbox. Leaving the `with` block ends it and all that it started."""

    def __init__(self, server: _Server, order: dict[str, str], limits: Limits) -> None:
        self._server, self._limits = server, limits
        pipes = [os.pipe() for _ in range(5)]  # stdin, stdout, stderr, requests, replies
        inside = [pipes[0][0], pipes[1][1], pipes[2][1], pipes[3][0], pipes[4][1]]
        outside = [pipes[0][1], pipes[1][0], pipes[2][0], pipes[3][1], pipes[4][0]]
        self._stdin, self._stdout, self._stderr, self._requests, self._replies = outside
        for fd in outside:
            os.set_blocking(fd, False)
        self._to_send = {self._requests: _request(order)}
        self._got = {fd: bytearray() for fd in (self._stdout, self._stderr, self._replies)}
        tails = (self._stderr,) if order["mode"] == "stdio" else (self._stderr, self._stdout)
        self._tails = tails  # of which only the end is kept
        self._open = set(outside)
        self._why = ""  # why it ended, once it has
        self._ended = False
        self.cpu_s = 0.0
        self.loaded = Reply()
        try:
            server.start(inside, limits)
        except OSError:
            for fd in outside:
                os.close(fd)
            raise
        finally:
            for fd in inside:
                os.close(fd)

    def call(self, args: list[Any], kwargs: dict[str, Any], *, seconds: float) -> Reply:
        """The program's function on these arguments."""
        call = jail.encode({"args": list(args), "kwargs": dict(kwargs)})
        self._to_send[self._requests] = _request(jail.decode(json.loads(call)))
        return self.reply(seconds)

    def reply(self, seconds: float) -> Reply:
        """The next line on the reply pipe."""
        got, deadline = self._got[self._replies], time.monotonic() + seconds
        while b"\n" not in got:
            if self._replies not in self._open or not self._pump(deadline):
                return Reply(error=self._why or "it ended without a reply", over=True)
            if len(got) > self._limits.output_bytes:
                self._end("output")
                return Reply(error="output limit exceeded", over=True)
        line, _, rest = bytes(got).partition(b"\n")
        got[:] = rest
        try:
            message = json.loads(line)
            if "error" in message:
                return Reply(error=str(message["error"])[:300])
            return Reply(value=jail.decode(message.get("value")))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
            return Reply(error="its reply is not plain data")

    def communicate(self, stdin: bytes, seconds: float) -> Output:
        self._to_send[self._stdin] = stdin
        deadline = time.monotonic() + seconds
        while self._pump(deadline):
            if len(self._got[self._stdout]) > self._limits.output_bytes:
                self._end("output")
        stdout, stderr = (self._got[fd].decode("utf-8", "replace") for fd in (self._stdout, self._stderr))
        return Output(stdout, stderr[-2000:], self._why)

    def _pump(self, deadline: float) -> bool:
        """Move bytes until something has happened. False once the run has ended and all it wrote is read."""
        if self._ended and not self._open & {self._stdout, self._stderr, self._replies}:
            return False
        poll = select.poll()
        for fd in tuple(self._open):
            if fd in self._got:
                poll.register(fd, select.POLLIN)
            elif self._to_send.get(fd):
                poll.register(fd, select.POLLOUT)
            elif fd == self._stdin:
                self._close(fd)  # all is sent: end of file
        control = self._server.control.fileno()
        if not self._ended:
            poll.register(control, select.POLLIN)
        left = deadline - time.monotonic()
        if self._ended and left <= 0:
            return False  # without isolation, a process that got away may hold its pipes for ever
        events = poll.poll(max(0, int(left * 1000) + 1))
        for fd, _ in events:
            if fd in self._got:
                self._read(fd)
            elif fd in self._to_send:
                self._write(fd)
        if any(fd == control for fd, _ in events):
            self._report()
        elif left <= 0 and not self._ended:
            self._end("time")
        return True

    def _read(self, fd: int) -> None:
        try:
            part = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        if not part:
            self._close(fd)
        elif fd in self._tails:
            self._got[fd] = (self._got[fd] + part)[-4000:]
        else:
            self._got[fd] += part

    def _write(self, fd: int) -> None:
        try:
            self._to_send[fd] = self._to_send[fd][os.write(fd, self._to_send[fd][: 1 << 16]) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._to_send[fd] = b""
            self._close(fd)

    def _close(self, fd: int) -> None:
        self._open.discard(fd)
        os.close(fd)

    def _end(self, why: str) -> None:
        """Kill the run, and wait until nothing of it is left."""
        if not self._ended:
            self._why = f"{why} limit exceeded" if why else ""
            self._server.kill()
            self._report()

    def _report(self) -> None:
        """Read how the run ended. All its processes are gone by then."""
        self._ended = True
        report = self._server.report()
        if report is None:
            self._why = self._why or "the sandbox died with the program"
            return
        status, exceeded, self.cpu_s, trouble = report
        if exceeded == jail.SETUP_FAILED:
            raise RuntimeError(f"the sandbox could not start a program: {trouble}")
        if exceeded in (b"memory", b"procs"):
            self._why = {b"memory": "memory", b"procs": "process"}[exceeded] + " limit exceeded"
        elif not self._why and os.WIFSIGNALED(status):
            self._why = f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
        elif not self._why and os.WEXITSTATUS(status):
            self._why = f"exit status {os.WEXITSTATUS(status)}"

    def close(self) -> None:
        self._end("")
        for fd in tuple(self._open):
            self._close(fd)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _request(message: Any) -> bytes:
    """A message for the inside. Inwards `marshal` may be used: this side is trusted, and both are the same Python."""
    data = marshal.dumps(message)
    return len(data).to_bytes(4, "big") + data


class _Server:
    """The outer end of a `jail` server."""

    def __init__(self, level: str, packages: tuple[str, ...]) -> None:
        self.level, self.lost = level, False
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = theirs.fileno()
        # bwrap maps its caller's user into the sandbox, and the kernel exempts root from process limits
        other = 2_000_000_000 + os.getpid() if level == "bubblewrap" and os.geteuid() == 0 else None
        self.process = subprocess.Popen(
            _command(level, fd, packages),
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={
                "PATH": "/usr/bin:/bin",
                "HOME": "/tmp",
                "LANG": "C.UTF-8",
                "PYTHONHASHSEED": "0",
                "MALLOC_ARENA_MAX": "2",
                "OPENBLAS_NUM_THREADS": "1",
            },
            start_new_session=True,
            user=other,
            group=other,
            extra_groups=None if other is None else [],
        )
        theirs.close()
        self.control.settimeout(10.0)
        try:
            ready = self.control.recv(64)
        except OSError:
            ready = b""
        if ready != b"ready":
            self.control.close()
            self.process.kill()
            said = self.process.communicate()[1].decode(errors="replace").strip().splitlines()
            raise NoIsolation(f'isolation "{level}" does not work here: {said[-1] if said else "no answer"}')
        self.process.stderr.close()
        self.control.settimeout(GRACE_S)

    def start(self, fds: list[int], limits: Limits) -> None:
        header = jail.HEADER.pack(limits.memory_mb << 20, limits.processes, limits.disk_mb << 20)
        self.control.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])

    def kill(self) -> None:
        try:
            self.control.send(b"kill")
        except OSError:
            pass  # it is gone: `report` finds that out

    def report(self) -> tuple[int, bytes, float, str] | None:
        """Wait status, what was exceeded, CPU seconds and trouble of the run; None when the server is lost."""
        try:
            data = self.control.recv(1000)
        except OSError:
            data = b""
        self.lost = not data or self.level == "bubblewrap"
        if not data:
            self.close()
            return None
        size = jail.REPORT.size
        status, exceeded, cpu_s = jail.REPORT.unpack(data[:size])
        return status, exceeded.rstrip(b"\0"), cpu_s, data[size:].decode(errors="replace")

    def close(self) -> None:
        self.control.close()  # at which it ends itself and all below it
        try:
            self.process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@cache
def _folders(packages: tuple[str, ...]) -> tuple[str, ...]:
    """Where the installed ones of these packages are, and the libraries that wheels put beside them."""
    specs = [importlib.util.find_spec(name) for name in packages]
    found = [Path(spec.submodule_search_locations[0]) for spec in specs if spec and spec.submodule_search_locations]
    beside = [folder.with_name(f"{folder.name}.libs") for folder in found]
    return tuple(str(path) for path in (*found, *beside) if path.is_dir())


def _command(level: str, fd: int, packages: tuple[str, ...]) -> list[str]:
    python = [_python(), "-I", "-S", "-X", "utf8"]
    if level != "bubblewrap":
        compiled = jail.__cached__ or ""  # compiling anew is a quarter of a cold start
        return [*python, compiled if os.path.exists(compiled) else jail.__file__, level, str(fd), *packages]
    walls = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    walls += ["--tmpfs", "/", "--proc", "/proc", "--dev", "/dev"]
    for path in [*jail.readable_paths(), str(Path(_python()).parent)]:
        walls += ["--ro-bind", path, path]
    for path in packages:
        walls += ["--ro-bind", path, f"{jail.PACKAGES}/{Path(path).name}"]
    for path in jail.hidden_paths():
        walls += ["--tmpfs", path]
    for path in ("/bin", "/lib", "/lib64"):
        walls += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind-try", path, path]
    return [*walls, "--size", str(64 << 20), "--tmpfs", "/tmp", "--ro-bind", jail.__file__, "/jail.py",
            *python, "/jail.py", level, str(fd), *packages]  # fmt: skip


@cache
def _python() -> str:
    """The interpreter itself: a virtual environment's link needs files that are not visible inside."""
    return os.path.realpath(sys.executable)


@cache
def detect() -> str:
    """The strongest isolation that works on this machine, found by trying. Raises NoIsolation when none does."""
    troubles = []
    for level in LEVELS[:-1]:
        if level == "bubblewrap" and shutil.which("bwrap") is None:
            troubles.append("bubblewrap: not installed")
            continue
        try:
            with Sandbox(level) as sandbox:
                said = sandbox.script("print(6 * 7)", stdin="", seconds=5.0)
            if said.stdout == "42\n":
                return level
            troubles.append(f"{level}: {said.error or said.stdout!r}")
        except (OSError, RuntimeError) as error:
            troubles.append(str(error))
    raise NoIsolation(
        "no isolation for running programs on this machine: allow unprivileged user namespaces (sysctl "
        "user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns) "
        'or install bubblewrap; isolation="none" runs programs unprotected. Tried: ' + "; ".join(troubles)
    )
