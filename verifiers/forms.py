r"""How a number is written: rounded decimals, and whether arithmetic is left to do.

Knows no policies: `verifiers.math` and `verifiers.process` say how much rounding they take.
"""

from __future__ import annotations

from fractions import Fraction

from verifiers.expression import Tree
from verifiers.numbers import rational_or_none, symbols, value


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


def rounded(left: Tree, right: Tree, digits: int) -> bool:
    """Whether one side is a decimal that stands for the other, rounded to at least `digits` significant digits."""
    one, two = as_decimal(left), as_decimal(right)
    if one and two:
        short, long = (one, two) if one[1] <= two[1] else (two, one)
        if 15 <= long[1] <= 17 and short[1] >= 1 and abs(long[0] - short[0]) <= abs(short[0]) * Fraction(1, 10**14):
            return True  # the noise of floating-point arithmetic
        longer = short[1] >= digits and long[1] >= short[1] + 3
        return longer and abs(long[0] - short[0]) > last_unit(short) / 100 and rounds(short, long[0])
    if not one and not two:
        return False
    decimal, other = (one, right) if one else (two, left)
    exact = rational_or_none(other)
    if exact is not None:
        if _terminates(exact):  # it has a decimal of its own
            return 15 <= decimal[1] <= 17 and abs(decimal[0] - exact) <= abs(exact) * Fraction(1, 10**14)
        return decimal[1] >= digits and rounds(decimal, exact)
    if decimal[1] < digits or symbols(other):
        return False
    number = value(other)
    if number is None or not hasattr(number, "_mpf_"):
        return False
    sign, mantissa, exponent, _ = number._mpf_
    if abs(exponent) > 5000:
        return False
    return rounds(decimal, (-1) ** sign * Fraction(int(mantissa)) * Fraction(2) ** exponent)


def last_unit(decimal: tuple[Fraction, int]) -> Fraction:
    """What one unit in the last digit of a decimal that is not zero is worth."""
    value, digits = decimal
    unit = Fraction(1)
    while abs(value) >= unit * 10:
        unit *= 10
    while abs(value) < unit:
        unit /= 10
    return unit / Fraction(10) ** (digits - 1)


def rounds(decimal: tuple[Fraction, int], exact: Fraction, *, cut_from: int = 6) -> bool:
    """Within half a unit in the last digit; from `cut_from` digits on a cut-off decimal counts as well."""
    value, digits = decimal
    if value == 0 or (value > 0) != (exact > 0):
        return False
    last = last_unit(decimal)
    error = abs(exact) - abs(value)
    return abs(error) <= last / 2 or (digits >= cut_from and 0 <= error < last)


def _terminates(value: Fraction) -> bool:
    bottom = value.denominator
    for p in (2, 5):
        for _ in range(12):
            if bottom % p:
                break
            bottom //= p
    return bottom == 1


def near(left: Tree, right: Tree, tolerance: float) -> bool:
    a, b = value(left), value(right)
    return a is not None and b is not None and bool(abs(a - b) <= tolerance * max(abs(a), abs(b)))


def finished(tree: Tree) -> bool:
    """Whether no arithmetic on plain numbers is left to do: 7, 3/4, 2 sqrt(3) are finished; 3 + 4, 6/8 are not."""
    kind = tree[0]
    if kind in ("num", "sym", "const", "based", "reals", "empty"):
        return True
    if kind == "matrix":
        return all(finished(entry) for row in tree[1] for entry in row)
    if kind == "neg" and tree[1][0] == "num":
        return True
    if kind in ("add", "mul", "div", "pow", "fn", "neg") and rational_or_none(tree) is not None:
        return _literal(tree)
    return all(
        finished(part)
        for part in tree[1:]
        if isinstance(part, tuple)
        and part
        and isinstance(part[0], str)
        and part[0] not in ("=", "<", ">", "<=", ">=", "!=", "∈")
    )


def _literal(tree: Tree) -> bool:
    if tree[0] == "neg":
        return tree[1][0] != "neg" and _literal(tree[1])
    if tree[0] == "num":
        return True
    if tree[0] == "div":
        top, bottom = tree[1], tree[2]
        if top[0] == "neg":
            top = top[1]
        whole = (
            top[0] == bottom[0] == "num"
            and top[2] == bottom[2] == 0
            and top[1].denominator == bottom[1].denominator == 1
        )
        return whole and bottom[1] > 1 and Fraction(top[1], bottom[1]).denominator == bottom[1]
    if tree[0] == "add" and len(tree) == 3:  # a mixed number
        return (
            tree[1][0] == "num"
            and tree[1][1] > 0
            and tree[2][0] == "div"
            and _literal(tree[2])
            and tree[2][1][0] == "num"
            and 0 < tree[2][1][1] < tree[2][2][1]
        )
    return False
