"""Speculative rejection: many starts, and the worse part of them dropped as they grow.

Neighbours: `sample` (best-of-n without the dropping), `particle` (with weights).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from search.base import Engine, Score, Trajectory, granularity, require, sane
from search.tree import best, spread


@dataclass(frozen=True)
class Rejection:
    """Best-of-n that stops paying for hopeless paths (Sun et al. 2024).

    Every `until` (tokens by default) all paths are scored and the best `keep` of them stay, finished ones included.
    """

    n: int = 16
    keep: float = 0.5
    until: str | int = 64
    method: ClassVar[str] = "best"
    size: ClassVar[str] = "n"

    def __post_init__(self) -> None:
        sane(self, positive=("n",))
        if not 0 < self.keep <= 1:
            raise ValueError(f"Rejection: keep={self.keep} must lie in (0, 1]")

    @property
    def responses(self) -> int:
        return self.n

    def check(self, engine: Engine, score: Score | None) -> None:
        require(self, engine, score, judged=True, until=self.until)

    async def run(self, root: Trajectory, engine: Engine, score: Score) -> list[Trajectory]:
        until = granularity(self.until)
        (paths,) = await spread([root], self.n, engine, score, until)
        while live := [path for path in paths if path.end is None]:
            kept = best(paths)[: max(1, math.ceil(self.keep * len(paths)))]
            live = [path for path in kept if path.end is None]
            grown = await spread(live, 1, engine, score, until)
            if live and not any(grown):
                return kept
            paths = [path for path in kept if path.end] + sum(grown, [])
        return best(paths)
