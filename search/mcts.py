"""Monte-Carlo tree search over steps or tokens, with several simulations in flight.

Neighbours: `refine` (the same bandit over whole answers), `beam`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from search.base import Engine, Score, Trajectory, again, granularity, require, sane
from search.tree import best, spread, together


@dataclass(eq=False)
class Node:
    """Statistics of one path: visits and the sum of the values backed up through it; `flying` is the virtual loss."""

    path: Trajectory
    parent: Node | None = None
    prior: float = 1.0
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0
    flying: int = 0
    drawn: int = 0  # times that children were drawn

    def line(self) -> Iterator[Node]:
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def bandit(self, c: float, puct: bool) -> float:
        """UCT (Kocsis & Szepesvari 2006) or PUCT (Silver et al. 2017); a simulation in flight counts as a loss."""
        assert self.parent is not None
        tried, above = self.visits + self.flying, self.parent.visits + self.parent.flying
        mean = self.total / tried if tried else 0.0
        if puct:
            return mean + c * self.prior * math.sqrt(above) / (1 + tried)
        return math.inf if not tried else mean + c * math.sqrt(math.log(max(1, above)) / tried)


@dataclass(frozen=True)
class Mcts:
    """`simulations` descents; each expands one leaf by up to `branch` children at once and backs the best value up.

    The best and not the mean: which child to follow is the search's own choice, and bad siblings should not hide it.
    value: "score" takes the scorer's word on a child; "rollout" finishes the child and scores that (the rollout is an
    answer too). policy: "puct" or "uct". lanes: simulations in flight; they are chosen one after the other under
    virtual loss and backed up in that order, so that a tree does not depend on which finishes first.
    expand: "sample" (children are equally likely a priori: they were drawn from the policy) or "top" (prior p).
    finish: when fewer paths ended than that, the best open leaves are completed.
    widen: draw further children of a node whenever they were drawn fewer than visits ** widen times (progressive
    widening, Coulom 2007): a node whose few children all answered at once is no dead end then. 0: draw them once.
    """

    simulations: int = 32
    branch: int = 4
    c: float = 1.25
    policy: str = "puct"
    value: str = "score"
    lanes: int = 4
    until: str | int = "step"
    expand: str = "sample"
    finish: int = 4
    widen: float = 0.0
    method: ClassVar[str] = "best"
    size: ClassVar[str] = "simulations"

    def __post_init__(self) -> None:
        choices = {"policy": ("puct", "uct"), "value": ("score", "rollout"), "expand": ("sample", "top")}
        sane(self, positive=("simulations", "branch", "c", "lanes", "finish"), **choices)
        if not 0 <= self.widen < 1 or (self.widen and self.expand == "top"):
            raise ValueError(
                f"Mcts: widen={self.widen} with expand={self.expand!r}: give 0 to below 1, and 0 for 'top', which "
                "lists the same tokens each time"
            )

    @property
    def responses(self) -> int:
        return self.simulations * self.branch * (2 if self.value == "rollout" else 1) + self.finish

    def check(self, engine: Engine, score: Score | None) -> None:
        until, offers = ("end", ("top", "logprobs")) if self.expand == "top" else (self.until, ())
        require(self, engine, score, judged=True, until=until, offers=offers)

    async def run(self, root: Trajectory, engine: Engine, score: Score) -> list[Trajectory]:
        top, ended = Node(root), {}

        async def rollout(path: Trajectory) -> float:
            whole = (await engine.extend(path) or [path])[0] if path.end is None else path
            value = await score(whole)
            if whole.end:
                ended.setdefault(whole.ids, replace(whole, value=value))
            return value

        judge = rollout if self.value == "rollout" else score
        left, until = self.simulations, granularity(self.until)
        while left > 0:
            wave = self._select(top, min(self.lanes, left))
            left -= max(1, len(wave))
            fresh = [node for node in wave if node.path.end is None]
            grown = await spread(
                [again(n.path, n.drawn) for n in fresh], self.branch, engine, judge, until, self.expand
            )
            found = {id(node): self._attach(node, kids) for node, kids in zip(fresh, grown, strict=True)}
            for node in wave:
                self._back_up(node, found.get(id(node), node.path.value or 0.0))
            if fresh and not any(grown):  # the budget is spent
                break
        leaves = [node.path for node in _walk(top) if not node.children and node.path.steps]
        ended.update({path.ids: path for path in leaves if path.end})
        open_leaves = best(path for path in leaves if not path.end)[: max(0, self.finish - len(ended))]
        await together(rollout(path) for path in open_leaves)
        return best(ended.values())

    def _select(self, top: Node, lanes: int) -> list[Node]:
        """Up to `lanes` different leaves; lanes that would expand a leaf twice are left to the next wave."""
        wave: list[Node] = []
        for _ in range(lanes):
            node = top
            while node.children and not self._narrow(node):
                node = max(node.children, key=lambda child: child.bandit(self.c, self.policy == "puct"))
            if node in wave:
                break
            wave.append(node)
            for above in node.line():
                above.flying += 1
        return wave

    def _narrow(self, node: Node) -> bool:
        """Whether its children were drawn too seldom for its visits."""
        return self.widen > 0 and node.path.end is None and node.drawn < (node.visits + node.flying) ** self.widen

    def _attach(self, node: Node, kids: list[Trajectory]) -> float:
        """Add the children that are new; returns the best value among those drawn."""
        node.drawn += 1
        known = {child.path.ids for child in node.children}
        new = [kid for kid in kids if kid.ids not in known]
        node.children += [Node(kid, node, visits=1, total=kid.value) for kid in new]
        for child in node.children:
            by_model = self.expand == "top"
            child.prior = math.exp(child.path.steps[-1].logprobs[0]) if by_model else 1 / len(node.children)
        return max((kid.value for kid in kids), default=node.path.value or 0.0)

    @staticmethod
    def _back_up(node: Node, value: float) -> None:
        """What a descent found: the value of the best child drawn, or again that of a leaf that ended."""
        for above in node.line():
            above.flying -= 1
            above.visits += 1
            above.total += value


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _walk(child)
