"""Independent samples, and the best or the score-weighted vote of them.

Neighbours: `distinct` (without replacement), `adaptive` (stops early).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from search.base import STEP, Engine, Score, Trajectory, require, sane
from search.tree import best, together

AGGREGATES = {
    "last": lambda scores: scores[-1],
    "min": min,
    "product": math.prod,
    "mean": lambda scores: math.fsum(scores) / len(scores),
}


@dataclass(frozen=True)
class Sample:
    """Self-consistency (Wang et al. 2023): n independent paths, whose answers vote.

    arithmetic: draw them from stratified codes, each path still by the model's own law (Vilnis et al. 2023).
    top: alternatives to keep per position, as the estimator "rao_blackwell" wants.
    """

    n: int = 16
    arithmetic: bool = False
    top: int = 0
    method: ClassVar[str] = "vote"
    size: ClassVar[str] = "n"

    def __post_init__(self) -> None:
        sane(self, positive=("n",))

    @property
    def responses(self) -> int:
        return self.n

    def check(self, engine: Engine, score: Score | None) -> None:
        offers = (*(("arithmetic",) if self.arithmetic else ()), *(("top",) if self.top else ()))
        require(self, engine, score, offers=offers)

    async def run(self, root: Trajectory, engine: Engine, score: Score | None) -> list[Trajectory]:
        changes = {name: value for name in ("arithmetic", "top") if (value := getattr(self, name))}
        engine = engine.at(**changes) if changes else engine
        return await engine.extend(root, n=self.n)


@dataclass(frozen=True)
class BestOf:
    """n independent paths and a scorer: the best of them answers, or all vote with their scores (`vote`).

    aggregate: "last" scores the whole path; "min", "product" and "mean" score after every step and join the scores.
    """

    n: int = 16
    aggregate: str = "last"
    vote: bool = False
    size: ClassVar[str] = "n"

    def __post_init__(self) -> None:
        sane(self, positive=("n",), aggregate=tuple(AGGREGATES))

    @property
    def method(self) -> str:
        return "prm" if self.vote else "best"

    @property
    def responses(self) -> int:
        return self.n

    def check(self, engine: Engine, score: Score | None) -> None:
        require(self, engine, score, judged=True, until="end" if self.aggregate == "last" else "step")

    async def run(self, root: Trajectory, engine: Engine, score: Score) -> list[Trajectory]:
        async def whole(path: Trajectory) -> Trajectory:
            return replace(path, value=await score(path))

        async def stepwise(path: Trajectory) -> Trajectory:
            scores = [await score(path)]
            while path.end is None and (grown := await engine.extend(path, until=STEP)):
                path = grown[0]
                scores.append(await score(path))
            return replace(path, value=AGGREGATES[self.aggregate](scores))

        if self.aggregate == "last":
            return best(await together(whole(path) for path in await engine.extend(root, n=self.n)))
        return best(await together(stepwise(path) for path in await engine.extend(root, n=self.n, until=STEP)))
