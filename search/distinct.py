"""The n paths of a sample without replacement: no path twice, and still unbiased.

Neighbours: `beam` (the likeliest paths: no randomness, no estimate), `marginal` (method "gumbel" reads `log_weight`).
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, replace
from typing import ClassVar

from search.base import Engine, Score, Step, Trajectory, derive, require, sane
from search.tree import likeliest, together

UNLISTED = -1  # stands for every token beyond the `top` listed ones


@dataclass(frozen=True)
class Distinct:
    """Stochastic beam search (Kool et al. 2019): log p + Gumbel noise, drawn top down, the n largest kept.

    log_weight of a path is log p - log P(it is among those kept), given the threshold. top: alternatives listed per
    position; with fewer than the whole vocabulary, what lies beyond them can be drawn too, as an unfinished path of a
    token that has no name, so that its mass is reported and not lost.
    """

    n: int = 8
    top: int = 64
    method: ClassVar[str] = "gumbel"
    size: ClassVar[str] = "n"

    def __post_init__(self) -> None:
        sane(self, positive=("n", "top"))

    @property
    def responses(self) -> int:
        return self.n + 1

    def check(self, engine: Engine, score: Score | None) -> None:
        require(self, engine, score, offers=("top", "logprobs"))
        if engine.sampling.temperature == 0:
            raise ValueError("Distinct draws at random but temperature=0 leaves one path: set it to 1")

    async def run(self, root: Trajectory, engine: Engine, score: Score | None) -> list[Trajectory]:
        beam = [(_gumbel(random.Random(derive(root.seed, "noise"))), root)]
        while any(path.end is None for _, path in beam):
            grown = await together(self._children(noise, path, root, engine) for noise, path in beam)
            if not all(grown):  # the budget is spent: a part of a sample without replacement is no sample
                return []
            beam = heapq.nlargest(self.n + 1, sum(grown, []), key=lambda pair: pair[0])  # one more: the threshold
        threshold = beam[self.n][0] if len(beam) > self.n else -math.inf
        return [self._weigh(path, root, threshold) for _, path in beam[: self.n]]

    async def _children(self, noise, path, root, engine) -> list[tuple[float, Trajectory]]:
        if path.end is not None:
            return [(noise, path)]
        kids = await likeliest(path, self.top, engine)
        rest = 1 - math.fsum(math.exp(kid.steps[-1].logprobs[0]) for kid in kids)
        if kids and rest > 1e-9:
            kids.append(path.grow(Step((UNLISTED,), (math.log(rest),)), end="length"))
        draw = random.Random(derive(path.seed, "noise", "children"))
        noises = [kid.logprob - root.logprob + _gumbel(draw) for kid in kids]
        return list(zip(_condition(noises, noise), kids, strict=True))

    def _weigh(self, path: Trajectory, root: Trajectory, threshold: float) -> Trajectory:
        logprob = path.logprob - root.logprob
        kept = -math.expm1(-math.exp(min(700.0, logprob - threshold)))
        # For a tiny chance 1 - exp(-x) ~ x, and the logarithm of x needs no exp.
        log_kept = math.log(kept) if kept > 1e-12 else logprob - threshold
        return replace(path, log_weight=logprob - log_kept)


def _gumbel(draw: random.Random) -> float:
    return -math.log(draw.expovariate(1.0))


def _condition(noises: list[float], highest: float) -> list[float]:
    """Gumbels given that their maximum is `highest`, without loss of digits (Kool et al. 2019, appendix B.3)."""
    top = max(noises, default=0.0)
    moved = []
    for g in noises:
        v = highest - g + (math.log1p(-math.exp(g - top)) if g < top else -math.inf)
        moved.append(highest - max(0.0, v) - math.log1p(math.exp(-abs(v))))
    return moved
