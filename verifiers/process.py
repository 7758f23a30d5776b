r"""Step scores without a trained model: every equality between numbers that a solution states is checked.

`3 + 4 = 7` earns its step 1.0, `3 + 4 = 8` earns it 0.0; a step that claims nothing checkable earns 1.0, as no
error was found in it. What has a symbol in it (`2x = 6`), and what is cut by words (`3 apples + 4`), is not judged:
a false alarm teaches more harm than a miss. So a step that is true but useless scores 1.0, unless `rule = "rewrite"`
asks that each step carries out a part of the question's expression (`rewriting`). Knows no reference. Neighbours:
`verifiers.math` judges the final answer, `verifiers.proof` the equalities. Limit: arithmetic only; learned and
Monte-Carlo step values fill the same `Verdict.steps`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import islice
from typing import Literal

from verifiers import get, numbers, proof
from verifiers.base import Task, Verdict
from verifiers.expression import Tree, Unreadable, normalise, parse
from verifiers.forms import as_decimal, rounds
from verifiers.math import Math
from verifiers.rewriting import Left, plain

CLAIMS = 200  # equalities checked in one step
WORK = 25 * numbers.BUDGET  # of all steps of one response, about a second; what comes after it is not checked
READING = 10  # work that reading a step costs

_LABEL = re.compile(
    r"^\s*(?:#+\s*)?(?:(?:[-*•>]|\(?\d{1,2}[.)]|\(?[a-z]\))\s+)*(?:(?:step|case|line|part)\s*\d*\s*[:.)-]\s*)?",
    re.IGNORECASE,
)
_CALCULATOR = re.compile(r"<<([^<>]*)>>")  # GSM8K writes 3+4=<<3+4=7>>7
_MARKS = re.compile(r"\\[()\[\]]|\\(?:boxed|fbox|displaystyle|text|mathrm|mathbf)\b|\\?\$|\*\*|`")
_TIMES = re.compile(r"(?<=\d)\s*[xX]\s*(?=\d)")
_FORMULA = re.compile(  # what may stand in arithmetic; a word, a comma between terms or any other sign ends it
    r"(?:\\(?:d?frac|sqrt|cdot|times|div|left|right|pi|d?binom|ast|approx)(?![A-Za-z])|\\[,;! ]|"
    r"\d,(?=\d{3}(?!\d))|\.(?=\d)|(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|\bpi\b|[0-9\s+\-*/^(){}=!%·×÷−–≈√π_²³])+"
)
_HIDES = re.compile(
    r"(?:\b(?:times|plus|minus|of|by|over|per|divided|multiplied|mod|log|ln|sin|cos|tan|squared|cubed|hundred|"
    r"thousand|million|billion|dozen|percent|half|to|less|more|than|base)\b|[<>≤≥≠≡(\[{|&:√]|\\[A-Za-z]+)\s*$",
    re.I,
)
_EXTENDS = re.compile(
    r"^\s*(?:(?:times|plus|minus|over|divided|multiplied|mod|squared|cubed|hundred|thousand|million|billion|dozen|"
    r"percent|remainder|r|choose|half|halves|thirds?)\b|[<>≤≥≠≡\[|&:%…]|\.\.|\\(?!\\|end|quad|qquad|implies|"
    r"Rightarrow|rightarrow|therefore))",
    re.I,
)


@dataclass(frozen=True, slots=True)
class ProcessMath:
    """The math verdict on the final answer, with one score per step of the response.

    Example:
        ProcessMath().verify(task, "3 + 4 = 7\\n7 + 5 = 13\\nAnswer: 13").steps  # (1.0, 0.0, 1.0)
    """

    delimiter: str = "\n"  # ends a step, as in the sampling settings of an engine
    outcome: Math = field(default_factory=Math)  # or its policy as a table, {form = "simplest"}
    rule: Literal["true", "rewrite"] = "true"  # a step may state nothing false; must carry out a part of what is left

    def __post_init__(self) -> None:
        if self.rule not in FAULTS:
            raise ValueError(f"process_math rule={self.rule!r} is unknown: choose one of {', '.join(FAULTS)}")
        if isinstance(self.outcome, Mapping):
            object.__setattr__(self, "outcome", get("math", **self.outcome))
        if not self.delimiter:
            raise ValueError(
                "process_math delimiter='' cuts no steps: give the text that ends a step, e.g. a line break"
            )

    def verify(self, task: Task, response: str) -> Verdict:
        start = time.perf_counter()
        verdict = self.outcome.verify(task, response)
        if self.rule == "rewrite":
            steps = tuple(map(float, rewritings(task.question, response, delimiter=self.delimiter)))
        else:
            steps = step_scores(response, delimiter=self.delimiter)
        wrong = first_wrong(steps)
        return replace(
            verdict,
            steps=steps,
            why=verdict.why
            if wrong is None
            else f"{verdict.why}; step {wrong + 1} of {len(steps)} {FAULTS[self.rule]}",
            seconds=time.perf_counter() - start,
            evidence={**verdict.evidence, "first_wrong_step": wrong},
        )

    def check(self, task: Task) -> None:
        self.outcome.check(task)
        if self.rule == "rewrite":
            asked(task.question)

    def answer(self, response: str) -> str | None:
        return self.outcome.answer(response)

    def equal(self, left: str, right: str) -> bool:
        return self.outcome.equal(left, right)


FAULTS = {
    "true": "states a false equality",
    "rewrite": "carries out no part of what is left of the question's expression",
}


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps alone, judged without a reference: what may guide a search whose result is an evaluation.

    A step that states true equalities scores 1, a false one 0, and a step with nothing to check `unchecked`: below 1,
    so that work shown is worth more than an answer out of nowhere. The verdict's score joins them by `join`; `correct`
    says that no step is false. Limit: steps that are true and lead nowhere score 1.

    Example:
        Steps().verify(task, "3+4=7\\n7-2=5\\nAnswer: 5").score  # (1 + 1 + 0.5) / 3
    """

    delimiter: str = "\n"
    unchecked: float = 0.5
    join: Literal["mean", "min", "product", "last"] = "mean"

    def __post_init__(self) -> None:
        if not self.delimiter:
            raise ValueError("steps delimiter='' cuts no steps: give the text that ends a step, e.g. a line break")
        if not 0 <= self.unchecked <= 1:
            raise ValueError(f"steps unchecked={self.unchecked} is outside [0, 1]: a step that shows nothing to check")
        if self.join not in JOINS:
            raise ValueError(f"steps join={self.join!r} is unknown: choose one of {', '.join(JOINS)}")

    def verify(self, task: Task, response: str) -> Verdict:
        start = time.perf_counter()
        found = findings(response, delimiter=self.delimiter)
        steps = tuple(self.unchecked if holds is None else float(holds) for holds in found)
        score = JOINS[self.join](steps) if steps else self.unchecked
        false = sum(holds is False for holds in found)
        why = f"{false} of {len(steps)} steps state a false equality"
        seconds = time.perf_counter() - start
        return Verdict("scored", score, not false, steps=steps, why=why, seconds=seconds)

    def check(self, task: Task) -> None:
        """Needs no reference."""

    def answer(self, response: str) -> str | None:
        return Math().answer(response)

    def equal(self, left: str, right: str) -> bool:
        return Math().equal(left, right)


