r"""Values of expressions: exact rationals, and 60-digit numbers at fixed random points.

Bounded by counted work and free of signals, clocks and shared state: what exceeds a bound raises `Beyond`, what has
no value `Undefined`, and a judgement that spends its whole budget `Exhausted`. Neighbour: `verifiers.proof` decides
equality with what is here. Knows no sets, units, text or policies. mpmath is used through a context of each
thread's own: the shared one changes while it works.
"""

from __future__ import annotations

import random
import threading
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial, gcd, isqrt, lcm
from typing import Any

from verifiers.expression import Tree

BITS = 20_000  # of an exact numerator or denominator
BUDGET = 8_000  # work of one judgement: term products, and evaluated nodes at a quarter each
MAGNITUDE = 10**12  # bits of a floating-point number
DIGITS = 60  # of a number at a point


class Beyond(Exception):
    """A bound is exceeded: the layer cannot say."""


class Exhausted(Exception):
    """The budget of the whole judgement is spent."""


class Undefined(Exception):
    """The expression has no (real) value here."""


_local = threading.local()  # of each thread: its mpmath context and what is left of its budget


def begin() -> None:
    """Give this thread the budget of a new judgement."""
    _local.left = BUDGET


def spend(amount: float) -> None:
    _local.left = getattr(_local, "left", BUDGET) - amount
    if _local.left < 0:
        raise Exhausted(f"more than {BUDGET} units of work")


def spent() -> float:
    """Work of this thread's judgement so far."""
    return BUDGET - getattr(_local, "left", BUDGET)


# -- exact rationals ---------------------------------------------------------------------------------------------------


def rational(tree: Tree) -> Fraction | None:
    """The value when exact arithmetic can find it, else None. Raises Undefined, Beyond."""
    kind = tree[0]
    if kind == "num":
        return tree[1]
    if kind == "neg":
        value = rational(tree[1])
        return None if value is None else -value
    if kind in ("add", "mul"):
        total = Fraction(kind == "mul")
        for part in tree[1:]:
            value = rational(part)
            if value is None:
                return None
            total = bounded(total + value if kind == "add" else total * value)
        return total
    if kind == "div":
        top, bottom = rational(tree[1]), rational(tree[2])
        if bottom == 0:
            raise Undefined("division by zero")
        return None if top is None or bottom is None else bounded(top / bottom)
    if kind == "pow":
        base, exponent = rational(tree[1]), rational(tree[2])
        return None if base is None or exponent is None else _power(base, exponent)
    if kind == "pct":
        value = rational(tree[1])
        return None if value is None else value / 100
    if kind == "fn":
        return _function(tree[1], [rational(part) for part in tree[2:]])
    return None


def rational_or_none(tree: Tree) -> Fraction | None:
    try:
        return rational(tree)
    except (Undefined, Beyond):
        return None


def bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > BITS or value.denominator.bit_length() > BITS:
        raise Beyond(f"more than {BITS} bits")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator == 1:
        n = exponent.numerator
        if base == 0 and n <= 0:
            raise Undefined("0 to a power that is not positive") if n < 0 else Undefined("0^0")
        if base in (0, 1):
            return base
        if base == -1:
            return base if n % 2 else Fraction(1)
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        return base**n if size * abs(n) <= BITS else None
    if exponent.denominator > 64 or (base < 0 and exponent.denominator % 2 == 0):
        return None
    top, bottom = _root(abs(base.numerator), exponent.denominator), _root(base.denominator, exponent.denominator)
    if top is None or bottom is None or base == 0:
        return Fraction(0) if base == 0 and exponent > 0 else None
    return _power(Fraction(top if base > 0 else -top, bottom), Fraction(exponent.numerator))


