"""Judges in worker processes that can be killed: a deadline per verdict, and a lost worker is replaced.

    one thread of the caller's process  <-- a socket each -->  workers: judge, one response after another
          |                                                       ^ fork
          +-----------------------------------------------> nursery: has the judges imported

A text that hangs a parser cannot be interrupted from within (the interpreter's lock may be held, signals reach the main
thread only), so it is judged in a process that is killed. Replacing a process must then be cheap: workers are forked
from a small single-threaded process, the nursery, which has imported the judges. Nothing is forked from the caller,
which may hold threads and a GPU, and no signal handler is used, so any thread and any event loop may ask.
(A pool that starts a fresh interpreter in place of a killed one, such as pebble's, took 3.4 s over ten responses that
hang for 0.2 s on two workers; this one takes 0.8 s.)

Knows no particular judge. Neighbours: `get` in `__init__` builds them; `rollouts` holds a `Pool`.
Nursery and workers run this file too; they stop when the socket to their parent closes, however it died.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import gc
import heapq
import importlib.util
import itertools
import json
import os
import pickle
import resource
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from verifiers.base import Task, Verdict
from verifiers.combine import as_verdict

IMPORT_S = 120.0  # a judge whose import takes longer than this counts as broken
STUCK_S = 0.1  # a judge this long over one response has work taken away from it, and a further worker helps out
LEAST_S = 0.2  # judging time that a lone response gets even when starting its judge took all of its limit
CHUNK_S = 0.02  # responses are sent in chunks of about this much work: cheap verdicts need few wake-ups


@dataclass
class _Item:
    """One question to a judge. `method` is verify, answer or equal."""

    name: str
    policy: dict[str, Any]
    method: str
    arguments: Any  # a tuple; pickled once it is in the pool's thread
    timeout: float
    batch: _Batch
    index: int
    number: int = 0  # age
    deaths: int = 0  # of processes that were at it

    @property
    def key(self) -> tuple[str, str]:
        return self.name, repr(sorted(self.policy.items()))

    @property
    def lone(self) -> bool:
        """Asked for alone: its caller waits for this one verdict, so it goes before the many of a batch."""
        return len(self.batch.results) == 1


class _Batch:
    """The items of one call, and the future that its caller waits for."""

    def __init__(self, size: int) -> None:
        self.results: list[Any] = [None] * size
        self.missing = size
        self.born = time.monotonic()
        self.future: Future[list[Any]] = Future()

    def settle(self, index: int, result: Any) -> None:
        self.results[index] = result
        self.missing -= 1
        if not self.missing and self.future.set_running_or_notify_cancel():
            self.future.set_result(self.results)

    def refuse(self, error: Exception) -> None:
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass
class _Worker:
    """The caller's end of one worker process."""

    pid: int
    socket: socket.socket
    items: deque[_Item] = field(default_factory=deque)  # the first is being judged
    since: float = 0.0  # when its judging began
    retire: bool = False  # kill it after the item at hand: what it was sent besides is judged elsewhere

    def stuck(self, now: float) -> bool:
        return bool(self.items) and now - self.since > STUCK_S

    def due(self) -> float:
        """When the item at hand must be done. One asked for alone has its caller waiting since then."""
        item = self.items[0]
        if item.lone:
            return max(item.batch.born + item.timeout, self.since + min(item.timeout, LEAST_S))
        return self.since + item.timeout


