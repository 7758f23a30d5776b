r"""Whether each step of a solution carries out a part of what is left of the question's expression.

    4 + 3 - 2 =      what is left        5 + 4 = 9       true, but there is no 5 to add
    4+3=7            7 - 2               7 - 2 = 5       5
    7-2=5            5                   5 + 0 = 5       true, and nothing is carried out

A step rewrites: what stands left of its equality is a part of what is left (terms of a sum and factors of a product in
any order, or any smaller part as it stands), and what stands right of it has the same value and fewer numbers and
operations. So what is left keeps the value of the question and shrinks: solutions that add other numbers than were
asked, repeat themselves, or say true things beside the point are found out. Knows no answer key. Neighbours: `process`
cuts the steps and reads the equalities. Limits: numbers only; a rounded result (10/3 = 3.33) is refused, since it
changes the value; a step that multiplies out a product of sums is no part of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from verifiers import proof
from verifiers.expression import Tree

JOINED = ("add", "mul")


class Left:
    """What is left of an expression: `carry_out` takes what a step states to be equal, and says whether it got further.

    Example:
        left = Left(parse("4+3-2"))
        left.carry_out([parse("4+3"), parse("7")])  # True; 7 - 2 is left
    """

    def __init__(self, expression: Tree) -> None:
        self.tree = plain(expression)

    def carry_out(self, members: Sequence[Tree]) -> bool:
        """members: the neighbours of one chain of equalities. What is left changes only where True is returned.

        Raises numbers.Exhausted where the numbers are beyond what a judgement may cost.
        """
        part, value = plain(members[0]), plain(members[-1])
        if size(value) >= size(part):
            return False
        after = replaced(self.tree, part, value)
        if after is None or not all(proof.equal(a, b) is True for a, b in zip(members, members[1:], strict=False)):
            return False
        self.tree = after
        return True


def plain(tree: Tree) -> Tree:
    """A tree in which 4 - 1 is the sum of 4 and -1, and 4 / 2 the product of 4 and 1/2; no sum directly in a sum,
    no product directly in a product."""
    kind = tree[0]
    if kind == "num":
        return ("num", tree[1])
    if kind == "neg":
        return negated(plain(tree[1]))
    if kind == "div":
        return joined("mul", [plain(tree[1]), inverse(plain(tree[2]))])
    if kind in JOINED:
        return joined(kind, map(plain, tree[1:]))
    return (kind, *(plain(part) if isinstance(part, tuple) else part for part in tree[1:]))


def joined(kind: str, parts: Iterable[Tree]) -> Tree:
    flat = [inner for part in parts for inner in (part[1:] if part[0] == kind else (part,))]
    return (kind, *sorted(flat, key=repr)) if len(flat) > 1 else flat[0]


def negated(tree: Tree) -> Tree:
    if tree[0] == "num":
        return ("num", -tree[1])
    if tree[0] == "neg":
        return tree[1]
    return joined("add", map(negated, tree[1:])) if tree[0] == "add" else ("neg", tree)


def inverse(tree: Tree) -> Tree:
    if tree[0] == "num" and tree[1]:
        return ("num", 1 / tree[1])
    if tree[0] == "inv":
        return tree[1]
    return joined("mul", map(inverse, tree[1:])) if tree[0] == "mul" else ("inv", tree)


def replaced(tree: Tree, part: Tree, value: Tree) -> Tree | None:
    """`tree` with `value` in place of `part`, the outermost place first; None where it has no such part.

    Of 4 - 1 - 7 the sum 1 + 7 is a part too, which is subtracted, and of 12 / 2 / 3 the product 2 * 3.
    """
    for sought, found in ((part, value), (negated(part), negated(value)), (inverse(part), inverse(value))):
        if tree == sought:
            return found
        if tree[0] == sought[0] and tree[0] in JOINED:
            rest = Counter(tree[1:])
            rest.subtract(Counter(sought[1:]))
            if min(rest.values()) >= 0:
                return joined(tree[0], [*rest.elements(), found])
    for place, inner in enumerate(tree):
        if isinstance(inner, tuple) and (after := replaced(inner, part, value)) is not None:
            return rebuilt((*tree[:place], after, *tree[place + 1 :]))
    return None


def rebuilt(tree: Tree) -> Tree:
    """A tree in plain form again after one of its parts has changed."""
    kind = tree[0]
    if kind in JOINED:
        return joined(kind, tree[1:])
    return {"neg": negated, "inv": inverse}[kind](tree[1]) if kind in ("neg", "inv") else tree


def size(tree: Tree) -> int:
    """Numbers and operations of a tree; signs of numbers are no operations."""
    return 1 + sum(size(part) for part in tree[1:] if isinstance(part, tuple))
