"""Diverse verifier tree search: independent beams of width 1, so that one good-looking start cannot take over.

Neighbour: `beam`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from search.base import Engine, Score, Trajectory, again, granularity, require, sane
from search.tree import best, spread, together


@dataclass(frozen=True)
class Dvts:
    """`trees` greedy walks side by side (Beeching et al. 2024); each keeps the best of `branch` children a step."""

    trees: int = 4
    branch: int = 4
    until: str | int = "step"
    method: ClassVar[str] = "best"
    size: ClassVar[str] = "trees"

    def __post_init__(self) -> None:
        sane(self, positive=("trees", "branch"))

    @property
    def responses(self) -> int:
        return self.trees * self.branch

    def check(self, engine: Engine, score: Score | None) -> None:
        require(self, engine, score, judged=True, until=self.until)

    async def run(self, root: Trajectory, engine: Engine, score: Score) -> list[Trajectory]:
        until = granularity(self.until)

        async def walk(path: Trajectory) -> Trajectory:
            while path.end is None:
                (kids,) = await spread([path], self.branch, engine, score, until)
                if not kids:
                    break
                path = best(kids)[0]
            return path

        paths = await together(walk(again(root, tree)) for tree in range(self.trees))
        return best(path for path in paths if path.steps)
