r"""Judges a final answer against a mathematical reference.

The answer's text is found (`verifiers.extract`) and read into trees by this room's own parser (`verifiers.reading`,
`verifiers.expression`, `verifiers.units`); what it says is settled (`verifiers.settle`) and compared here by its kind:
choices, words, lists, sets, intervals (`verifiers.regions`), relations, matrices, quantities and, last, numbers, by
exact arithmetic, proof or evaluation (`verifiers.proof`, `verifiers.forms`).

Model text is never evaluated. Every step is bounded by counted work; nothing uses signals or clocks, so a `Math` may
be called from any thread. Knows nothing of how the response was made.
Limit: what it can read but not compare (a sum, an integral, an inequality of second degree) it abstains from.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from verifiers import numbers, proof
from verifiers.base import Task, Verdict
from verifiers.expression import Tree
from verifiers.extract import final
from verifiers.forms import finished, near, rounded
from verifiers.numbers import rational_or_none, symbols
from verifiers.reading import Reading, read
from verifiers.regions import NoRegion, region
from verifiers.settle import COLLECTIONS, SETS, Refused, by_name, quantity, settle
from verifiers.units import label_of, unit_of

_NOTHING_BUT_SIGNS = re.compile(r"[-\d\s.,+*/^()\[\]=<>!%:;&|?]*")  # no word or command that other readers might know
ITEMS = 40  # of a list or set that is compared without order


@dataclass(frozen=True, slots=True)
class Math:
    r"""The math verifier; its fields are the named policies.

    A reference is one string (bare or boxed LaTeX; several boxes that are equal are forms of one answer) or a sequence
    of alternatives.

    Example:
        Math().verify(Task("t", (), reference="\\frac{1}{2}", verifier="math"), r"... so \boxed{0.5}.").correct  # True
    """

    percent: Literal["ratio", "strict", "ignore"] = "ratio"  # 9% is 0.09 | only another percentage | 9
    units: Literal["optional", "required", "ignore"] = (
        "optional"  # one side may leave them out; where both have them they must agree
    )
    order: Literal["written", "strict"] = (
        "written"  # tuples keep their order, sets and bare lists do not | bare lists do too
    )
    form: Literal["any", "exact", "simplest"] = (
        "any"  # any equal value | no rounded decimals | and no arithmetic left to do
    )
    digits: int = 6  # a decimal may stand for an exact number that rounds to it, from this many significant digits
    tolerance: float = 0.0  # relative; for references that were measured or rounded

    def __post_init__(self) -> None:
        choices = {
            "percent": ("ratio", "strict", "ignore"), "units": ("optional", "required", "ignore"),
            "order": ("written", "strict"), "form": ("any", "exact", "simplest"),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"math policy {name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}"
                )
        if self.digits < 2:
            raise ValueError(f"math policy digits={self.digits}: at least 2, or form='exact' to accept no rounding")
        if not 0 <= self.tolerance < 0.5:
            raise ValueError(f"math policy tolerance={self.tolerance}: give a relative error in [0, 0.5)")

    def verify(self, task: Task, response: str) -> Verdict:
        start = time.perf_counter()
        golds = _golds(task)
        answer, marker, outcome = None, "", False
        numbers.begin()
        try:
            answer, marker, why = self._found(response)
            if answer is not None:
                outcome, why = self._against(golds, answer)
        except numbers.Exhausted as error:
            why = f"the answer is too large to compare: {error}"
        fields = dict(
            answer=answer.text if answer is not None and answer.text else None,
            why=why,
            seconds=time.perf_counter() - start,
            evidence={"marker": marker, "policy": _policy(self)},
        )
        if outcome is None:
            return Verdict.abstain(**fields)
        return Verdict("scored", float(outcome), outcome, **fields)

    def check(self, task: Task) -> None:
        for gold in _golds(task):
            if gold.trees or gold.words or gold.choice:
                continue
            if not gold.text or _unbalanced(gold.text) or _NOTHING_BUT_SIGNS.fullmatch(gold.text):
                raise ValueError(
                    f"task {task.id}: reference {task.reference!r} cannot be read ({gold.why}): "
                    "give one answer in LaTeX, plain text or a box"
                )

    def answer(self, response: str) -> str | None:
        numbers.begin()
        try:
            found, _, _ = self._found(response)
        except numbers.Exhausted:
            return None
        return found.text if found is not None and found.text else None

    def equal(self, left: str, right: str) -> bool:
        one, other = read(left), read(right)
        numbers.begin()
        try:
            return _same_text(one, other) or self._readings(one, other) is True
        except numbers.Exhausted:
            return False

    # -- responses and references -------------------------------------------------------------------------------------

    def _found(self, response: str) -> tuple[Reading | None, str, str]:
        """The one answer a response commits to, or None with the reason."""
        found = final(response)
        if found is None:
            return None, "", "no final answer"
        answer = read(found.texts[-1])
        if not answer.text:
            return None, found.marker, f"no final answer: {answer.why}"
        for other in found.texts[:-1]:
            reading = read(other)
            if not (_same_text(reading, answer) or self._readings(reading, answer)):
                return None, found.marker, f"contradicting answers: {reading.text[:60]} and {answer.text[:60]}"
        return answer, found.marker, ""

    def _against(self, golds: Sequence[Reading], answer: Reading) -> tuple[bool | None, str]:
        if not (answer.trees or answer.words or answer.choice):
            if any(_same_text(gold, answer) for gold in golds):
                return True, "equal as text"
            readable = any(gold.trees or gold.words or gold.choice for gold in golds)
            return False if readable else None, f"unreadable answer: {answer.why}"
        outcomes = []
        for gold in golds:
            if self.form == "simplest" and answer.trees and not finished(answer.trees[0]):
                return False, f"not in simplest form: {answer.text[:60]}"
            outcome = self._readings(gold, answer)
            if outcome:
                return True, f"equal to {gold.text[:60]}"
            outcomes.append(outcome)
        if None in outcomes:
            return None, f"cannot compare {answer.text[:60]} with {golds[0].text[:60]}"
        return False, f"differs from {golds[0].text[:60]}"

    def _readings(self, gold: Reading, answer: Reading) -> bool | None:
        """Any reading of one against any of the other, but not both second readings."""
        if gold.choice and answer.choice:
            both = gold.text != gold.choice and answer.text != answer.choice
            return gold.choice == answer.choice and (not both or self._contents(gold, answer))
        return self._contents(gold, answer)

    def _contents(self, gold: Reading, answer: Reading) -> bool | None:
        if gold.words and answer.words:
            return gold.words == answer.words
        if not gold.trees:
            if gold.words:
                return None if len(gold.words.split()) > 7 else False
            return True if _same_text(gold, answer) else None
        if not answer.trees:
            return False
        outcome: bool | None = False
        pairs = [(gold.trees[0], tree) for tree in answer.trees] + [(tree, answer.trees[0]) for tree in gold.trees[1:]]
        for left, right in pairs:
            same = self._same(left, right)
            if same:
                return True
            outcome = None if same is None else outcome
        return outcome

    # -- comparison by kind -------------------------------------------------------------------------------------------

    def _same(self, left: Tree, right: Tree) -> bool | None:
        numbers.spend(0.25)
        try:
            return self._settled(settle(left, self._same), settle(right, self._same))
        except Refused:
            return False

    def _settled(self, left: Tree, right: Tree) -> bool | None:
        kinds = {left[0], right[0]}
        if "named" in kinds:
            return self._named(left, right)
        if "equation" in kinds:
            return self._equations(left, right)
        if "rel" in kinds or kinds & SETS:
            return self._regions(left, right)
        if kinds & COLLECTIONS:
            return self._collections(left, right)
        if "based" in kinds:
            return _based(left, right)
        return self._quantities(left, right)

    def _named(self, left: Tree, right: Tree) -> bool | None:
        """`x = 5` is 5; two names must agree, or the equations must be one."""
        if left[0] == right[0]:
            if left[1] == right[1]:
                return self._settled(left[2], right[2])
            if "(" in left[1] + right[1] and (left[1][0] == right[1][0] or "y" in (left[1], right[1])):
                return self._settled(left[2], right[2])
            if "(" not in left[1] + right[1] and symbols(left[2]) and symbols(right[2]):
                return proof.proportional(_difference(left), _difference(right), positive=False)
            return False
        named, other = (left, right) if left[0] == "named" else (right, left)
        if other[0] == "equation":
            return proof.proportional(_difference(named), other[1], positive=False)
        if other[0] == named[2][0] == "list" and _numbered(other[1:], named[1]):
            return self._unordered(named[2][1:], [item[2] for item in other[1:]])
        if other[0] == "list" and any(item[0] == "named" for item in other[1:]):
            return self._unordered(_one_by_one(named), other[1:])
        if other[0] in ("tuple", "bracket", "matrix") and named[2][0] == "list":
            return False
        if other[0] == "rel" or other[0] in SETS:
            return self._regions(("set", *(named[2][1:] if named[2][0] == "list" else named[2:3])), other)
        return self._settled(named[2], other)

    def _equations(self, left: Tree, right: Tree) -> bool | None:
        """Equations up to a factor; `m + n = 25` also says 25, because only its right side is a number."""
        if left[0] == right[0]:
            return proof.proportional(left[1], right[1], positive=False)
        equation, other = (left, right) if left[0] == "equation" else (right, left)
        _, _, first, last = equation
        if symbols(last) or symbols(other) or other[0] in COLLECTIONS or _has_number(first):
            return False
        return self._settled(settle(last, self._same), other)

    def _regions(self, left: Tree, right: Tree) -> bool | None:
        if left == right:
            return True
        try:
            one, two = region(left), region(right)
        except NoRegion:
            return self._without_region(left, right)
        if len(one) != len(two):
            return False
        return _all(
            (p.low_closed, p.high_closed) == (q.low_closed, q.high_closed)
            and _all(self._quantities(a, b) for a, b in ((p.low, q.low), (p.high, q.high)))
            for p, q in zip(one, two, strict=True)
        )

    def _without_region(self, left: Tree, right: Tree) -> bool | None:
        """Sets with symbols in them, and inequalities in several unknowns, part by part."""
        if left[0] != right[0]:
            kinds = {left[0], right[0]}
            unsolved = "rel" in kinds or _open(left) or _open(right)
            return None if unsolved and kinds <= SETS | {"rel", "tuple", "bracket"} else False
        if left[0] == "rel":
            return _same_relation(left, right)
        if len(left) != len(right):
            return False
        if left[0] == "union":
            return self._unordered(_flat("union", left), _flat("union", right))
        if left[0] == "interval" and left[3:] != right[3:]:
            return False
        return _all(self._same(a, b) for a, b in zip(left[1:3], right[1:3], strict=True))

    def _collections(self, left: Tree, right: Tree) -> bool | None:
        kinds = (left[0], right[0])
        if "matrix" in kinds:
            return self._matrices(left, right)
        if "ratio" in kinds:
            return _ratios(left, right)
        if not (kinds[0] in COLLECTIONS and kinds[1] in COLLECTIONS):
            single, many = (left, right) if kinds[1] in COLLECTIONS else (right, left)
            items = _distinct(self, many[1:])
            return self._same(single, items[0]) if len(items) == 1 and many[0] in ("set", "list") else False
        if "set" in kinds:
            if not set(kinds) <= {"set", "list"} or any(item[0] == "named" for item in (*left[1:], *right[1:])):
                return False
            return self._unordered(_distinct(self, left[1:]), _distinct(self, right[1:]))
        a, b = left[1:], right[1:]
        if len(a) != len(b):
            return False
        if "bracket" in kinds and kinds[0] != kinds[1] and len(a) == 2:
            return False  # a closed interval against an open one, a point or two numbers
        if set(kinds) == {"list"} and self.order == "written":
            return self._unordered(a, b)
        return _all(self._same(x, y) for x, y in zip(by_name(a), by_name(b), strict=True))

    def _unordered(self, left: Sequence[Tree], right: Sequence[Tree]) -> bool | None:
        if len(left) != len(right):
            return False
        if len(left) > ITEMS:
            return True if left == right else None
        rest, unsure = list(right), False
        for item in left:
            outcomes = [self._same(item, other) for other in rest]
            if True in outcomes:
                rest.pop(outcomes.index(True))
            elif None in outcomes:
                unsure = True
            else:
                return False
        return None if unsure else True

    def _matrices(self, left: Tree, right: Tree) -> bool | None:
        if left[0] == right[0]:
            a, b = left[1], right[1]
            if (len(a), len(a[0])) != (len(b), len(b[0])):
                return False
            return _all(self._same(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
        matrix, other = (left, right) if left[0] == "matrix" else (right, left)
        rows = matrix[1]
        if other[0] not in ("tuple", "bracket"):
            return False
        if all(part[0] in ("bracket", "tuple") for part in other[1:]):  # [[1, 2], [3, 4]]
            same_length = len({len(part) for part in other[1:]}) == 1
            return same_length and self._matrices(matrix, ("matrix", tuple(part[1:] for part in other[1:])))
        entries = tuple(row[0] for row in rows) if len(rows[0]) == 1 else rows[0] if len(rows) == 1 else ()
        if not entries or len(entries) != len(other) - 1:
            return False
        return _all(self._same(x, y) for x, y in zip(entries, other[1:], strict=True))

    # -- quantities ---------------------------------------------------------------------------------------------------

    def _quantities(self, left: Tree, right: Tree) -> bool | None:
        (a, unit_a), (b, unit_b) = quantity(left), quantity(right)
        if self.percent != "ratio":
            a_percent, b_percent = a[0] == "pct", b[0] == "pct"
            if self.percent == "strict" and a_percent != b_percent:
                return False
            a, b = (a[1] if a_percent else a), (b[1] if b_percent else b)
        if self.units == "ignore" or unit_a == unit_b:
            return self._numbers(a, b)
        if not unit_a or not unit_b:
            bare = b if unit_a else a
            return self.units == "optional" and bare[0] not in ("pct", "deg") and self._numbers(a, b)
        known_a, known_b = unit_of(unit_a), unit_of(unit_b)
        if known_a is None or known_b is None:
            return self._numbers(a, b) if label_of(unit_a) == label_of(unit_b) else False
        if known_a.dimension != known_b.dimension:
            return False
        if known_a.scale == known_b.scale:
            return self._numbers(a, b)
        scale = known_a.scale / known_b.scale
        return self._numbers(("num", a[1] * scale, a[2]) if a[0] == "num" else ("mul", ("num", scale, 0), a), b)

    def _numbers(self, left: Tree, right: Tree) -> bool | None:
        if left == right:
            return _defined(left)
        exact = proof.equal(left, right)
        if exact:
            return True
        if (left[0] == "deg") != (right[0] == "deg") and self.units != "required":
            if proof.equal(*(side[1] if side[0] == "deg" else side for side in (left, right))):
                return True  # 90 degrees without the sign
        if self.form == "any" and rounded(left, right, self.digits):
            return True
        if self.tolerance and near(left, right, self.tolerance):
            return True
        if exact is None and (symbols(left) != symbols(right) or numbers.defined(left) != numbers.defined(right)):
            return False  # one has a value where the other has none
        return exact


# -- parts of the comparison ------------------------------------------------------------------------------------------


def _all(outcomes: Any) -> bool | None:
    """True when all are, False when one is, None when one is unsure."""
    unsure = False
    for outcome in outcomes:
        if outcome is False:
            return False
        unsure = unsure or outcome is None
    return None if unsure else True


def _one_by_one(named: Tree) -> list[Tree]:
    """`(a, b) = (1, 2)` as a = 1 and b = 2; any other definition stays one."""
    names = named[3][1:] if named[3][0] == "tuple" else ()
    if named[2][0] != "tuple" or len(names) != len(named[2]) - 1:
        return [named]
    return [("named", name[1], value, name) for name, value in zip(names, named[2][1:], strict=True)]


def _numbered(items: Sequence[Tree], name: str) -> bool:
    """Whether the items are `x_1 = ...`, `x_2 = ...`: the solutions for x."""
    return all(item[0] == "named" and re.fullmatch(re.escape(name) + r"_\d+", item[1]) for item in items)


def _distinct(judge: Math, items: Sequence[Tree]) -> list[Tree]:
    found: list[Tree] = []
    for item in items[: ITEMS + 1]:
        if not any(judge._same(item, other) for other in found):
            found.append(item)
    return found if len(items) <= ITEMS else list(items)


def _flat(kind: str, tree: Tree) -> list[Tree]:
    return [leaf for part in tree[1:] for leaf in _flat(kind, part)] if tree[0] == kind else [tree]


def _has_number(tree: Tree) -> bool:
    return tree[0] == "num" or any(_has_number(part) for part in tree[1:] if isinstance(part, tuple))


def _open(tree: Tree) -> bool:
    """Whether a set has symbols in it other than one unknown of a relation."""
    return bool(len(symbols(tree)) > (tree[0] == "rel"))


def _defined(tree: Tree) -> bool:
    try:
        numbers.rational(tree)
    except numbers.Undefined:
        return False
    except numbers.Beyond:
        pass
    return True


def _difference(named: Tree) -> Tree:
    return ("add", named[3], ("neg", named[2]))


def _same_relation(left: Tree, right: Tree) -> bool | None:
    """Inequalities in several unknowns: link by link the same sides up to a positive factor."""
    one, two = _upward(left), _upward(right)
    if len(one) != len(two):
        return False
    return _all(
        op == other and proof.proportional(a, b, positive=op != "!=")
        for (op, a), (other, b) in zip(one, two, strict=True)
    )


def _upward(tree: Tree) -> list[tuple[str, Tree]]:
    """`c > b > a` as the links `a - b < 0`, `b - c < 0`."""
    ops, parts = tree[1], tree[2:]
    if all(op[0] == ">" for op in ops):
        ops, parts = [op.replace(">", "<") for op in reversed(ops)], parts[::-1]
    return [(op, ("add", a, ("neg", b))) for op, a, b in zip(ops, parts, parts[1:], strict=False)]


def _based(left: Tree, right: Tree) -> bool:
    """Numerals match in their own base only: a value in another base is another answer to "write it in base 8"."""
    if left[0] == right[0]:
        return left[1:] == right[1:]
    numeral, other = (left, right) if left[0] == "based" else (right, left)
    value = rational_or_none(other)
    return numeral[2] == 10 and value is not None and numeral[1].isdigit() and value == int(numeral[1])


def _ratios(left: Tree, right: Tree) -> bool | None:
    """3:4 is 6:8 and, for two terms, 3/4."""
    if left[0] == right[0]:
        a, b = left[1:], right[1:]
        if len(a) != len(b):
            return False
        crossed = (proof.equal(("mul", x, b[0]), ("mul", y, a[0])) for x, y in zip(a, b, strict=True))
        return left == right or _all(crossed)
    ratio, other = (left, right) if left[0] == "ratio" else (right, left)
    if len(ratio) != 3 or other[0] in COLLECTIONS:
        return False
    return proof.equal(("div", ratio[1], ratio[2]), other)


# -- references -------------------------------------------------------------------------------------------------------


def _golds(task: Task) -> tuple[Reading, ...]:
    reference = task.reference
    texts = (reference,) if isinstance(reference, str) else reference
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"task {task.id}: reference {reference!r} is no answer: give a string or a list of alternative strings"
        )
    return tuple(gold for text in texts for gold in _forms(text))


@lru_cache(maxsize=8192)
def _forms(text: str) -> tuple[Reading, ...]:
    """One reference as its alternative forms: boxes that agree are forms of one answer, others are its parts."""
    if not any(marker in text for marker in ("boxed", "<answer>", "####")):
        return (read(text),)
    found = final(text)
    if found is None:
        return (read(""),)
    forms = tuple(read(each) for each in found.texts)
    judge = Math()
    numbers.begin()
    if all(judge._readings(forms[0], form) for form in forms[1:]):
        return forms
    return (read(", ".join(found.texts)),)


def _same_text(left: Reading, right: Reading) -> bool:
    """Identical spellings of what can only be compared as text; `0=0` reads as mathematics and is no such."""
    return bool(left.text) and left.text == right.text and not (left.trees or left.words or left.choice)


def _unbalanced(text: str) -> bool:
    plain = text.replace("\\{", "").replace("\\}", "")
    return plain.count("{") != plain.count("}")


@lru_cache(maxsize=64)
def _policy(judge: Math) -> dict[str, Any]:
    return asdict(judge)
