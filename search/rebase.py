"""Reward-balanced search: every live path gets children in proportion to the softmax of its score.

Neighbours: `beam` (hard selection), `particle` (random selection with weights that stay exact).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from search.base import Engine, Score, Trajectory, granularity, require, sane
from search.tree import best, spread, together


@dataclass(frozen=True)
class Rebase:
    """REBASE (Wu et al. 2024): `width` paths in all; those not finished share the rest of it each step.

    balance: temperature of the softmax; small is greedy.
    """

    width: int = 16
    balance: float = 0.2
    until: str | int = "step"
    method: ClassVar[str] = "prm"
    size: ClassVar[str] = "width"

    def __post_init__(self) -> None:
        sane(self, positive=("width", "balance"))

    @property
    def responses(self) -> int:
        return self.width

    def check(self, engine: Engine, score: Score | None) -> None:
        require(self, engine, score, judged=True, until=self.until)

    async def run(self, root: Trajectory, engine: Engine, score: Score) -> list[Trajectory]:
        until = granularity(self.until)
        (live,) = await spread([root], self.width, engine, score, until)
        done: list[Trajectory] = []
        while True:
            done += [path for path in live if path.end]
            live = [path for path in live if not path.end]
            shares = apportion([path.value / self.balance for path in live], self.width - len(done))
            chosen = [(path, n) for path, n in zip(live, shares, strict=True) if n]
            grown = await together(spread([path], n, engine, score, until) for path, n in chosen)
            kids = [kid for (each,) in grown for kid in each]
            if not kids:
                return best(done + live)
            live = kids


def apportion(logits: Sequence[float], seats: int) -> list[int]:
    """Whole numbers that sum to `seats`, close to seats x softmax(logits): largest remainders, earlier ones first."""
    if not logits or seats <= 0:
        return [0] * len(logits)
    highest = max(logits)
    weights = [math.exp(x - highest) for x in logits]
    total = math.fsum(weights)
    quotas = [seats * w / total for w in weights]
    counts = [int(q) for q in quotas]
    order = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for i in order[: seats - sum(counts)]:
        counts[i] += 1
    return counts
