"""One task becomes a group of judged paths: search, then verify. Many tasks at once, no barrier between them.

Runs on any Engine; knows no Ray, no vLLM and no learner. Whoever calls it chooses whether the search may see a score.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from rollouts.base import Group, Rollout
from search.base import Engine, Score, Search, Trajectory, derive
from verifiers import Pool
from verifiers.base import Task


def encode(tokenizer: Any, task: Task) -> tuple[int, ...]:
    """The prompt's token ids under the tokenizer's chat template: the one place where text becomes ids."""
    ids = tokenizer.apply_chat_template(list(task.prompt), add_generation_prompt=True, return_dict=False)
    return tuple(ids)


async def roll_out(
    tasks: Sequence[Task],
    search: Search,
    engine: Engine,
    pool: Pool,
    tokenizer: Any,
    *,
    seed: int,
    score: Score | None = None,
) -> list[Group]:
    """The groups of `tasks`, in their order.

    Args:
        seed: hashed with each task's id into the seed of its root.
        score: what scores partial paths for the search. Never the answer key when the result is an evaluation.
    """

    async def one(task: Task) -> Group:
        root = Trajectory(encode(tokenizer, task), seed=derive(seed, task.id))
        paths = await search.run(root, engine, score)
        verdicts = await pool.verify(task, [path.text for path in paths])
        return Group(task, tuple(Rollout(task, p, v) for p, v in zip(paths, verdicts, strict=True)))

    try:
        async with asyncio.TaskGroup() as group:  # the first failure cancels the rest
            running = [group.create_task(one(task)) for task in tasks]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in running]
