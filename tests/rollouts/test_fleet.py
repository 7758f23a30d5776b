"""Engines die, hang, forget and lie at every call there is; callers still get right answers from right weights."""

import asyncio
import hashlib
import itertools
import json
import random
import threading
import time
from collections import defaultdict

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from rollouts.fleet import Fleet
from rollouts.host import ClusterError, Deadlines, Lost, NoRoom, Refused, Weights
from rollouts.request import Placement, Request
from rollouts.scripted_engine import PACE, ScriptedEngine
from search.base import END, Sampling

QUICK = Deadlines(room=0.1, start=1.0, sync=0.5, beat=0.5, reply=0.8, every=0.05, retry=0.3)
CALLS = ("ready", "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")


class Mortal:
    """A scripted engine in this process. `faults` says what goes wrong at which call; `log` is shared by all lives."""

    def __init__(self, folder, seat, life, faults, log):
        self.node, self.seat, self.life, self.faults, self.log = f"here/{life}", seat, life, faults, log
        self.folder = folder
        self.engine = ScriptedEngine(folder, Placement(), 0)
        self.gone = asyncio.Event()

    async def call(self, method, *args):
        self.log.append((self.seat, self.life, method))
        fault = self.faults.get(method)
        await self._suffer(fault, "dies before")
        if fault == "refuses":
            raise Refused("not today")
        if method == "update_weights":
            file = self.folder / f"push-{self.seat}-{self.life}"
            file.write_bytes(args[0])
            args = ({"path": str(file), "digest": args[1]},)
        said = await getattr(self.engine, method)(*args)
        await self._suffer(fault, "dies after")
        if self.gone.is_set():
            raise Lost("it was killed")
        return fault if fault is not None and fault != "dies after" else said

    async def _suffer(self, fault, when):
        if fault == "dies slowly":  # after some beats
            await asyncio.sleep(0.2)
        if fault in (when, "dies slowly") or self.gone.is_set():
            self.gone.set()
            raise Lost("it died")
        if fault == "hangs":
            await asyncio.sleep(3600)
        if callable(fault):
            fault(self)

    async def extend(self, requests):
        self.log.append((self.seat, self.life, "extend"))
        fault = self.faults.get("extend")
        await self._suffer(fault, "dies before")
        if fault == "refuses":
            raise Refused("not today")
        if fault == "stops early":
            return
        answers = self.engine.extend(requests)
        async for complete in answers:
            if self.gone.is_set():
                raise Lost("it was killed")
            yield complete
            await self._suffer(fault, "dies after")

    def kill(self):
        self.gone.set()


class Here:
    """Hosts engines in this process. `faults[seat, life]` is what will go wrong."""

    def __init__(self, folder, faults=None):
        self.folder, self.faults = folder, faults or {}
        self.lives, self.log, self.room, self.now = defaultdict(int), [], True, {}

    async def start(self, seat, room):
        if not self.room:
            await asyncio.sleep(room)
            raise NoRoom("no node has a CPU left")
        life = self.lives[seat]
        self.lives[seat] += 1
        faults = self.faults.get((seat, life), self.faults.get(seat, {}))
        self.now[seat] = Mortal(self.folder, seat, life, faults, self.log)
        return self.now[seat]

    def stop(self):
        pass


def weights(version):
    data = save({"w": np.full(3, float(version), np.float32)})
    return Weights(version, ((data, hashlib.blake2b(data, digest_size=16).hexdigest()),))


@pytest.fixture
def fleet(tmp_path):
    """Makes fleets; the base weights are 0, those of version v are v."""
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    made = []

    def make(faults=None, count=2, **changes):
        deadlines = Deadlines(**{name: changes.get(name, getattr(QUICK, name)) for name in Deadlines.__slots__})
        made.append(Fleet(Here(tmp_path, faults), count, deadlines))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def request(seed, room=24):
    return Request((1, 2, 3), (seed, seed + 1000), room, END, Sampling())


async def reached(fleet):
    """Returns once an engine has been asked for paths."""
    while not any(method == "extend" for _, _, method in fleet._host.log):
        await asyncio.sleep(0.002)


async def ask(fleet, *numbers, room=24):
    return await asyncio.gather(*(fleet.ask(i, request(i, room)) for i in numbers))