def _root(value: int, index: int) -> int | None:
    """The exact root of a whole number, or None."""
    if value < 2:
        return value
    if index == 2:
        root = isqrt(value)
    else:
        if value.bit_length() > 2000:
            return None
        low, high = 1, 1 << (value.bit_length() // index + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**index <= value else (low, middle - 1)
        root = low
    return root if root**index == value else None


def _function(name: str, values: list[Fraction | None]) -> Fraction | None:
    if not values or None in values:
        return None
    first = values[0]
    whole = all(value.denominator == 1 for value in values)
    if name == "abs" and len(values) == 1:
        return abs(first)
    if name == "floor" and len(values) == 1:
        return Fraction(first.__floor__())
    if name == "ceil" and len(values) == 1:
        return Fraction(first.__ceil__())
    if name == "max":
        return max(values)
    if name == "min":
        return min(values)
    if name in ("gcd", "lcm") and whole:
        return Fraction((gcd if name == "gcd" else lcm)(*(int(value) for value in values)))
    if name == "factorial" and whole and len(values) == 1:
        if first < 0:
            raise Undefined("factorial of a negative number")
        return Fraction(factorial(int(first))) if first <= 2100 else None
    if name == "binom" and whole and len(values) == 2 and 0 <= first <= 1000:
        return Fraction(comb(int(first), int(values[1]))) if values[1] >= 0 else Fraction(0)
    return None


# -- numbers at points -------------------------------------------------------------------------------------------------


def context() -> Any:
    """This thread's own mpmath context: the shared one changes its precision while it works."""
    if not hasattr(_local, "mp"):
        from mpmath import MPContext

        _local.mp = MPContext()
        _local.mp.dps = DIGITS
    return _local.mp


def evaluate(tree: Tree, point: dict[str, Any], *, real: bool) -> Any:
    """The value at a point, an mpmath number. Raises Undefined (no real value where `real`) or Beyond."""
    mp = context()
    spend(0.25)
    kind = tree[0]
    if kind == "num":
        return mp.mpf(tree[1].numerator) / tree[1].denominator
    if kind == "sym":
        if tree[1] not in point:
            raise Undefined(f"{tree[1]} has no value")
        return point[tree[1]]
    if kind == "const":
        if tree[1] == "i":
            if real:
                raise Undefined("i is not real")
            return mp.mpc(0, 1)
        if tree[1] == "inf":
            raise Undefined("infinity")
        return +(mp.pi if tree[1] == "pi" else mp.e)
    if kind in ("add", "mul", "neg", "div", "pow", "pct", "deg"):
        values = [evaluate(part, point, real=real) for part in tree[1:]]
        return _operate(mp, kind, values, tree, real)
    if kind == "fn":
        return _call(mp, tree[1], [evaluate(part, point, real=real) for part in tree[2:]], real)
    raise Beyond(f"{kind} is no number")


def _operate(mp: Any, kind: str, values: list[Any], tree: Tree, real: bool) -> Any:
    if kind == "add":
        return sum(values[1:], values[0])
    if kind == "mul":
        total = values[0]
        for value in values[1:]:
            total = total * value
        return total
    if kind == "neg":
        return -values[0]
    if kind == "pct":
        return values[0] / 100
    if kind == "deg":
        return values[0] * mp.pi / 180
    if kind == "div":
        if values[1] == 0:
            raise Undefined("division by zero")
        return values[0] / values[1]
    return _raise(mp, values[0], values[1], rational_or_none(tree[2]), real)


def _raise(mp: Any, base: Any, exponent: Any, exact: Fraction | None, real: bool) -> Any:
    if base == 0:
        if exact is None or exact <= 0:
            raise Undefined("0 to such a power")
        return base
    size = abs(exponent) * (abs(mp.mag(base)) + 1)
    if size > MAGNITUDE:
        raise Beyond("magnitude")
    negative = isinstance(base, mp.mpf) and base < 0
    if exact is None and isinstance(exponent, mp.mpf) and abs(exponent) < 10**6 and mp.isint(exponent):
        exact = Fraction(int(exponent))
    if exact is not None and exact.denominator == 1:
        return base**exact.numerator
    if negative and exact is not None and exact.denominator % 2:
        value = (-base) ** exponent
        return -value if exact.numerator % 2 else value
    if negative and real:
        raise Undefined("a root of a negative number")
    return mp.power(base, exponent)


def _call(mp: Any, name: str, values: list[Any], real: bool) -> Any:
    x = values[0]
    if real and any(not isinstance(value, mp.mpf) for value in values):
        raise Undefined("not real")
    if name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh") and abs(x) > 10**6:
        raise Beyond("a large argument")
    if name in ("arcsin", "arccos") and real and abs(x) > 1:
        raise Undefined("outside [-1, 1]")
    if name == "ln":
        if x == 0 or (real and x < 0):
            raise Undefined("logarithm of what is not positive")
        return mp.log(x)
    if name in _POLES and abs(getattr(mp, _POLES[name])(x)) < mp.mpf(10) ** (10 - DIGITS):
        raise Undefined(f"{name} at a pole")  # pi is rounded: the value there would be huge
    if name in _MP:
        try:
            return getattr(mp, _MP[name])(x)
        except (ZeroDivisionError, ValueError) as error:
            raise Undefined(name) from error
    if name in ("floor", "ceil", "max", "min") and all(isinstance(v, mp.mpf) for v in values):
        if mp.mag(x) > 150:
            raise Beyond("rounding a large number")
        return {"floor": mp.floor, "ceil": mp.ceil, "max": lambda *v: max(v), "min": lambda *v: min(v)}[name](*values)
    if name == "abs":
        return abs(x)
    if name in ("factorial", "binom"):
        if any(abs(v) > 1000 for v in values):
            raise Beyond("a large factorial")
        return mp.factorial(x) if name == "factorial" else mp.binomial(*values)
    raise Beyond(f"{name} is not evaluated")


_POLES = {"tan": "cos", "sec": "cos", "cot": "sin", "csc": "sin"}  # zero where the function has no value
_MP = {
    "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc", "arcsin": "asin",
    "arccos": "acos", "arctan": "atan",
    "sinh": "sinh", "cosh": "cosh", "tanh": "tanh", "re": "re", "im": "im",
}  # fmt: skip


def value(tree: Tree) -> Any | None:
    """A constant as a 60-digit number (real where it can be), or None."""
    for real in (True, False):
        try:
            return evaluate(tree, {}, real=real)
        except Undefined:
            continue
        except (Beyond, OverflowError, ZeroDivisionError, ValueError):
            return None
    return None


def defined(tree: Tree) -> bool:
    """Whether the expression has a value, real or complex, at one of the points; what is beyond bounds may have one."""
    mp, names = context(), tuple(sorted(symbols(tree)))
    for real in (True, False):
        for point in points(names) if names else ({},):
            at = {name: mp.mpf(value.numerator) / value.denominator for name, value in point.items()}
            try:
                evaluate(tree, at, real=real)
                return True
            except (Undefined, ZeroDivisionError):
                continue
            except (Beyond, OverflowError, ValueError):
                return True
    return False


def symbols(tree: Tree) -> frozenset[str]:
    """Names the expression depends on, an unknown function being one of them."""
    if tree[0] == "sym":
        return frozenset((tree[1],))
    if tree[0] == "fn" and tree[1].startswith("call "):
        return frozenset((tree[1],)).union(*(symbols(part) for part in tree[2:]))
    return frozenset().union(*(symbols(part) for part in tree[1:] if isinstance(part, tuple)))


def mentions_i(tree: Tree) -> bool:
    return tree == ("const", "i") or any(mentions_i(part) for part in tree[1:] if isinstance(part, tuple))


@lru_cache(maxsize=64)
def points(names: tuple[str, ...]) -> tuple[dict[str, Fraction], ...]:
    """Fixed points: in (0, 1), around 1, negative, large; then whole numbers, for what is defined only there."""
    draw = random.Random("points/" + "/".join(names))
    ranges = ((0, 1), (1, 4), (-4, 4), (0, 1), (-1, 1), (5, 40), (-40, 40), (1, 4), (100, 5000), (-5000, -100))
    found = [
        {name: Fraction(draw.randrange(low * 10**6 + 1, high * 10**6), 10**6) for name in names} for low, high in ranges
    ]
    whole = [{name: Fraction(draw.randrange(1, 12)) for name in names} for _ in range(4)]
    return (*found, *whole)
