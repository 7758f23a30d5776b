"""Which tasks a step draws: pools by difficulty, and further draws until there is contrast."""

import json
from collections import Counter

import pytest

from reasoner.contrast import disagrees, until_contrast
from reasoner.curriculum import Curriculum, Pools
from rollouts.base import Group, Rollout
from rollouts.feed import Batch
from search.base import Step, Trajectory
from verifiers.base import Task, Verdict

TASKS = [Task(f"t/{i}", ({"role": "user", "content": str(i)},), "7", "math", {"level": i % 3}) for i in range(30)]


def group(task: Task, *scores: float | None) -> Group:
    path = Trajectory((1,), (Step((5,), (-0.1,)),), "stop")
    verdicts = [Verdict.fail("broke") if s is None else Verdict("scored", s, s == 1.0) for s in scores]
    return Group(task, tuple(Rollout(task, path, v) for v in verdicts))


def test_pools_that_are_half_solved_are_drawn_most():
    pools = Pools(TASKS, Curriculum(by="level", memory=1.0), seed=0)
    scores = {0: (1.0,) * 40, 1: (1.0, 0.0) * 20, 2: (0.0,) * 40}
    pools.learn([group(t, *scores[t.meta["level"]]) for t in TASKS[:3]])
    assert pools.weights() == pytest.approx({"0": 0.05, "1": 0.25, "2": 0.05})
    drawn = Counter(pools[ticket].meta["level"] for ticket in range(700))
    assert 450 < drawn[1] < 550 and drawn[0] > 60 and drawn[2] > 60  # 5/7 of them; none is given up
    assert {pools[ticket].id for ticket in range(700)} == {t.id for t in TASKS}


def test_an_unjudged_rollout_says_nothing_of_difficulty():
    pools = Pools(TASKS, Curriculum(by="level"), seed=0)
    before = pools.weights()
    pools.learn([group(TASKS[0], None, None)])
    assert pools.weights() == before


def test_what_was_seen_long_ago_is_forgotten():
    pools = Pools(TASKS, Curriculum(by="level", memory=0.5), seed=0)
    pools.learn([group(TASKS[0], *(1.0,) * 100)])
    low = pools.weights()["0"]
    for _ in range(12):
        pools.learn([])
    assert pools.weights()["0"] > 4 * low


def test_a_ticket_depends_on_the_seed_and_the_state_alone():
    pools = Pools(TASKS, Curriculum(by="level"), seed=3)
    pools.learn([group(TASKS[0], 1.0, 0.0), group(TASKS[1], 1.0, 1.0, 1.0)])
    drawn = [pools[ticket].id for ticket in range(40)]
    resumed = Pools(TASKS, Curriculum(by="level"), seed=3, state=json.loads(json.dumps(pools.state)))
    assert [resumed[ticket].id for ticket in reversed(range(40))] == drawn[::-1]
    assert [Pools(TASKS, Curriculum(by="level"), seed=4)[ticket].id for ticket in range(40)] != drawn


@pytest.mark.parametrize("key", ["nothing", "level.deeper"])
def test_a_task_without_the_key_is_named(key):
    with pytest.raises(ValueError, match=r"t/0.*level"):
        Pools(TASKS, Curriculum(by=key), seed=0)


def taking(*told: str):
    """Batches whose groups disagree ("x") or agree ("."), and how many were taken."""
    taken = []

    def take() -> Batch:
        marks = told[len(taken)]
        taken.append(marks)
        groups = tuple(group(TASKS[0], 1.0, 0.0) if mark == "x" else group(TASKS[0], 1.0, 1.0) for mark in marks)
        return Batch(groups, (len(taken),) * len(marks), {len(taken): "late"}, 0.5, len(taken))

    return take, taken


def test_a_step_takes_batches_until_enough_groups_teach():
    take, taken = taking("xx..", "x.xx", "xxxx")
    batch = until_contrast(take, 4, rounds=5)
    assert len(taken) == 2 and sum(map(disagrees, batch.groups)) == 5
    assert batch.lags == (1, 1, 1, 1, 2, 2, 2, 2) and batch.dropped == {1: "late", 2: "late"}
    assert batch.generate_s == 1.0 and batch.in_flight == 2


def test_the_rounds_are_bounded_and_every_group_is_kept_to_be_counted():
    take, taken = taking(*["...."] * 9)
    batch = until_contrast(take, 4, rounds=3)
    assert len(taken) == 4 and len(batch.groups) == 16


def test_without_rounds_a_step_takes_one_batch():
    take, taken = taking("....", "xxxx")
    assert len(until_contrast(take, 4, rounds=0).groups) == 4 and len(taken) == 1


def test_what_could_not_be_judged_is_no_contrast():
    assert not disagrees(group(TASKS[0], 1.0, None)) and not disagrees(group(TASKS[0], None, None))