def steps(answers):
    return [reply.step for replies in answers for reply in replies]


def undisturbed(numbers):
    """The tokens that each seed must give, whichever engine draws them."""
    drawn = []
    for seed in (s for i in numbers for s in (i, i + 1000)):
        noise, ids = random.Random(seed), []
        while len(ids) < 24 and (not ids or ids[-1]):
            ids.append(noise.randrange(10))
        drawn.append(tuple(ids))
    return drawn


def faithful(step):
    """Every token was written by the weights that it names."""
    named = [version for version, start, end in step.versions for _ in range(start, end)]
    return named == [-lp for lp in step.logprobs]


def wait(true, timeout=10.0):
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, "this should have happened by now"
        time.sleep(0.005)


def settled(fleet, version):
    """Waits until every engine serves `version`."""
    wait(lambda: all((s.state, s.version) == ("serving", version) for s in fleet.states()))


MOMENTS = list(itertools.product((*CALLS, "checksums", "extend"), ("dies before", "dies after", "hangs")))
MOMENTS += [(call, "refuses") for call in ("start_weight_update", "update_weights", "finish_weight_update")]


@pytest.mark.parametrize(("method", "fault"), MOMENTS)
def test_a_fault_at_any_call_costs_time_and_nothing_else(fleet, method, fault):
    fleet = fleet({(0, 0): {method: fault}})

    async def train():
        before = asyncio.ensure_future(ask(fleet, *range(8)))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(fleet.push, weights(1))
        return await before, await ask(fleet, *range(8, 16))

    before, after = asyncio.run(train())
    assert [s.ids for s in steps(before + after)] == undisturbed(range(16))
    assert all(faithful(s) for s in steps(before + after))
    assert {v for s in steps(after) for v, _, _ in s.versions} == {1}
    settled(fleet, 1)
    assert [s.restarts for s in fleet.states()] == [1, 0]


def test_a_replacement_gets_no_work_before_it_holds_and_proved_the_newest_weights(fleet):
    fleet = fleet(count=1)
    fleet.push(weights(1))
    fleet.push(weights(2))
    fleet._host.now[0].gone.set()
    answers = asyncio.run(ask(fleet, 1, 2))
    life = [method for _, life, method in fleet._host.log if life == 1 and method != "ready"]
    assert life[:6] == [*CALLS[1:], "checksums", "extend"]
    assert {v for s in steps(answers) for v, _, _ in s.versions} == {2} and all(faithful(s) for s in steps(answers))


def forget(mortal):
    """It has lost its weights, and says nothing."""
    mortal.engine._weights, mortal.engine._version = dict(mortal.engine._base), 0


def test_tokens_of_a_version_that_was_not_served_are_asked_again(fleet):
    fleet = fleet({(0, 0): {"extend": forget}}, every=60)
    fleet.push(weights(1))
    answers = asyncio.run(ask(fleet, *range(10)))
    assert {v for s in steps(answers) for v, _, _ in s.versions} == {1}
    assert [s.ids for s in steps(answers)] == undisturbed(range(10))
    assert fleet.dropped["wrong version"] == 1 and fleet.dropped["engine lost"] >= 1


def test_an_idle_engine_that_forgets_its_weights_is_found_by_its_beat(fleet):
    fleet = fleet(count=1)
    fleet.push(weights(1))
    forget(fleet._host.now[0])
    wait(lambda: fleet.states()[0].restarts == 1)
    settled(fleet, 1)
    assert any("version 0" in e.why for e in fleet._events)


def test_an_engine_whose_weights_differ_from_the_others_is_replaced(fleet):
    fleet = fleet({(1, 0): {"checksums": {"w": "wrong"}}})
    fleet.push(weights(1))
    settled(fleet, 1)
    assert sum(s.restarts for s in fleet.states()) >= 1
    assert any("first in w" in e.why for e in fleet._events)


def test_a_request_that_every_engine_dies_of_is_blamed_in_the_end(fleet):
    fleet = fleet({i: {"extend": "dies slowly"} for i in range(2)})
    with pytest.raises(ClusterError, match="lost with its engine 5 times: engine .: it died"):
        asyncio.run(ask(fleet, 1))
    settled(fleet, 0)  # nothing else suffers


