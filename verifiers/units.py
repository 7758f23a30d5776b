r"""Units of measure as scale and dimension, read from the words after a quantity.

Knows the SI, common imperial, time, money and angle units. Does not know temperature offsets (°C and °F never
convert), exchange rates or what an unknown word means: "5 apples" carries the label "apple", equal to itself alone.
Neighbour: `verifiers.math` compares quantities.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple


class Unit(NamedTuple):
    scale: Fraction  # times the base units of `dimension`
    dimension: tuple[tuple[str, int], ...]  # sorted (base unit, exponent)


def _table() -> dict[str, Unit]:
    table: dict[str, Unit] = {}

    def put(names: str, scale: Fraction | int, **dimension: int) -> None:
        unit = Unit(Fraction(scale), tuple(sorted(dimension.items())))
        for name in names.split():
            table[name] = unit

    def prefixed(
        symbol: str, names: str, scale: Fraction | int = 1, prefixes: str = "n μ mu m c d k M G", **dimension: int
    ) -> None:
        put(f"{symbol} {names}", scale, **dimension)
        powers = {"p": -12, "n": -9, "μ": -6, "mu": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9, "T": 12}
        words = {
            -12: "pico",
            -9: "nano",
            -6: "micro",
            -3: "milli",
            -2: "centi",
            -1: "deci",
            3: "kilo",
            6: "mega",
            9: "giga",
            12: "tera",
        }
        for prefix in prefixes.split():
            factor = Fraction(10) ** powers[prefix] * scale
            put(
                " ".join([prefix + symbol, *(words[powers[prefix]] + name for name in names.split())]),
                factor,
                **dimension,
            )

    prefixed("m", "meter metre", m=1)
    prefixed("g", "gram", Fraction(1, 1000), prefixes="n μ mu m c k", kg=1)
    prefixed("s", "sec second", prefixes="p n μ mu m", s=1)
    prefixed("L", "liter litre", Fraction(1, 1000), prefixes="μ mu m c d k", m=3)
    prefixed("l", "litre", Fraction(1, 1000), prefixes="m c d", m=3)
    prefixed("A", "ampere amp", prefixes="n μ m k", A=1)
    prefixed("mol", "mole", prefixes="n μ m k", mol=1)
    prefixed("K", "kelvin", prefixes="m", K=1)
    prefixed("Hz", "hertz", prefixes="k M G T", s=-1)
    prefixed("N", "newton", prefixes="m k M", kg=1, m=1, s=-2)
    prefixed("Pa", "pascal", prefixes="k M G", kg=1, m=-1, s=-2)
    prefixed("J", "joule", prefixes="m k M G", kg=1, m=2, s=-2)
    prefixed("W", "watt", prefixes="m k M G", kg=1, m=2, s=-3)
    prefixed("C", "coulomb", prefixes="n μ m", A=1, s=1)
    prefixed("V", "volt", prefixes="m k M", kg=1, m=2, s=-3, A=-1)
    prefixed("F", "farad", prefixes="p n μ m", kg=-1, m=-2, s=4, A=2)
    prefixed("ohm", "Omega", prefixes="m k M", kg=1, m=2, s=-3, A=-2)
    prefixed("T", "tesla", prefixes="m", kg=1, s=-2, A=-1)
    prefixed("eV", "electronvolt", Fraction("1.602176634e-19"), prefixes="m k M G T", kg=1, m=2, s=-2)
    prefixed("cal", "calorie", Fraction("4.184"), prefixes="k", kg=1, m=2, s=-2)
    put("Å angstrom", Fraction(1, 10**10), m=1)
    put("t ton tonne", 1000, kg=1)
    put("hectare ha", 10**4, m=2)
    put("atm", 101325, kg=1, m=-1, s=-2)
    put("min minute", 60, s=1)
    put("h hr hour", 3600, s=1)
    put("day d", 86400, s=1)
    put("week wk", 604800, s=1)
    put("month", 1, month=1)
    put("year yr", 12, month=1)
    put("in inch inche", Fraction("0.0254"), m=1)
    put("ft foot feet", Fraction("0.3048"), m=1)
    put("yd yard", Fraction("0.9144"), m=1)
    put("mi mile", Fraction("1609.344"), m=1)
    put("lb lbs pound", Fraction("0.45359237"), kg=1)
    put("oz ounce", Fraction("0.45359237") / 16, kg=1)
    put("gal gallon", Fraction("0.003785411784"), m=3)
    put("qt quart", Fraction("0.003785411784") / 4, m=3)
    put("pint", Fraction("0.003785411784") / 8, m=3)
    put("mph", Fraction("0.44704"), m=1, s=-1)
    put("kph kmh", Fraction(5, 18), m=1, s=-1)
    put("sqft", Fraction("0.3048") ** 2, m=2)
    put("$ dollar USD", 1, dollar=1)
    put("cent ¢", Fraction(1, 100), dollar=1)
    put("€ euro EUR", 1, euro=1)
    put("£ GBP", 1, sterling=1)
    put("¥ yen yuan", 1, yen=1)
    put("₹ rupee rs Rs", 1, rupee=1)
    put("rad radian", 1, rad=1)
    put("°C °c celsius degC", 1, celsius=1)
    put("°F °f fahrenheit degF", 1, fahrenheit=1)
    put("bit", 1, bit=1)
    put("byte", 8, bit=1)
    put("percent pct", Fraction(1, 100))
    put("tenth", Fraction(1, 10))
    put("hundredth", Fraction(1, 100))
    put("thousandth", Fraction(1, 1000))
    put("ten", 10)
    put("hundred", 100)
    put("thousand", 1000)
    put("million", 10**6)
    put("billion", 10**9)
    put("trillion", 10**12)
    put("dozen", 12)
    put("unit", 1)
    put("square sq", 1)
    return table


_TABLE = _table()
_WORD = re.compile(r"[A-Za-zμ°Å¢€£¥₹$]+|\^\s*-?\s*\d+|[/*()·-]|\d+")


@lru_cache(maxsize=4096)
def unit_of(label: str) -> Unit | None:
    """The unit a label names, e.g. "cm", "square feet", "km/h", "m s^-2"; None when a word of it is unknown."""
    label = label.strip().strip(".,").strip()
    if not label or len(label) > 80:
        return None
    label = re.sub(r"(?:°|\bdeg(?:rees?)?)\s*(C|F)(?:elsius|ahrenheit)?\b", r"°\1", label)
    scale, dimension = Fraction(1), {}
    sign, power, last = 1, 1, None
    pieces = _WORD.findall(label)
    if re.sub(r"\s", "", "".join(pieces)) != re.sub(r"[\s.]+", "", label):
        return None
    for piece in pieces:
        word = piece.lower()
        if piece in "*·()-":
            continue
        if piece == "/" or (word in ("per", "an", "a", "each") and last is not None):
            sign = -1
        elif word in ("square", "sq", "cubic"):
            power = 3 if word == "cubic" else 2
        elif word in ("squared", "cubed"):
            if last is None:
                return None
            scale, dimension = _multiply(scale, dimension, last[0], (1 if word == "squared" else 2) * last[1])
        elif piece[0] == "^" or piece.isdigit():
            exponent = int(piece.lstrip("^ ").replace(" ", ""))
            if last is None or abs(exponent) > 6 or exponent == 0:
                return None
            scale, dimension = _multiply(scale, dimension, last[0], (exponent - 1) * last[1])
        else:
            unit = _lookup(piece)
            if unit is None:
                return None
            scale, dimension = _multiply(scale, dimension, unit, sign * power)
            last, power = (unit, sign), 1
    return Unit(scale, tuple(sorted((k, v) for k, v in dimension.items() if v)))


def _lookup(word: str) -> Unit | None:
    if word in _TABLE:
        return _TABLE[word]
    lower = word.lower()
    if len(lower) > 2:
        for form in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
            if len(form) > 1 and form in _TABLE:
                return _TABLE[form]
    return None


def _multiply(scale: Fraction, dimension: dict[str, int], unit: Unit, times: int) -> tuple[Fraction, dict[str, int]]:
    merged = dict(dimension)
    for base, exponent in unit.dimension:
        merged[base] = merged.get(base, 0) + exponent * times
    return scale * unit.scale**times, merged


def label_of(label: str) -> str:
    """An unknown unit as a comparable label: "Apples" and "apple" are one."""
    words = re.findall(r"[a-z°$€£¥₹/^0-9]+", label.lower())
    return " ".join(w.removesuffix("s") if len(w) > 3 else w for w in words if w not in ("the", "of", "a", "an", "in"))
