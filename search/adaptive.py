"""Samples where they are needed: stop when the leader is safe, and share one budget among questions by difficulty.

Neighbours: `sample` (a fixed number), `marginal` (classes and certificate).
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

from search.base import Engine, Score, Trajectory, again, require, sane
from search.marginal import estimate, group, last_line
from search.tree import together


@dataclass(frozen=True)
class Adaptive:
    """Self-consistency that stops early (Aggarwal et al. 2023), cancelling what is still in flight.

    Stops when the runner-up cannot catch up within n, when the paths drawn prove the answer (certificate), or when the
    leader's chance of being the true mode reaches `confidence` (1: never for that reason). Paths are judged in the
    order of their number, not of their arrival: the same seed stops at the same place. answer, equal: how the task
    reads and compares answers, bound by the caller.
    """

    n: int = 64
    least: int = 4
    confidence: float = 0.95
    lanes: int = 8
    answer: Callable[[str], str | None] = last_line
    equal: Callable[[str, str], bool] | None = None
    method: ClassVar[str] = "vote"
    size: ClassVar[str] = "n"

    def __post_init__(self) -> None:
        sane(self, positive=("n", "least", "lanes"))
        if not 0.5 < self.confidence <= 1:
            raise ValueError(f"Adaptive: confidence={self.confidence} must lie in (0.5, 1]")

    @property
    def responses(self) -> int:
        return self.n

    def check(self, engine: Engine, score: Score | None) -> None:
        require(self, engine, score)

    async def run(self, root: Trajectory, engine: Engine, score: Score | None) -> list[Trajectory]:
        flights: list[asyncio.Task] = []
        paths: list[Trajectory] = []
        settled = replace(self, equal=self.equal and cache(self.equal)).settled  # asked anew with every path
        try:
            while len(paths) < self.n and not settled(paths):
                while len(flights) < min(self.n, len(paths) + self.lanes):
                    flights.append(asyncio.ensure_future(engine.extend(again(root, len(flights)))))
                drawn = await flights[len(paths)]
                if not drawn:  # the budget is spent
                    break
                paths += drawn
        finally:
            for flight in flights:
                flight.cancel()
            await asyncio.gather(*flights, return_exceptions=True)
        return paths

    def settled(self, paths: Sequence[Trajectory]) -> bool:
        if len(paths) < self.least:
            return False
        first, second = votes(paths, self.answer, self.equal)
        if first - second > self.n - len(paths) or (first and mode_confidence(first, second) >= self.confidence):
            return True
        return estimate(paths, answer=self.answer, equal=self.equal).certified


def votes(paths: Sequence[Trajectory], answer, equal) -> tuple[int, int]:
    """Votes of the leader and of the runner-up."""
    labels, _, _ = group([answer(path.text) if path.end == "stop" else None for path in paths], equal)
    counts = sorted(Counter(label for label in labels if label >= 0).values(), reverse=True)
    return tuple([*counts, 0, 0][:2])


def mode_confidence(first: int, second: int) -> float:
    """P(the leader's share exceeds the runner-up's) under a uniform prior: 1 - I_1/2(first + 1, second + 1)."""
    n = first + second + 1
    return sum(math.comb(n, i) for i in range(first + 1)) / 2**n


async def allocate(
    roots: Sequence[Trajectory],
    engine: Engine,
    budget: int,
    *,
    least: int = 4,
    most: int = 64,
    lanes: int = 16,
    answer: Callable[[str], str | None] = last_line,
    equal: Callable[[str, str], bool] | None = None,
) -> list[list[Trajectory]]:
    """One budget of generated tokens over many questions: `least` samples each, then more where the mode is least sure.

    Goes in waves of `lanes` questions, least confident first; a question whose mode is 99% sure, or that has `most`
    samples, is left alone. Never exceeds the budget, which must cover `least` full paths of every question.
    """
    longest = engine.sampling.max_tokens
    equal = equal and cache(equal)
    if budget < least * longest * len(roots):
        raise ValueError(
            f"budget={budget} is smaller than {least} paths of {longest} tokens for each of {len(roots)} questions: "
            "raise it, or lower least or max_tokens"
        )
    paths = await together(engine.extend(root, n=least) for root in roots)
    while True:
        spent = sum(path.sampled_tokens - roots[i].sampled_tokens for i, each in enumerate(paths) for path in each)
        sure = [mode_confidence(*votes(each, answer, equal)) for each in paths]
        open_ = sorted((s, i) for i, s in enumerate(sure) if s < 0.99 and len(paths[i]) < most)
        wave = [i for _, i in open_[: min(lanes, (budget - spent) // longest)]]
        if not wave:
            return paths
        drawn = await together(engine.extend(again(roots[i], len(paths[i]))) for i in wave)
        for i, more in zip(wave, drawn, strict=True):
            paths[i] = [*paths[i], *more]
