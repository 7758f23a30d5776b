"""An engine that says what it is told to: for tests and for stepping through a search by hand.

A token is a character; id 0 ends a path. Knows nothing of models. Neighbour: `toy` has true probabilities.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from search.base import END, Engine, Offer, Sampling, Step, Trajectory, Until, derive


@dataclass(frozen=True)
class Scripted:
    """`reply(text so far, child)` is the rest of the response, to its end; what lies beyond `until` is cut off.

    Example:
        Scripted(lambda text, child: ["3+4=7\\nans: 7", "ans: 8"][child % 2])
    """

    reply: Callable[[str, int], str]
    sampling: Sampling = field(default_factory=Sampling)
    logprob: float = -0.1  # of every token; NaN for an engine that gives none
    offers: frozenset[Offer] = frozenset({"logprobs", "write"})

    @staticmethod
    def root(question: str = "", seed: int = 0) -> Trajectory:
        return Trajectory(tuple(map(ord, question)) or (1,), seed=seed)

    def at(self, **changes: float | int | str) -> Scripted:
        return replace(self, sampling=replace(self.sampling, **changes))

    async def extend(self, path: Trajectory, *, n: int = 1, until: Until = END) -> list[Trajectory]:
        if path.end is not None:
            raise ValueError(f"the path has ended ({path.end}): only an open path can be extended")
        await asyncio.sleep(0)
        return [self._grow(path, child, until) for child in range(n)]

    def _grow(self, path: Trajectory, child: int, until: Until) -> Trajectory:
        ids = (*map(ord, self.reply(path.text, child)), 0)
        room = self.sampling.max_tokens - path.length
        if room <= 0:  # the search wrote the rest, or `at` lowered the limit
            return replace(path, end="length", seed=derive(path.seed, child))
        stop = min(room, until.tokens) if until.kind == "tokens" else room
        if until.kind == "step":
            text = "".join(map(chr, ids))
            at = text.find(self.sampling.step)
            stop = min(stop, at + len(self.sampling.step)) if at >= 0 else stop
        ids = ids[:stop]
        end = "stop" if ids[-1] == 0 else "length" if len(ids) == room else None
        text = "".join(map(chr, ids[:-1] if end == "stop" else ids))
        step = Step(ids, (self.logprob,) * len(ids), text)
        return path.grow(step, end=end, seed=derive(path.seed, child))

    def write(self, path: Trajectory, text: str, *, turn: bool = False) -> Trajectory:
        steps = path.steps
        if path.end == "stop":
            last = steps[-1]
            steps = (*steps[:-1], replace(last, ids=last.ids[:-1], logprobs=last.logprobs[:-1]))
        text = f"\n[user] {text}\n" if turn else text
        added = Step(tuple(map(ord, text)), (0.0,) * len(text), text, sampled=False)
        return replace(path, steps=(*steps, added), end=None, seed=derive(path.seed, "write", text))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, filter(None, ids)))


@dataclass(frozen=True)
class Jittered:
    """Another engine, answering after a random number of turns of the event loop: any scheduling order can happen."""

    engine: Engine
    random: random.Random

    @property
    def sampling(self) -> Sampling:
        return self.engine.sampling

    @property
    def offers(self) -> frozenset[Offer]:
        return self.engine.offers

    def at(self, **changes: float | int | str) -> Jittered:
        return replace(self, engine=self.engine.at(**changes))

    def write(self, path: Trajectory, text: str, *, turn: bool = False) -> Trajectory:
        return self.engine.write(path, text, turn=turn)

    def decode(self, ids: Sequence[int]) -> str:
        return self.engine.decode(ids)

    async def extend(self, path: Trajectory, *, n: int = 1, until: Until = END) -> list[Trajectory]:
        for _ in range(self.random.randrange(6)):
            await asyncio.sleep(0)
        return await self.engine.extend(path, n=n, until=until)
