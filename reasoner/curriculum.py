"""Training tasks drawn from pools by how much there is to learn from each.

A pool holds the tasks with one value of a `meta` key (their number of terms, their level). Pools that are solved about
half of the time are drawn most: the variance of a 0/1 reward, p (1 - p), is what a policy gradient has to learn from.
Knows no engine and no learner. Neighbour: `train.Deck` is the same without pools; `train.steps` tells what came of a
draw.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from rollouts.base import Group
from search.base import derive
from verifiers.base import Task


@dataclass(frozen=True, slots=True)
class Curriculum:
    """The `[curriculum]` table of a config."""

    by: str  # key of the tasks' meta; dots go into tables: "difficulty.num_terms"
    memory: float = 0.9  # share of what was seen of a pool that still counts after a step
    floor: float = 0.05  # least weight of a pool, against 0.25 of one that is solved half of the time

    def __post_init__(self) -> None:
        if not 0 <= self.memory <= 1 or self.floor <= 0:
            raise ValueError(f"memory = {self.memory} must lie in [0, 1] and floor = {self.floor} above 0")

    def pool_of(self, task: Task) -> str:
        """Raises ValueError for a task without the key."""
        found = task.meta
        for key in self.by.split("."):
            if not isinstance(found, Mapping) or key not in found:
                known = ", ".join(sorted(task.meta)) or "nothing"
                raise ValueError(f"curriculum.by = {self.by!r}: task {task.id} has no such meta, it has {known}")
            found = found[key]
        return str(found)


class Pools:
    """Which task a ticket stands for, by what is known when it is asked for.

    Within a pool the task is drawn by the ticket's number alone, so that nothing but the pools' scores has to be kept.

    Example:
        pools = Pools(tasks, Curriculum(by="num_terms"), seed=0)
        groups = roll_out([pools[ticket] for ticket in range(32)], ...)
        pools.learn(groups)
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        curriculum: Curriculum,
        seed: int,
        state: Mapping[str, Sequence[float]] = MappingProxyType({}),
    ) -> None:
        self._curriculum, self._seed = curriculum, seed
        pools: dict[str, list[Task]] = {}
        for task in tasks:
            pools.setdefault(curriculum.pool_of(task), []).append(task)
        self._pools = {name: pools[name] for name in sorted(pools)}
        self.state = {name: (0.0, 0.0) for name in self._pools} | {k: (a, b) for k, (a, b) in state.items()}

    def __getitem__(self, ticket: int) -> Task:
        noise = random.Random(derive(self._seed, "pool", ticket))
        weights = self.weights()
        (name,) = noise.choices(list(weights), list(weights.values()))
        return noise.choice(self._pools[name])

    def learn(self, groups: Sequence[Group]) -> None:
        """Count what was judged in a step; what could not be judged says nothing of difficulty."""
        keep = self._curriculum.memory
        counts = {name: [right * keep, seen * keep] for name, (right, seen) in self.state.items()}
        for group in groups:
            count = counts[self._curriculum.pool_of(group.task)]
            count[0] += sum(r.verdict.score for r in group.scored)
            count[1] += len(group.scored)
        self.state = {name: (right, seen) for name, (right, seen) in counts.items()}

    def weights(self) -> dict[str, float]:
        """p (1 - p) of each pool, p from its score with one success and one failure assumed; not normalised."""
        rates = {name: (right + 1) / (seen + 2) for name, (right, seen) in self.state.items()}
        return {name: max(p * (1 - p), self._curriculum.floor) for name, p in rates.items()}
