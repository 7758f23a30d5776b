r"""Judges a final answer against a mathematical reference.

Layers, cheapest first: the answer's text is found (`verifiers.extract`), read into a tree by this room's own parser (`verifiers.reading`,
`verifiers.expression`; model text is never evaluated), compared by its kind (here: numbers, quantities, lists, sets, intervals, relations,
matrices, choices, words) and its numbers by exact arithmetic, proof or evaluation (`verifiers.numbers`).
Every step is bounded by counted work; nothing uses signals, clocks or shared state, so a `Math` may be called from any thread.
Knows nothing of how the response was made. Limit: what it can read but not compare (a sum, an integral) it abstains from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from verifiers import numbers
from verifiers.base import Task, Verdict
from verifiers.expression import FUNCTIONS, Tree
from verifiers.extract import final
from verifiers.numbers import rational_or_none, symbols
from verifiers.reading import Reading, read
from verifiers.regions import NoRegion, region
from verifiers.units import label_of, unit_of

ITEMS = 40  # of a list or set that is compared without order
SETS = frozenset(("interval", "union", "minus", "meet", "reals", "empty"))
COLLECTIONS = frozenset(("tuple", "bracket", "set", "list", "matrix", "ratio"))


class Refused(Exception):
    """The answer contradicts itself or says nothing: it equals nothing."""


@dataclass(frozen=True, slots=True)
class Math:
    r"""The math verifier; its fields are the named policies.

    A reference is one string (bare or boxed LaTeX; several boxes that are equal are forms of one answer) or a sequence of alternatives.

    Example:
        Math().verify(Task("t", (), reference="\\frac{1}{2}", verifier="math"), r"... so \boxed{0.5}.").correct  # True
    """

    percent: Literal["ratio", "strict", "ignore"] = "ratio"  # 9% is 0.09 | only another percentage | 9
    units: Literal["optional", "required", "ignore"] = "optional"  # one side may leave them out; where both have them they must agree
    order: Literal["written", "strict"] = "written"  # tuples keep their order, sets and bare lists do not | bare lists do too
    form: Literal["any", "exact", "simplest"] = "any"  # any equal value | no rounded decimals | and no arithmetic left to do
    digits: int = 6  # a decimal may stand for an exact number that rounds to it, from this many significant digits
    tolerance: float = 0.0  # relative; for references that were measured or rounded

    def __post_init__(self) -> None:
        choices = {
            "percent": ("ratio", "strict", "ignore"), "units": ("optional", "required", "ignore"),
            "order": ("written", "strict"), "form": ("any", "exact", "simplest"),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"math policy {name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}")
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
            if not gold.text or _unbalanced(gold.text):
                raise ValueError(f"task {task.id}: reference {task.reference!r} cannot be read ({gold.why}): give one answer in LaTeX, plain text or a box")

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

    # -- responses and references -----------------------------------------------------------------------------------

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
            same = any(_same_text(gold, answer) for gold in golds)
            return same, "equal as text" if same else f"unreadable answer: {answer.why}"
        outcomes = []
        for gold in golds:
            if self.form == "simplest" and answer.trees and not _finished(answer.trees[0]):
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
        try:
            return self._settled(settle(left), settle(right))
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
                return _proportional(_difference(left), _difference(right), positive=False)
            return False
        named, other = (left, right) if left[0] == "named" else (right, left)
        if other[0] == "equation":
            return _proportional(_difference(named), other[1], positive=False)
        if other[0] == "rel" or other[0] in SETS:
            return self._regions(("set", *(named[2][1:] if named[2][0] == "list" else named[2:3])), other)
        return self._settled(named[2], other)

    def _equations(self, left: Tree, right: Tree) -> bool | None:
        """Equations up to a factor; `m + n = 25` also says 25, because only its right side is a number."""
        if left[0] == right[0]:
            return _proportional(left[1], right[1], positive=False)
        equation, other = (left, right) if left[0] == "equation" else (right, left)
        _, _, first, last = equation
        if symbols(last) or symbols(other) or other[0] in COLLECTIONS or _has_number(first):
            return False
        return self._settled(settle(last), other)

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
            (p.low_closed, p.high_closed) == (q.low_closed, q.high_closed) and _all(self._quantities(a, b) for a, b in ((p.low, q.low), (p.high, q.high)))
            for p, q in zip(one, two, strict=True)
        )

    def _without_region(self, left: Tree, right: Tree) -> bool | None:
        """Sets with symbols in them, and inequalities in several unknowns, part by part."""
        if left[0] != right[0]:
            comparable = {left[0], right[0]} <= SETS | {"rel", "tuple", "bracket"} and ("rel" in (left[0], right[0]) or _open(left) or _open(right))
            return None if comparable else False
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
            if not set(kinds) <= {"set", "list"}:
                return False
            return self._unordered(_distinct(self, left[1:]), _distinct(self, right[1:]))
        a, b = left[1:], right[1:]
        if len(a) != len(b):
            return False
        if "bracket" in kinds and kinds[0] != kinds[1] and len(a) == 2:
            return False  # a closed interval against an open one, a point or two numbers
        if set(kinds) == {"list"} and self.order == "written":
            return self._unordered(a, b)
        return _all(self._same(x, y) for x, y in zip(_by_name(a), _by_name(b), strict=True))

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
        if all(part[0] in ("bracket", "tuple") for part in other[1:]):  # [[1, 2], [3, 4]]
            return self._matrices(matrix, ("matrix", tuple(part[1:] for part in other[1:]))) if len({len(part) for part in other[1:]}) == 1 else False
        entries = tuple(row[0] for row in rows) if len(rows[0]) == 1 else rows[0] if len(rows) == 1 else ()
        if not entries or other[0] not in ("tuple", "bracket") or len(entries) != len(other) - 1:
            return False
        return _all(self._same(x, y) for x, y in zip(entries, other[1:], strict=True))

    # -- quantities -----------------------------------------------------------------------------------------------------

    def _quantities(self, left: Tree, right: Tree) -> bool | None:
        (a, unit_a), (b, unit_b) = _quantity(left), _quantity(right)
        if self.percent != "ratio":
            a_percent, b_percent = a[0] == "pct", b[0] == "pct"
            if self.percent == "strict" and a_percent != b_percent:
                return False
            a, b = (a[1] if a_percent else a), (b[1] if b_percent else b)
        if self.units == "ignore" or unit_a == unit_b:
            return self._numbers(a, b)
        if not unit_a or not unit_b:
            return False if self.units == "required" else self._numbers(a, b)
        known_a, known_b = unit_of(unit_a), unit_of(unit_b)
        if known_a is None or known_b is None:
            return self._numbers(a, b) if label_of(unit_a) == label_of(unit_b) else False
        if known_a.dimension != known_b.dimension:
            return False
        if known_a.scale == known_b.scale:
            return self._numbers(a, b)
        return self._numbers(("mul", ("num", known_a.scale / known_b.scale, 0), a) if a[0] != "num" else ("num", a[1] * known_a.scale / known_b.scale, a[2]), b)

    def _numbers(self, left: Tree, right: Tree) -> bool | None:
        if left == right:
            return _defined(left)
        exact = numbers.equal(left, right)
        if exact:
            return True
        if left[0] == "deg" != right[0] and self.units != "required" or right[0] == "deg" != left[0] and self.units != "required":
            bare = numbers.equal(left[1] if left[0] == "deg" else left, right[1] if right[0] == "deg" else right)
            if bare:
                return True
        if self.form == "any" and _rounded(left, right, self.digits):
            return True
        if self.tolerance and _near(left, right, self.tolerance):
            return True
        if exact is None and (symbols(left) != symbols(right) or numbers.defined(left) != numbers.defined(right)):
            return False  # one has a value where the other has none
        return exact


# -- trees to what they say ------------------------------------------------------------------------------------------------


def settle(tree: Tree) -> Tree:
    """The tree with its relations, signs and words resolved. Raises Refused for what contradicts itself."""
    kind = tree[0]
    if kind == "rel":
        return _settled_relation(tree)
    if kind == "list":
        return _settled_list(tree)
    if kind == "unit":
        return _settled_unit(tree)
    if kind == "set" and len(tree) == 2 and tree[1][0] == "rel":
        return settle(tree[1])
    if kind in ("add", "neg", "mul", "pm", "div") and _has_sign(tree):
        plus, minus = _signed(tree, 1), _signed(tree, -1)
        return ("list", plus, minus)
    if kind in ("set", "tuple", "bracket") and any(_has_sign(part) for part in tree[1:]):
        if kind != "set":
            raise Refused("a sign left open in a tuple")
        return ("set", *_opened(tree[1:]))
    return tree


def _settled_relation(tree: Tree) -> Tree:
    ops, parts = tree[1], tree[2:]
    if "≈" in ops:
        return _settled_rounding(ops, parts)
    if ops == ("∈",):
        return settle(parts[1]) if parts[0][0] in ("sym", "tuple", "mul", "fn") else _refuse("membership of nothing")
    if any(op != "=" for op in ops):
        if not any(symbols(part) for part in parts if part[0] not in SETS):
            raise Refused("a relation without an unknown")
        return tree
    first, last = parts[0], parts[-1]
    name = _name(first)
    if name is None and len(parts) == 2 and last[0] == "sym" and first[0] != "sym":
        name, first, last, parts = _name(last), last, first, (last, first)
    if name is not None:
        if not _chain(parts[1:]):
            raise Refused("an equality chain that does not hold")
        value = settle(last)
        if name in symbols(value) if value[0] not in SETS else False:
            return _equation(first, last)
        return ("named", name, value, first)
    if not any(symbols(part) for part in parts):
        if all(part[0] in ("num", "const") for part in parts) or not _chain(parts):
            raise Refused("an equality without an unknown that says nothing or is false")
        return settle(last)
    if len(parts) > 2:
        if not _chain(parts):
            raise Refused("an equality chain that does not hold")
        return settle(last)
    return _equation(first, last)


def _settled_rounding(ops: Sequence[str], parts: Sequence[Tree]) -> Tree:
    """`pi ≈ 3.14` says pi, `x ≈ 3.14` says 3.14; the rounded value must be near."""
    at = ops.index("≈")
    exact, rounded = parts[at], parts[at + 1 :]
    if any(op not in ("=", "≈") for op in ops) or any(symbols(part) for part in rounded):
        raise Refused("a rounding among other relations")
    if at == 0 and symbols(exact):
        return settle(("rel", ("=",), exact, rounded[0])) if _name(exact) else _refuse("a rounded expression")
    if not all(_near(exact, part, 0.02) for part in rounded):
        raise Refused("a rounded value that is not near")
    return settle(("rel", tuple(ops[:at]), *parts[: at + 1])) if at else settle(exact)


def _refuse(why: str) -> Tree:
    raise Refused(why)


def _equation(left: Tree, right: Tree) -> Tree:
    difference: Tree = ("add", left, ("neg", right))
    if any(part[0] in COLLECTIONS or part[0] in SETS for part in (left, right)):
        raise Refused("an equation between collections")
    if numbers.zero(difference) is not False:
        raise Refused("an equation that always holds")
    return ("equation", difference, left, right)


def _name(tree: Tree) -> str | None:
    """The name on the left of a definition: x, x_1, f(x), P(x), "area"."""
    if tree[0] == "sym":
        return tree[1]
    if tree[0] == "fn" and tree[1].startswith("call "):
        return f"{tree[1][5:]}({tree[2][1] if tree[2][0] == 'sym' else repr(tree[2])})"
    if tree[0] == "mul" and len(tree) == 3 and tree[1][0] == tree[2][0] == "sym" and tree[1][1].isupper():
        return f"{tree[1][1]}({tree[2][1]})"
    if tree[0] == "mul" and len(tree) == 3 and tree[1][0] == "pow" and tree[1][1][0] == tree[2][0] == "sym" and tree[1][2] == ("neg", ("num", Fraction(1), 0)):
        return f"{tree[1][1][1]}^-1({tree[2][1]})"
    if tree[0] == "fn" and tree[1] in FUNCTIONS and len(tree) == 3 and tree[2][0] == "sym":
        return f"{tree[1]} {tree[2][1]}"
    if tree[0] == "tuple" and all(part[0] == "sym" for part in tree[1:]):
        return "(" + ",".join(part[1] for part in tree[1:]) + ")"
    if tree[0] == "mul" and all(part[0] == "sym" for part in tree[1:]) and all(part[1].isupper() for part in tree[1:]):
        return "".join(part[1] for part in tree[1:])  # a segment AB
    return None


def _chain(parts: Sequence[Tree]) -> bool:
    """Whether all members of a chain of equalities are equal; a rounded last member is allowed."""
    judge = Math()
    return all(judge._same(a, b) is True for a, b in zip(parts, parts[1:], strict=False))


def _settled_list(tree: Tree) -> Tree:
    parts = _opened(tree[1:])
    if parts[0][0] == "rel" and parts[0][1] == ("!=",) and not any(part[0] == "rel" for part in parts[1:]):  # x != 1, 2
        parts = [parts[0], *(("rel", ("!=",), parts[0][2], part) for part in parts[1:])]
    if any(part[0] == "rel" and any(op != "=" for op in part[1]) for part in parts):
        return _relations(parts)
    named = [settle(part) for part in parts]
    names = [part[1] for part in named if part[0] == "named"]
    if names and len(names) < len(named):
        if len(set(names)) == 1 and named[0][0] == "named":  # x = 1, 2
            return ("named", names[0], ("list", *(part[2] if part[0] == "named" else part for part in named)), named[0][3])
        return ("list", *named)
    if names and len(set(names)) == 1:  # x = 1 or x = 2
        return ("named", names[0], ("list", *(part[2] for part in named)), named[0][3])
    return ("list", *named)


def _relations(parts: Sequence[Tree]) -> Tree:
    try:
        pieces = region(("list", *parts))
    except NoRegion:
        return ("list", *parts)
    if not pieces:
        return ("empty",)
    trees = [("interval", *piece) for piece in pieces]
    return trees[0] if len(trees) == 1 else ("union", *trees)


def _settled_unit(tree: Tree) -> Tree:
    label = tree[2].strip().lower()
    if label in ("degree", "degrees", "deg", "°", "^°"):
        return ("deg", tree[1])
    if label in ("percent", "per cent", "pct", "percents"):
        return ("pct", tree[1])
    if _has_sign(tree[1]):
        return ("list", ("unit", _signed(tree[1], 1), tree[2]), ("unit", _signed(tree[1], -1), tree[2]))
    return tree


def _has_sign(tree: Tree) -> bool:
    return tree[0] == "pm" or (tree[0] in ("add", "mul", "neg", "div", "unit") and any(_has_sign(part) for part in tree[1:] if isinstance(part, tuple)))


def _signed(tree: Tree, sign: int) -> Tree:
    """The tree with every open sign taken as `sign`."""
    if tree[0] == "pm":
        inner = _signed(tree[1], sign)
        return inner if sign > 0 else ("neg", inner)
    if tree[0] in ("add", "mul", "neg", "div", "unit"):
        return (tree[0], *(_signed(part, sign) if isinstance(part, tuple) else part for part in tree[1:]))
    return tree


def _opened(parts: Sequence[Tree]) -> list[Tree]:
    """List items with their open signs written out."""
    found: list[Tree] = []
    for part in parts:
        if _has_sign(part):
            found += [_signed(part, 1), _signed(part, -1)]
        elif part[0] == "rel" and part[1] == ("=",) and _has_sign(part[3]):
            found += [("rel", ("=",), part[2], _signed(part[3], sign)) for sign in (1, -1)]
        else:
            found.append(part)
    return found


def _by_name(items: Sequence[Tree]) -> Sequence[Tree]:
    """Items in order; where every one is named, in the order of the names: `y = 2, x = 1` is (1, 2)."""
    names = [item[1] if item[0] == "named" else _name(item[2]) if item[0] == "rel" and item[1] == ("=",) else None for item in items]
    if None in names or len(set(names)) != len(names):
        return items
    return [item for _, item in sorted(zip(names, items, strict=True), key=lambda pair: pair[0])]


def _distinct(judge: Math, items: Sequence[Tree]) -> list[Tree]:
    found: list[Tree] = []
    for item in items[: ITEMS + 1]:
        if not any(judge._same(item, other) for other in found):
            found.append(item)
    return found if len(items) <= ITEMS else list(items)


def _has_number(tree: Tree) -> bool:
    return tree[0] == "num" or any(_has_number(part) for part in tree[1:] if isinstance(part, tuple))


def _open(tree: Tree) -> bool:
    """Whether a set has symbols in it other than one unknown of a relation."""
    return bool(len(symbols(tree)) > (tree[0] == "rel"))


def _flat(kind: str, tree: Tree) -> list[Tree]:
    return [leaf for part in tree[1:] for leaf in _flat(kind, part)] if tree[0] == kind else [tree]


def _quantity(tree: Tree) -> tuple[Tree, str]:
    """A number and its unit; scale words (dozen, million) belong to the number, words for "pieces" to neither."""
    if tree[0] == "neg":
        inner, unit = _quantity(tree[1])
        return (("neg", inner), unit) if unit else (tree, "")
    if tree[0] != "unit":
        return tree, ""
    inner, deeper = _quantity(tree[1])
    label = f"{deeper} {tree[2]}".strip() if deeper else tree[2]
    known = unit_of(label)
    if known is not None and not known.dimension:
        return (inner if known.scale == 1 else ("mul", ("num", known.scale, 0), inner)), ""
    return inner, label


# -- numbers -----------------------------------------------------------------------------------------------------------------


def _all(outcomes: Any) -> bool | None:
    """True when all are, False when one is, None when one is unsure."""
    unsure = False
    for outcome in outcomes:
        if outcome is False:
            return False
        unsure = unsure or outcome is None
    return None if unsure else True


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


def _proportional(left: Tree, right: Tree, *, positive: bool) -> bool | None:
    """Whether two functions differ by a constant factor (a positive one if asked): the same equation or inequality."""
    if symbols(left) != symbols(right):
        return False
    for point in numbers.points(tuple(sorted(symbols(left))))[:6]:
        one, two = _put(left, point), _put(right, point)
        a, b = rational_or_none(one), rational_or_none(two)
        if a and b:
            ratio: Tree = ("num", a / b, 0)
        else:
            a, b = numbers.value(one), numbers.value(two)
            if not a or not b or not (hasattr(a, "_mpf_") and hasattr(b, "_mpf_")):
                continue
            ratio = ("div", one, two)
        if positive and not a / b > 0:
            return False
        return numbers.zero(("add", left, ("neg", ("mul", ratio, right))))
    return None


def _put(tree: Tree, point: dict[str, Fraction]) -> Tree:
    if tree[0] == "sym":
        return ("num", point[tree[1]], 0)
    return (tree[0], *(_put(part, point) if isinstance(part, tuple) else part for part in tree[1:]))


def _same_relation(left: Tree, right: Tree) -> bool | None:
    """Inequalities in several unknowns: link by link the same sides up to a positive factor."""
    one, two = _upward(left), _upward(right)
    if len(one) != len(two):
        return False
    return _all(op == other and _proportional(a, b, positive=op != "!=") for (op, a), (other, b) in zip(one, two, strict=True))


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
        return _all(numbers.equal(("mul", x, b[0]), ("mul", y, a[0])) for x, y in zip(a, b, strict=True)) if left != right else True
    ratio, other = (left, right) if left[0] == "ratio" else (right, left)
    if len(ratio) != 3 or other[0] in COLLECTIONS:
        return False
    return numbers.equal(("div", ratio[1], ratio[2]), other)


def as_decimal(tree: Tree) -> tuple[Fraction, int] | None:
    """A decimal literal (signed, in scientific notation or a percentage): its value and count of significant digits."""
    if tree[0] == "num":
        return (tree[1], tree[2]) if tree[2] else None
    if tree[0] in ("neg", "pct"):
        inner = as_decimal(tree[1])
        return inner and (inner[0] * (Fraction(-1) if tree[0] == "neg" else Fraction(1, 100)), inner[1])
    if tree[0] == "mul" and len(tree) == 3 and tree[2][0] == "pow" and tree[2][1] == ("num", Fraction(10), 0):
        inner, power = as_decimal(tree[1]), rational_or_none(tree[2])
        return inner and power and (inner[0] * power, inner[1])
    return None


def _rounded(left: Tree, right: Tree, digits: int) -> bool:
    """Whether one side is a decimal that stands for the other, rounded to at least `digits` significant digits."""
    one, two = as_decimal(left), as_decimal(right)
    if one and two:
        short, long = (one, two) if one[1] <= two[1] else (two, one)
        if long[1] >= 15 and short[1] >= 1 and abs(long[0] - short[0]) <= abs(short[0]) * Fraction(1, 10**14):
            return True  # the noise of floating-point arithmetic
        return short[1] >= digits and long[1] >= short[1] + 3 and rounds(short, long[0])
    if not one and not two:
        return False
    decimal, other = (one, right) if one else (two, left)
    exact = rational_or_none(other)
    if exact is not None:
        if _terminates(exact):  # it has a decimal of its own
            return decimal[1] >= 15 and abs(decimal[0] - exact) <= abs(exact) * Fraction(1, 10**14)
        return decimal[1] >= digits and rounds(decimal, exact)
    if decimal[1] < digits or symbols(other):
        return False
    number = numbers.value(other)
    if number is None or not hasattr(number, "_mpf_"):
        return False
    sign, mantissa, exponent, _ = number._mpf_
    if abs(exponent) > 5000:
        return False
    return rounds(decimal, (-1) ** sign * Fraction(int(mantissa)) * Fraction(2) ** exponent)


def _terminates(value: Fraction) -> bool:
    bottom = value.denominator
    for p in (2, 5):
        for _ in range(12):
            if bottom % p:
                break
            bottom //= p
    return bottom == 1


def rounds(decimal: tuple[Fraction, int], exact: Fraction, *, cut_from: int = 6) -> bool:
    """Within half a unit in the last digit; from `cut_from` digits on a cut-off decimal counts as well."""
    value, digits = decimal
    if value == 0 or (value > 0) != (exact > 0):
        return False
    unit = Fraction(1)
    while abs(value) >= unit * 10:
        unit *= 10
    while abs(value) < unit:
        unit /= 10
    last = unit / Fraction(10) ** (digits - 1)
    error = abs(exact) - abs(value)
    return abs(error) <= last / 2 or (digits >= cut_from and 0 <= error < last)


def _near(left: Tree, right: Tree, tolerance: float) -> bool:
    a, b = numbers.value(left), numbers.value(right)
    return a is not None and b is not None and bool(abs(a - b) <= tolerance * max(abs(a), abs(b)))


def _finished(tree: Tree) -> bool:
    """Whether no arithmetic on plain numbers is left to do: 7, 0.5, 3/4, 1 1/2 and 2 sqrt(3) are finished; 3 + 4, 6/8 and 2^3 are not."""
    kind = tree[0]
    if kind in ("num", "sym", "const", "text", "based", "reals", "empty"):
        return True
    if kind == "matrix":
        return all(_finished(entry) for row in tree[1] for entry in row)
    if kind == "neg" and tree[1][0] == "num":
        return True
    if kind in ("add", "mul", "div", "pow", "fn", "neg") and rational_or_none(tree) is not None:
        return _literal(tree)
    return all(_finished(part) for part in tree[1:] if isinstance(part, tuple) and part and isinstance(part[0], str) and part[0] not in ("=", "<", ">", "<=", ">=", "!=", "∈"))


def _literal(tree: Tree) -> bool:
    if tree[0] == "neg":
        return tree[1][0] != "neg" and _literal(tree[1])
    if tree[0] == "num":
        return True
    if tree[0] == "div":
        top, bottom = tree[1], tree[2]
        if top[0] == "neg":
            top = top[1]
        whole = top[0] == bottom[0] == "num" and top[2] == bottom[2] == 0 and top[1].denominator == bottom[1].denominator == 1
        return whole and bottom[1] > 1 and Fraction(top[1], bottom[1]).denominator == bottom[1]
    if tree[0] == "add" and len(tree) == 3:  # a mixed number
        return tree[1][0] == "num" and tree[1][1] > 0 and tree[2][0] == "div" and _literal(tree[2]) and tree[2][1][0] == "num" and 0 < tree[2][1][1] < tree[2][2][1]
    return False


# -- references ----------------------------------------------------------------------------------------------------------------


def _golds(task: Task) -> tuple[Reading, ...]:
    reference = task.reference
    texts = (reference,) if isinstance(reference, str) else tuple(reference) if isinstance(reference, (list, tuple)) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"task {task.id}: reference {reference!r} is no answer: give a string or a list of alternative strings")
    return tuple(gold for text in texts for gold in _forms(text))


@lru_cache(maxsize=8192)
def _forms(text: str) -> tuple[Reading, ...]:
    """One reference as its alternative forms: boxes that agree are forms of one answer, boxes that do not are its parts."""
    if "boxed" not in text and "<answer>" not in text:
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
    """Identical spellings of something that is not empty; spam such as 0=0 reads as mathematics and is judged as such."""
    return bool(left.text) and left.text == right.text and not (left.trees or left.words or left.choice)


def _unbalanced(text: str) -> bool:
    plain = text.replace("\\{", "").replace("\\}", "")
    return plain.count("{") != plain.count("}")


@lru_cache(maxsize=64)
def _policy(judge: Math) -> dict[str, Any]:
    return asdict(judge)
