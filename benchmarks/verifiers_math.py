r"""The math verifier beside math-verify: verdicts on generated truth tables, and verifications per second in one run.

    python -m benchmarks.verifiers_math [--rows 4000] [--seed 0] [--out benchmarks/results/verifiers_math.json]

`cases` makes golds of the kinds that public data sets hold (numbers, radicals, quantities, lists, intervals,
relations, matrices, bases ...), their true variants and their near misses (a digit, the sign, the unit, the order,
the base, the percent sign off). Knows the answers by construction, never by asking a judge. Both judges see the
same rows and the same 3,000-character completions, on one core, one after the other.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from verifiers.base import Task
from verifiers.math import Math


class Case(NamedTuple):
    gold: str
    answer: str
    equal: bool
    family: str


Made = tuple[str, list[str], list[str]]  # gold, true variants, near misses


def cases(rows: int, seed: int = 0) -> Iterator[Case]:
    """Rows of every family in turn, until there are `rows`."""
    draw = random.Random(f"math cases/{seed}")
    made = 0
    while made < rows:
        for family in FAMILIES:
            gold, true, false = family(draw)
            for answers, equal in ((true, True), (false, False)):
                for answer in answers:
                    yield Case(gold, answer, equal, family.__name__)
                    made += 1


def digit_off(draw: random.Random, text: str) -> str:
    """The same text with one of its digits replaced (never making a leading zero)."""
    places = [i for i, c in enumerate(text) if c.isdigit()]
    at = draw.choice(places)
    return text[:at] + draw.choice([d for d in "123456789" if d != text[at]]) + text[at + 1 :]


def integer(draw: random.Random) -> Made:
    n = draw.choice([draw.randrange(2, 100), draw.randrange(100, 10**4), draw.randrange(10**4, 10**9)])
    text = str(n)
    true = [
        text,
        f"{n}.0",
        f"{n}.",
        f"x = {n}",
        f"\\text{{{n}}}",
        f"{n:,}",
        f"{n:,}".replace(",", "{,}"),
        f"+{n}",
        f"\\frac{{{2 * n}}}{{2}}",
        f"{n - 1}+1",
        f"${n}$",
        f"{{{n}}}",
    ]
    false = [
        str(n + 1),
        str(n - 1),
        f"-{n}",
        f"{n}0",
        digit_off(draw, text),
        f"{n}\\%",
        f"{n}.1",
        f"{n},{n + 1}",
        f"\\frac{{1}}{{{n}}}",
        f"{n}x",
        f"{n}^2",
        f"{n}=0",
        f"{n}={n}",
    ]
    return text, true, false


def negative(draw: random.Random) -> Made:
    n = draw.randrange(2, 5000)
    return (
        f"-{n}",
        [f"-{n}", f"−{n}", f"-{n}.0", f"- {n}", f"y=-{n}", f"(-{n})", f"{{-{n}}}"],
        [str(n), f"-{n + 1}", f"-{n}0", f"--{n}", f"\\pm {n}"],
    )


def decimal(draw: random.Random) -> Made:
    places = draw.randrange(1, 6)
    value = Fraction(
        draw.randrange(10 ** (places - 1), 10 ** (places + 2)) * 10 + draw.randrange(1, 10), 10 ** (places + 1)
    )
    text = _decimal(value)
    last = Fraction(1, 10 ** len(text.partition(".")[2]))
    true = [
        text,
        text + "0",
        f"\\frac{{{value.numerator}}}{{{value.denominator}}}",
        f"{value.numerator}/{value.denominator}",
        f"x = {text}",
        f"{_decimal(value * 100)} \\times 10^{{-2}}",
    ]
    false = [
        _decimal(value + last),
        _decimal(value - last),
        "-" + text,
        _decimal(value * 10),
        _decimal(value / 10),
        digit_off(draw, text),
        text + "1",
        text + "\\%",
    ]
    return text, true, false


def fraction(draw: random.Random) -> Made:
    value = Fraction(draw.randrange(1, 60), draw.randrange(2, 60))
    if value.denominator == 1:
        value += Fraction(1, 3)
    a, b = value.numerator, value.denominator
    true = [
        f"\\dfrac{{{a}}}{{{b}}}",
        f"{a}/{b}",
        f"\\frac{{{3 * a}}}{{{3 * b}}}",
        f"\\tfrac{{{a}}}{{{b}}}",
        f"\\left(\\frac{{{a}}}{{{b}}}\\right)",
        f"x=\\frac{{{a}}}{{{b}}}",
        f"{a} \\div {b}",
    ]
    true += [f"{a // b}\\frac{{{a % b}}}{{{b}}}", f"{a // b} {a % b}/{b}"] if a > b else []
    true.append(f"{float(value):.10f}")
    false = [
        f"-\\frac{{{a}}}{{{b}}}",
        f"\\frac{{{a + 1}}}{{{b}}}",
        f"\\frac{{{a}}}{{{b + 1}}}",
        f"{float(value):.1f}1" if b > 9 else f"{a}{b}",
        f"\\frac{{{a}}}{{{b}}}\\%",
        str(a),
        f"{a},{b}",
    ]
    if a != b and a != 1:
        false.append(f"\\frac{{{b}}}{{{a}}}")
    return f"\\frac{{{a}}}{{{b}}}", true, false


def radical(draw: random.Random) -> Made:
    a, b = draw.randrange(2, 30), draw.choice([2, 3, 5, 6, 7, 10, 11, 13, 15, 21, 30])
    true = [
        f"{a} \\sqrt {b}" if b < 10 else f"{a} \\sqrt{{{b}}}",
        f"\\sqrt{{{a * a * b}}}",
        f"{a}\\cdot\\sqrt{{{b}}}",
        f"{a}*sqrt({b})",
        f"{a}√{b}",
        f"{a}\\cdot {b}^{{1/2}}",
        f"\\frac{{{a * b}}}{{\\sqrt{{{b}}}}}",
    ]
    false = [
        f"{a + 1}\\sqrt{{{b}}}",
        f"{a}\\sqrt{{{b + 1}}}",
        f"-{a}\\sqrt{{{b}}}",
        f"{a}+\\sqrt{{{b}}}",
        f"{a}\\sqrt[3]{{{b}}}",
        f"\\sqrt{{{a * b}}}",
        f"{a * b}",
        f"{a}{b}",
    ]
    return f"{a}\\sqrt{{{b}}}", true, false


def surd(draw: random.Random) -> Made:
    a, b, c = draw.randrange(1, 20), draw.choice([2, 3, 5, 7]), draw.randrange(2, 9)
    gold = f"\\frac{{{a}+\\sqrt{{{b}}}}}{{{c}}}"
    true = [
        f"\\frac{{\\sqrt{{{b}}}+{a}}}{{{c}}}",
        f"({a}+sqrt({b}))/{c}",
        f"\\frac{{{a}}}{{{c}}}+\\frac{{\\sqrt{{{b}}}}}{{{c}}}",
        f"\\frac{{{a * a - b}}}{{{c}({a}-\\sqrt{{{b}}})}}",
        f"\\frac{{1}}{{{c}}}({a}+\\sqrt{{{b}}})",
    ]
    false = [
        f"\\frac{{{a}-\\sqrt{{{b}}}}}{{{c}}}",
        f"{a}+\\frac{{\\sqrt{{{b}}}}}{{{c}}}",
        f"\\frac{{{a + 1}+\\sqrt{{{b}}}}}{{{c}}}",
        f"\\frac{{{a}\\pm\\sqrt{{{b}}}}}{{{c}}}",
        f"\\frac{{{a}+\\sqrt{{{b}}}}}{{{c + 1}}}",
    ]
    return gold, true, false


def pi_multiple(draw: random.Random) -> Made:
    a, b = draw.randrange(2, 40), draw.choice([1, 3, 4, 6, 7])
    gold = f"{a}\\pi" if b == 1 else f"\\frac{{{a}\\pi}}{{{b}}}"
    true = [
        f"{a}*pi/{b}",
        f"\\frac{{{a}}}{{{b}}}\\pi",
        f"{a}π/{b}",
        f"\\pi\\cdot\\frac{{{a}}}{{{b}}}",
        f"{a * 3.141592653589793 / b:.8f}",
        f"{gold}\\text{{ cm}}^2",
        f"A = {gold}",
    ]
    false = [
        f"\\frac{{{a + 1}\\pi}}{{{b}}}",
        f"\\frac{{{a}\\pi}}{{{b + 1}}}",
        f"-{gold}",
        f"\\frac{{{a}}}{{{b}}}",
        f"\\frac{{{a}\\pi^2}}{{{b}}}",
        f"{a * 3.14159265 / b:.1f}",
        f"\\frac{{{a}e}}{{{b}}}",
    ]
    return gold, true, false


def percentage(draw: random.Random) -> Made:
    p = draw.randrange(1, 1000)
    text = _decimal(Fraction(p, 10)) if p % 10 else str(p // 10)
    ratio = _decimal(Fraction(p, 1000))
    true = [
        f"{text}%",
        f"{text} \\%",
        f"{text} percent",
        ratio,
        f"\\frac{{{p}}}{{1000}}",
        f"${text}\\%$",
        f"{text}\\text{{ percent}}",
    ]
    false = [
        text,
        f"{digit_off(draw, text)}\\%",
        f"-{text}\\%",
        f"{ratio}\\%",
        f"{text}0\\%" if "." not in text else f"{text}1\\%",
    ]
    return f"{text}\\%", true, false


UNITS = [
    ("cm", "m", "0.01"),
    ("kg", "g", "1000"),
    ("km", "m", "1000"),
    ("hours", "minutes", "60"),
    ("minutes", "seconds", "60"),
    ("mL", "L", "0.001"),
    ("kJ", "J", "1000"),
    ("days", "hours", "24"),
    ("feet", "inches", "12"),
]


def quantity(draw: random.Random) -> Made:
    n = draw.randrange(2, 500)
    unit, other, scale = draw.choice(UNITS)
    converted = _decimal(n * Fraction(scale))
    true = [
        f"{n} {unit}",
        f"{n}\\ \\text{{{unit}}}",
        f"{n}\\,\\mathrm{{{unit}}}",
        f"{n}",
        f"{converted} {other}",
        f"{converted} \\text{{ {other}}}",
        f"x = {n} \\text{{ {unit}}}",
        f"\\text{{{n} {unit}}}",
    ]
    false = [
        f"{n} \\text{{ {other}}}",
        f"{n + 1} \\text{{ {unit}}}",
        f"-{n} \\text{{ {unit}}}",
        f"{n} \\text{{ {unit}}}^2",
        f"{n}0 {unit}",
        f"{n} \\text{{ dollars}}",
        f"{n} {unit}, {n + 1} {unit}",
    ]
    return f"{n} \\text{{ {unit}}}", true, false


def rate(draw: random.Random) -> Made:
    n = draw.randrange(2, 120)
    true = [
        f"{n} km/h",
        f"{n} \\text{{ km per hour}}",
        f"{n}\\ \\text{{kilometers per hour}}",
        f"{n}",
        f"{n} \\frac{{\\text{{km}}}}{{\\text{{h}}}}",
        f"{n}\\,\\mathrm{{km/h}}",
    ]
    false = [
        f"{n} \\text{{ m/s}}",
        f"{n} \\text{{ km}}",
        f"{n + 2} \\text{{ km/h}}",
        f"{n} \\text{{ miles per hour}}",
        f"{n} \\text{{ h}}",
    ]
    return f"{n} \\text{{ km/h}}", true, false


def money(draw: random.Random) -> Made:
    n, c = draw.randrange(2, 900), draw.randrange(11, 99)
    text = f"{n}.{c}"
    true = [
        f"\\${text}",
        f"${text}",
        text,
        f"{text} dollars",
        f"\\text{{\\${text}}}",
        f"{text} \\text{{ dollars}}",
        f"{n}{c} cents",
    ]
    false = [
        f"\\${n}.{c + 1}",
        f"\\${n + 1}.{c}",
        f"-\\${text}",
        f"\\${n}{c}",
        f"€{text}",
        f"{text} cents",
        f"{text}\\%",
    ]
    return f"\\${text}", true, false


def angle(draw: random.Random) -> Made:
    n = draw.randrange(3, 178)
    true = [
        f"{n}^\\circ",
        f"{n}°",
        f"{n} degrees",
        str(n),
        f"{n}^{{\\circ}}",
        f"{n}\\text{{ degrees}}",
        f"\\frac{{{n}\\pi}}{{180}}",
        f"\\angle A = {n}^\\circ",
        f"{n}\\degree",
    ]
    false = [
        f"{n + 1}^\\circ",
        f"-{n}^\\circ",
        f"{n}0^\\circ",
        f"{n}\\pi",
        f"\\frac{{{n}\\pi}}{{90}}",
        f"{180 - n if n != 90 else 45}^\\circ",
    ]
    return f"{n}^\\circ", true, false


def pair(draw: random.Random) -> Made:
    a, b = draw.sample(range(-30, 60), 2)
    true = [
        f"({a}, {b})",
        f"\\left({a},{b}\\right)",
        f"$({a},{b})$",
        f"(x,y) = ({a},{b})",
        f"x={a}, y={b}",
        f"({2 * a}/2, {b}.0)",
    ]
    false = [
        f"({b},{a})",
        f"({a + 1},{b})",
        f"({a},{-b if b else 1})",
        f"({a},{b},{b})",
        f"\\{{{a},{b}\\}}",
        f"[{a},{b}]",
        f"({a},{b}]",
        f"({a})",
        f"({a},{b}),({b},{a})",
    ]
    return f"({a},{b})", true, false


def triple(draw: random.Random) -> Made:
    a, b, c = draw.sample(range(-20, 40), 3)
    true = [
        f"( {a} , {b} , {c} )",
        f"\\langle {a},{b},{c} \\rangle",
        f"\\begin{{pmatrix}} {a} \\\\ {b} \\\\ {c} \\end{{pmatrix}}",
        f"\\left( {a}, {b}, {c} \\right)",
    ]
    false = [
        f"({b},{a},{c})",
        f"({a},{c},{b})",
        f"({a},{b})",
        f"({a},{b},{c + 1})",
        f"\\{{{a},{b},{c}\\}}",
        f"({-a or 1},{b},{c})",
    ]
    return f"({a},{b},{c})", true, false


def bare_list(draw: random.Random) -> Made:
    a, b, c = draw.sample(range(-40, 90), 3)
    true = [
        f"{a},{b},{c}",
        f"{c}, {a}, {b}",
        f"\\{{{b}, {c}, {a}\\}}",
        f"{a}, {b}, \\text{{ and }} {c}",
        f"x = {a}, {b}, {c}",
        f"x={b} \\text{{ or }} x={a} \\text{{ or }} x={c}",
    ]
    false = [
        f"{a}, {b}",
        f"{a}, {b}, {c + 1}",
        f"{a}, {b}, {c}, {c + 1}",
        f"{a}, {b}, {b}",
        f"{-a or 91}, {b}, {c}",
        f"{a}",
        f"({b},{a},{c})",
    ]
    return f"{a}, {b}, {c}", true, false


def set_of(draw: random.Random) -> Made:
    a, b, c = draw.sample(range(-40, 90), 3)
    true = [
        f"\\{{{c},{b},{a}\\}}",
        f"\\left\\{{ {a}, {b}, {c} \\right\\}}",
        f"{b}, {a}, {c}",
        f"\\{{{a},{b},{c},{a}\\}}",
        f"{{{a}, {b}, {c}}}",
    ]
    false = [
        f"\\{{{a},{b}\\}}",
        f"({a},{b},{c})",
        f"\\{{{a},{b},{c + 1}\\}}",
        f"\\{{{a},{b},{c},{c + 100}\\}}",
        f"[{a},{b},{c}]",
        f"\\{{{a},{-b or 91},{c}\\}}",
    ]
    return f"\\{{{a},{b},{c}\\}}", true, false


def interval(draw: random.Random) -> Made:
    a = draw.randrange(-30, 30)
    b = a + draw.randrange(1, 40)
    true = [
        f"[{a}, {b})",
        f"\\left[{a},{b}\\right)",
        f"{a} \\le x < {b}",
        f"x \\in [{a},{b})",
        f"{b} > x \\geq {a}",
        f"\\{{x \\mid {a} \\leq x < {b}\\}}",
        f"x \\ge {a} \\text{{ and }} x < {b}",
    ]
    false = [
        f"({a},{b})",
        f"[{a},{b}]",
        f"({a},{b}]",
        f"[{a},{b + 1})",
        f"[{a - 1},{b})",
        f"[{-b},{-a})" if a + b else f"[{a},{b + 2})",
        f"{a} < x < {b}",
        f"[{b},{a})",
        f"\\{{{a},{b}\\}}",
        f"x \\ge {a}",
    ]
    return f"[{a},{b})", true, false


def ray(draw: random.Random) -> Made:
    a = draw.randrange(-40, 40)
    true = [
        f"x \\ge {a}",
        f"{a} \\le x",
        f"[{a}, \\infty)",
        f"2x \\geq {2 * a}",
        f"x>={a}",
        f"x - {a} \\ge 0" if a >= 0 else f"x + {-a} \\ge 0",
        f"\\left[{a}, +\\infty\\right)",
        f"x \\in [{a},\\infty)",
    ]
    false = [
        f"x > {a}",
        f"x \\le {a}",
        f"x < {a}",
        f"x \\ge {a + 1}",
        f"x = {a}",
        f"({a},\\infty)",
        f"(-\\infty,{a}]",
        f"x \\ge {-a or 1}",
        str(a),
        f"[{a},{a + 100}]",
    ]
    return f"x \\geq {a}", true, false


def union(draw: random.Random) -> Made:
    a = draw.randrange(-30, 20)
    b = a + draw.randrange(1, 20)
    true = [
        f"(-\\infty, {a}) \\cup ({b}, \\infty)",
        f"({b},\\infty)\\cup(-\\infty,{a})",
        f"x < {a} \\text{{ or }} x > {b}",
        f"x > {b} or x < {a}",
        f"\\mathbb{{R}} \\setminus [{a},{b}]",
    ]
    false = [
        f"({a},{b})",
        f"(-\\infty,{a}]\\cup[{b},\\infty)",
        f"(-\\infty,{a})\\cup({b + 1},\\infty)",
        f"(-\\infty,{a})",
        "(-\\infty,\\infty)",
        f"(-\\infty,{a})\\cap({b},\\infty)",
        f"{a} < x < {b}",
    ]
    return f"(-\\infty,{a})\\cup({b},\\infty)", true, false


def cells(a: int, b: int, c: int, d: int) -> str:
    return f"\\begin{{pmatrix}} {a} & {b} \\\\ {c} & {d} \\end{{pmatrix}}"


def matrix(draw: random.Random) -> Made:
    a, b, c, d = draw.sample(range(-20, 30), 4)
    gold = cells(a, b, c, d)
    array = gold.replace("begin{pmatrix}", "left[\\begin{array}{cc}").replace("end{pmatrix}", "end{array}\\right]")
    true = [gold.replace("pmatrix", "bmatrix"), gold.replace(" ", ""), f"A = {gold}", array]
    row = f"\\begin{{pmatrix}} {a} & {b} \\end{{pmatrix}}"
    false = [cells(a, c, b, d), cells(a + 1, b, c, d), cells(c, d, a, b), cells(b, a, d, c), row]
    return gold, true, [*false, cells(a, b, c, -d or 99), f"({a},{b},{c},{d})"]


def line(draw: random.Random) -> Made:
    a, b = draw.randrange(2, 15), draw.randrange(1, 30)
    true = [
        f"y = {b} + {a}x",
        f"{a}x - y + {b} = 0",
        f"y - {b} = {a}x",
        f"2y = {2 * a}x + {2 * b}",
        f"{a}x+{b}",
        f"{a}x + {b} = y",
        f"y = {a}(x + \\frac{{{b}}}{{{a}}})",
    ]
    false = [
        f"y = {a}x - {b}",
        f"y = {a + 1}x + {b}",
        f"y = {a}x + {b + 1}",
        f"x = {a}y + {b}",
        f"y = -{a}x + {b}",
        "0=0",
        f"{a}x + {b} = 0",
        "y=y",
        f"{a}y + {b}",
        f"y > {a}x + {b}",
        f"{a}={a}",
    ]
    return f"y = {a}x+{b}", true, false


def choice(draw: random.Random) -> Made:
    letter = draw.choice("ABCDE")
    other = draw.choice([x for x in "ABCDE" if x != letter])
    n = draw.randrange(2, 90)
    true = [
        letter,
        f"({letter})",
        f"\\text{{{letter}}}",
        f"\\textbf{{({letter})}}",
        f"{letter}.",
        f"{letter})",
        f"\\textbf{{({letter}) }}{n}",
        f"{letter}. {n}",
        f"\\mathrm{{({letter})}}",
        f"Option {letter}",
        f"**{letter}**",
    ]
    false = [
        other,
        f"({other})",
        f"\\text{{{other}}}",
        f"{letter}, {other}",
        f"{letter} or {other}",
        f"\\textbf{{({other}) }}{n}",
        "ABCDE",
        f"({letter}) ({other})",
        f"not {letter}",
        f"{letter}{other}",
        str(n),
    ]
    return draw.choice([letter, f"({letter})", f"\\text{{({letter})}}", f"\\textbf{{({letter})}}"]), true, false


WORDS = [
    "east",
    "west",
    "Monday",
    "Tuesday",
    "Evelyn",
    "ellipse",
    "parabola",
    "even",
    "odd",
    "Yes",
    "No",
    "circle",
    "Friday",
    "hyperbola",
    "neither",
    "triangle",
    "True",
    "False",
]


def word(draw: random.Random) -> Made:
    gold, other = draw.sample(WORDS, 2)
    letters = gold[1:] + gold[0]
    true = [
        gold,
        gold.lower(),
        f"\\text{{{gold}}}",
        f"\\text{{{gold.upper()}}}",
        f"\\mathrm{{{gold}}}",
        f"\\textbf{{{gold}}}",
    ]
    false = [
        other,
        f"\\text{{{other}}}",
        f"\\text{{{letters}}}",
        f"\\text{{not {gold}}}",
        f"\\text{{{gold} or {other}}}",
        str(draw.randrange(100)),
        f"\\text{{{gold}, {other}}}",
        gold[:-1] if len(gold) > 3 else "Nope",
    ]
    return f"\\text{{{gold}}}", true, false


def based(draw: random.Random) -> Made:
    base = draw.choice([2, 3, 5, 6, 7, 8, 9])
    n = draw.randrange(base * base, 3000)
    digits, rest = "", n
    while rest:
        digits, rest = str(rest % base) + digits, rest // base
    swapped = list(digits)
    swapped[-1] = str((int(swapped[-1]) + 1) % base)
    true = [
        f"{digits}_{base}",
        f"{digits}_{{{base}}}",
        f"({digits})_{{{base}}}",
        f"{digits}_{{\\text{{{['', '', 'two', 'three', '', 'five', 'six', 'seven', 'eight', 'nine'][base]}}}}}",
    ]
    false = [
        f"{digits}_{{{base + 1}}}",
        "".join(swapped) + f"_{{{base}}}",
        digits,
        str(n),
        f"{digits}0_{{{base}}}",
        f"{n}_{{10}}",
    ]
    return f"{digits}_{{{base}}}", true, false


def plus_minus(draw: random.Random) -> Made:
    a, b = draw.randrange(1, 30), draw.choice([2, 3, 5, 7])
    true = [
        f"{a} \\pm \\sqrt{{{b}}}",
        f"{a}+\\sqrt{{{b}}}, {a}-\\sqrt{{{b}}}",
        f"x = {a} \\pm \\sqrt{{{b}}}",
        f"{a}-\\sqrt{{{b}}} \\text{{ and }} {a}+\\sqrt{{{b}}}",
        f"x={a}+\\sqrt{{{b}}} \\text{{ or }} x={a}-\\sqrt{{{b}}}",
        f"{a}±√{b}",
    ]
    false = [
        f"{a}+\\sqrt{{{b}}}",
        f"{a}-\\sqrt{{{b}}}",
        f"{a} \\pm \\sqrt{{{b + 1}}}",
        f"{a + 1} \\pm \\sqrt{{{b}}}",
        f"\\pm\\sqrt{{{b}}}",
        f"-{a} \\pm \\sqrt{{{b}}}",
        f"{a} \\pm {b}",
    ]
    return f"{a}\\pm\\sqrt{{{b}}}", true, false


def scientific(draw: random.Random) -> Made:
    m, e = Fraction(draw.randrange(11, 99), 10), draw.choice([*range(-12, -2), *range(3, 24)])
    m = m if m.denominator > 1 else m + Fraction(1, 10)
    text = _decimal(m)
    true = [
        f"{text} \\times 10^{{{e}}}",
        f"{text} \\cdot 10^{{{e}}}",
        f"{text}e{e}",
        f"{text}E{e}",
        f"{text} * 10^{e}" if e > 0 else f"{text} * 10^({e})",
        _decimal(m * Fraction(10) ** e),
        f"{_decimal(m * 10)} \\times 10^{{{e - 1}}}",
    ]
    false = [
        f"{text} \\times 10^{{{e + 1}}}",
        f"{text} \\times 10^{{{-e}}}",
        f"{_decimal(m + Fraction(1, 10))} \\times 10^{{{e}}}",
        f"-{text} \\times 10^{{{e}}}",
        text,
        f"10^{{{e}}}",
        "0",
        f"{text}1 \\times 10^{{{e}}}",
    ]
    return f"{text} \\times 10^{{{e}}}", true, false


def complex_number(draw: random.Random) -> Made:
    a, b = draw.randrange(1, 30), draw.randrange(2, 30)
    if a == b:
        b += 1
    true = [f"{b}i+{a}", f"{a} + {b} i", f"{a}+{b}\\cdot i", f"z = {a}+{b}i", f"-i({a}i-{b})+2\\cdot 0"]
    true[-1] = f"i({b}-{a}i)"
    false = [f"{a}-{b}i", f"-{a}+{b}i", f"{b}+{a}i", f"{a + 1}+{b}i", f"{a}+{b}", f"{a}{b}i", f"({a},{b})", f"{a}+{b}j"]
    return f"{a}+{b}i", true, false


def logarithm(draw: random.Random) -> Made:
    a, b = draw.randrange(3, 12), draw.choice([2, 3, 5, 7])
    true = [
        f"{a}\\ln({b})",
        f"\\ln {b**a}",
        f"\\ln({b}^{{{a}}})",
        f"{a} \\log_e {b}",
        f"{a}*ln({b})",
        f"-{a}\\ln\\frac{{1}}{{{b}}}",
    ]
    false = [
        f"{a + 1}\\ln {b}",
        f"{a}\\ln {b + 1}",
        f"-{a}\\ln {b}",
        f"\\ln {a * b}",
        f"{a}\\log_{{10}} {b}",
        f"{a}\\log_2 {b}",
        f"(\\ln {b})^{{{a}}}",
        f"{a}{b}",
    ]
    return f"{a}\\ln {b}", true, false


def power(draw: random.Random) -> Made:
    b, n = draw.choice([2, 3, 5, 7, 10]), draw.randrange(4, 60)
    true = [
        str(b**n),
        f"{b}^{n}",
        f"{b} \\cdot {b}^{{{n - 1}}}",
        f"\\frac{{{b}^{{{n + 2}}}}}{{{b}^2}}",
        f"{b}**{n}",
        f"{b * b}^{{{n}/2}}",
    ]
    false = [
        f"{b}^{{{n + 1}}}",
        f"{b}^{{{n - 1}}}",
        f"{b}^{{-{n}}}",
        f"{b}^{{{n}}}+1",
        str(b**n + 1),
        str(b**n - 1),
        f"{b * n}",
        f"{n}^{{{b}}}" if b != n and (b, n) != (2, 4) else "17",
    ]
    return f"{b}^{{{n}}}", true, false


def polynomial(draw: random.Random) -> Made:
    a, b, c = draw.randrange(2, 9), draw.randrange(1, 12), draw.randrange(1, 12)
    gold = f"{a}x^2+{a * (b + c)}x+{a * b * c}"
    true = [
        f"{a}(x+{b})(x+{c})",
        f"{a * b * c}+{a * (b + c)}x+{a}x^2",
        f"{a} x^{{2}} + {a * (b + c)} x + {a * b * c}",
        f"({a}x+{a * b})(x+{c})",
        f"{a}*x^2+{a * (b + c)}*x+{a * b * c}",
        f"f(x) = {gold}",
        f"{a}x²+{a * (b + c)}x+{a * b * c}",
    ]
    false = [
        f"{a}x^2-{a * (b + c)}x+{a * b * c}",
        f"{a}x^2+{a * (b + c) + 1}x+{a * b * c}",
        f"{a}x^2+{a * (b + c)}x-{a * b * c}",
        f"{a}(x-{b})(x+{c})",
        f"{a}y^2+{a * (b + c)}y+{a * b * c}",
        f"{a}x^3+{a * (b + c)}x+{a * b * c}",
        f"{gold}=0",
        f"(x+{b})(x+{c})",
    ]
    return gold, true, false


def several_symbols(draw: random.Random) -> Made:
    n = draw.randrange(2, 9)
    gold = f"\\frac{{a^{n}b}}{{c}}"
    true = [
        f"\\frac{{b a^{n}}}{{c}}",
        f"a^{n} b c^{{-1}}",
        f"a^{n}*b/c",
        f"\\frac{{a^{{{n}}}}}{{c}} b",
        f"\\frac{{2a^{n}b}}{{2c}}",
    ]
    false = [
        f"\\frac{{a^{n}c}}{{b}}",
        f"\\frac{{a^{n + 1}b}}{{c}}",
        f"-\\frac{{a^{n}b}}{{c}}",
        f"\\frac{{c}}{{a^{n}b}}",
        f"a^{n}bc",
        f"\\frac{{ab^{n}}}{{c}}",
        f"\\frac{{a^{n}+b}}{{c}}",
    ]
    return gold, true, false


def trigonometric(draw: random.Random) -> Made:
    n = draw.randrange(2, 9)
    true = [
        f"{n}\\sin(2x)",
        f"{2 * n} \\sin x \\cos x",
        f"{2 * n}\\cos(x)\\sin(x)",
        f"{n} \\sin (2 x)",
        f"{n}*sin(2*x)",
    ]
    false = [
        f"{n}\\cos 2x",
        f"-{n}\\sin 2x",
        f"{n}\\sin x",
        f"{2 * n}\\sin x",
        f"{n + 1}\\sin 2x",
        f"{n}\\sin^2 x",
        f"{n}\\sin 2y",
    ]
    return f"{n}\\sin 2x", true, false


def solutions(draw: random.Random) -> Made:
    a, b, c, d = draw.sample(range(-20, 30), 4)
    true = [
        f"({c},{d}),({a},{b})",
        f"\\{{({a},{b}),({c},{d})\\}}",
        f"({a},{b}) \\text{{ and }} ({c},{d})",
        f"(x,y)=({a},{b}),({c},{d})",
    ]
    false = [
        f"({a},{b})",
        f"({b},{a}),({c},{d})",
        f"({a},{d}),({c},{b})",
        f"({a},{b}),({c},{d + 1})",
        f"({a},{b},{c},{d})",
        f"{a},{b},{c},{d}",
    ]
    return f"({a},{b}),({c},{d})", true, false


def ratio(draw: random.Random) -> Made:
    a, b = draw.choice([(2, 3), (3, 5), (4, 7), (5, 8), (1, 9), (7, 11)])
    true = [f"{a} : {b}", f"{a}:{b}", f"\\frac{{{a}}}{{{b}}}", f"{a}/{b}", f"{2 * a}:{2 * b}"]
    false = [f"{b}:{a}", f"{a + 1}:{b}", f"{a}:{b + 1}", f"{a}", f"({a},{b})", f"{a}:{b}:1", f"-{a}:{b}"]
    return f"{a}:{b}", true, false


def infinite(draw: random.Random) -> Made:
    sign = draw.choice(["", "-"])
    other = "-" if not sign else ""
    return (
        f"{sign}\\infty",
        [f"{sign}\\infty", f"{sign}∞", f"x = {sign}\\infty", f"{sign}infinity"],
        [f"{other}\\infty", "0", "10^{100}", "\\text{none}", "(-\\infty,\\infty)", f"{draw.randrange(100)}"],
    )


def tiny(draw: random.Random) -> Made:
    n = draw.randrange(101, 999)
    e = draw.randrange(8, 40)
    gold = f"{n} \\times 10^{{-{e}}}"
    true = [gold, f"{n}e-{e}", f"\\frac{{{n}}}{{10^{{{e}}}}}", f"\\frac{{{n}}}{{1{'0' * e}}}", f"0.{'0' * (e - 3)}{n}"]
    false = [
        "0",
        f"{n + 1} \\times 10^{{-{e}}}",
        f"{n} \\times 10^{{-{e + 1}}}",
        f"-{gold}",
        f"{n - 1}e-{e}",
        f"1e-{e}",
    ]
    return gold, true, false


def counting(draw: random.Random) -> Made:
    from math import comb, factorial

    n = draw.randrange(6, 14)
    k = draw.randrange(2, n // 2)
    value = comb(n, k)
    true = [
        f"\\binom{{{n}}}{{{k}}}",
        f"\\binom{{{n}}}{{{n - k}}}",
        f"\\frac{{{n}!}}{{{k}!{n - k}!}}",
        f"{factorial(n)}/({factorial(k)}*{factorial(n - k)})",
        f"{{{n} \\choose {k}}}",
    ]
    false = [
        f"\\binom{{{n + 1}}}{{{k}}}",
        f"\\binom{{{n}}}{{{k + 1}}}" if n != 2 * k + 1 else "1",
        f"\\frac{{{n}!}}{{{k}!}}",
        str(value + 1),
        f"{k}^{{{n}}}" if k**n != value else "0",
        f"\\binom{{{k}}}{{{n}}}",
    ]
    return str(value), true, false


FAMILIES: list[Callable[[random.Random], Made]] = [
    integer, negative, decimal, fraction, radical, surd, pi_multiple, percentage, quantity, rate, money, angle, pair,
    triple, bare_list, set_of, interval, ray, union,
    matrix, line, choice, word, based, plus_minus, scientific, complex_number, logarithm, power, polynomial,
    several_symbols, trigonometric, solutions, ratio, infinite,
    tiny, counting,
]  # fmt: skip


def _decimal(value: Fraction) -> str:
    """A terminating fraction as plain decimal text."""
    places, scaled = 0, abs(value)
    while scaled.denominator > 1:
        scaled *= 10
        places += 1
    digits = str(scaled.numerator).rjust(places + 1, "0")
    text = f"{digits[:-places]}.{digits[-places:]}" if places else digits
    return ("-" if value < 0 else "") + text


PROSE = (
    "We start by restating the problem. Let $x$ be the unknown, so that $x + 3 = 10$ and $x = 7$ in the first case. "
    "Then \\[ \\frac{x^2 - 1}{x + 1} = x - 1 = 6, \\] and since $2 \\cdot 3 = 6$ the two sides agree. Next we "
    "look at the second case, where (a, b) = (1, 2). "
)


def completion(answer: str, length: int = 3000) -> str:
    """A worked solution of about `length` characters that ends in a box."""
    body = (PROSE * (length // len(PROSE) + 1))[:length].rpartition(". ")[0]
    return f"{body}.\n\nTherefore the answer is \\boxed{{{answer}}}."


def judged(rows: list[Case], judge: Callable[[str, str], bool | None]) -> dict:
    """Verdicts and times of one judge over all rows."""
    times, wrong = [], []
    start = time.perf_counter()
    for case in rows:
        begun = time.perf_counter()
        got = judge(case.gold, completion(case.answer))
        times.append(time.perf_counter() - begun)
        if got is not case.equal:
            wrong.append((case, got))
    seconds = time.perf_counter() - start
    times.sort()
    equal = sum(case.equal for case in rows)
    return {
        "rows": len(rows),
        "per_second": round(len(rows) / seconds, 1),
        "median_ms": round(1000 * statistics.median(times), 3),
        "p99_ms": round(1000 * times[int(0.99 * len(times))], 3),
        "slowest_ms": round(1000 * times[-1], 3),
        "false_accepts": sum(got is True for _, got in wrong),
        "undecided": sum(got is None for _, got in wrong),
        "near_misses": len(rows) - equal,
        "false_refusals": sum(got is False for _, got in wrong),
        "true_variants": equal,
        "wrong": wrong,
    }


def own(gold: str, response: str) -> bool | None:
    return Math().verify(Task("row", (), gold, "math"), response).correct


def math_verify_judge() -> Callable[[str, str], bool | None] | None:
    """math-verify with its defaults, as its documentation calls it; None where it is not installed."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return None

    def judge(gold: str, response: str) -> bool | None:
        try:
            return bool(verify(parse(f"\\boxed{{{gold}}}"), parse(response)))
        except Exception:  # its own faults count as no verdict
            return None

    return judge


