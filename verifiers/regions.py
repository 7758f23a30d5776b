r"""Sets of real numbers: intervals, unions, complements and the solutions of linear inequalities in one unknown.

A region is a sorted list of pieces that neither touch nor overlap. Knows no policies and no text. Neighbour:
`verifiers.math` compares two regions piece by piece. Limit: end points are constants; an inequality that is not
linear in its unknown is no region here.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cmp_to_key, reduce
from typing import Any, NamedTuple

from verifiers.expression import Tree
from verifiers.numbers import Beyond, Undefined, rational_or_none, symbols, value
from verifiers.proof import zero

INFINITY: Tree = ("const", "inf")
MINUS_INFINITY: Tree = ("neg", INFINITY)
PIECES = 40


class Piece(NamedTuple):
    low: Tree
    high: Tree
    low_closed: bool
    high_closed: bool


class NoRegion(Exception):
    """The tree is no set of real numbers that this file can hold."""


EVERYTHING = [Piece(MINUS_INFINITY, INFINITY, False, False)]


def region(tree: Tree) -> list[Piece]:
    """The pieces of a set of reals. Raises NoRegion."""
    kind = tree[0]
    if kind == "reals":
        return EVERYTHING
    if kind == "empty":
        return []
    if kind == "interval":
        return _interval(*tree[1:])
    if kind in ("tuple", "bracket") and len(tree) == 3:
        return _interval(tree[1], tree[2], kind == "bracket", kind == "bracket")
    if kind == "set":
        return union(*([Piece(point, point, True, True)] for point in tree[1:]))
    if kind in ("union", "either"):
        return union(*(region(part) for part in tree[1:]))
    if kind == "meet":
        return meet(region(tree[1]), region(tree[2]))
    if kind == "minus":
        return meet(region(tree[1]), complement(region(tree[2])))
    if kind == "rel":
        return _relation(tree)
    if kind == "both":
        return _together([region(part) for part in tree[1:]])
    if kind == "list":
        return _several(tree[1:])
    raise NoRegion(kind)


def place(tree: Tree) -> Any:
    """Where an end point stands on the line: a fraction, a 60-digit number or an infinite float."""
    if tree == INFINITY:
        return float("inf")
    if tree == MINUS_INFINITY or tree == ("add", MINUS_INFINITY):
        return float("-inf")
    exact = rational_or_none(tree)
    if exact is not None:
        return exact
    number = None if symbols(tree) else value(tree)
    if number is None or not hasattr(number, "_mpf_"):
        raise NoRegion("an end point that is no real constant")
    return number


def before(left: Tree, right: Tree) -> int:
    """-1, 0 or 1 as `left` stands before, at or after `right`."""
    a, b = place(left), place(right)
    if isinstance(a, float) or isinstance(b, float):
        a, b = (x if isinstance(x, float) else 0.0 for x in (a, b))
        return (a > b) - (a < b)
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return (a > b) - (a < b)
    if zero(("add", left, ("neg", right))):
        return 0
    a, b = (value(x) if isinstance(p, Fraction) else p for x, p in ((left, a), (right, b)))
    return (a > b) - (a < b)


def _interval(low: Tree, high: Tree, low_closed: bool, high_closed: bool) -> list[Piece]:
    order = before(low, high)
    if order > 0 or (order == 0 and not (low_closed and high_closed)):
        raise NoRegion("an interval whose ends stand the wrong way round")
    return [Piece(low, high, low_closed, high_closed)]


def union(*regions: list[Piece]) -> list[Piece]:
    pieces = [piece for pieces in regions for piece in pieces]
    if len(pieces) > PIECES:
        raise NoRegion(f"more than {PIECES} pieces")
    pieces.sort(key=cmp_to_key(lambda p, q: before(p.low, q.low) or q.low_closed - p.low_closed))
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        gap = before(piece.low, last.high) if last else 1
        if last is None or gap > 0 or (gap == 0 and not (piece.low_closed or last.high_closed)):
            merged.append(piece)
            continue
        order = before(piece.high, last.high)
        high, closed = (
            (piece.high, piece.high_closed)
            if order > 0
            else (last.high, last.high_closed or (order == 0 and piece.high_closed))
        )
        merged[-1] = Piece(last.low, high, last.low_closed, closed)
    return merged


def complement(pieces: list[Piece]) -> list[Piece]:
    found, low, closed = [], MINUS_INFINITY, False
    for piece in pieces:
        order = before(low, piece.low)
        if order < 0 or (order == 0 and closed and not piece.low_closed and low != MINUS_INFINITY):
            found.append(Piece(low, piece.low, closed, not piece.low_closed))
        low, closed = piece.high, not piece.high_closed
    if low != INFINITY:
        found.append(Piece(low, INFINITY, closed, False))
    return found


def meet(left: list[Piece], right: list[Piece]) -> list[Piece]:
    return complement(union(complement(left), complement(right)))


def _relation(tree: Tree) -> list[Piece]:
    """`1 < x <= 3`, `2x + 1 > 5`, `x != 2`, `x = 2`, `x in S`."""
    ops, parts = tree[1], tree[2:]
    names = (
        symbols(("add", *parts))
        if all(
            part[0] not in ("set", "union", "interval", "tuple", "bracket", "reals", "minus", "meet", "empty")
            for part in parts
        )
        else None
    )
    if names is None:
        if ops == ("∈",) and parts[0][0] == "sym":
            return region(parts[1])
        raise NoRegion("a relation between sets")
    if len(names) != 1 or "∈" in ops:
        raise NoRegion("not one unknown")
    (name,) = names
    pieces = EVERYTHING
    for op, left, right in zip(ops, parts, parts[1:], strict=False):
        pieces = meet(pieces, _solved(op, left, right, name))
    return pieces


def _solved(op: str, left: Tree, right: Tree, name: str) -> list[Piece]:
    """Solutions of one relation; `|a| < b` is `a < b` and `-a < b`, `|a| > b` is one of them."""
    if right[:2] == ("fn", "abs"):
        left, right, op = right, left, op.translate(str.maketrans("<>", "><"))
    if left[:2] != ("fn", "abs"):
        return _linear(op, left, right, name)
    sides = [_linear(op, inner, right, name) for inner in (left[2], ("neg", left[2]))]
    if op[0] == "=":
        raise NoRegion("an absolute value without a direction")
    return meet(*sides) if op[0] in "<!" else union(*sides)


def _linear(op: str, left: Tree, right: Tree, name: str) -> list[Piece]:
    """Solutions of a relation with one unknown, from two values of the difference; two more must show it is linear."""
    if (
        left == ("sym", name)
        and right in (INFINITY, MINUS_INFINITY)
        or right == ("sym", name)
        and left in (INFINITY, MINUS_INFINITY)
    ):
        return EVERYTHING
    difference: Tree = ("add", left, ("neg", right))
    at = [_substitute(difference, name, Fraction(n)) for n in (0, 1, 2)]
    slope: Tree = ("add", at[1], ("neg", at[0]))
    try:
        if zero(("add", at[2], ("neg", at[1]), ("neg", slope))) is not True or zero(slope) is not False:
            raise NoRegion("not linear")
        extra = _substitute(difference, name, Fraction(37, 11))
        if zero(("add", extra, ("neg", at[0]), ("neg", ("mul", ("num", Fraction(37, 11), 0), slope)))) is not True:
            raise NoRegion("not linear")
    except (Undefined, Beyond) as error:
        raise NoRegion(str(error)) from error
    solved = left == ("sym", name) or right == ("sym", name)
    bound = (
        (right if left == ("sym", name) else left)
        if solved and not (symbols(left) and symbols(right))
        else ("div", ("neg", at[0]), slope)
    )
    rising = before(slope, ("num", Fraction(0), 0)) > 0
    if op == "=":
        return [Piece(bound, bound, True, True)]
    if op == "!=":
        return complement([Piece(bound, bound, True, True)])
    below = (op[0] == "<") == rising
    closed = op.endswith("=")
    return [Piece(MINUS_INFINITY, bound, False, closed)] if below else [Piece(bound, INFINITY, closed, False)]


def _substitute(tree: Tree, name: str, number: Fraction) -> Tree:
    if tree == ("sym", name):
        return ("num", number, 0)
    return (tree[0], *(_substitute(part, name, number) if isinstance(part, tuple) else part for part in tree[1:]))


def _together(regions: list[list[Piece]]) -> list[Piece]:
    return reduce(meet, regions)


def _several(parts: tuple[Tree, ...]) -> list[Piece]:
    """Relations side by side: all of them where that leaves something, else any of them."""
    if not any(part[0] == "rel" and part[1] != ("=",) for part in parts) and not any(
        part[0] in ("interval", "union") for part in parts
    ):
        raise NoRegion("no relations")
    regions = [region(part) for part in parts]
    both = _together(regions)
    if both and all(part[0] == "rel" for part in parts):
        return both
    return union(*regions)
