"""Sequential revision: draft, critique, revise, keep the best.

Neighbours: `refine` (a tree of revisions), `force` (more thinking inside one response).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from search.base import Engine, Score, Trajectory, require, sane
from search.tree import best

CRITIQUE = "Check the solution above step by step. Name the first mistake, or say that there is none."
CHECKED = "A checker rates this solution {score:.2f} out of 1."
REVISE = "Now solve the problem again, without the mistakes found. End with the final answer."


@dataclass(frozen=True)
class Revise:
    """`rounds` revisions of a draft (Madaan et al. 2023), each a path that holds all before it.

    feedback: "self" lets the model criticise its answer; "score" tells it the scorer's number instead. The scorer keeps
    the best version; without one the last revision is the answer.
    """

    rounds: int = 2
    feedback: str = "self"
    critique: str = CRITIQUE
    request: str = REVISE
    method: ClassVar[str] = "best"
    size: ClassVar[str] = "rounds"

    def __post_init__(self) -> None:
        sane(self, positive=("rounds",), feedback=("self", "score"))

    @property
    def responses(self) -> int:
        return 1 + self.rounds * (2 if self.feedback == "self" else 1)

    def check(self, engine: Engine, score: Score | None) -> None:
        require(self, engine, score, judged=self.feedback == "score", offers=("write",))

    async def run(self, root: Trajectory, engine: Engine, score: Score | None) -> list[Trajectory]:
        versions: list[Trajectory] = []
        path: Trajectory | None = next(iter(await engine.extend(root)), None)
        while path is not None:
            value = len(versions) if score is None else await score(path)
            versions.append(path := replace(path, value=value))
            if len(versions) > self.rounds:
                break
            critique = self.critique if self.feedback == "self" else None
            path = await revision(path, engine, critique, self.request)
        return best(versions)


async def revision(path: Trajectory, engine: Engine, critique: str | None, request: str) -> Trajectory | None:
    """Another attempt after a critique by the model, or after the score of the path where no critique is asked for.

    Each message may be answered at the full length that one response may have. None: the budget is spent.
    """
    if critique is not None:
        path = engine.write(path, critique, turn=True)
        grown = await _answer(path, engine)
        if not grown:
            return None
        path = grown[0]
    else:
        request = f"{CHECKED.format(score=path.value)} {request}"
    return next(iter(await _answer(engine.write(path, request, turn=True), engine)), None)


async def _answer(path: Trajectory, engine: Engine) -> list[Trajectory]:
    return await engine.at(max_tokens=path.length + engine.sampling.max_tokens).extend(path)