LONG = next(i for i in range(100) if len(undisturbed([i])[0]) == 24)  # the seed of an answer of 48 ms


def test_an_engine_that_is_lost_again_and_again_while_it_serves_is_replaced_each_time(fleet):
    """Its node dies, its first successor with it, and the second one soon after it is back: no reason to give up."""
    fleet = fleet({(0, life): {"ready": "dies before"} for life in (1, 2)}, count=1, every=60, retry=60)
    for lives in (3, 4, 5):
        fleet._host.now[0].gone.set()
        answers = asyncio.run(ask(fleet, LONG))
        assert [s.ids for s in steps(answers)] == undisturbed([LONG])
        assert fleet.states()[0].restarts == lives


def test_an_engine_that_cannot_be_started_again_is_given_up(fleet):
    fleet = fleet({(0, life): {"ready": "dies before"} for life in (1, 2, 3)}, count=1, retry=60)
    fleet._host.now[0].gone.set()
    with pytest.raises(ClusterError, match="no engine is left: engine 0: it died"):
        asyncio.run(ask(fleet, 1))


def test_what_an_engine_refuses_is_told_to_its_caller_alone(fleet):
    fleet = fleet({(0, 0): {"extend": "refuses"}})

    async def both():
        return await asyncio.gather(*(fleet.ask(i, request(i)) for i in (0, 1)), return_exceptions=True)

    refused, answered = asyncio.run(both())
    assert isinstance(refused, ClusterError) and "not today" in str(refused)
    assert [r.step.ids for r in answered] == undisturbed([1])
    assert [s.restarts for s in fleet.states()] == [0, 0]


def test_answers_that_end_early_are_asked_again(fleet):
    fleet = fleet({(0, 0): {"extend": "stops early"}})
    assert [s.ids for s in steps(asyncio.run(ask(fleet, 0, 1, 2)))] == undisturbed([0, 1, 2])


def test_an_engine_that_cannot_be_replaced_leaves_its_work_to_the_others(fleet):
    fleet = fleet()
    fleet._host.room = False
    fleet._host.now[0].gone.set()
    assert [s.ids for s in steps(asyncio.run(ask(fleet, *range(8))))] == undisturbed(range(8))
    wait(lambda: fleet.states()[0].state == "dead")
    assert any(e.state == "dead" and e.why == "no node has a CPU left" for e in fleet._events)
    fleet.push(weights(1))
    fleet._host.room = True  # a node comes back
    settled(fleet, 1)


def test_when_no_engine_is_left_every_caller_is_told_why(fleet):
    fleet = fleet()
    fleet._host.room = False
    for mortal in fleet._host.now.values():
        mortal.gone.set()
    with pytest.raises(ClusterError, match="no engine is left: engine .: no node has a CPU left"):
        asyncio.run(ask(fleet, *range(4)))
    with pytest.raises(ClusterError, match="no engine is left"):
        fleet.push(weights(1))


def test_an_engine_that_cannot_start_is_told_at_once(fleet):
    with pytest.raises(ClusterError, match="engine 1 could not start: not today"):
        fleet({1: {"ready": "refuses"}})


def test_a_hung_engine_is_named_with_what_it_did_not_do_and_holds_no_push_back_for_long(fleet):
    fleet = fleet({(0, 0): {"finish_weight_update": "hangs"}})
    fleet.push(weights(1))
    assert any("hung: finish_weight_update of engine 0 took more than 0.5 s" == e.why for e in fleet._events)
    settled(fleet, 1)


def test_a_cancelled_request_is_not_asked_again(fleet):
    fleet = fleet(count=1)

    async def cancel_and_die():
        reply = fleet.ask(0, request(LONG))
        await reached(fleet)
        reply.cancel()
        fleet._host.now[0].gone.set()

    asyncio.run(cancel_and_die())
    wait(lambda: fleet.states()[0].restarts)
    settled(fleet, 0)
    assert sum(method == "extend" for _, _, method in fleet._host.log) == 1


