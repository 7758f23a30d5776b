"""Batches from groups that arrive in any order: bounded lag, nothing lost, nothing twice, all told by the journal."""

import asyncio
import json
import random
import threading
import time

import pytest

from rollouts.base import Group, Rollout
from rollouts.feed import Feed, Ledger
from rollouts.journal import Journal, mend, read
from rollouts.loop import Loop
from search.base import Step, Trajectory
from verifiers.base import Task, Verdict


def group(ticket: int, version: int) -> Group:
    task = Task(f"t/{ticket}", ({"role": "user", "content": "?"},), "7", "math")
    step = Step((5,), (-0.25,), "7", versions=((version, 0, 1),))
    return Group(task, (Rollout(task, Trajectory((1,), (step,), "stop"), Verdict("scored", 1.0, True, "7")),))


class World:
    """Rolls out under the version that is now, each ticket after its own delay; remembers what it was asked."""

    def __init__(self, delay=lambda ticket: 0.0):
        self.version, self.asked, self.delay = 0, [], delay
        self.lock = threading.Lock()

    async def roll(self, ticket):
        with self.lock:
            self.asked.append(ticket)
        version = self.version
        await asyncio.sleep(self.delay(ticket))
        return group(ticket, version)


@pytest.fixture
def loop():
    with Loop() as loop:
        yield loop


def feed(loop, journal, world, *, per_step=4, max_lag=0, timeout=5.0, total=40, **more):
    return Feed(loop, journal, world.roll, per_step=per_step, max_lag=max_lag, timeout=timeout, total=total, **more)


def names(batch):
    return [int(group.task.id[2:]) for group in batch.groups]


def learn(source, world, steps, version=0):
    """Take batches as a learner does: every step is an update."""
    found = []
    for step in range(steps):
        found.append(source.batch(step, version))
        version = world.version = version + 1
    return found


def test_without_lag_a_step_starts_when_the_one_before_is_learned(tmp_path, loop):
    world = World(lambda ticket: 0.02 * (ticket % 3))
    with Journal(tmp_path / "j") as journal:
        source = feed(loop, journal, world)
        first = source.batch(0, 0)
        time.sleep(0.05)
        assert names(first) == world.asked == [0, 1, 2, 3] and first.in_flight == 0
        world.version = 1
        second = source.batch(1, 1)
    assert names(second) == [4, 5, 6, 7] and set(second.lags) == {0}


def test_with_lag_the_next_steps_are_on_their_way_meanwhile_and_no_further(tmp_path, loop):
    world = World()
    with Journal(tmp_path / "j") as journal:
        source = feed(loop, journal, world, max_lag=2)
        source.batch(0, 0)
        time.sleep(0.05)
        assert sorted(world.asked) == list(range(12))
        world.version = 1
        batch = source.batch(1, 1)
        assert names(batch) == [4, 5, 6, 7] and set(batch.lags) == {1}
        time.sleep(0.05)
        assert sorted(world.asked) == list(range(16))


def test_a_straggler_holds_no_batch_and_joins_a_later_one(tmp_path, loop):
    world = World(lambda ticket: 0.15 if ticket == 1 else 0.0)
    with Journal(tmp_path / "j") as journal:
        source = feed(loop, journal, world, max_lag=4)
        started = time.monotonic()
        assert names(source.batch(0, 0)) == [0, 2, 3, 4]
        assert time.monotonic() - started < 0.1
        time.sleep(0.2)
        later = [
            names(batch) for batch in (source.batch(1, 0), source.batch(2, 0), source.batch(3, 0), source.batch(4, 0))
        ]
    assert sum(1 in batch for batch in later) == 1


def test_what_lags_too_far_is_dropped_counted_and_replaced(tmp_path, loop):
    world = World(lambda ticket: 0.1 if ticket == 1 else 0.0)
    with Journal(tmp_path / "j") as journal:
        source = feed(loop, journal, world, max_lag=1)
        first = source.batch(0, 0)
        world.version = 5  # updates in between
        time.sleep(0.15)
        second = source.batch(1, 5)
    assert names(first) == [0, 2, 3, 4]
    assert set(second.dropped.values()) == {"stale: its oldest token lags 5 versions"} and 1 in second.dropped
    assert len(second.groups) == 4 and set(second.lags) == {0}


