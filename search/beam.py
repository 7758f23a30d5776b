"""Beam search, over steps with a scorer or over tokens with the model's own probabilities.

Neighbours: `dvts` (independent beams of width 1), `rebase` (soft in place of hard selection).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from search.base import Engine, Score, Trajectory, granularity, require, sane
from search.tree import best, spread


@dataclass(frozen=True)
class Beam:
    """Keeps the `width` best paths; every round draws `branch` children for each that is not finished.

    A path that finishes among the best keeps its place for good, so that an answer is never lost to a promise.
    lookahead: score a child by where greedy decoding takes it in that many more extensions.
    expand: "sample", or "top" for the likeliest next tokens, one token at a time. With "top" and no scorer paths are
    ranked by log p: at full width these are exactly the likeliest paths.
    """

    width: int = 4
    branch: int = 4
    lookahead: int = 0
    until: str | int = "step"
    expand: str = "sample"
    method: ClassVar[str] = "best"
    size: ClassVar[str] = "width"

    def __post_init__(self) -> None:
        sane(self, positive=("width", "branch"), expand=("sample", "top"))

    @property
    def responses(self) -> int:
        return self.width * self.branch * (1 + self.lookahead)

    def check(self, engine: Engine, score: Score | None) -> None:
        top = self.expand == "top"
        until = "end" if top else self.until
        offers = ("top", "logprobs") if top else ()
        require(self, engine, score, judged=not top or self.lookahead > 0, until=until, offers=offers)

    async def run(self, root: Trajectory, engine: Engine, score: Score | None) -> list[Trajectory]:
        until = granularity(self.until)
        greedy = engine.at(temperature=0.0) if self.lookahead else engine

        async def foresee(path: Trajectory) -> float:
            for _ in range(self.lookahead):
                if path.end is None and (grown := await greedy.extend(path, until=until)):
                    path = grown[0]
            return await score(path)

        judge = foresee if self.lookahead else score
        live, done = [root], []
        while live:
            free = self.width - len(done)
            each = self.branch if self.expand == "top" else max(1, free * self.branch // len(live))
            kids = sum(await spread(live, each, engine, judge, until, self.expand), [])
            if not kids:  # the budget is spent: what is live stays unfinished
                break
            kept = best(kids)[:free]
            done += [path for path in kept if path.end]
            live = [path for path in kept if not path.end]
        return best(done + [path for path in live if path.steps])
