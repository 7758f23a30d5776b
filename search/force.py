"""Budget forcing: make a response think longer, or make it answer.

Neighbour: `revise` (asks for a new answer in a new turn).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from search.base import Engine, Score, Trajectory, require, sane
from search.tree import together


@dataclass(frozen=True)
class Force:
    """Budget forcing (Muennighoff et al. 2025).

    A response that stops is told to `wait` that many times before it may; one that runs into the length limit is cut
    there and told to answer within `answer_tokens` more.
    """

    n: int = 1
    waits: int = 1
    wait: str = "\nWait"
    finish: str = "\nThe final answer is"
    answer_tokens: int = 16
    method: ClassVar[str] = "vote"
    size: ClassVar[str] = "n"

    def __post_init__(self) -> None:
        sane(self, positive=("n", "answer_tokens"))
        if self.waits < 0:
            raise ValueError(f"Force: waits={self.waits} must be at least 0")

    @property
    def responses(self) -> int:
        return self.n * (1 + self.waits)

    def check(self, engine: Engine, score: Score | None) -> None:
        require(self, engine, score, offers=("write",))

    async def run(self, root: Trajectory, engine: Engine, score: Score | None) -> list[Trajectory]:
        async def go_on(path: Trajectory, text: str, room: int) -> Trajectory:
            longer = engine.write(path, text)
            if longer.length >= room:
                return path
            return (await engine.at(max_tokens=room).extend(longer) or [path])[0]

        async def one(path: Trajectory) -> Trajectory:
            for _ in range(self.waits):
                if path.end == "stop":
                    path = await go_on(path, self.wait, engine.sampling.max_tokens)
            if path.end == "length":
                room = engine.write(path, self.finish).length + self.answer_tokens
                path = await go_on(path, self.finish, room)
            return path

        return await together(one(path) for path in await engine.extend(root, n=self.n))