JOINS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda steps: math.fsum(steps) / len(steps),
    "min": min,
    "product": math.prod,
    "last": lambda steps: steps[-1],
}


def step_scores(text: str, *, delimiter: str = "\n") -> tuple[float, ...]:
    """One score per step, 0.0 where a step states a false equality, else 1.0. A delimiter at the end opens no step."""
    return tuple(0.0 if holds is False else 1.0 for holds in findings(text, delimiter=delimiter))


def findings(text: str, *, delimiter: str = "\n") -> tuple[bool | None, ...]:
    """Of each step whether the equalities it states hold: False if one does not, None where there is none to check."""
    steps = text.split(delimiter)
    if steps and not steps[-1]:
        steps.pop()
    found: list[bool | None] = []
    left = float(WORK)
    for step in steps:
        found.append(verified(step) if "=" in step and left > 0 else None)
        left -= READING + numbers.spent() if "=" in step else 0
    return tuple(found)


def rewritings(question: str, text: str, *, delimiter: str = "\n") -> tuple[bool, ...]:
    """Of each step whether it carries out a part of what is then left of the question's expression, and no step less;
    the last one may say an answer instead, without an equality. Raises ValueError as `asked` does."""
    left, budget = Left(asked(question)), float(WORK)
    steps = text.split(delimiter)
    if steps and not steps[-1]:
        steps.pop()
    found = []
    for step in steps:
        found.append(budget > 0 and _carries_out(left, step))
        budget -= READING + numbers.spent()
    if steps and "=" not in steps[-1]:
        found[-1] = True
    return tuple(found)


def asked(question: str) -> Tree:
    """The one expression of numbers in a question, taken to be what it asks for (and not "half of 3 + 4"). Raises
    ValueError when it has none, or several."""
    text = _TIMES.sub("*", _MARKS.sub(" ", question))
    stretches = (_arithmetic(match.group().strip(" =\n")) for match in _FORMULA.finditer(text))
    found = [tree for tree in stretches if tree is not None and plain(tree)[0] not in ("num", "pct")]
    if len(found) != 1:
        raise ValueError(
            f"the question {question[:200]!r} has {len(found)} expressions of numbers, and process_math with "
            "rule='rewrite' follows how one is worked out: use rule='true'"
        )
    return found[0]


