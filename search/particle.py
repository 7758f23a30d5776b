"""Particle filtering: resample unfinished paths by their scores, and keep weights that make every sum unbiased.

Neighbours: `rebase` and `rejection` (the same idea without the weights), `marginal` (methods "particle" and "gumbel"
read `log_weight`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from search.base import Engine, Score, Trajectory, derive, granularity, require, sane
from search.tree import together


@dataclass(frozen=True)
class Particle:
    """Sequential Monte Carlo with the policy as proposal and the score as twist (Zhao et al. 2024).

    A particle's weight moves by score(now) / score(before); below `ess` x n effective particles all are resampled
    systematically. With log_weight w_i of the paths returned, sum exp(w_i) f(path_i) is an unbiased estimate of
    E[score(path) f(path)] over the policy's paths, so sum exp(w_i) is the evidence. target "model" divides the last
    score out again: then it estimates E[f(path)], the model's own marginal, with scores only guiding the search.
    Scores must be positive on every prefix that a wanted path can have (a 0 ends a particle).
    """

    n: int = 16
    ess: float = 0.5
    until: str | int = "step"
    target: str = "score"
    method: ClassVar[str] = "particle"
    size: ClassVar[str] = "n"

    def __post_init__(self) -> None:
        sane(self, positive=("n",), target=("score", "model"))
        if not 0 <= self.ess <= 1:
            raise ValueError(f"Particle: ess={self.ess} must lie in 0..1 (0 never resamples, 1 always)")

    @property
    def responses(self) -> int:
        return self.n

    def check(self, engine: Engine, score: Score | None) -> None:
        require(self, engine, score, judged=True, until=self.until)

    async def run(self, root: Trajectory, engine: Engine, score: Score) -> list[Trajectory]:
        until, draw = granularity(self.until), random.Random(derive(root.seed, "resample"))
        # While running, log_weight is relative to `scale`: the log of what resampling has averaged away.
        particles, scale = [replace(root, value=1.0)] * self.n, -math.log(self.n)
        while any(p.end is None and p.log_weight > -math.inf for p in particles):
            moved = await self._move(particles, engine, score, until)
            if moved is None:  # the budget is spent: the particles stay where they are
                break
            weights = [math.exp(p.log_weight) for p in moved]
            total = math.fsum(weights)
            if total > 0 and total**2 / math.fsum(w * w for w in weights) < self.ess * self.n:
                scale += math.log(total / self.n)
                moved = [replace(moved[i], log_weight=0.0) for i in systematic(weights, draw.random())]
            particles = moved
        return [replace(p, log_weight=p.log_weight + scale - self._last(p)) for p in particles if p.steps]

    async def _move(self, particles, engine, score, until) -> list[Trajectory] | None:
        """Every open particle one extension further, copies of one path in one call."""
        copies: dict[tuple[int, ...], int] = {}
        for p in particles:
            copies[p.seed, *p.ids] = copies.get((p.seed, *p.ids), 0) + 1
        firsts = {(p.seed, *p.ids): p for p in reversed(particles)}

        async def one(name: tuple[int, ...]) -> list[Trajectory]:
            path, n = firsts[name], copies[name]
            if path.end is not None or path.log_weight == -math.inf:
                return [path] * n
            kids = await engine.extend(path, n=n, until=until)
            scores = await together(score(kid) for kid in kids)
            gains = [math.log(s / path.value) if s > 0 else -math.inf for s in scores]
            return [
                replace(kid, value=s, log_weight=path.log_weight + gain)
                for kid, s, gain in zip(kids, scores, gains, strict=True)
            ]

        moved = sum(await together(one(name) for name in copies), [])
        return moved if len(moved) == len(particles) else None

    def _last(self, path: Trajectory) -> float:
        return math.log(path.value) if self.target == "model" and path.value > 0 else 0.0


def systematic(weights: Sequence[float], offset: float) -> list[int]:
    """As many indices as weights, i about weights[i] / mean times: one uniform offset for evenly spaced pointers."""
    total, n = math.fsum(weights), len(weights)
    chosen, at, below = [], 0, weights[0]
    for pointer in ((i + offset) * total / n for i in range(n)):
        while pointer >= below and at < n - 1:
            at += 1
            below += weights[at]
        chosen.append(at)
    return chosen


def evidence(particles: Sequence[Trajectory]) -> float:
    """Log of the estimated E[score]; the estimate itself (not its log) is unbiased."""
    return math.log(total) if (total := math.fsum(math.exp(p.log_weight) for p in particles)) else -math.inf
