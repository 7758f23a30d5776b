r"""Judges a final answer against a mathematical reference.

Knows nothing of how the response was made. Neighbours: `verifiers.extract` finds the answer in the response.
Never evaluates model text: everything read here goes through this room's own parser.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from verifiers.base import Task, Verdict
from verifiers.extract import final

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:/\d+)?")


@dataclass(frozen=True, slots=True)
class Math:
    r"""The math verifier; its fields are the named policies.

    Example:
        Math().verify(Task("t", (), reference="\\frac{1}{2}", verifier="math"), r"... so \boxed{0.5}.").correct  # True
    """

    percent: Literal["ratio", "strict"] = "ratio"

    def verify(self, task: Task, response: str) -> Verdict:
        start = time.perf_counter()
        answer = self.answer(response)
        if answer is None:
            return Verdict("scored", 0.0, False, why="no final answer", seconds=time.perf_counter() - start)
        gold = _clean(task.reference)
        correct = self.equal(gold, answer)
        return Verdict("scored", float(correct), correct, answer, why="equal" if correct else "differs", seconds=time.perf_counter() - start)

    def check(self, task: Task) -> None:
        if not isinstance(task.reference, str) or not _clean(task.reference):
            raise ValueError(f"task {task.id}: reference {task.reference!r} is not a readable answer: give a non-empty string")

    def answer(self, response: str) -> str | None:
        found = final(response)
        if found is None or len({_clean(text) for text in found.texts}) > 1:
            return None
        return _clean(found.texts[-1]) or None

    def equal(self, left: str, right: str) -> bool:
        if left == right:
            return bool(left)
        values = _value(left), _value(right)
        return None not in values and values[0] == values[1]


def _clean(text: str) -> str:
    found = final(text) if "boxed" in text else None
    text = found.texts[-1] if found else text
    text = text.strip().strip("$").strip().rstrip(".").replace("\\left", "").replace("\\right", "")
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r"\1/\2", text)
    return re.sub(r"\s+", "", text)


def _value(text: str) -> Fraction | None:
    if len(text) > 100 or not re.search(r"\d", text) or not _NUMBER.fullmatch(text):
        return None
    top, _, bottom = text.replace(",", "").partition("/")
    if bottom and not Fraction(bottom):
        return None
    return Fraction(top) / Fraction(bottom or 1)
