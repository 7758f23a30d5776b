"""Engines that may die at any moment: kept at work and on the newest weights, and no request is lost with one.

    starting -> updating -> serving <-> updating      one line: a seat, through the lives of the engines that fill it
        ^                      | died, hung, or answered with wrong weights
        +---- restarting <-----+---- dead: three starts in a row failed, or no node has room; tried again now and then

A restarted engine holds the weights of its checkpoint. It gets the newest ones, its version and its checksums are
checked, and only then it gets work; what its predecessor was asked is asked again with the same seeds.

Lives in a thread of its own, so that a death is noticed and mended while the learner computes or another event loop
waits. Knows neither Ray nor vLLM: where engines live is a `Host`, and `host` says what is asked of it. Neighbour:
`cluster` hosts engines in Ray actors and shows them to searches as one `Engine`.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rollouts.host import ClusterError, Deadlines, Host, Lost, NoRoom, Refused, Remote, Weights
from rollouts.request import Replies, Reply, Request
from search.tree import Ledger

STRIKES = 3  # starts in a row that failed, after which an engine counts as dead
TRIES = 5  # engines that may be lost over one request before the request itself is blamed
MEMORY = 1000  # events kept for whoever starts recording later

State = Literal["starting", "updating", "serving", "restarting", "dead"]


@dataclass(frozen=True, slots=True)
class EngineState:
    """One engine at one moment: a line of the progress display, an event of the run's time line."""

    time: float  # when it entered this state, in seconds since 1970
    engine: int
    state: State
    version: int  # of the weights it holds
    lag: int  # versions that these are behind the newest
    restarts: int
    requests: int  # asked of it and not answered; at a restart, those that are asked again
    node: str
    why: str = ""  # of a restart or a death


class _Job:
    """One request, and who waits for its reply in which event loop."""

    def __init__(self, key: int, request: Request, cancelled: Callable[[_Job], None]) -> None:
        self.key, self.request, self.tries = key, request, 0
        self.seat: _Seat | None = None  # whose engine is at work on it
        self.loop = asyncio.get_running_loop()
        self.reply: asyncio.Future[list[Reply]] = self.loop.create_future()
        self.reply.add_done_callback(lambda reply: reply.cancelled() and cancelled(self))

    def settle(self, reply: list[Reply] | Exception) -> None:
        """In its own event loop."""
        if self.reply.done():  # cancelled by its search
            return
        self.reply.set_exception(reply) if isinstance(reply, Exception) else self.reply.set_result(reply)


Answer = tuple[_Job, list[Reply] | Exception]


