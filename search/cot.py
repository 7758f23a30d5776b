"""CoT-decoding: branch over the likeliest first tokens, and trust the branch that is surest of its answer.

Neighbour: `marginal`, whose method "prm" sums the margins per answer. The sum is a support score, not a mass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from search.base import Engine, Score, Trajectory, require, sane
from search.tree import best, likeliest, together


@dataclass(frozen=True)
class CotDecoding:
    """The k likeliest first tokens, each continued greedily (Wang & Zhou 2024).

    A path's value is the mean margin p(first choice) - p(second choice) over the tokens of its answer alone.
    answer: how the task reads an answer, bound by the caller; where it is not literally in the text, the last number is
    taken for the answer.
    """

    k: int = 10
    answer: Callable[[str], str | None] | None = None
    method: ClassVar[str] = "prm"
    size: ClassVar[str] = "k"

    def __post_init__(self) -> None:
        sane(self, positive=("k",))

    @property
    def responses(self) -> int:
        return self.k

    def check(self, engine: Engine, score: Score | None) -> None:
        require(self, engine, score, offers=("top", "logprobs"))

    async def run(self, root: Trajectory, engine: Engine, score: Score | None) -> list[Trajectory]:
        greedy = engine.at(temperature=0.0, top=2)

        async def finish(path: Trajectory) -> Trajectory:
            # The first token is a choice of the search: its own margin is no sign of confidence and is left out.
            whole = (await greedy.extend(path) or [path])[0] if path.end is None else path
            return replace(whole, value=self.margin(whole, skip=root.length + 1))

        return best(await together(finish(path) for path in await likeliest(root, self.k, engine)))

    def margin(self, path: Trajectory, skip: int = 0) -> float:
        span = self._span(path.text)
        margins, at, index = [], 0, 0
        for step in path.steps:
            if not step.top:
                at, index = at + len(step.text), index + len(step.ids)
                continue
            for token, row in zip(step.ids, step.top, strict=True):
                own = next(a for a in row if a.id == token)
                after = at if own.ends else at + len(own.text)
                if span and at < span[1] and after > span[0] and index >= skip:
                    first, second, *_ = sorted((math.exp(a.logprob) for a in row), reverse=True) + [0.0]
                    margins.append(first - second)
                at, index = after, index + 1
        return math.fsum(margins) / len(margins) if margins else 0.0

    def _span(self, text: str) -> tuple[int, int] | None:
        found = self.answer(text) if self.answer else None
        if found and (at := text.rfind(found)) >= 0:
            return at, at + len(found)
        numbers = list(re.finditer(r"-?\d[\d,]*(?:\.\d+)?", text))
        return numbers[-1].span() if numbers else None
