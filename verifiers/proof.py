r"""Equality of two expressions, cheapest layer first.

    1. exact rationals;
    2. a proof: the difference as a quotient of polynomials over atoms (symbols, constants, prime roots, function
       values). Zero proves equality; a non-zero rational, or one product that cannot vanish, proves the opposite;
    3. what is left, at random points: equal means to 40 of 60 digits, relative to the largest term that remains
       after layer 2.

Knows how to value an expression (`verifiers.numbers`), nothing of sets, units or policies (`verifiers.math`).
Limit: an equality found by layer 3 alone holds at every point tried; it is not a proof.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from math import isqrt
from typing import Any

from verifiers.expression import Tree
from verifiers.numbers import (
    BITS,
    Beyond,
    Undefined,
    bounded,
    context,
    defined,
    evaluate,
    mentions_i,
    points,
    rational,
    rational_or_none,
    spend,
    symbols,
    value,
)  # fmt: skip

TERMS = 300  # of one polynomial
WORK = 4_000  # term products of one proof
AGREE = 40  # digits to which equal values agree, of 60

Monomial = tuple[tuple[int, Fraction], ...]  # (atom, exponent), sorted by atom
Poly = dict[Monomial, Fraction]


def equal(left: Tree, right: Tree) -> bool | None:
    """Whether two expressions are the same function of their symbols; None when no layer can say. Symmetric."""
    return zero(("add", left, ("neg", right)))


def zero(tree: Tree) -> bool | None:
    """Whether an expression is zero wherever it has a value; None when no layer can say. Raises Exhausted."""
    spend(1)
    try:
        value = rational(tree)
        if value is not None:
            return value == 0
    except Undefined:
        return False
    except Beyond:
        pass
    terms = tree
    try:
        atoms = _Atoms()
        top, bottom = atoms.quotient(tree)
        if not bottom:
            return False  # a division by zero in disguise
        if not top:
            return defined(tree)  # what cancelled may have no value: ln 0 - ln 0
        if set(top) == {()}:
            return False
        if len(top) == 1 and not any(_vanishing(atoms.trees[a]) for m in top for a, _ in m):
            return False
        terms = atoms.tree(top)
    except Undefined:
        return False
    except Beyond:
        pass
    return _vanishes(tree, terms)


def proportional(left: Tree, right: Tree, *, positive: bool) -> bool | None:
    """Whether two functions differ by a constant factor (a positive one if asked): the same equation or inequality."""
    if symbols(left) != symbols(right):
        return False
    for point in points(tuple(sorted(symbols(left))))[:6]:
        one, two = _put(left, point), _put(right, point)
        a, b = rational_or_none(one), rational_or_none(two)
        if a and b:
            ratio: Tree = ("num", a / b, 0)
        else:
            a, b = value(one), value(two)
            if not a or not b or not (hasattr(a, "_mpf_") and hasattr(b, "_mpf_")):
                continue
            ratio = ("div", one, two)
        if positive and not a / b > 0:
            return False
        return zero(("add", left, ("neg", ("mul", ratio, right))))
    return None


def _put(tree: Tree, point: dict[str, Fraction]) -> Tree:
    if tree[0] == "sym":
        return ("num", point[tree[1]], 0)
    return (tree[0], *(_put(part, point) if isinstance(part, tuple) else part for part in tree[1:]))


# -- layer 2: polynomials over atoms -----------------------------------------------------------------------------------


class _Atoms:
    """Names atoms by small integers and counts the work of one comparison."""

    def __init__(self) -> None:
        self.ids: dict[Any, int] = {}
        self.trees: list[Tree] = []
        self.primes: dict[int, int] = {}  # atom -> prime
        self.imaginary = self.intern(("const", "i"), ("const", "i"))
        self.work = 0

    def intern(self, key: Any, tree: Tree) -> int:
        if key not in self.ids:
            self.ids[key] = len(self.trees)
            self.trees.append(tree)
        return self.ids[key]

    def prime(self, p: int) -> int:
        atom = self.intern(("prime", p), ("num", Fraction(p), 0))
        self.primes[atom] = p
        return atom

    def spend(self, amount: int) -> None:
        self.work += amount
        spend(amount)
        if self.work > WORK:
            raise Beyond("work budget")

    # polynomials -------------------------------------------------------------------------------------------------

    def add(self, left: Poly, right: Poly) -> Poly:
        self.spend(len(right) + 1)
        total = dict(left)
        for monomial, coefficient in right.items():
            value = bounded(total.get(monomial, Fraction(0)) + coefficient)
            if value:
                total[monomial] = value
            else:
                total.pop(monomial, None)
        if len(total) > TERMS:
            raise Beyond("terms")
        return total

    def times(self, left: Poly, right: Poly) -> Poly:
        self.spend(len(left) * len(right) + 1)
        total: Poly = {}
        for m1, c1 in left.items():
            for m2, c2 in right.items():
                monomial, factor = self.join(m1, m2)
                value = bounded(total.get(monomial, Fraction(0)) + c1 * c2 * factor)
                if value:
                    total[monomial] = value
                else:
                    total.pop(monomial, None)
        if len(total) > TERMS:
            raise Beyond("terms")
        return total

    def join(self, m1: Monomial, m2: Monomial) -> tuple[Monomial, Fraction]:
        if not m1 or not m2:
            return m1 or m2, Fraction(1)
        powers = dict(m1)
        for atom, exponent in m2:
            powers[atom] = powers.get(atom, Fraction(0)) + exponent
        return self.tidy(powers)

    def tidy(self, powers: dict[int, Fraction]) -> tuple[Monomial, Fraction]:
        """Whole powers of primes and of i belong to the coefficient."""
        factor = Fraction(1)
        for atom in list(powers):
            exponent = powers[atom]
            if atom == self.imaginary and exponent.denominator == 1:
                turns = exponent.numerator % 4
                factor *= -1 if turns >= 2 else 1
                powers[atom] = Fraction(turns % 2)
            elif atom in self.primes:
                whole = exponent.__floor__()
                if whole and abs(whole) * self.primes[atom].bit_length() <= BITS:
                    factor *= Fraction(self.primes[atom]) ** whole
                    powers[atom] = exponent - whole
        return tuple(sorted((a, e) for a, e in powers.items() if e)), factor

    # trees to quotients --------------------------------------------------------------------------------------------

    def quotient(self, tree: Tree) -> tuple[Poly, Poly]:
        self.spend(1)
        kind = tree[0]
        if kind == "num":
            return _constant(tree[1]), _ONE
        if kind == "sym" or kind == "const":
            return {((self.intern(tree, tree), Fraction(1)),): Fraction(1)}, _ONE
        if kind == "neg":
            top, bottom = self.quotient(tree[1])
            return self.times(_constant(Fraction(-1)), top), bottom
        if kind == "add":
            total = ({}, _ONE)
            for part in tree[1:]:
                total = self.plus(total, self.quotient(part))
            return total
        if kind == "mul":
            top, bottom = _ONE, _ONE
            for part in tree[1:]:
                t, b = self.quotient(part)
                top, bottom = self.times(top, t), self.times(bottom, b)
            return top, bottom
        if kind == "div":
            (t1, b1), (t2, b2) = self.quotient(tree[1]), self.quotient(tree[2])
            if not t2:
                raise Undefined("division by zero")
            return self.times(t1, b2), self.times(b1, t2)
        if kind == "pow":
            return self.power(self.quotient(tree[1]), tree[2])
        if kind == "pct":
            top, bottom = self.quotient(tree[1])
            return self.times(_constant(Fraction(1, 100)), top), bottom
        if kind == "deg":
            top, bottom = self.quotient(("mul", tree[1], ("const", "pi")))
            return self.times(_constant(Fraction(1, 180)), top), bottom
        if kind == "fn":
            value = rational(tree)
            return (_constant(value), _ONE) if value is not None else self.function(tree)
        raise Beyond(f"{kind} is no number")

    def plus(self, left: tuple[Poly, Poly], right: tuple[Poly, Poly]) -> tuple[Poly, Poly]:
        (t1, b1), (t2, b2) = left, right
        if b1 == b2:
            return self.add(t1, t2), b1
        return self.add(self.times(t1, b2), self.times(t2, b1)), self.times(b1, b2)

    def power(self, base: tuple[Poly, Poly], exponent_tree: Tree) -> tuple[Poly, Poly]:
        exponent = rational(exponent_tree)
        top, bottom = base
        if exponent is None:
            return self.opaque_power(base, exponent_tree)
        if exponent < 0:
            if not top:
                raise Undefined("division by zero")
            top, bottom, exponent = bottom, top, -exponent
        if exponent == 0:
            return _ONE, _ONE
        return self.raised(top, exponent), self.raised(bottom, exponent)

    def raised(self, poly: Poly, exponent: Fraction) -> Poly:
        if poly == _ONE or not poly:
            return poly
        if len(poly) == 1:
            return self.raised_monomial(poly, exponent)
        if exponent.denominator == 1 and exponent <= 60:
            result, square, n = _ONE, poly, int(exponent)
            while n:
                if n & 1:
                    result = self.times(result, square)
                n >>= 1
                if n:
                    square = self.times(square, square)
            return result
        whole, rest = divmod(exponent, 1)
        atom = self.intern(("poly", _key(poly)), self.tree(poly))
        if rest and 0 < whole <= 60:
            return self.times(self.raised(poly, Fraction(whole)), {((atom, rest),): Fraction(1)})
        return {((atom, exponent),): Fraction(1)}

    def raised_monomial(self, poly: Poly, exponent: Fraction) -> Poly:
        ((monomial, coefficient),) = poly.items()
        if exponent.denominator == 1:
            powers = {atom: e * exponent for atom, e in monomial}
        elif coefficient < 0 and exponent.denominator == 2 and not monomial:  # a root of a negative number
            inner = self.raised_monomial({(): -coefficient}, exponent)
            return self.times(inner, self.raised({((self.imaginary, Fraction(1)),): Fraction(1)}, exponent * 2))
        elif coefficient < 0 or any(
            self.trees[atom] != ("const", "pi") and self.trees[atom] != ("const", "e") and atom not in self.primes
            for atom, _ in monomial
        ):
            if len(monomial) == 1 and coefficient == 1 and monomial[0][1] == 1:
                return {((monomial[0][0], exponent),): Fraction(1)}  # a power of an atom itself
            if coefficient > 0 and coefficient != 1:  # numbers leave the root: sqrt(4x) = 2 sqrt(x)
                return self.times(
                    self.raised_monomial({(): coefficient}, exponent),
                    self.raised_monomial({monomial: Fraction(1)}, exponent),
                )
            if coefficient < 0 and not monomial and exponent.denominator % 2:
                sign = Fraction(-1 if exponent.numerator % 2 else 1)
                return self.times(_constant(sign), self.raised_monomial({(): -coefficient}, exponent))
            atom = self.intern(("poly", _key(poly)), self.tree(poly))
            return {((atom, exponent),): Fraction(1)}
        else:
            powers = {atom: e * exponent for atom, e in monomial}
        if coefficient == 1:
            factor, extra = Fraction(1), {}
        else:
            factor, extra = self.raised_number(coefficient, exponent)
        for atom, e in extra.items():
            powers[atom] = powers.get(atom, Fraction(0)) + e
        tidied, more = self.tidy(powers)
        return {tidied: bounded(factor * more)}

    def raised_number(self, value: Fraction, exponent: Fraction) -> tuple[Fraction, dict[int, Fraction]]:
        if exponent.denominator == 1:
            size = max(value.numerator.bit_length(), value.denominator.bit_length())
            if size * abs(exponent.numerator) <= BITS:
                return value ** int(exponent), {}
        sign = Fraction(1)
        if value < 0:
            if exponent.denominator % 2 == 0:
                raise Beyond("an even root of a negative number")
            sign = Fraction(-1 if exponent.numerator % 2 else 1)
        powers: dict[int, Fraction] = {}
        for part, direction in ((abs(value.numerator), 1), (value.denominator, -1)):
            for p, count in _factors(part):
                atom = self.prime(p)
                powers[atom] = powers.get(atom, Fraction(0)) + direction * count * exponent
        return sign, powers

    def opaque_power(self, base: tuple[Poly, Poly], exponent_tree: Tree) -> tuple[Poly, Poly]:
        """b^e with e no rational: b^(c t) is (b^t)^c for a rational b > 0 or the constant e."""
        top, bottom = self.quotient(exponent_tree)
        shared = set(bottom) == {()}
        plain = base[1] == _ONE and (
            base[0] == {((self.ids.get(("const", "e"), -1), Fraction(1)),): Fraction(1)}
            or (set(base[0]) == {()} and base[0][()] > 0)
        )
        if not shared or not plain:
            key = ("pow", _key(base[0]), _key(base[1]), _key(top), _key(bottom))
            tree = ("pow", ("div", self.tree(base[0]), self.tree(base[1])), ("div", self.tree(top), self.tree(bottom)))
            return {((self.intern(key, tree), Fraction(1)),): Fraction(1)}, _ONE
        powers: dict[int, Fraction] = {}
        factor = Fraction(1)
        scale = bottom[()]
        bases = (
            [(None, 1)]
            if set(base[0]) != {()}
            else [
                (p, n * d)
                for part, d in ((base[0][()].numerator, 1), (base[0][()].denominator, -1))
                for p, n in _factors(part)
            ]
        )
        for monomial, coefficient in top.items():
            for p, count in bases:
                exponent = coefficient / scale * count
                if not monomial:
                    atom = self.prime(p) if p else self.ids[("const", "e")]
                else:
                    root: Tree = ("num", Fraction(p), 0) if p else ("const", "e")
                    atom = self.intern(("exp", p, monomial), ("pow", root, self.tree({monomial: Fraction(1)})))
                powers[atom] = powers.get(atom, Fraction(0)) + exponent
        monomial, more = self.tidy(powers)
        return {monomial: factor * more}, _ONE

    def function(self, tree: Tree) -> tuple[Poly, Poly]:
        name, arguments = tree[1], [self.quotient(part) for part in tree[2:]]
        if name == "ln" and len(arguments) == 1:
            return self.logarithm(arguments[0]), _ONE
        key = ("fn", name, *((_key(t), _key(b)) for t, b in arguments))
        plain = (
            "fn",
            name,
            *(self.tree(t) if b == _ONE else ("div", self.tree(t), self.tree(b)) for t, b in arguments),
        )
        return {((self.intern(key, plain), Fraction(1)),): Fraction(1)}, _ONE

    def logarithm(self, argument: tuple[Poly, Poly]) -> Poly:
        """ln of a positive rational is a sum over primes; of e^r it is r."""
        top, bottom = argument
        total: Poly = {}
        if len(top) == 1 and len(bottom) == 1 and all(c > 0 for c in (*top.values(), *bottom.values())):
            for poly, direction in ((top, 1), (bottom, -1)):
                ((monomial, coefficient),) = poly.items()
                if any(
                    atom not in self.primes and self.trees[atom] not in (("const", "e"), ("const", "pi"))
                    for atom, _ in monomial
                ):
                    break
                for part, sign in ((coefficient.numerator, 1), (coefficient.denominator, -1)):
                    for p, count in _factors(part):
                        total = self.add(
                            total, self.scaled_log(("num", Fraction(p), 0), Fraction(count * sign * direction))
                        )
                for atom, exponent in monomial:
                    if self.trees[atom] == ("const", "e"):
                        total = self.add(total, _constant(exponent * direction))
                    else:
                        total = self.add(total, self.scaled_log(self.trees[atom], exponent * direction))
            else:
                return total
        tree = ("fn", "ln", self.tree(top) if bottom == _ONE else ("div", self.tree(top), self.tree(bottom)))
        return {((self.intern(("fn", "ln", _key(top), _key(bottom)), tree), Fraction(1)),): Fraction(1)}

    def scaled_log(self, of: Tree, factor: Fraction) -> Poly:
        return {((self.intern(("ln", of), ("fn", "ln", of)), Fraction(1)),): factor} if factor else {}

    def tree(self, poly: Poly) -> Tree:
        terms = []
        for monomial, coefficient in sorted(poly.items()):
            factors: list[Tree] = [("num", coefficient, 0)] if coefficient != 1 or not monomial else []
            factors += [self.trees[a] if e == 1 else ("pow", self.trees[a], ("num", e, 0)) for a, e in monomial]
            terms.append(factors[0] if len(factors) == 1 else ("mul", *factors))
        return ("num", Fraction(0), 0) if not terms else terms[0] if len(terms) == 1 else ("add", *terms)


_ONE: Poly = {(): Fraction(1)}


def _constant(value: Fraction) -> Poly:
    return {(): value} if value else {}


def _key(poly: Poly) -> tuple:
    return tuple(sorted(poly.items()))


@lru_cache(maxsize=4096)
def _factors(value: int) -> tuple[tuple[int, int], ...]:
    """Prime factors by trial division to 1,000; what is left counts as one factor, or its exact square root twice."""
    assert value > 0
    found = []
    p = 2
    while p <= 1000 and p * p <= value:
        count = 0
        while value % p == 0:
            value //= p
            count += 1
        if count:
            found.append((p, count))
        p += 1 if p == 2 else 2
    if value > 1:
        root = isqrt(value)
        found.append((root, 2) if root > 1000 and root * root == value else (value, 1))
    return tuple(found)


# -- layer 3: values at points -----------------------------------------------------------------------------------------


def _vanishing(tree: Tree) -> bool:
    """Whether an atom may be identically zero: a function value or a root of a sum may, a symbol or a prime may not."""
    return tree[0] not in ("sym", "num", "const")


def _vanishes(tree: Tree, terms: Tree) -> bool | None:
    """Whether `tree` is zero at the points where it has a value, relative to the largest of its `terms`."""
    names = tuple(sorted(symbols(tree)))
    mp = context()
    real = not mentions_i(tree)
    held = 0  # points where it has a value
    for count, point in enumerate(points(names) if names else ({},)):
        if count >= 10 and held >= 3:
            break
        at = {name: mp.mpf(value.numerator) / value.denominator for name, value in point.items()}
        try:
            evaluate(tree, at, real=real)  # every part must have a value, also where the sum of terms cancelled it
            values = [
                evaluate(part, at, real=real)
                for part in (terms[1:] if terms[0] == "add" else (terms, ("num", Fraction(1), 0)))
            ]
        except (Undefined, Beyond, OverflowError, ZeroDivisionError, ValueError):
            continue
        scale = max(abs(value) for value in values)
        total = sum(values) if terms[0] == "add" else values[0]
        if scale and abs(total) > scale * mp.mpf(10) ** -AGREE:
            return False
        held += 1
    if not names and real and not held:
        return _vanishes_complex(tree, terms)
    if names and _steps(tree):
        return None  # floor(x) and floor(x + 1/10^9) agree at every point tried
    return True if held >= (3 if names else 1) else None


def _vanishes_complex(tree: Tree, terms: Tree) -> bool | None:
    mp = context()
    try:
        parts = terms[1:] if terms[0] == "add" else (terms, ("num", Fraction(1), 0))
        values = [evaluate(part, {}, real=False) for part in parts]
    except Undefined:
        return False
    except (Beyond, OverflowError, ZeroDivisionError, ValueError):
        return None
    total = sum(values) if terms[0] == "add" else values[0]
    return bool(abs(total) <= max(abs(v) for v in values) * mp.mpf(10) ** -AGREE)


def _steps(tree: Tree) -> bool:
    """Whether a rounding or a choice of the larger depends on a symbol."""
    if tree[0] == "fn" and tree[1] in ("floor", "ceil", "max", "min", "gcd", "lcm") and symbols(tree):
        return True
    return any(_steps(part) for part in tree[1:] if isinstance(part, tuple))