class _Seat:
    """A place for an engine, and the one that fills it now."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.remote: Remote | None = None
        self.state: State = "starting"
        self.up = False  # takes work
        self.version = 0  # of the last push that was checked
        self.loading = 0  # of the last push that was begun
        self.served = False  # whether any engine here ever did
        self.strikes = self.restarts = 0
        self.since, self.why = time.time(), ""
        self.jobs: dict[_Job, None] = {}  # asked and not answered, in order
        self.unwanted: list[int] = []  # numbers of requests that were cancelled and are to be dropped
        self.work: set[asyncio.Task[Any]] = set()  # of this life
        self.lost: asyncio.Future[str]  # of this life: why it ended

    def fail(self, life: asyncio.Future[str], why: str) -> None:
        if not life.done():
            life.set_result(why)


class Fleet:
    """`count` engines of a host, for callers in any thread. What begins with an underscore runs in the fleet's own."""

    def __init__(self, host: Host, count: int, deadlines: Deadlines | None = None) -> None:
        self.ledger = Ledger()
        self.dropped: Counter[str] = Counter()  # requests that had to be asked again, by reason
        self._host, self._deadlines = host, deadlines or Deadlines()
        self._weights = Weights(0, ())
        self._pushing = asyncio.Lock()
        self._seats = [_Seat(number) for number in range(count)]
        self._events: deque[EngineState] = deque(maxlen=MEMORY)
        self._file: Any = None
        self._outboxes: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
        self._settled: dict[asyncio.AbstractEventLoop, list[Answer]] = {}  # not yet told
        self._waiting: list[_Job] = []  # while no engine takes work
        self._broken: Exception | None = None  # why nothing goes on
        self._last_words = ""  # of the engine that was lost last
        self._loop = asyncio.new_event_loop()
        self._news = asyncio.Event()  # replaced and set whenever a seat enters a state
        self._thread = threading.Thread(target=self._loop.run_forever, name="engines", daemon=True)
        self._thread.start()
        try:
            self._do(self._open())
        except BaseException:
            self.stop()
            raise

    # -- for callers in any thread -------------------------------------------------------------------------------

    def ask(self, key: int, request: Request) -> asyncio.Future[list[Reply]]:
        """One reply per seed, to come. What is asked in one turn of the event loop is sent together.

        key: equal ones go to the same engine, which then has their prefix cached.
        """
        if self._broken:
            raise self._broken
        job = _Job(key, request, self._cancelled)
        loop = asyncio.get_running_loop()
        if loop not in self._outboxes:
            self._outboxes[loop] = []
            loop.call_soon(self._flush, loop)
        self._outboxes[loop].append(job)
        return job.reply

    def _cancelled(self, job: _Job) -> None:
        """Its search wants it no longer."""
        try:
            self._loop.call_soon_threadsafe(self._forget, job)
        except RuntimeError:
            pass  # the engines were stopped

    def push(self, weights: Weights) -> None:
        """Returns when every engine that is up has these weights, or is being replaced by one that will."""
        self._do(self._push(weights))

    def call(self, method: str) -> list[Any]:
        """The same question to every engine that is up, once one is."""
        return self._do(self._call_all(method))

    def states(self) -> list[EngineState]:
        return [self._snapshot(seat) for seat in self._seats]

    def record(self, path: Path) -> None:
        """Write every event so far, and from now on each as it comes, as JSON lines."""
        self._do(self._record(path))

    def stop(self) -> None:
        """End every engine; whoever still waits is told. Safe to call twice."""
        if self._loop.is_closed():
            return
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._host.stop()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        if self._loop.is_closed():
            work.close()
            raise ClusterError("the engines were stopped")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()  # bounded by the deadlines inside

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        jobs = self._outboxes.pop(loop)
        try:
            self._loop.call_soon_threadsafe(self._send, jobs)
        except RuntimeError:
            self._refuse(jobs, ClusterError("the engines were stopped"))

    # -- the life of an engine -----------------------------------------------------------------------------------

    async def _open(self) -> None:
        self._keepers = [asyncio.create_task(self._keep(seat)) for seat in self._seats]
        await self._until(lambda: all(seat.up or seat.state == "dead" for seat in self._seats))
        if self._broken:
            raise self._broken
        for seat in self._seats:
            if seat.state == "dead":
                raise ClusterError(f"engine {seat.number} could not start: {seat.why}")

    async def _keep(self, seat: _Seat) -> None:
        """One engine after another in this seat, for ever."""
        try:
            while True:
                try:
                    await self._bring_up(seat)
                    seat.strikes = 0  # an engine that serves and is lost is no failed start: requests count its losses
                    why = await seat.lost
                except NoRoom as error:
                    seat.strikes = STRIKES
                    why = str(error)
                except (Lost, Refused) as error:
                    hopeless = isinstance(error, Refused) and not seat.served  # e.g. a checkpoint it cannot read
                    seat.strikes = STRIKES if hopeless else seat.strikes + 1
                    why = str(error)
                self._bury(seat, why)
                await asyncio.sleep(self._deadlines.retry if seat.state == "dead" else max(0, seat.strikes - 1))
                seat.restarts += 1
        except Exception as error:  # our own mistake: nobody may be left waiting for it
            self._break(error)
            raise

    async def _bring_up(self, seat: _Seat) -> None:
        """From nothing to an engine that takes work, on the newest weights."""
        seat.lost = self._loop.create_future()
        seat.version = seat.loading = 0
        self._enter(seat, "starting", seat.why)
        limits = self._deadlines
        seat.remote = await self._host.start(seat.number, limits.room)
        said = await self._ask(seat, "ready", limit=limits.start)
        if said != 0:
            raise Lost(f"it started with weights of version {said}, not with those of its checkpoint")
        await self._ask(seat, "init_weight_transfer_engine", {}, limit=limits.sync)
        while seat.version != self._weights.version:  # a push may have come meanwhile
            await self._update(seat, self._weights)
        seat.up = seat.served = True
        self._enter(seat, "serving")
        self._work(self._beat, seat)
        waiting, self._waiting = self._waiting, []
        self._send(waiting)

    async def _beat(self, seat: _Seat) -> None:
        """Ask again and again which weights it serves: it must answer, and know."""
        while True:
            await asyncio.sleep(self._deadlines.every)
            before = seat.version
            said = await self._ask(seat, "ready", limit=self._deadlines.beat)
            if not before <= said <= seat.loading:
                raise Lost(f"it serves weights of version {said}, not {seat.version}")

    def _bury(self, seat: _Seat, why: str) -> None:
        """End this life, and ask others what it was asked."""
        self._last_words = f"engine {seat.number}: {why}"
        seat.up = False
        for task in seat.work:
            task.cancel()
        if seat.remote is not None:
            seat.remote.kill()
        seat.remote = None
        self._enter(seat, "dead" if seat.strikes >= STRIKES else "restarting", why)
        jobs, seat.jobs = [job for job in seat.jobs if not job.reply.done()], {}
        for job in jobs:
            self.dropped["engine lost"] += 1
            job.tries += 1
        waiting, self._waiting = self._waiting, []
        self._send(jobs + waiting)

    def _work(self, work: Callable[..., Awaitable[None]], seat: _Seat, *args: Any) -> asyncio.Task[None]:
        """Run something of this seat's life; its failure ends the life."""
        life = seat.lost

        async def guarded() -> None:
            try:
                await work(seat, *args)
            except (Lost, Refused) as error:
                seat.fail(life, str(error))
            except Exception as error:
                self._break(error)
                raise

        task = asyncio.create_task(guarded())
        seat.work.add(task)
        task.add_done_callback(seat.work.discard)
        return task

    async def _ask(self, seat: _Seat, method: str, *args: Any, limit: float) -> Any:
        return await _within(limit, seat.remote.call(method, *args), f"{method} of engine {seat.number}")

    # -- weights -------------------------------------------------------------------------------------------------

    async def _push(self, weights: Weights) -> None:
        async with self._pushing:
            self._weights = weights  # from here on, an engine that starts gets these
            tasks = [self._work(self._refresh, seat, weights) for seat in self._seats if seat.up]
            if tasks:
                await asyncio.wait(tasks)
        self._require_hope()

    async def _refresh(self, seat: _Seat, weights: Weights) -> None:
        await self._update(seat, weights)
        self._enter(seat, "serving")

    async def _update(self, seat: _Seat, weights: Weights) -> None:
        """The four phases of vLLM's weight-transfer protocol on one engine, and what it must say afterwards."""
        limit = self._deadlines.sync
        seat.loading = weights.version
        self._enter(seat, "updating")
        await self._ask(seat, "start_weight_update", limit=limit)
        for chunk, digest in weights.chunks:
            await self._ask(seat, "update_weights", chunk, digest, limit=limit)
        said = await self._ask(seat, "finish_weight_update", weights.version, limit=limit)
        if said != weights.version:
            raise Lost(f"it reports version {said} after a push of version {weights.version}")
        sums = await self._ask(seat, "checksums", limit=limit)
        if not weights.sums:
            weights.sums.update(sums)
        if sums != weights.sums:
            names = sums.keys() | weights.sums.keys()
            name = min(n for n in names if sums.get(n) != weights.sums.get(n))
            raise Lost(f"it holds other weights than were pushed as version {weights.version}, first in {name}")
        seat.version = weights.version

    async def _call_all(self, method: str) -> list[Any]:
        while True:
            await self._until(lambda: any(seat.up for seat in self._seats) or not self._hope())
            self._require_hope()
            answers: list[Any] = []
            up = [seat for seat in self._seats if seat.up]
            await asyncio.wait([self._work(self._answer, seat, method, answers) for seat in up])
            if answers:
                return answers

    async def _answer(self, seat: _Seat, method: str, answers: list[Any]) -> None:
        answers.append(await self._ask(seat, method, limit=self._deadlines.sync))

    # -- requests ------------------------------------------------------------------------------------------------

    def _send(self, jobs: list[_Job]) -> None:
        """One call to each engine with what is its own; if none takes work, later."""
        jobs = [job for job in jobs if not job.reply.done()]
        if not jobs:
            return
        if not self._hope():
            return self._refuse(jobs, self._broken or self._no_hope())
        for job in [job for job in jobs if job.tries >= TRIES]:
            jobs.remove(job)
            self._refuse([job], ClusterError(f"a request was lost with its engine {TRIES} times: {self._last_words}"))
        up = [seat for seat in self._seats if seat.up]
        if not up:
            self._waiting += jobs
            return
        mine: dict[_Seat, list[_Job]] = {}
        for job in jobs:
            home = self._seats[job.key % len(self._seats)]
            owner = home if home.up else up[job.key // len(self._seats) % len(up)]
            mine.setdefault(owner, []).append(job)
        for seat, batch in mine.items():
            seat.jobs |= dict.fromkeys(batch)
            for job in batch:
                job.seat = seat
            self._work(self._collect, seat, batch)

    def _forget(self, job: _Job) -> None:
        """Have the engine drop what was cancelled: its tokens would be drawn for nobody. One call for many."""
        if job.seat is None or job not in job.seat.jobs:  # answered meanwhile, or not sent: `_send` leaves it out
            return
        del job.seat.jobs[job]
        if not job.seat.unwanted:
            self._loop.call_soon(self._drop, job.seat)
        job.seat.unwanted.append(job.request.number)

    def _drop(self, seat: _Seat) -> None:
        numbers, seat.unwanted = seat.unwanted, []
        if seat.up:
            self._work(self._have_dropped, seat, numbers)

    async def _have_dropped(self, seat: _Seat, numbers: list[int]) -> None:
        await self._ask(seat, "drop", numbers, limit=self._deadlines.beat)

    async def _collect(self, seat: _Seat, jobs: list[_Job]) -> None:
        """Run one call on an engine and hand each reply to whoever waits for it."""
        sent, left = seat.version, len(jobs)
        answers = seat.remote.extend([job.request for job in jobs])
        try:
            while left:
                complete = await _within(self._deadlines.reply, _next(answers), f"a reply of engine {seat.number}")
                for index, replies in complete:
                    if wrong := _wrong(replies, sent, seat.loading):
                        self.dropped["wrong version"] += 1
                        raise Lost(wrong)
                    seat.jobs.pop(jobs[index], None)
                    self._count(replies)
                    self._settle(jobs[index], replies)
                left -= len(complete)
        except Refused as error:
            mine = [job for job in jobs if job in seat.jobs]
            for job in mine:
                del seat.jobs[job]
            self._refuse(mine, ClusterError(f"engine {seat.number} refused a request: {error}"))

    def _settle(self, job: _Job, reply: list[Reply]) -> None:
        """To whoever waits: what comes at one moment wakes their event loop once."""
        if job.loop not in self._settled:
            self._settled[job.loop] = []
            self._loop.call_soon(lambda: self._answer_all(job.loop, self._settled.pop(job.loop)))
        self._settled[job.loop].append((job, reply))

    def _answer_all(self, loop: asyncio.AbstractEventLoop, answers: list[Answer]) -> None:
        try:
            loop.call_soon_threadsafe(lambda: [job.settle(reply) for job, reply in answers])
        except RuntimeError:
            pass  # that loop ended: nobody waits

    def _count(self, replies: list[Reply]) -> None:
        self.ledger.generated += sum(len(reply.step.ids) for reply in replies)
        self.ledger.prefilled += sum(reply.prefilled for reply in replies)
        self.ledger.cached += sum(reply.step.cached for reply in replies)

    def _refuse(self, jobs: Sequence[_Job], error: Exception) -> None:
        for loop, mine in groupby(sorted(jobs, key=lambda job: id(job.loop)), key=lambda job: job.loop):
            self._answer_all(loop, [(job, error) for job in mine])

    # -- what is known of all of them ----------------------------------------------------------------------------

    def _hope(self) -> bool:
        return self._broken is None and any(seat.state != "dead" for seat in self._seats)

    def _require_hope(self) -> None:
        if not self._hope():
            raise self._broken or self._no_hope()

    def _no_hope(self) -> ClusterError:
        return ClusterError(f"no engine is left: {self._last_words}")

    def _break(self, error: Exception) -> None:
        """Nothing goes on after this."""
        self._broken = error
        jobs = [job for seat in self._seats for job in seat.jobs] + self._waiting
        self._refuse(jobs, error)
        self._tell()

    def _enter(self, seat: _Seat, state: State, why: str = "") -> None:
        seat.state, seat.since, seat.why = state, time.time(), why
        event = self._snapshot(seat)
        self._events.append(event)
        if self._file is not None:
            self._write([event])
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _until(self, true: Callable[[], bool]) -> None:
        """Every life ends within its deadlines, in service or in death, so this ends."""
        while not true() and not self._broken:
            await self._news.wait()

    def _snapshot(self, seat: _Seat) -> EngineState:
        return EngineState(
            time=seat.since,
            engine=seat.number,
            state=seat.state,
            version=seat.version,
            lag=self._weights.version - seat.version,
            restarts=seat.restarts,
            requests=len(seat.jobs),
            node=seat.remote.node if seat.remote else "",
            why=seat.why,
        )

    async def _record(self, path: Path) -> None:
        self._file = path.open("a")
        self._write(self._events)

    def _write(self, events: Sequence[EngineState]) -> None:
        try:
            self._file.write("".join(json.dumps(asdict(event)) + "\n" for event in events))
            self._file.flush()
        except OSError:  # a full disk: the run goes on without its time line, and is told of the disk by its journal
            self._file = None

    async def _close(self) -> None:
        self._break(self._broken or ClusterError("the engines were stopped"))
        tasks = [*getattr(self, "_keepers", ()), *(task for seat in self._seats for task in seat.work)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for seat in self._seats:
            if seat.remote is not None:
                seat.remote.kill()
                seat.remote = None
        if self._file is not None:
            self._file.close()


async def _next(answers: AsyncIterator[Replies]) -> Replies:
    try:
        return await anext(answers)
    except StopAsyncIteration:
        raise Lost("its answers ended before the last") from None


async def _within(seconds: float, work: Awaitable[Any], what: str) -> Any:
    """The result, or Lost when it takes too long: whoever it was asked of counts as hung."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise Lost(f"hung: {what} took more than {seconds:g} s") from None


def _wrong(replies: list[Reply], oldest: int, newest: int) -> str:
    """Why these tokens cannot be from the weights that were served, or ""."""
    for reply in replies:
        at = 0
        for version, start, end in reply.step.versions:
            if start != at or not oldest <= version <= newest:
                return f"it answered with weights of version {version} while {oldest} to {newest} were served"
            at = end
        if at != len(reply.step.ids):
            return f"it did not say which weights wrote its tokens from {at} on"
    return ""
