"""One task becomes a group of judged paths: search, then verify. Many tasks at once, no barrier between them.

Runs on any Engine; knows no Ray, no vLLM and no learner. What the search may know of its task is the caller's choice
and stands in one place: `score.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rollouts.admission import Admission, need_of
from rollouts.base import Group, Rollout
from rollouts.episode import Episode
from rollouts.score import Guide, read_by
from search.base import Engine, Search, Trajectory, derive
from search.tree import Tree, explore
from verifiers import Pool
from verifiers.base import Task


@dataclass(frozen=True)
class Searched:
    """The judged paths of one task, and the tree that they were found in (an episode has none)."""

    group: Group
    tree: Tree | None


def encode(tokenizer: Any, task: Task) -> tuple[int, ...]:
    """The prompt's token ids under the tokenizer's chat template: the one place where text becomes ids."""
    ids = tokenizer.apply_chat_template(list(task.prompt), add_generation_prompt=True, return_dict=False)
    return tuple(ids)


async def roll_out(
    tasks: Sequence[Task],
    search: Search | Episode,
    engine: Engine,
    pool: Pool,
    tokenizer: Any,
    *,
    seed: int,
    guide: Guide | None = None,
) -> list[Group]:
    """The groups of `tasks`, in their order; `search_tasks` without the trees."""
    found = await search_tasks(tasks, search, engine, pool, tokenizer, seed=seed, guide=guide)
    return [each.group for each in found]


async def search_tasks(
    tasks: Sequence[Task],
    search: Search | Episode,
    engine: Engine,
    pool: Pool,
    tokenizer: Any,
    *,
    seed: int,
    guide: Guide | None = None,
) -> list[Searched]:
    """Search and judge every task.

    Args:
        pool: judges the paths, with the answer key.
        seed: hashed with each task's id into the seed of its root.
        guide: what the search may know of its task; None: nothing, not even how answers are read. An evaluation gives
            `Open`, and no other.
    """

    admission = getattr(engine, "admission", Admission(None))

    async def one(task: Task) -> Searched:
        root = Trajectory(encode(tokenizer, task), seed=derive(seed, task.id))
        if isinstance(search, Episode):
            rollouts = await search.play(task, root, engine, pool, partial(encode, tokenizer))
            return Searched(Group(task, tuple(rollouts)), None)
        bound = search if guide is None else read_by(search, task.verifier, guide.pool)
        async with admission.held(need_of(search, len(root.prompt), engine.sampling.max_tokens)):
            found = await explore(bound, root, engine, None if guide is None else guide.score_of(task))
        verdicts = await pool.verify(task, [path.text for path in found.paths])
        rollouts = (Rollout(task, p, v) for p, v in zip(found.paths, verdicts, strict=True))
        return Searched(Group(task, tuple(rollouts)), found.tree)

    try:
        async with asyncio.TaskGroup() as group:  # the first failure cancels the rest
            running = [group.create_task(one(task)) for task in tasks]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in running]