class Pool:
    """Worker processes for any registered judges.

    `workers` run at once. Those held up by one response for more than 0.1 s do not count, so that a hanging response
    delays no other: up to `spare` further workers are forked in their place. `timeout` (seconds) is the default
    deadline of one verdict, `policies` the judges' policies by name, `memory_mb` what one worker may map beside its
    imports, `env` further environment variables of theirs.
    Safe to use from any thread; `close()` or the end of the process stops everything.

    Example:
        pool = Pool(workers=2, policies={"math": {"percent": "strict"}})
        verdicts = await pool.verify(task, ["\\\\boxed{7}", "\\\\boxed{8}"])
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        timeout: float = 10.0,
        spare: int = 8,
        memory_mb: int = 2048,
        policies: Mapping[str, Mapping[str, Any]] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.size = workers or len(os.sched_getaffinity(0))
        if self.size < 1 or timeout <= 0:
            raise ValueError(f"Pool(workers={workers}, timeout={timeout}): both must be positive")
        self.timeout, self.spare, self.memory_mb, self.policies = timeout, spare, memory_mb, policies or {}
        self.env = {**os.environ, **(env or {})}
        self._inbox: deque[_Item] = deque()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._owner = os.getpid()

    # -- the caller's side ---------------------------------------------------------------------------------------

    async def verify(self, task: Task, responses: Sequence[str], *, timeout: float | None = None) -> list[Verdict]:
        """One verdict per response, in order. Never raises for what a response holds."""
        calls = [("verify", (task, response)) for response in responses]
        return await asyncio.wrap_future(self.submit(task.verifier, calls, timeout=timeout))

    async def answers(self, name: str, responses: Sequence[str], *, timeout: float | None = None) -> list[str | None]:
        """The final answer in each response; None also where finding it failed or took too long."""
        return await asyncio.wrap_future(self.submit(name, [("answer", (r,)) for r in responses], timeout=timeout))

    async def equal(self, name: str, pairs: Sequence[tuple[str, str]], *, timeout: float | None = None) -> list[bool]:
        """Whether the two answers of each pair are the same; False also where that could not be decided in time."""
        return await asyncio.wrap_future(self.submit(name, [("equal", pair) for pair in pairs], timeout=timeout))

    def submit(
        self, name: str, calls: Sequence[tuple[str, tuple[Any, ...]]], *, timeout: float | None = None, **policy: Any
    ) -> Future[list[Any]]:
        """Queue calls of one judge's methods. The future raises ValueError for an unknown judge or policy."""
        policy = {**self.policies.get(name, {}), **policy}
        batch = _Batch(len(calls))
        if not calls:
            batch.future.set_result([])
            return batch.future
        limit = self.timeout if timeout is None else timeout
        if limit <= 0:
            raise ValueError(f"timeout={limit}: give the seconds that one verdict may take")
        self._start()
        self._inbox.extend(_Item(name, policy, *call, limit, batch, i) for i, call in enumerate(calls))
        self._ring()
        return batch.future

    def close(self) -> None:
        """Kill every process of the pool. What was still being judged fails."""
        with self._lock:
            if self._closed or self._owner != os.getpid():
                return
            self._closed = True
        self._ring()
        if self._thread is not None:
            self._thread.join()
        self._bell.close()
        atexit.unregister(self.close)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ring(self) -> None:
        try:
            self._bell.send(b"!")
        except BlockingIOError:
            pass  # so many rings are unheard that one more adds nothing

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("this pool is closed")
            if self._owner != os.getpid():
                raise RuntimeError("this pool belongs to the process it was made in: make another one after a fork")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="verifier-pool", daemon=True)
                self._thread.start()
                atexit.register(self.close)

    # -- the pool's own thread: everything below runs in it ------------------------------------------------------

    def _run(self) -> None:
        self._nursery: _Nursery | None = None
        self._queue: list[tuple[bool, int, _Item]] = []  # a heap: what is asked for alone first, then by age
        self._count = itertools.count()
        self._workers: list[_Worker] = []
        self._pace: dict[tuple[str, str], float] = {}  # seconds per item of each judge, smoothed
        self._ready: dict[tuple[str, str], str] = {}  # judges the nursery has; the value says why one cannot be had
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._ear, selectors.EVENT_READ)
        try:
            while not self._closed:
                try:
                    self._turn()
                except _NurseryLost:
                    self._start_over()
        except Exception as error:  # our own mistake: nobody may be left waiting for it
            self._abandon(RuntimeError(f"the pool's thread broke: {error!r}"))
            raise
        finally:
            self._closed = True
            self._abandon(RuntimeError("the pool was closed"))
            if self._nursery is not None:
                self._nursery.close()
            for worker in self._workers:
                worker.socket.close()
            self._selector.close()
            self._ear.close()

    def _turn(self) -> None:
        self._dispatch()
        for key, _ in self._selector.select(self._patience()):
            self._hear() if key.data is None else self._receive(key.data)
        self._enforce()

    def _start_over(self) -> None:
        """The nursery is gone and its workers with it: what they had waits for the next one."""
        self._nursery.close()
        self._nursery = None
        self._ready.clear()
        for worker in self._workers:
            self._selector.unregister(worker.socket)
            worker.socket.close()
            if worker.items:
                self._died(worker.items.popleft(), "the worker processes were killed", 0.0)
            self._put(worker.items)
        self._workers.clear()

    def _abandon(self, error: Exception) -> None:
        queued = [item for _, _, item in self._queue]
        for items in (self._inbox, queued, *(worker.items for worker in self._workers)):
            for item in items:
                item.batch.refuse(error)

    def _put(self, items: Iterable[_Item]) -> None:
        for item in items:
            heapq.heappush(self._queue, (not item.lone, item.number, item))

    def _hear(self) -> None:
        try:
            self._ear.recv(4096)
        except BlockingIOError:
            pass
        while self._inbox:
            item = self._inbox.popleft()
            item.number = next(self._count)
            try:
                item.arguments = pickle.dumps(item.arguments, protocol=pickle.HIGHEST_PROTOCOL)
                self._put([item])
            except Exception as error:
                self._settle(item, Verdict.fail(f"the task cannot be sent to a worker: {error}"), 0.0)

    def _dispatch(self) -> None:
        """Give idle workers work; fork more while there are fewer than `size` that are not stuck."""
        now = time.monotonic()
        while self._queue:
            item = self._queue[0][2]
            refused = self._load(item)
            if refused or item.batch.future.cancelled():
                heapq.heappop(self._queue)
                if refused:
                    item.batch.refuse(ValueError(refused))
                continue
            idle = next((w for w in self._workers if not w.items and not w.retire), None)
            if idle is None:
                moving = sum(not w.stuck(now) for w in self._workers)
                if moving >= self.size or len(self._workers) >= self.size + self.spare:
                    return
                idle = self._hire()
            self._give(idle)

    def _load(self, item: _Item) -> str:
        """Have the nursery import the judge, so that workers start with it. Returns why it cannot, or ""."""
        if item.key not in self._ready:
            if self._nursery is None:
                self._nursery = _Nursery(self.memory_mb, self.env)
            self._ready[item.key] = self._nursery.load(item.name, item.policy)
        return self._ready[item.key]

    def _hire(self) -> _Worker:
        worker = _Worker(*self._nursery.fork())
        self._workers.append(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        return worker

    def _give(self, worker: _Worker) -> None:
        first = self._queue[0][2]
        count = min(CHUNK_S / self._pace.get(first.key, CHUNK_S), 1 + len(self._queue) // self.size, 256)
        while self._queue and self._queue[0][2].key == first.key and len(worker.items) < max(1, count):
            worker.items.append(heapq.heappop(self._queue)[2])
        worker.since = time.monotonic()
        message = (first.name, first.policy, [(item.method, item.arguments) for item in worker.items])
        try:
            _send(worker.socket, message)  # an idle worker is reading, so this does not block
        except OSError:
            self._kill(worker)  # it died idle: nothing was judged yet, so another takes all of it

    def _receive(self, worker: _Worker) -> None:
        try:
            message = _receive(worker.socket)
        except (OSError, EOFError):
            why = "the worker process died twice over it (killed by the system, most likely for its memory)"
            return self._lost(worker, why, died=True)
        now = time.monotonic()
        item, seconds = worker.items.popleft(), now - worker.since
        worker.since = now
        self._pace[item.key] = 0.9 * self._pace.get(item.key, CHUNK_S) + 0.1 * seconds
        payload, healthy = message
        try:
            result = pickle.loads(payload)
        except Exception as error:
            result = Verdict.fail(f"the judge's verdict cannot be read here: {error}")
        self._settle(item, result, seconds)
        spare = not worker.items and not self._queue and len(self._workers) > self.size
        if worker.retire or spare or not healthy:
            self._kill(worker)

    def _settle(self, item: _Item, result: Any, seconds: float) -> None:
        if item.method == "verify":
            result = replace(result, seconds=seconds)
        elif isinstance(result, Verdict):  # answer or equal that raised or took too long
            result = None if item.method == "answer" else False
        item.batch.settle(item.index, result)

    def _lost(self, worker: _Worker, why: str, *, died: bool = False) -> None:
        """A worker is gone, and with it the verdict it was at; the rest of its chunk is judged elsewhere."""
        if worker.items:
            item, seconds = worker.items.popleft(), time.monotonic() - worker.since
            self._died(item, why, seconds) if died else self._settle(item, Verdict.fail(why), seconds)
        self._kill(worker)

    def _died(self, item: _Item, why: str, seconds: float) -> None:
        """A process died under this item. Once may be chance, so it is judged again; twice is the response's doing."""
        item.deaths += 1
        if item.deaths == 1:
            self._put([item])
        else:
            self._settle(item, Verdict.fail(why), seconds)

    def _kill(self, worker: _Worker) -> None:
        self._put(worker.items)
        worker.items.clear()
        self._workers.remove(worker)
        self._selector.unregister(worker.socket)
        worker.socket.close()
        self._nursery.kill(worker.pid)

    def _enforce(self) -> None:
        """Kill what is past its deadline; take the rest of the chunk away from what is merely slow."""
        now = time.monotonic()
        for worker in [w for w in self._workers if w.items]:
            if now >= worker.due():
                self._lost(worker, f"deadline of {worker.items[0].timeout:g} s passed")
            elif worker.stuck(now) and len(worker.items) > 1:
                item = worker.items.popleft()
                self._put(worker.items)
                worker.items = deque([item])
                worker.retire = True

    def _patience(self) -> float | None:
        """Seconds until something must be done unasked."""
        now = time.monotonic()
        waits = [w.due() - now for w in self._workers if w.items]
        waits += [w.since + STUCK_S - now for w in self._workers if w.items and not w.stuck(now)]
        return max(0.0, min(waits)) + 0.001 if waits else None


class _Nursery:
    """The caller's end of the process that workers are forked from."""

    def __init__(self, memory_mb: int, env: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        start = (
            "import sys, json; sys.path[:] = json.loads(sys.argv[2]); from verifiers.pool import _nursery; _nursery()"
        )
        command = [
            sys.executable,
            "-c",
            start,
            str(theirs.fileno()),
            json.dumps(sys.path),
            str(memory_mb),
            str(os.getpid()),
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True, env=env
        )
        theirs.close()
        self.socket = ours
        self.socket.settimeout(IMPORT_S)

    def load(self, name: str, policy: dict[str, Any]) -> str:
        from verifiers import _judges  # the registry imports this file

        judge = _judges.get(name)
        home = getattr(judge, "__module__", None)
        file = getattr(sys.modules.get(home or ""), "__file__", None)
        return self._ask("load", name, policy, home, file)

    def fork(self) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        try:
            _send(self.socket, ("fork",))
            socket.send_fds(self.socket, [b"."], [theirs.fileno()])
            return _receive(self.socket), ours
        except (OSError, EOFError) as error:
            raise _NurseryLost from error
        finally:
            theirs.close()

    def kill(self, pid: int) -> None:
        self._ask("kill", pid)

    def _ask(self, *question: Any) -> Any:
        try:
            _send(self.socket, question)
            return _receive(self.socket)
        except (OSError, EOFError) as error:
            raise _NurseryLost from error

    def close(self) -> None:
        self.socket.close()  # at which it ends its workers and itself
        try:
            self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:  # it is importing a judge; the workers die with it
            self.process.kill()
            self.process.wait()


class _NurseryLost(Exception):
    """The nursery died; its workers die with it."""


# -- what runs in the nursery and in the workers -----------------------------------------------------------------


def _nursery() -> None:
    """Import judges, fork workers and kill them, as told; end with the parent."""
    control = socket.socket(fileno=int(sys.argv[1]))
    memory_mb = int(sys.argv[3])
    os.set_inheritable(control.fileno(), False)
    _die_with_parent(int(sys.argv[4]))
    workers: set[int] = set()
    try:
        while True:
            what, *rest = _receive(control)
            if what == "load":
                _send(control, _load(*rest))
            elif what == "fork":
                _, fds, _, _ = socket.recv_fds(control, 1, 1)
                gc.freeze()
                nursery = os.getpid()
                pid = os.fork()
                if pid == 0:
                    control.close()
                    _die_with_parent(nursery)
                    _work(socket.socket(fileno=fds[0]), memory_mb)
                os.close(fds[0])
                workers.add(pid)
                _send(control, pid)
            elif what == "kill":
                _end(rest[0])
                workers.discard(rest[0])
                _send(control, None)
    except (EOFError, OSError):
        for pid in workers:
            _end(pid)


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)  # our own unreaped child, so the number cannot belong to another process
    os.waitpid(pid, 0)


def _load(name: str, policy: dict[str, Any], home: str | None, file: str | None) -> str:
    """Build the judge once, after importing the module that registers it. Returns what is wrong, or ""."""
    from verifiers import _judges, get

    try:
        if name not in _judges and home is not None and "|" not in name:
            _import(home, file)
        get(name, **policy)
        return ""
    except Exception as error:
        return str(error) if isinstance(error, ValueError) else f'verifier "{name}" cannot be loaded: {error!r}'


def _import(home: str, file: str | None) -> None:
    """Import the caller's module by name, or from its file where it was not found by name (a script, a test)."""
    if home == "__main__":
        if file is None:
            raise ValueError("a judge defined in an interactive session cannot be judged with: put it into a file")
        runpy.run_path(file, run_name="__mp_main__")
        return
    try:
        importlib.import_module(home)
    except ModuleNotFoundError:
        if file is None:
            raise
        spec = importlib.util.spec_from_file_location(home, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[home] = module
        spec.loader.exec_module(module)


def _work(requests: socket.socket, memory_mb: int) -> None:
    """A worker: judges what it is sent until the socket closes. Never returns."""
    from verifiers import get

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]  # left as it is: programs in a sandbox have limits of their own
    limit = mapped + (memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    judges: dict[tuple[str, str], Any] = {}
    try:
        while True:
            name, policy, calls = _receive(requests)
            key = name, repr(sorted(policy.items()))
            if key not in judges:
                judges[key] = get(name, **policy)
            for method, arguments in calls:
                _send(requests, _call(getattr(judges[key], method), arguments))
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def _call(method: Any, arguments: bytes) -> tuple[bytes, bool]:
    """The result, pickled, and whether the process is still to be trusted."""
    healthy = True
    try:
        return pickle.dumps(_returned(method, pickle.loads(arguments)), protocol=pickle.HIGHEST_PROTOCOL), True
    except MemoryError:
        verdict, healthy = Verdict.fail("MemoryError: the judge ran out of the memory that a worker may use"), False
    except (Exception, SystemExit) as error:
        verdict = Verdict.fail(_told(error)[:500])
    return pickle.dumps(verdict), healthy


def _returned(method: Any, arguments: tuple[Any, ...]) -> Any:
    """What a judge's method returned, as the type that callers rely on. Raises TypeError for any other."""
    said = method(*arguments)
    if method.__name__ == "verify":
        return as_verdict(said)
    if method.__name__ == "answer" and not isinstance(said, str | None):
        raise TypeError(f"answer returned {type(said).__name__}: return text, or None where there is no answer")
    return said if method.__name__ == "answer" else bool(said)


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its own __str__ raises
        return type(error).__name__


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before the call
        os._exit(0)


def _send(to: socket.socket, message: Any) -> None:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    to.sendall(struct.pack("!Q", len(body)) + body)


def _receive(source: socket.socket) -> Any:
    (size,) = struct.unpack("!Q", _exactly(source, 8))
    return pickle.loads(_exactly(source, size))


def _exactly(source: socket.socket, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        part = source.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return data


# -- one pool for callers who hold none --------------------------------------------------------------------------

_shared: Pool | None = None
_shared_lock = threading.Lock()


def verify_many(name: str, pairs: Iterable[tuple[Any, str]], *, timeout: float = 10.0, **policy: Any) -> list[Verdict]:
    """One verdict per (reference, response), in order, in a pool shared by the process. From any thread.

    `timeout` is in seconds per verdict. Raises ValueError for an unknown judge or policy key, naming the nearest.
    """
    return _submit(name, pairs, timeout, policy).result()


async def verify_many_async(
    name: str, pairs: Iterable[tuple[Any, str]], *, timeout: float = 10.0, **policy: Any
) -> list[Verdict]:
    """`verify_many` for an event loop, which it does not hold up."""
    return await asyncio.wrap_future(_submit(name, pairs, timeout, policy))


def _submit(name: str, pairs: Iterable[tuple[Any, str]], timeout: float, policy: dict[str, Any]) -> Future[list[Any]]:
    global _shared
    with _shared_lock:
        if _shared is None or _shared._closed or _shared._owner != os.getpid():
            _shared = Pool()
    calls = [
        ("verify", (Task(f"{name}/{i}", (), reference, name), response))
        for i, (reference, response) in enumerate(pairs)
    ]
    return _shared.submit(name, calls, timeout=timeout, **policy)
