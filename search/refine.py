"""Monte-Carlo tree search over whole answers: a child is a revision of its parent.

Neighbours: `revise` (one line of revisions), `mcts` (over steps; has the bandit).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from search.base import Engine, Score, Trajectory, again, require, sane
from search.mcts import Node
from search.revise import CRITIQUE, REVISE, revision
from search.tree import best


@dataclass(frozen=True)
class Refine:
    """MCTS self-refine (Zhang et al. 2024) without its oracle stop: UCT picks the answer to revise next.

    drafts: independent first answers; simulations: revisions; an answer with `branch` revisions is not revised again.
    """

    drafts: int = 2
    simulations: int = 6
    branch: int = 2
    c: float = 1.25
    critique: str = CRITIQUE
    request: str = REVISE
    method: ClassVar[str] = "best"
    size: ClassVar[str] = "simulations"

    def __post_init__(self) -> None:
        sane(self, positive=("drafts", "simulations", "branch", "c"))

    @property
    def responses(self) -> int:
        return self.drafts + 2 * self.simulations

    def check(self, engine: Engine, score: Score | None) -> None:
        require(self, engine, score, judged=True, offers=("write",))

    async def run(self, root: Trajectory, engine: Engine, score: Score) -> list[Trajectory]:
        top, found = Node(root), []

        async def add(parent: Node, path: Trajectory) -> None:
            path = replace(path, value=await score(path))
            found.append(path)
            node = Node(path, parent)
            parent.children.append(node)
            for above in node.line():
                above.visits += 1
                above.total += path.value

        for path in await engine.extend(root, n=self.drafts):
            await add(top, path)
        for _ in range(self.simulations if found else 0):
            node = top
            while node is top or (len(node.children) >= self.branch):
                node = max(node.children, key=lambda child: child.bandit(self.c, puct=False))
            path = await revision(again(node.path, len(node.children)), engine, self.critique, self.request)
            if path is None:  # the budget is spent
                break
            await add(node, path)
        return best(found)
