r"""What an answer says: relations, names, open signs and unit words resolved.

`x = 5` names 5, `3 + 4 = 7` says 7, `\pm 2` is a list of two, `0 = 0` says nothing and is `Refused`. Knows no
policies; the equality of the members of a chain is asked of the caller. Neighbour: `verifiers.math` compares what
comes out.

Besides the trees of `verifiers.expression` there come out: ("named", name, value, left side), ("equation",
difference, left, right).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from verifiers import proof
from verifiers.expression import FUNCTIONS, Tree
from verifiers.forms import near
from verifiers.numbers import symbols
from verifiers.regions import NoRegion, region
from verifiers.units import unit_of

SETS = frozenset(("interval", "union", "minus", "meet", "reals", "empty"))
COLLECTIONS = frozenset(("tuple", "bracket", "set", "list", "matrix", "ratio"))

Same = Callable[[Tree, Tree], bool | None]


class Refused(Exception):
    """The answer contradicts itself or says nothing: it equals nothing."""


def settle(tree: Tree, same: Same) -> Tree:
    """The tree with its relations, signs and words resolved. Raises Refused for what contradicts itself."""
    kind = tree[0]
    if kind == "rel":
        return _settled_relation(tree, same)
    if kind == "list":
        return _settled_list(tree, same)
    if kind in ("both", "either"):
        return _relations(tree)
    if kind == "unit":
        return _settled_unit(tree)
    if kind == "add" and len(tree) == 3 and tree[1][0] in ("reals", "interval", "union") and tree[2][0] == "neg":
        return ("minus", tree[1], tree[2][1])  # R - {0}
    if kind == "set" and len(tree) == 2 and tree[1][0] == "rel":
        return settle(tree[1], same)
    if kind in ("add", "neg", "mul", "pm", "div") and _has_sign(tree):
        plus, minus = _signed(tree, 1), _signed(tree, -1)
        return ("list", plus, minus)
    if kind in ("mul", "neg", "div") and sum(part[0] == "matrix" for part in tree[1:]) == 1:
        return _scaled_matrix(tree)
    if kind in ("set", "tuple", "bracket") and any(_has_sign(part) for part in tree[1:]):
        if kind != "set":
            raise Refused("a sign left open in a tuple")
        return ("set", *_opened(tree[1:]))
    return tree


def _scaled_matrix(tree: Tree) -> Tree:
    """A number times a matrix, entry by entry."""
    at = next(i for i, part in enumerate(tree) if part[0] == "matrix")
    if at != 1 and tree[0] == "div":
        raise Refused("a division by a matrix")
    rows = tree[at][1]
    return ("matrix", tuple(tuple((*tree[:at], entry, *tree[at + 1 :]) for entry in row) for row in rows))


def _settled_relation(tree: Tree, same: Same) -> Tree:
    ops, parts = tree[1], tree[2:]
    if "≈" in ops:
        return _settled_rounding(ops, parts, same)
    if ops == ("∈",):
        return (
            settle(parts[1], same) if parts[0][0] in ("sym", "tuple", "mul", "fn") else _refuse("membership of nothing")
        )
    if any(op != "=" for op in ops):
        if not any(symbols(part) for part in parts if part[0] not in SETS):
            raise Refused("a relation without an unknown")
        return tree
    first, last = parts[0], parts[-1]
    name = _name(first)
    if name is None and len(parts) == 2 and last[0] == "sym" and first[0] != "sym":
        name, first, last, parts = _name(last), last, first, (last, first)
    if name is not None:
        if not _chain(parts[1:], same):
            raise Refused("an equality chain that does not hold")
        value = settle(last, same)
        if name in symbols(value) if value[0] not in SETS else False:
            return _equation(first, last)
        return ("named", name, value, first)
    if not any(symbols(part) for part in parts):
        if all(part[0] in ("num", "const") for part in parts) or not _chain(parts, same):
            raise Refused("an equality without an unknown that says nothing or is false")
        return settle(last, same)
    if len(parts) > 2:
        if not _chain(parts, same):
            raise Refused("an equality chain that does not hold")
        return settle(last, same)
    return _equation(first, last)


def _settled_rounding(ops: Sequence[str], parts: Sequence[Tree], same: Same) -> Tree:
    """`pi ≈ 3.14` says pi, `x ≈ 3.14` says 3.14; the rounded value must be near."""
    at = ops.index("≈")
    exact, rounded = parts[at], parts[at + 1 :]
    if any(op not in ("=", "≈") for op in ops) or any(symbols(part) for part in rounded):
        raise Refused("a rounding among other relations")
    if at == 0 and symbols(exact):
        return settle(("rel", ("=",), exact, rounded[0]), same) if _name(exact) else _refuse("a rounded expression")
    if not all(near(exact, part, 0.02) for part in rounded):
        raise Refused("a rounded value that is not near")
    return settle(("rel", tuple(ops[:at]), *parts[: at + 1]), same) if at else settle(exact, same)


def _refuse(why: str) -> Tree:
    raise Refused(why)


def _equation(left: Tree, right: Tree) -> Tree:
    difference: Tree = ("add", left, ("neg", right))
    if any(part[0] in COLLECTIONS or part[0] in SETS for part in (left, right)):
        raise Refused("an equation between collections")
    if proof.zero(difference) is not False:
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
    if (
        tree[0] == "mul"
        and len(tree) == 3
        and tree[1][0] == "pow"
        and tree[1][1][0] == tree[2][0] == "sym"
        and tree[1][2] == ("neg", ("num", Fraction(1), 0))
    ):
        return f"{tree[1][1][1]}^-1({tree[2][1]})"
    if tree[0] == "fn" and tree[1] in FUNCTIONS and len(tree) == 3 and tree[2][0] == "sym":
        return f"{tree[1]} {tree[2][1]}"
    if tree[0] == "tuple" and all(part[0] == "sym" for part in tree[1:]):
        return "(" + ",".join(part[1] for part in tree[1:]) + ")"
    if tree[0] == "mul" and all(part[0] == "sym" for part in tree[1:]) and all(part[1].isupper() for part in tree[1:]):
        return "".join(part[1] for part in tree[1:])  # a segment AB
    return None


def _chain(parts: Sequence[Tree], same: Same) -> bool:
    """Whether all members of a chain of equalities are equal; a rounded last member is allowed."""
    return all(same(a, b) is True for a, b in zip(parts, parts[1:], strict=False))


def _settled_list(tree: Tree, same: Same) -> Tree:
    parts = _opened(tree[1:])
    if parts[0][0] == "rel" and parts[0][1] == ("!=",) and not any(part[0] == "rel" for part in parts[1:]):  # x != 1, 2
        parts = [parts[0], *(("rel", ("!=",), parts[0][2], part) for part in parts[1:])]
    if any(part[0] == "rel" and any(op != "=" for op in part[1]) for part in parts):
        return _relations(("list", *parts))
    named = [settle(part, same) for part in parts]
    names = [part[1] for part in named if part[0] == "named"]
    if names and len(names) < len(named):
        if len(set(names)) == 1 and named[0][0] == "named":  # x = 1, 2
            return (
                "named",
                names[0],
                ("list", *(part[2] if part[0] == "named" else part for part in named)),
                named[0][3],
            )
        return ("list", *named)
    if names and len(set(names)) == 1:  # x = 1 or x = 2
        return ("named", names[0], ("list", *(part[2] for part in named)), named[0][3])
    return ("list", *named)


def _relations(tree: Tree) -> Tree:
    """Relations side by side ("list"), joined by "and" ("both") or by "or" ("either"), as the set they describe."""
    try:
        pieces = region(tree)
    except NoRegion:
        return ("list", *tree[1:])
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
    return tree[0] == "pm" or (
        tree[0] in ("add", "mul", "neg", "div", "unit")
        and any(_has_sign(part) for part in tree[1:] if isinstance(part, tuple))
    )


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


def by_name(items: Sequence[Tree]) -> Sequence[Tree]:
    """Items in order; where every one is named, in the order of the names: `y = 2, x = 1` is (1, 2)."""
    names = [
        item[1] if item[0] == "named" else _name(item[2]) if item[0] == "rel" and item[1] == ("=",) else None
        for item in items
    ]
    if None in names or len(set(names)) != len(names):
        return items
    return [item for _, item in sorted(zip(names, items, strict=True), key=lambda pair: pair[0])]


def quantity(tree: Tree) -> tuple[Tree, str]:
    """A number and its unit; scale words (dozen, million) belong to the number, words for "pieces" to neither."""
    if tree[0] == "neg":
        inner, unit = quantity(tree[1])
        return (("neg", inner), unit) if unit else (tree, "")
    if tree[0] != "unit":
        return tree, ""
    inner, deeper = quantity(tree[1])
    label = f"{deeper} {tree[2]}".strip() if deeper else tree[2]
    known = unit_of(label)
    if known is not None and not known.dimension:
        return (inner if known.scale == 1 else ("mul", ("num", known.scale, 0), inner)), ""
    return inner, label