def _carries_out(left: Left, step: str) -> bool:
    """Whether every chain of equalities in a step does, and there is one."""
    numbers.begin()
    text = _TIMES.sub("*", _MARKS.sub(" ", _CALCULATOR.sub(" ", _LABEL.sub("", step, count=1))))
    chains = [[_arithmetic(part) for part in formula.split("=")] for formula, _ in _formulas(text)]
    try:
        return bool(chains) and all(None not in chain and left.carry_out(chain) for chain in chains)
    except numbers.Exhausted:
        return False  # nothing was shown


def first_wrong(scores: tuple[float, ...]) -> int | None:
    """Index of the first step that scored 0."""
    return next((i for i, score in enumerate(scores) if score == 0.0), None)


def verified(step: str) -> bool | None:
    """True when a text states equalities between numbers and those found hold, False when one does not, else None."""
    numbers.begin()
    shown = None
    try:
        for holds in map(_equal_or_unknown, islice(claims(step), CLAIMS)):
            if holds is False:
                return False
            shown = shown or holds
    except numbers.Exhausted:
        return None  # nothing was shown, neither right nor wrong
    return shown


def claims(step: str) -> Iterator[tuple[str, str, bool]]:
    """Neighbours in the equality chains of a step, as text, and whether the sign between them says "about"."""
    for inner in _CALCULATOR.findall(step):
        yield from _links([(inner, "")])
    text = _MARKS.sub(" ", _CALCULATOR.sub(" ", _LABEL.sub("", step, count=1)))
    text = _TIMES.sub("*", text)
    yield from _links(_formulas(text))


def _formulas(text: str) -> Iterator[tuple[str, str]]:
    """Stretches of arithmetic, without the members that a word beside them belongs to; and the text before."""
    for match in _FORMULA.finditer(text):
        formula = match.group()
        if "=" not in formula and "≈" not in formula and "approx" not in formula:
            continue
        before, after = text[: match.start()], text[match.end() :]
        if _HIDES.search(before[-20:]):
            formula = "?" + formula
        if _EXTENDS.search(after[:20]):
            formula += "?"
        yield formula, before


def _links(formulas: list[tuple[str, str]] | Iterator[tuple[str, str]]) -> Iterator[tuple[str, str, bool]]:
    for formula, _ in formulas:
        parts = re.split(r"(=|≈|\\approx)", formula)
        for i in range(1, len(parts), 2):
            yield parts[i - 1], parts[i + 1], parts[i] != "="


def _equal_or_unknown(claim: tuple[str, str, bool]) -> bool | None:
    """Whether a stated equality holds; None where it is no arithmetic."""
    left, right = _arithmetic(claim[0]), _arithmetic(claim[1])
    if left is None or right is None:
        return None
    holds = proof.equal(left, right)
    return True if holds is False and _rounding(left, right, about=claim[2]) else holds


def _arithmetic(text: str) -> Tree | None:
    """The tree of a member of a chain when it is a number made of numbers, else None."""
    text = text.strip()
    if not re.search(r"\d", text) or "?" in text or len(text) > 300:
        return None
    try:
        tree = parse(normalise(text.rstrip(". ")))
    except (Unreadable, ZeroDivisionError, IndexError):
        return None
    return tree if _numeric(tree[1] if tree[0] == "pct" else tree) else None


def _numeric(tree: Tree) -> bool:
    """Made of literals, pi, arithmetic, roots and binomials; letters (also e and i) may be anything."""
    kind = tree[0]
    if kind == "num" or tree == ("const", "pi"):
        return True
    if kind in ("add", "mul", "div", "neg", "pow", "fn"):
        return all(_numeric(part) for part in tree[1:] if isinstance(part, tuple))
    return False


def _rounding(left: Tree, right: Tree, *, about: bool) -> bool:
    """`10 / 3 = 3.33` and `10 / 3 ≈ 3` are how people write rounded results."""
    a, b = numbers.value(left), numbers.value(right)
    if a is None or b is None:
        return False
    if about:
        return bool(abs(a - b) <= max(abs(a), abs(b)) / 20)
    for decimal, exact in ((as_decimal(left), right), (as_decimal(right), left)):
        value = numbers.rational_or_none(exact)
        if decimal and decimal[1] >= 2 and (value is None or as_decimal(exact) is None):
            exact_value = value if value is not None else Fraction(str(numbers.value(exact)))
            if rounds(decimal, exact_value, cut_from=2):
                return True
    return False
