import asyncio

import pytest

from rollouts.roll_out import roll_out
from search.base import Sampling, Trajectory
from search.sample import Sample
from search.scripted import Scripted
from verifiers import Pool
from verifiers.base import Task


class Letters:
    """A tokenizer of the two methods that rolling out needs: every character is its code."""

    def apply_chat_template(self, messages, *, add_generation_prompt, return_dict):
        assert add_generation_prompt and not return_dict
        return [ord(c) for message in messages for c in message["content"]]


def task(number: int) -> Task:
    return Task(f"t/{number}", ({"role": "user", "content": f"{number} + 1 ="},), str(number + 1), "math")


@pytest.fixture(scope="module")
def pool():
    with Pool(1) as pool:
        yield pool


def run(tasks, engine, pool, **options):
    return asyncio.run(roll_out(tasks, Sample(n=2), engine, pool, Letters(), **({"seed": 1} | options)))


def test_every_task_becomes_a_judged_group_in_order(pool):
    engine = Scripted(lambda text, child: ["Answer: 3", "Answer: 9"][child], Sampling(max_tokens=40))
    groups = run([task(2), task(8)], engine, pool)
    assert [g.task.id for g in groups] == ["t/2", "t/8"]
    assert [[r.verdict.correct for r in g.rollouts] for g in groups] == [[True, False], [False, True]]


def test_seeds_depend_on_the_run_and_the_task_alone(pool):
    engine = Scripted(lambda text, child: "Answer: 3", Sampling(max_tokens=40))

    def seeds(tasks, seed):
        groups = run(tasks, engine, pool, seed=seed)
        return {g.task.id: [r.trajectory.seed for r in g.rollouts] for g in groups}

    both, alone = seeds([task(2), task(8)], 1), seeds([task(8)], 1)
    assert both["t/8"] == alone["t/8"] != both["t/2"]
    assert seeds([task(8)], 2)["t/8"] != alone["t/8"]


def test_the_first_failure_rises_as_itself(pool):
    class Broken(Scripted):
        async def extend(self, path: Trajectory, **_):
            raise RuntimeError("the engine is gone")

    with pytest.raises(RuntimeError, match="the engine is gone"):
        run([task(1), task(2)], Broken(lambda text, child: ""), pool)


def test_a_search_gets_no_score_unless_one_is_bound(pool):
    seen = []

    class Peeking(Sample):
        async def run(self, root, engine, score):
            seen.append(score)
            return await engine.extend(root, n=1)

    engine = Scripted(lambda text, child: "Answer: 3", Sampling(max_tokens=40))
    asyncio.run(roll_out([task(2)], Peeking(n=1), engine, pool, Letters(), seed=0))
    assert seen == [None]