def test_what_was_cancelled_is_dropped_by_its_engine_and_what_was_not_goes_on(fleet):
    fleet = fleet(count=1)
    endless = Request((1, 2, 3), tuple(range(10_000)), 24, END, Sampling())  # its children are drawn one by one

    async def cancel_most():
        asked = [fleet.ask(0, request(seed)) for seed in range(8)] + [fleet.ask(0, endless)]
        await reached(fleet)
        for reply in [*asked[:6], asked[8]]:
            reply.cancel()
        return steps([await reply for reply in asked[6:8]])

    kept = asyncio.run(cancel_most())
    assert all(map(faithful, kept)) and [step.ids for step in kept] == undisturbed([6, 7])
    engine = fleet._host.now[0].engine
    wait(lambda: fleet.ledger.generated == engine.drawn)  # what was drawn for nobody is counted, too
    told = sum(method == "drop" for _, _, method in fleet._host.log)
    time.sleep(0.1)
    assert engine.drawn == fleet.ledger.generated < 16 * 24 and fleet.states()[0].requests == 0
    assert told == 1  # one call for all of one moment


def test_a_mistake_of_our_own_reaches_those_who_wait_and_those_who_come(fleet):
    fleet = fleet(count=1)

    async def oops(seat, room):
        raise KeyError("a mistake")

    async def wait_for_it():
        reply = fleet.ask(0, request(LONG))
        await asyncio.sleep(0.01)
        fleet._host.start = oops
        fleet._host.now[0].gone.set()
        await asyncio.wait_for(reply, 5)

    for _ in range(2):
        with pytest.raises(KeyError, match="a mistake"):
            asyncio.run(wait_for_it())


def test_callers_in_other_threads_and_after_the_end_are_served_or_told(fleet):
    fleet = fleet()
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: asyncio.run(ask(fleet, i))})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all([s.ids for s in steps(found[i])] == undisturbed([i]) for i in range(4))
    fleet.stop()
    fleet.stop()
    with pytest.raises(ClusterError, match="stopped"):
        asyncio.run(ask(fleet, 0))
    with pytest.raises(ClusterError, match="stopped"):
        fleet.push(weights(1))


def test_the_time_line_holds_every_state_since_the_start(fleet, tmp_path):
    fleet = fleet(count=1)
    fleet.record(tmp_path / "events.jsonl")
    fleet.push(weights(1))
    fleet._host.now[0].gone.set()
    wait(lambda: fleet.states()[0].restarts == 1)
    settled(fleet, 1)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    states = [e["state"] for e in events]
    assert states == ["starting", "serving", "updating", "serving", "restarting", "starting", "updating", "serving"]
    assert events[4]["why"] == "it was killed" or events[4]["why"] == "it died"
    assert [e["time"] for e in events] == sorted(e["time"] for e in events)
    assert events[5]["version"] == 0 and events[5]["lag"] == 1 and events[-1]["lag"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_moments_change_no_token_and_no_version(fleet, seed):
    fleet, chance = fleet(count=3, retry=0.05), random.Random(seed)

    async def kill_now_and_then(until):
        """Paced by the turns that an engine needs for its tokens, however long those take on a busy machine. A request
        that was lost twice already is left alone: with three engines dead at once it is then lost 5 times never."""
        while not until.is_set():
            for _ in range(chance.randrange(10, 75)):
                await asyncio.sleep(PACE)
            jobs = [*fleet._waiting, *(job for seat in fleet._seats for job in seat.jobs)]
            if all(job.tries < 2 for job in jobs):
                fleet._host.now[chance.randrange(3)].gone.set()

    async def train():
        answers, end = [], threading.Event()
        killer = asyncio.run_coroutine_threadsafe(kill_now_and_then(end), fleet._loop)
        for step in range(12):
            answers.append(await ask(fleet, *range(8 * step, 8 * step + 8)))
            await asyncio.to_thread(fleet.push, weights(step + 1))
        end.set()
        await asyncio.wrap_future(killer)
        return answers

    answers = asyncio.run(train())
    for step, each in enumerate(answers):
        assert [s.ids for s in steps(each)] == undisturbed(range(8 * step, 8 * step + 8))
        assert {v for s in steps(each) for v, _, _ in s.versions} == {step}
        assert all(faithful(s) for s in steps(each))
    assert sum(s.restarts for s in fleet.states()) > 2
