"""Batches for a learner, from groups that arrive in any order: tasks start ahead of it by a bounded lag.

The tasks of a run are numbered in the order of drawing (tickets) and started in that order. With max_lag = 0 a whole
step starts, in one turn of the event loop, when the step before it is learned: synchronous. With max_lag = L, groups of
L further steps are on their way meanwhile, and a batch is the first ones that are complete; stragglers join a later
one. Each group is recorded when it is complete. Every ticket ends in exactly one batch, or is dropped for a reason that
the journal records. After a restart the journal says what was taken: those batches come again as they were, complete
groups wait for theirs, and only what was not complete is rolled out again.

Knows no engine, no verifier and no learner: `roll` makes the groups. Runs in the event loop of `loop.py`; `batch` is
called from the learner's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rollouts.base import Group
from rollouts.journal import Journal, read_at, scan
from rollouts.loop import Loop

Roll = Callable[[int], Awaitable[Group]]  # the group of a ticket


@dataclass(frozen=True)
class Batch:
    """What one step learns from."""

    groups: tuple[Group, ...]
    lags: tuple[int, ...]  # of each group: policy versions between its oldest token and the learner
    dropped: Mapping[int, str]  # ticket: reason
    generate_s: float  # in which groups were on their way since the last batch
    in_flight: int  # groups still on their way


@dataclass
class Ledger:
    """Which tickets are done. Kept with a checkpoint, and brought up to date from the journal."""

    next: int = 0  # the first ticket never started
    open: dict[int, int | None] = field(default_factory=dict)  # started, in no batch: where its group is in the journal
    taken: int = 0
    dropped: int = 0

    def take(self, tickets: Sequence[int], dropped: Mapping[int, str]) -> None:
        for ticket in (*tickets, *dropped):
            del self.open[ticket]
        self.taken += len(tickets)
        self.dropped += len(dropped)


NEW = Ledger()  # of a run that begins


@dataclass(frozen=True)
class _Take:
    """A batch that the journal says was taken."""

    places: Mapping[int, int]  # ticket: where its group is in the journal
    dropped: Mapping[int, str]


class Feed:
    """Rolls out ahead of the learner.

    Args:
        per_step: groups in a batch.
        max_lag: policy versions that a group's oldest token may lag behind the learner.
        timeout: seconds that a group may take, and seconds that a batch may be waited for beyond that.
        total: groups that the whole run learns from; none is started that it will not need.
        ledger, since: where a resumed run stood, and the size of the journal then.
    """

    def __init__(
        self,
        loop: Loop,
        journal: Journal,
        roll: Roll,
        *,
        per_step: int,
        max_lag: int,
        timeout: float,
        total: int,
        ledger: Ledger = NEW,
        since: int = 0,
    ) -> None:
        self._ledger = replace(ledger, open=dict(ledger.open))
        self._loop, self._journal, self._roll = loop, journal, roll
        self._per_step, self._max_lag, self._timeout, self._total = per_step, max_lag, timeout, total
        self._takes: dict[int, deque[_Take]] = {}  # what is to be taken again, by step
        self._ready: dict[int, tuple[int, Group]] = {}  # in order of arrival: (version when it began, group)
        self._again: deque[int] = deque()  # tickets that were on their way when an earlier driver ended
        self._running: dict[asyncio.Task, tuple[int, float]] = {}  # (ticket, when it began)
        self._late: dict[int, str] = {}
        self._news = asyncio.Event()
        self._error: BaseException | None = None
        self._version = 0
        self._busy, self._busy_since = 0.0, 0.0
        self._remember(since)

    def _remember(self, since: int) -> None:
        """Go through what the journal has since the checkpoint: batches to repeat, groups to use."""
        places = {ticket: place for ticket, place in self._ledger.open.items() if place is not None}
        started = self._ledger.next
        for place, _, row in scan(self._journal.path, since):
            if "take" in row:
                dropped = {int(ticket): why for ticket, why in row["dropped"].items()}
                take = _Take({ticket: places.pop(ticket) for ticket in row["tickets"]}, dropped)
                self._takes.setdefault(row["take"], deque()).append(take)
                for ticket in dropped:
                    places.pop(ticket, None)
                started = max(started, 1 + max((*take.places, *dropped), default=-1))
            elif row["ticket"] is not None:
                places[row["ticket"]] = place
                started = max(started, row["ticket"] + 1)
        promised = {t for takes in self._takes.values() for take in takes for t in (*take.places, *take.dropped)}
        self._ledger.open |= {ticket: None for ticket in range(self._ledger.next, started)} | places
        self._ledger.next = started
        for ticket in sorted(self._ledger.open.keys() - promised):
            if (place := self._ledger.open[ticket]) is None:
                self._again.append(ticket)
            else:
                self._ready[ticket] = read_at(self._journal.path, place)

    @property
    def remembered(self) -> tuple[int, int, int]:
        """(batches that the journal repeats, complete groups that it has, groups to roll out again)."""
        return sum(map(len, self._takes.values())), len(self._ready), len(self._again)

    def batch(self, step: int, version: int) -> Batch:
        """The next batch, for the learner's `step` and policy `version`.

        Raises what a group's rollout raised, and TimeoutError naming what it waited for.
        """
        if takes := self._takes.get(step):
            return self._repeat(takes.popleft(), version)
        return self._loop.run(self._batch(step, version))

    def mark(self) -> tuple[Ledger, int]:
        """Where the rollouts stand, for a checkpoint, and the size of the journal, which is then on the disk."""

        async def mark() -> tuple[Ledger, int]:
            return replace(self._ledger, open=dict(self._ledger.open)), self._journal.flush(to_disk=True)

        return self._loop.run(mark())

    def _repeat(self, take: _Take, version: int) -> Batch:
        found = [read_at(self._journal.path, place) for place in take.places.values()]
        self._ledger.take(list(take.places), take.dropped)
        lags = tuple(version - oldest(group, began) for began, group in found)
        return Batch(tuple(group for _, group in found), lags, take.dropped, 0.0, 0)

    async def _batch(self, step: int, version: int) -> Batch:
        self._version = version
        dropped: dict[int, str] = {}
        patience = time.monotonic() + 2 * self._timeout
        while True:
            dropped |= self._drop(version)
            self._start(len(dropped))
            if self._error:
                raise self._error
            if len(self._ready) >= self._per_step:
                break
            await self._wait(patience)
        tickets = sorted(list(self._ready)[: self._per_step])  # the first to arrive, in the order of drawing
        found = [self._ready.pop(ticket) for ticket in tickets]
        self._journal.take(step, tickets, dropped)
        self._journal.flush()
        self._ledger.take(tickets, dropped)
        lags = tuple(version - oldest(group, began) for began, group in found)
        return Batch(tuple(group for _, group in found), lags, dropped, self._busy_seconds(), self._in_flight())

    def _drop(self, version: int) -> dict[int, str]:
        """What may no longer be learned from."""
        stale = {}
        for ticket, (began, group) in self._ready.items():
            if not 0 <= (lag := version - oldest(group, began)) <= self._max_lag:  # below 0: of weights never reached
                stale[ticket] = f"stale: its oldest token lags {lag} versions"
        for ticket in stale:
            del self._ready[ticket]
        late, self._late = self._late, {}
        return stale | late

    def _start(self, dropped: int) -> None:
        """Start what the lag allows. Groups left out make room for others, so that a batch becomes full."""
        done = self._ledger.taken + self._ledger.dropped + dropped
        ahead = done + (1 + self._max_lag) * self._per_step
        needed = max(self._total + self._ledger.dropped + dropped, done + self._per_step)
        while self._again:
            self._launch(self._again.popleft())
        while self._ledger.next < min(ahead, needed):
            self._ledger.open[self._ledger.next] = None
            self._launch(self._ledger.next)
            self._ledger.next += 1

    def _launch(self, ticket: int) -> None:
        if not self._running:
            self._busy_since = time.monotonic()
        task = asyncio.create_task(self._make(ticket, self._version))
        self._running[task] = (ticket, time.monotonic())
        task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task) -> None:
        del self._running[task]
        self._news.set()
        if not self._running:
            self._busy += time.monotonic() - self._busy_since

    async def _make(self, ticket: int, version: int) -> None:
        """Roll out, record, hand over. What goes wrong is raised in the learner's thread by `batch`."""
        try:
            async with asyncio.timeout(self._timeout) as limit:
                group = await self._roll(ticket)
            place = self._journal.append(group, step=ticket // self._per_step, version=version, ticket=ticket)
            self._journal.flush()
            self._ledger.open[ticket] = place
            self._ready[ticket] = version, group
        except TimeoutError as error:
            if not limit.expired() or not self._max_lag:
                self._error = TimeoutError(f"ticket {ticket} was not rolled out in {self._timeout:.0f} s")
                self._error.__cause__ = error
            else:
                self._late[ticket] = f"late: not rolled out in {self._timeout:.0f} s"
        except Exception as error:
            self._error = self._error or error

    async def _wait(self, patience: float) -> None:
        """Until something arrives."""
        try:
            self._news.clear()
            async with asyncio.timeout(patience - time.monotonic()):
                await self._news.wait()
            return
        except TimeoutError:
            pass
        ticket, began = min(self._running.values(), key=lambda item: item[1], default=(None, 0.0))
        oldest = f", the oldest (ticket {ticket}) for {time.monotonic() - began:.0f} s" if self._running else ""
        raise TimeoutError(
            f"no batch within {2 * self._timeout:.0f} s: {len(self._ready)} of {self._per_step} groups are complete, "
            f"{self._in_flight()} on their way{oldest}"
        )

    def _in_flight(self) -> int:
        return len(self._running)

    def _busy_seconds(self) -> float:
        """Seconds with work on its way, since last asked."""
        now = time.monotonic()
        if self._running:
            self._busy += now - self._busy_since
            self._busy_since = now
        busy, self._busy = self._busy, 0.0
        return busy


def oldest(group: Group, began: int) -> int:
    """The policy version of the group's oldest token; `began` where the engine tells none."""
    spans = [span for r in group.rollouts for s in r.trajectory.steps for span in s.versions]
    return min((version for version, _, _ in spans), default=began)