def measured(rows: int, seed: int = 0, against: int = 1000) -> dict[str, dict]:
    """Figures of the own judge on all rows and of math-verify on an even sample of `against` of them, in one run."""
    made = list(cases(rows, seed))
    results = {"reasoner": judged(made, own)}
    other = math_verify_judge() if against else None
    if other is not None:
        sample = random.Random(seed).sample(made, min(against, len(made)))
        results["math-verify"] = judged(sample, other)
    return results


TITLES = ("rows", "per second", "median ms", "p99 ms", "false accepts", "false refusals", "undecided")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=4000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--against", type=int, default=1000, help="rows that math-verify judges too; 0 leaves it out")
    options.add_argument("--show", type=int, default=0, help="print this many disagreements of the own judge")
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    results = measured(chosen.rows, chosen.seed, chosen.against)
    for case, got in results["reasoner"]["wrong"][: chosen.show]:
        print(f"{case.family:16} {'EQUAL' if case.equal else 'DIFFERENT'} judged {got}: {case.gold}  ||  {case.answer}")
    print(" ".join(["judge       ", *(f"{title:>16}" for title in TITLES)]))
    for name, r in results.items():
        accepts, refusals = f"{r['false_accepts']}/{r['near_misses']}", f"{r['false_refusals']}/{r['true_variants']}"
        row = (r["rows"], r["per_second"], r["median_ms"], r["p99_ms"], accepts, refusals, r["undecided"])
        print(" ".join([f"{name:12}", *(f"{cell!s:>16}" for cell in row)]))
        del r["wrong"]
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