def test_a_group_that_takes_too_long_is_dropped_and_with_no_lag_it_stops_the_run(tmp_path, loop):
    world = World(lambda ticket: 60.0 if ticket == 1 else 0.0)
    with Journal(tmp_path / "j") as journal:
        source = feed(loop, journal, world, max_lag=2, timeout=0.1)
        source.batch(0, 0)
        time.sleep(0.15)
        assert source.batch(1, 1).dropped == {1: "late: not rolled out in 0 s"}
    with Journal(tmp_path / "k") as journal, pytest.raises(TimeoutError, match="ticket 1 was not rolled out"):
        feed(loop, journal, world, timeout=0.1).batch(0, 0)


def test_a_batch_that_never_comes_is_an_error_that_names_what_it_waited_for(tmp_path, loop):
    async def roll(ticket):
        if ticket < 2:
            return group(ticket, 0)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)  # hangs, and does not listen

    with Journal(tmp_path / "j") as journal:
        source = Feed(loop, journal, roll, per_step=4, max_lag=1, timeout=0.1, total=40)
        with pytest.raises(TimeoutError, match=r"2 of 4 groups are complete, 6 on their way, the oldest \(ticket 2\)"):
            source.batch(0, 0)


def test_an_error_of_a_rollout_reaches_the_learner(tmp_path, loop):
    async def roll(ticket):
        raise RuntimeError("the engines are gone")

    with Journal(tmp_path / "j") as journal, pytest.raises(RuntimeError, match="engines are gone"):
        Feed(loop, journal, roll, per_step=4, max_lag=0, timeout=5.0, total=40).batch(0, 0)


def test_no_group_is_started_that_the_run_will_not_need(tmp_path, loop):
    world = World()
    with Journal(tmp_path / "j") as journal:
        learn(feed(loop, journal, world, max_lag=4, total=12), world, 3)
    assert sorted(world.asked) == list(range(12))


@pytest.mark.parametrize("max_lag", [0, 1, 4])
def test_every_ticket_ends_in_one_batch_or_is_dropped_for_a_reason(tmp_path, loop, max_lag):
    luck = random.Random(max_lag)
    slow = {ticket: luck.choice((0.0, 0.0, 0.0, 0.01, 0.03)) for ticket in range(1000)}
    world = World(slow.__getitem__)
    with Journal(tmp_path / "j") as journal:
        batches = learn(feed(loop, journal, world, max_lag=max_lag, total=80), world, 20)
    taken = [name for batch in batches for name in names(batch)]
    dropped = [ticket for batch in batches for ticket in batch.dropped]
    assert len(taken) == 80 == len(set(taken)) and not set(taken) & set(dropped)
    assert sorted(taken + dropped) == list(range(80 + len(dropped))) == sorted(world.asked)
    assert max(lag for batch in batches for lag in batch.lags) <= max_lag


