"""Judges made of other things: a plain function, the first that can decide, a weighted sum.

Knows no particular judge. Neighbours: the registry in `__init__` builds these; the pool runs them like any other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from verifiers.base import Task, Verdict, Verifier


class FunctionVerifier:
    """A plain function as a judge.

    Parameters named `task`, `reference` or `response` receive that, in any order; a function whose first two
    parameters have other names is called with the task and the response.
    """

    def __init__(self, function: Callable[..., Any], policy: Mapping[str, Any]) -> None:
        self.function, self.policy = function, dict(policy)
        positional = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
        if len(positional) != 2:
            raise ValueError(f"{function.__qualname__}({', '.join(positional)}): a judge takes (task, response)")
        first, second = positional
        given = {"task", "reference", "response"}
        self.wants = (first if first in given else "task", second if second in given else "response")

    def verify(self, task: Task, response: str) -> Verdict:
        values = {"task": task, "reference": task.reference, "response": response}
        return as_verdict(self.function(*(values[want] for want in self.wants), **self.policy))

    def check(self, task: Task) -> None:
        """A plain function says nothing of its references."""

    def answer(self, response: str) -> str | None:
        return response.strip() or None

    def equal(self, left: str, right: str) -> bool:
        return left == right

    def __or__(self, second: Verifier) -> FirstOf:
        return FirstOf(self, second)


def as_verdict(said: Any) -> Verdict:
    """What a judge returned as a verdict."""
    said = said.item() if hasattr(said, "item") else said  # numpy's bool_ and float64
    if isinstance(said, Verdict):
        return said
    if said is None:
        return Verdict.abstain("the judge returned None")
    if isinstance(said, bool):
        return Verdict("scored", float(said), said)
    if isinstance(said, int | float):
        return Verdict("scored", float(said), said >= 1.0)
    raise TypeError(f"the judge returned {type(said).__name__}: return a bool, a score in [0, 1], a Verdict or None")


@dataclass(frozen=True)
class FirstOf:
    """Asks the second judge only where the first abstains. A first that fails is not covered up."""

    first: Verifier
    second: Verifier

    def verify(self, task: Task, response: str) -> Verdict:
        verdict = self.first.verify(task, response)
        return self.second.verify(task, response) if verdict.status == "abstained" else verdict

    def check(self, task: Task) -> None:
        """A reference will do when either judge can read it."""
        try:
            self.first.check(task)
        except ValueError:
            self.second.check(task)

    def answer(self, response: str) -> str | None:
        found = self.first.answer(response)
        return self.second.answer(response) if found is None else found

    def equal(self, left: str, right: str) -> bool:
        return self.first.equal(left, right) or self.second.equal(left, right)

    def __or__(self, third: Verifier) -> FirstOf:
        return FirstOf(self, third)


@dataclass(frozen=True)
class Weighted:
    """The weighted mean of several judges' scores; correct when each part that counts is.

    `parts` maps names of judges to positive weights. A part that abstains or fails makes the whole do so: a
    mean over the others would be another reward than the one asked for. The first part names the answer.

    Example:
        get("weighted", parts={"math": 0.9, "tidy": 0.1})
    """

    parts: Mapping[str, float]

    def __post_init__(self) -> None:
        weights = self.parts.values()
        if not self.parts or not all(math.isfinite(w) and w > 0 for w in weights):
            raise ValueError(f"weighted parts={dict(self.parts)}: give at least one judge, each with a positive weight")

    @cached_property
    def judges(self) -> dict[str, Verifier]:
        from verifiers import get  # the registry builds this class

        return {name: get(name) for name in self.parts}

    def verify(self, task: Task, response: str) -> Verdict:
        verdicts = {name: judge.verify(task, response) for name, judge in self.judges.items()}
        for name, verdict in verdicts.items():
            if verdict.status != "scored":
                return replace(verdict, why=f"{name}: {verdict.why}")
        score = sum(self.parts[name] * v.score for name, v in verdicts.items()) / sum(self.parts.values())
        return Verdict(
            "scored",
            min(1.0, score),
            all(v.correct for v in verdicts.values()),
            answer=next(iter(verdicts.values())).answer,
            why="; ".join(f"{name} {v.score:.3g}: {v.why}" for name, v in verdicts.items()),
            evidence={"scores": {name: v.score for name, v in verdicts.items()}},
        )

    def check(self, task: Task) -> None:
        for judge in self.judges.values():
            judge.check(task)

    def answer(self, response: str) -> str | None:
        return next(iter(self.judges.values())).answer(response)

    def equal(self, left: str, right: str) -> bool:
        return next(iter(self.judges.values())).equal(left, right)