@pytest.mark.parametrize("max_lag", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_after_a_restart_batches_come_again_as_they_were_and_only_the_rest_is_rolled_out(tmp_path, loop, max_lag, stop):
    path = tmp_path / "j"
    luck = random.Random(1)
    slow = {ticket: luck.choice((0.0, 0.0, 0.01)) for ticket in range(1000)}
    world = World(slow.__getitem__)
    with Journal(path) as journal:
        source = feed(loop, journal, world, max_lag=max_lag)
        ledger, since = source.mark()
        before = learn(source, world, stop)
        time.sleep(0.03)
    recorded = {json.loads(line)["ticket"] for line in path.read_text().splitlines() if "task" in json.loads(line)}
    again = World(slow.__getitem__)
    mend(path, since)
    with Journal(path) as journal:
        after = learn(feed(loop, journal, again, max_lag=max_lag, ledger=ledger, since=since), again, 10)
    assert [names(b) for b in after[:stop]] == [names(b) for b in before]
    assert [b.groups for b in after[:stop]] == [b.groups for b in before]
    assert not recorded & set(again.asked)
    taken = [name for batch in after for name in names(batch)]
    assert len(taken) == len(set(taken)) == 40
    assert sorted(t for _, _, g in read(path) for t in [g.task.id]) == sorted({g.task.id for _, _, g in read(path)})


def test_the_ledger_of_a_checkpoint_spares_reading_what_was_before_it(tmp_path, loop):
    path, world = tmp_path / "j", World()
    with Journal(path) as journal:
        source = feed(loop, journal, world, max_lag=1)
        learn(source, world, 3)
        time.sleep(0.03)
        ledger, since = source.mark()
    assert ledger.taken == 12 and ledger.next == 16 and len(ledger.open) == 4 and None not in ledger.open.values()
    again = World()
    with Journal(path) as journal:
        source = feed(loop, journal, again, max_lag=1, ledger=ledger, since=since)
        assert source.remembered == (0, 4, 0)
        assert names(source.batch(3, 3)) == [12, 13, 14, 15]


class Dying(World):
    """Rolls out `most` groups, those with the highest tickets, and no more."""

    def __init__(self, most):
        super().__init__(lambda ticket: 0.004 * (7 - ticket % 8))
        self.left = most

    async def roll(self, ticket):
        found = await super().roll(ticket)
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("killed")
        return found


@pytest.mark.parametrize("most", range(9))
@pytest.mark.parametrize("torn", [False, True])
def test_in_lock_step_too_no_complete_group_is_rolled_out_again(tmp_path, loop, most, torn):
    """Groups are complete in another order than they are drawn in, and given to the learner in that one."""
    path, calm = tmp_path / "j", Dying(1000)
    with Journal(tmp_path / "calm") as journal:
        whole = learn(feed(loop, journal, calm, per_step=8), calm, 3)
    dying = Dying(8 + most)
    with Journal(path) as journal, pytest.raises(RuntimeError, match="killed"):
        learn(feed(loop, journal, dying, per_step=8), dying, 3)
    if torn:
        path.write_bytes(path.read_bytes() + b'{"step":1,"version":1,"ticket":')
    assert mend(path, 0) == (31 if torn else 0)
    again = World()
    with Journal(path) as journal:
        source = feed(loop, journal, again, per_step=8)
        assert source.remembered == (1 + most // 8, most % 8, (8 - most) % 8)
        after = learn(source, again, 3)
    assert again.asked == [*range(8, 16 - most), *range(16, 24)]
    assert [batch.groups for batch in after] == [batch.groups for batch in whole]
    assert [batch.lags for batch in after] == [(0,) * 8] * 3
    assert [group for _, _, group in read(path)] == [group for batch in whole for group in batch.groups]


def test_a_batch_that_must_be_rolled_out_as_one_is_where_a_part_of_it_is_missing(tmp_path, loop):
    path, dying = tmp_path / "j", Dying(8 + 5)
    with Journal(path) as journal, pytest.raises(RuntimeError, match="killed"):
        learn(feed(loop, journal, dying, per_step=8), dying, 3)
    assert mend(path, 0, 8) > 0 and mend(path, 0, 8) == 0
    again = World()
    with Journal(path) as journal:
        assert names(learn(feed(loop, journal, again, per_step=8), again, 2)[1]) == list(range(8, 16))
    assert again.asked == list(range(8, 16))


@pytest.mark.parametrize(("began", "reason"), [(0, "lags 2 versions"), (3, "lags -1 versions")])
def test_in_lock_step_a_group_of_other_weights_than_the_learner_has_is_not_learned_from(tmp_path, loop, began, reason):
    path, world = tmp_path / "j", World()
    with Journal(path) as journal:
        learn(feed(loop, journal, world), world, 2)
        for ticket in (8, 9):
            journal.append(group(ticket, began if ticket == 9 else 2), step=2, version=2, ticket=ticket)
    again = World()
    with Journal(path) as journal:
        third = learn(feed(loop, journal, again, total=12), again, 3)[2]
    assert reason in third.dropped[9] and names(third) == [8, 10, 11, 12]
    assert again.asked == [10, 11, 12]


def test_a_new_ledger_is_not_shared_between_feeds(tmp_path, loop):
    world = World()
    with Journal(tmp_path / "j") as journal:
        learn(feed(loop, journal, world), world, 2)
    with Journal(tmp_path / "k") as journal:
        assert names(feed(loop, journal, World()).batch(0, 0)) == [0, 1, 2, 3]
    assert Ledger().next == 0
