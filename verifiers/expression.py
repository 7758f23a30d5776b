r"""Reads LaTeX and plain mathematics into a small tree.

A tokenizer and a recursive-descent parser of this room's own: model text is never evaluated, and every bound
(characters, tokens, depth, digits) is checked before work is done, so reading costs microseconds and is safe in any
thread. Knows nothing of equality (`verifiers.numbers`, `verifiers.math`) nor of responses (`verifiers.extract`).
Limits: sums, integrals, limits, case distinctions and quantifiers are not read (`Unreadable`); `log` without a base
is base 10.

A tree is a tuple whose first entry names its kind:
    ("num", Fraction, digits)       digits: significant ones of a decimal literal, 0 for an exact number
    ("sym", name)  ("const", "pi" | "e" | "i" | "inf")
    ("add", *t)  ("mul", *t)  ("div", a, b)  ("pow", a, b)  ("neg", a)  ("pm", a)  ("fn", name, *t)
    ("pct", a)  ("deg", a)  ("unit", a, unit)  ("based", digits, base)  ("ratio", *t)
    ("tuple", *t)  ("bracket", *t)  ("set", *t)  ("list", *t)  ("interval", lo, hi, lo_closed, hi_closed)
    ("union", *t)  ("meet", *t)  ("minus", a, b)  ("matrix", rows)  ("rel", operators, *t)  ("reals",)  ("empty",)
    ("both", *t)  ("either", *t)    inequalities joined by "and", by "or"; any other neighbours are a "list"
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

from verifiers.units import unit_of

Tree = tuple[Any, ...]

CHARACTERS, TOKENS, DEPTH, DIGITS = 2000, 500, 40, 1000  # bounds on what is read


RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "∈", "≈")
LABEL = 12  # tokens of a unit
_NUMERAL = re.compile(r"(?<![A-Za-z^\d-])\d")  # no exponent: a label with a number in it holds a second answer
_NO_LABEL = frozenset(  # words after a number that change it
    "not no isn't to or is are was or if plus minus times over by divided factorial choose more less than half "
    "halves third thirds fourth fourths quarter quarters fifth fifths "
    "tenth tenths squared cubed root negative below above under except but between "
    "wrong incorrect maybe possibly through either".split()
)


class Unreadable(ValueError):
    """The text is no mathematics that this parser knows, or it exceeds a bound."""


FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp sqrt cbrt abs floor ceil max min "
    "gcd lcm re im".split()
)
_ALIASES = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "Re": "re", "Im": "im", "tg": "tan", "ctg": "cot",
    "ceiling": "ceil",
}  # fmt: skip
_GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi "
    "chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar".split()
)
_WORDS = frozenset(
    "no on up am pm if it is as at to so do us we me he in of an by my go be".split()
)  # two letters, not a product
_COMMANDS = {
    "times": "*", "cdot": "*", "ast": "*", "bullet": "*", "div": "/", "pm": "±", "mp": "±", "le": "<=", "leq": "<=",
    "leqslant": "<=",
    "leqq": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "geqq": ">=", "lt": "<", "gt": ">", "ne": "!=",
    "neq": "!=", "approx": "≈", "simeq": "≈", "thickapprox": "≈",
    "in": "∈", "cup": "∪", "cap": "∩", "setminus": "∖", "backslash": "∖", "lbrace": "\\{", "rbrace": "\\}",
    "lbrack": "[", "rbrack": "]",
    "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "langle": "(", "rangle": ")", "degree": "°", "lor": "or",
    "vee": "or",
    "land": "and", "wedge": "and", "colon": ":", "pounds": "£", "textdollar": "$", "lparen": "(", "rparen": ")",
}  # fmt: skip
_UNICODE = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "•": "*", "÷": "/",
    "⁄": "/", "∕": "/", "√": "\\sqrt ", "∛": "\\cbrt ",
    "π": "\\pi ", "∞": "\\infty ", "≤": "<=", "≥": ">=", "⩽": "<=", "⩾": ">=", "≠": "!=", "∪": "∪", "∩": "∩",
    "∖": "∖", "∈": "∈", "∅": "\\emptyset ",
    "ℝ": "\\mathbb{R}", "º": "°", "˚": "°", "∘": "°", "±": "±", "∓": "±", "′": "'", "’": "'", "‘": "'", "“": '"',
    "”": '"', "θ": "\\theta ", "⟨": "(", "⟩": ")",
    "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}",
    "⅕": "\\frac{1}{5}", "⅛": "\\frac{1}{8}", "⅜": "\\frac{3}{8}",
    "⅝": "\\frac{5}{8}", "⅞": "\\frac{7}{8}", "⅙": "\\frac{1}{6}", "⅚": "\\frac{5}{6}", "…": "...", "\u200b": "",
    "\ufeff": "", "\u2061": "",
    "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ", "φ": "\\phi ", "ω": "\\omega ", "µ": "\\mu ",
    "μ": "\\mu ", "⌊": "\\lfloor ", "⌋": "\\rfloor ",
    "⌈": "\\lceil ", "⌉": "\\rceil ", "∨": " or ", "∧": " and ", "，": ", ", "、": ", ", "。": ".", "；": "; ",
}  # fmt: skip
_UNICODE_TABLE = str.maketrans(_UNICODE)
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣ", "₀₁₂₃₄₅₆₇₈₉₊₋"
_RAISE = str.maketrans(_RAISED, "0123456789+-()nx")
_LOWER = str.maketrans(_LOWERED, "0123456789+-")

_THIN = re.compile(r"(?<=\d)(?:\\[,!:; ]|\{,\}|,\s*\\!)\s*(?=\d{3}(?!\d))")
_PRIME = re.compile(r"\^\s*\{?\s*(\\prime\s*|')+\}?")
_SKIP = re.compile(
    r"(?<!\\)\\(?:left|right|middle|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big|bigg|Bigg)(?![A-Za-z])\s*\.?|"
    r"(?<!\\)\\(?:displaystyle|textstyle|scriptstyle|limits|"
    r"nolimits|mathstrut|strut|hfill|phantom\{[^{}]*\}|label\{[^{}]*\}|tag\{[^{}]*\}|hspace\*?\{[^{}]*\}|"
    r"quad|qquad|enspace|thinspace|newline|(?:bf|rm|it|sf|large|Large|normalsize|small)(?!\s*\{))(?![A-Za-z])|"
    r"(?<!\\)\\[,;:>! ]|~|&nbsp;"
)
_ORDINAL = re.compile(r"(?<=\d)\s*\^\s*\{?\s*(?:\\(?:text|mathrm|textrm)\s*\{)?\s*(st|nd|rd|th)\s*\}{0,2}(?![A-Za-z])")
_OUTWARD = re.compile(  # ]0,1[ is (0,1), [0,1[ is [0,1)
    r"(?P<open>(?:^|[∪∩∖∈=,]|\\(?:cup|cap|setminus|in)(?![A-Za-z]))\s*)?(?P<left>[\[\]])(?P<ends>[^\[\],]+,[^\[\],]+)"
    r"(?P<right>[\[\]])(?=\s*(?:$|[∪∩∖,;]|\\(?:cup|cap|setminus)(?![A-Za-z])))"
)
_CELSIUS = re.compile(
    r"(?:\^\s*\{?\s*\\circ\s*\}?|°)\s*(?:\\(?:text|mathrm|textrm)\s*\{\s*([CF])\s*\}|([CF])(?![A-Za-z]))"
)
_OHM = re.compile(r"(?<=\d)\s*\\Omega(?![A-Za-z])")
_MICRO = re.compile(r"(?<=\d)\s*\\mu\s*\\(?:text|mathrm)\s*\{\s*([mgsLCFA])\s*\}")
_UNIT_FRACTION = re.compile(
    r"\\[dt]?frac\s*\{\s*\\(?:text|mathrm)\s*\{([^{}]*)\}\s*\}\s*\{\s*\\(?:text|mathrm)\s*\{([^{}]*)\}\s*\}"
)
_TEXT = re.compile(
    r"\\(?:text|mathrm|textbf|textit|textrm|textsf|texttt|textnormal|mbox|hbox|mathbf|mathit|mathsf|mathtt|"
    r"mathcal|mathscr|operatorname\*?|boldsymbol|bm|rm|emph|underline|vec|"
    r"color\{\w+\}|textcolor\{\w+\}|mathop)(?![A-Za-z])\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<num>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+(?![\d.]))?)|\\(?P<cmd>[A-Za-z]+)|"
    r"(?P<word>[A-Za-z]+)"
    r"|(?P<op>\\\\|\\[{}|%$#&_]|<=|>=|==|!=|\*\*|\.\.\.|[-+*/^_(){}\[\],;=<>|!%°:±∪∩∖∈&'$€£¥₹\"?≈])"
)
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?")
_SPACED = re.compile(r"\d{1,3}(?: \d{3})+(?![\d])(?:\.\d+)?(?![ ]*[/\\])")
_SMALL = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "twelve": 12,
    "sixteen": 16,
}


def normalise(text: str) -> str:
    """Unicode and LaTeX spacing to plain forms; meaning is kept, words are kept."""
    if len(text) > CHARACTERS:
        raise Unreadable(f"an answer of {len(text)} characters: at most {CHARACTERS} are read")
    if not text.isascii():
        text = re.sub(f"[{_RAISED}]+", lambda m: "^{" + m.group().translate(_RAISE) + "}", text)
        text = re.sub(f"[{_LOWERED}]+", lambda m: "_{" + m.group().translate(_LOWER) + "}", text)
        text = re.sub(r"(?<=\d)[\u2009\u202f\u00a0](?=\d{3}(?!\d))", "", text.translate(_UNICODE_TABLE))
        text = unicodedata.normalize("NFKC", text).translate(_UNICODE_TABLE)
    if "\\" in text or "~" in text or "{,}" in text:
        text = _THIN.sub("", text)
        text = _SKIP.sub(" ", text)
        text = _PRIME.sub("'", text) if "prime" in text else text
        text = _UNIT_FRACTION.sub(r"\\text{\1/\2}", text) if "frac" in text else text
        text = _MICRO.sub(r"\\text{mu\1}", _OHM.sub(r"\\text{ohm}", text))
    text = _ORDINAL.sub(r"\1", text) if "^" in text else text
    if "[" in text or "]" in text:
        text = _OUTWARD.sub(_inward, text)
    if "circ" in text or "°" in text:
        text = _CELSIUS.sub(r" \\text{deg\1\2}", text)
    return text


def _inward(match: re.Match[str]) -> str:
    """An interval in the notation that turns the bracket of an open end outwards, in the other notation."""
    if match["left"] == "]" and match["open"] is None:
        return match[0]  # this bracket closes another one
    left, right = "[("[match["left"] == "]"], "])"[match["right"] == "["]
    return f"{match['open'] or ''}{left}{match['ends']}{right}"


class Token:
    __slots__ = ("kind", "spaced", "text")

    def __init__(self, kind: str, text: str, spaced: bool):
        self.kind, self.text, self.spaced = kind, text, spaced


def tokens(text: str, *, thousands: bool = True) -> list[Token]:
    """Tokens of normalised text. A comma inside brackets always separates; outside, it groups digits if `thousands`."""
    found: list[Token] = []
    at, depth, spaced, size = 0, 0, False, len(text)
    while at < size:
        if thousands and not depth and text[at].isdigit():
            grouped = _GROUPED.match(text, at) or (_SPACED.match(text, at) if " " in text else None)
            if grouped:
                found.append(Token("num", grouped.group().replace(",", "").replace(" ", ""), spaced))
                at, spaced = grouped.end(), False
                continue
        if text[at] == "\\":
            words = _TEXT.match(text, at)
            if words:
                content = words.group(1).strip().replace("{", "").replace("}", "")
                at = words.end()
                if content.lstrip("\\") in ("%", "$"):
                    found.append(Token("op", content.lstrip("\\"), True))
                elif content:
                    found.append(Token("text", content, True))
                spaced = True
                continue
        match = _TOKEN.match(text, at)
        if match is None:
            raise Unreadable(f"{text[at]!r} is no mathematics")
        kind, value = match.lastgroup, match.group(match.lastgroup)
        at = match.end()
        if kind == "space":
            spaced = True
            continue
        if kind == "cmd" and value in _COMMANDS:
            kind, value = "op", _COMMANDS[value]
        if kind == "op":
            value = {"**": "^", "==": "=", "\\%": "%", "\\|": "|", "\\_": "_", "\\#": "#"}.get(value, value)
            depth += (value in ("(", "[", "\\{")) - (value in (")", "]", "\\}"))
        found.append(Token(kind, value, spaced))
        spaced = False
        if len(found) > TOKENS:
            raise Unreadable(f"more than {TOKENS} tokens")
    return found


def parse(text: str, *, thousands: bool = True, letters: str = "spaced") -> Tree:
    """The tree of normalised text. Raises Unreadable.

    `letters` says when one letter after a number is a unit: "spaced" (5 m), "always" (5m), "never".
    """
    reader = _Reader(tokens(text, thousands=thousands), letters)
    tree = reader.statements()
    if reader.here is not None:
        raise Unreadable(f"{reader.here.text!r} is unexpected")
    return tree


def number(literal: str) -> Tree:
    """A decimal literal as an exact fraction with its count of significant digits (0 when it has no point)."""
    mantissa, _, exponent = literal.lower().partition("e")
    if len(mantissa) > DIGITS or len(exponent) > 4:
        raise Unreadable(f"a number of {len(literal)} characters")
    value = Fraction(mantissa)
    if exponent:
        if abs(int(exponent)) > DIGITS:
            raise Unreadable(f"exponent {exponent}")
        value *= Fraction(10) ** int(exponent)
    point = "." in mantissa.rstrip(".")
    return ("num", value, len(mantissa.replace(".", "").lstrip("0")) if point else 0)


class _Reader:
    """Recursive descent over tokens; `at` is the only state besides the bounds."""

    def __init__(self, tokens: list[Token], unit_letters: str):
        self.tokens, self.at, self.depth, self.bars, self.unit_letters = tokens, 0, 0, 0, unit_letters

    @property
    def here(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def sees(self, *ops: str) -> bool:
        token = self.here
        return token is not None and token.kind == "op" and token.text in ops

    def take(self, *ops: str) -> bool:
        if self.sees(*ops):
            self.at += 1
            return True
        return False

    def descend(self) -> None:
        self.depth += 1
        if self.depth > DEPTH:
            raise Unreadable(f"deeper than {DEPTH}")

    def need(self, op: str) -> None:
        if not self.take(op):
            raise Unreadable(f"{op!r} is missing")

    # -- statements: separators, relations, sets ------------------------------------------------------------------

    def statements(self) -> Tree:
        items, words = [self.statement()], set()
        while word := self.separator():
            if self.here is None:
                break
            words.add(word)
            items.append(self.statement())
        if len(items) == 1:
            return items[0]
        if len(words) == 1 and all(item[0] == "rel" and item[1] != ("=",) for item in items):
            return ({"and": "both", "or": "either"}.get(words.pop(), "list"), *items)
        return ("list", *items)

    def separator(self) -> str:
        """The separator here as its word, a sign as itself; "" when there is none."""
        word = ""
        while self.here is not None and (self.sees(",", ";", "or", "and") or _joins(self.here)):
            word = self.here.text.strip(" ,").lower() or word or ","
            self.at += 1
        return word

    def statement(self) -> Tree:
        self.descend()
        parts, ops = [self.ratio()], []
        while self.here is not None and self.sees(*RELATIONS):
            ops.append(self.here.text)
            self.at += 1
            parts.append(self.ratio())
        self.depth -= 1
        return parts[0] if not ops else ("rel", tuple(ops), *parts)

    def ratio(self) -> Tree:
        parts = [self.sets()]
        while self.sees(":") and not self.bars:
            self.at += 1
            parts.append(self.sets())
        return parts[0] if len(parts) == 1 else ("ratio", *parts)

    def sets(self) -> Tree:
        left = self.sum()
        while self.sees("∪", "∩", "∖"):
            op = self.here.text
            self.at += 1
            right = self.sum()
            left = {"∪": ("union", left, right), "∩": ("meet", left, right), "∖": ("minus", left, right)}[op]
        return left

    # -- arithmetic --------------------------------------------------------------------------------------------------

    def sum(self) -> Tree:
        terms = [self.product()]
        while self.sees("+", "-", "±"):
            op = self.here.text
            self.at += 1
            term = self.product()
            terms.append(term if op == "+" else ("neg", term) if op == "-" else ("pm", term))
        tree = terms[0] if len(terms) == 1 else ("add", *terms)
        if self.here is not None and self.here.kind == "cmd" and self.here.text in ("choose", "over"):
            kind = ("div",) if self.here.text == "over" else ("fn", "binom")
            self.at += 1
            return (*kind, tree, self.sum())
        return self.with_unit(tree)

    def product(self) -> Tree:
        self.descend()
        if self.sees("+", "-", "±"):
            op = self.here.text
            self.at += 1
            inner = self.product()
            self.depth -= 1
            return inner if op == "+" else ("neg", inner) if op == "-" else ("pm", inner)
        tree = self.power()
        while True:
            if self.take("*"):
                tree = _times(tree, self.signed_power())
            elif self.take("/"):
                if self.unit_ahead(tree):
                    self.at -= 1
                    break
                tree = ("div", tree, self.signed_power())
            elif self.starts_factor(tree):
                glued = self.here
                right = self.power()
                if tree[0] == "num" and right[0] == "num" and not (glued.kind == "op"):
                    mixed = _mixed_plain(self, tree, right)
                    if mixed is None:
                        raise Unreadable("two numbers side by side")
                    tree = self.postfix(mixed)
                elif _is_mixed(tree, right, glued):
                    tree = ("add", tree, right)
                elif right[0] in ("pct", "deg") and _is_mixed(tree, right[1], glued):
                    tree = (right[0], ("add", tree, right[1]))  # the sign belongs to the whole mixed number
                else:
                    tree = _times(tree, right)
            else:
                break
        self.depth -= 1
        return tree

    def signed_power(self) -> Tree:
        if self.take("-"):
            return ("neg", self.signed_power_bounded())
        if self.take("+"):
            return self.signed_power_bounded()
        return self.power()

    def signed_power_bounded(self) -> Tree:
        self.descend()
        tree = self.signed_power()
        self.depth -= 1
        return tree

    def starts_factor(self, left: Tree) -> bool:
        """Whether the next token begins a factor of an implicit product."""
        token = self.here
        if token is None:
            return False
        if token.kind == "op":
            return token.text in ("(", "{", "[") or (token.text == "|" and not self.bars)
        if token.kind == "cmd":
            return token.text not in ("choose", "over", "rfloor", "rceil", "end", "circ", "pmod", "bmod", "mod")
        if token.kind in ("text", "word"):
            if token.text.lower() in ("and", "or", "if", "for", "where", "when", "with", "mod"):
                return False
            return not self.is_unit(left)
        return True

    def is_unit(self, left: Tree) -> bool:
        """Whether the word here is a unit or a label of the quantity on its left, rather than a symbol."""
        token = self.here
        if token.kind == "text":
            return not (
                token.text in FUNCTIONS
                or token.text in ("e", "i")
                or (len(token.text) == 1 and token.text.isalpha() and not _quantity(left))
            )
        word = token.text
        if word in FUNCTIONS or word in _ALIASES or word in _GREEK or word in ("pi", "inf", "infinity", "oo", "e", "i"):
            return False
        if not _quantity(left):
            return len(word) >= 4
        if len(word) == 1:
            wanted = self.unit_letters == "always" or (self.unit_letters == "spaced" and token.spaced)
            return wanted and _plain(left) and unit_of(word) is not None and self.ends_after(1)
        return unit_of(word) is not None or len(word) >= 4

    def ends_after(self, count: int) -> bool:
        after = self.tokens[self.at + count] if self.at + count < len(self.tokens) else None
        return after is None or (
            after.kind == "op" and after.text in ("/", "^", ",", ";", ")", "]", "}", "\\}", "=", "*")
        )

    def unit_ahead(self, left: Tree) -> bool:
        """After a slash: `60 miles/hour` was handled by the unit; here `5 / text` would be a unit too."""
        return self.here is not None and self.here.kind == "text" and unit_of(self.here.text) is not None

    def with_unit(self, tree: Tree) -> Tree:
        """The quantity with the words after it, read as its unit."""
        token = self.here
        if token is None or not (token.kind in ("word", "text") or (token.kind == "op" and token.text in ("°", "/"))):
            return tree
        if _joins(token):
            return tree
        start, words = self.at, []
        while self.here is not None:
            token = self.here
            if token.kind in ("word", "text"):
                if token.text.strip(" ,").lower() in ("and", "or") and words:
                    break
                words.append(token.text.strip())
            elif token.kind == "num" and words and words[-1] in ("^", "{", "-"):
                words.append(token.text)
            elif (
                token.kind == "op"
                and token.text in ("/", "^", "*", "°", "-", "{", "}", "(", ")")
                and (token.text != ")" or "(" in words)
            ):
                words.append(token.text)
            else:
                break
            self.at += 1
        label = " ".join(words).replace("{", "").replace("}", "")
        if (
            len(words) > LABEL
            or unit_of(label) is None
            and (_NUMERAL.search(label) or any(word in _NO_LABEL for word in re.findall(r"[a-z']+", label.lower())))
        ):
            raise Unreadable(f"{label[:40]!r} is no unit")
        if not re.search(r"[A-Za-z°]", label):
            self.at = start
            return tree
        return ("unit", tree, label)

    def power(self) -> Tree:
        base = self.postfix(self.atom())
        if self.take("^"):
            if self.sees("°") or (
                self.here is not None and self.here.kind == "cmd" and self.here.text in ("circ", "prime")
            ):
                prime = self.here.text == "prime"
                self.at += 1
                return self.postfix(("sym", _name(base) + "'") if prime else ("deg", base))
            exponent = self.exponent()
            if exponent == ("sym", "circ"):
                return self.postfix(("deg", base))
            tower = [exponent]
            while self.take("^"):  # 2^3^2 is 2^(3^2)
                tower.append(self.exponent())
            while len(tower) > 1:
                top = tower.pop()
                tower[-1] = ("pow", tower[-1], top)
            base = self.postfix(("pow", base, tower[0]))
        return base

    def exponent(self) -> Tree:
        if self.sees("{"):
            self.at += 1
            if self.here is not None and self.here.kind == "cmd" and self.here.text == "circ":
                self.at += 1
                self.need("}")
                return ("sym", "circ")
            inner = self.sum()
            self.need("}")
            return inner
        if self.take("-"):
            return ("neg", self.exponent_bounded())
        if self.take("+"):
            return self.exponent_bounded()
        return self.atom()

    def exponent_bounded(self) -> Tree:
        self.descend()
        tree = self.exponent()
        self.depth -= 1
        return tree

    def postfix(self, tree: Tree) -> Tree:
        while self.here is not None:
            if self.sees("{") and self.after("}"):
                self.at += 2
            elif self.take("!"):
                tree = ("fn", "factorial", tree)
            elif self.take("%"):
                tree = ("pct", tree)
            elif self.sees("°") and not self.celsius_ahead():
                self.at += 1
                tree = ("deg", tree)
            elif self.here.kind == "cmd" and self.here.text == "circ":
                self.at += 1
                tree = ("deg", tree)
            elif self.sees("'") and tree[0] in ("sym",):
                self.at += 1
                tree = ("sym", tree[1] + "'")
            else:
                break
        return tree

    def after(self, op: str) -> bool:
        """Whether the token after the next is this sign."""
        return self.at + 1 < len(self.tokens) and self.tokens[self.at + 1].text == op

    def celsius_ahead(self) -> bool:
        after = self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else None
        return (
            after is not None
            and after.kind in ("word", "text")
            and after.text in ("C", "F", "K", "Celsius", "Fahrenheit")
        )

    # -- atoms ---------------------------------------------------------------------------------------------------------

    def atom(self) -> Tree:
        token = self.here
        if token is None:
            raise Unreadable("the formula ends too early")
        self.descend()
        self.at += 1
        tree = getattr(self, "_" + token.kind)(token)
        self.depth -= 1
        return tree

    def _num(self, token: Token) -> Tree:
        if self.here is not None and self.here.kind == "cmd" and "." in token.text:
            if self.here.text == "overline":
                self.at += 1
                return _repeating(token.text, self.digits())
            if self.here.text == "dot":
                return _repeating(token.text, self.dotted())
        if token.text.endswith(".") and self.sees("("):
            return _repeating(token.text, self.digits())  # 0.(3)
        if self.here is not None and (
            self.sees("...") or (self.here.kind == "cmd" and self.here.text in ("ldots", "dots", "cdots"))
        ):
            tail = re.search(r"\.\d*?(\d{1,6}?)\1\1+$|\.\d*?(\d{2,6}?)\2+$", token.text)
            if not tail:
                raise Unreadable("an ellipsis")
            self.at += 1
            period = tail.group(1) or tail.group(2)
            stem = token.text
            while stem.endswith(period):
                stem = stem[: -len(period)]
            return _repeating(stem, period)
        if self.sees("_"):
            self.at += 1
            return ("based", token.text.lstrip("0") or "0", self.base())
        return number(token.text)

    def dotted(self) -> str:
        r"""A repetend between dots: `\dot{3}`, `\dot{1}42\dot{7}`."""
        self.at += 1
        first = self.digits()
        between = self.here
        if between is None or between.kind not in ("num", "cmd") or (between.kind == "cmd" and between.text != "dot"):
            return first
        self.at += 1
        if between.kind == "cmd":
            return first + self.digits()
        if self.here is None or self.here.text != "dot" or not between.text.isdigit():
            raise Unreadable("a repetend that never ends")
        self.at += 1
        return first + between.text + self.digits()

    def digits(self) -> str:
        """The digits of a repetend: one, or some in a group."""
        closing = "}" if self.take("{") else ")" if self.take("(") else ""
        token = self.here
        if token is None or token.kind != "num" or not token.text.isdigit() or len(token.text) > (60 if closing else 1):
            raise Unreadable("a repetend is digits")
        self.at += 1
        if closing:
            self.need(closing)
        return token.text

    def base(self) -> int:
        braced = self.take("{")
        token = self.here
        if token is None:
            raise Unreadable("a base is missing")
        self.at += 1
        if braced:
            self.need("}")
        word = token.text.strip().lower()
        value = _SMALL.get(word) or (
            int(word) if token.kind in ("num", "text") and word.isdigit() and len(word) < 3 else 0
        )
        if not 2 <= value <= 36:
            raise Unreadable(f"base {token.text!r}")
        return value

    def _word(self, token: Token) -> Tree:
        word = _ALIASES.get(token.text, token.text)
        if word in FUNCTIONS and (len(word) > 2 or word == "ln" or word == "lg" or self.sees("(")):
            return self.call(word)
        if word in ("pi", "Pi"):
            return ("const", "pi")
        if word in ("inf", "infinity", "Infinity", "oo"):
            return ("const", "inf")
        if word in _GREEK:
            return self.symbol(word)
        if word in ("USD", "EUR", "GBP") and self.here is not None and self.here.kind == "num":
            return self.money(word)
        if len(word) > 3 or word in _WORDS:
            split = re.fullmatch(r"([A-Za-z]?)(sqrt|pi)([A-Za-z]?)", word)
            if not split:
                return ("sym", word.lower())
        if len(word) == 1:
            return self.letter(word)
        return self.letters(word)

    def letters(self, word: str) -> Tree:
        """A run of letters as a product; a call, subscript or power belongs to the last."""
        if word.startswith("pi"):
            rest = word[2:]
            first: Tree = ("const", "pi")
        else:
            first, rest = self.plain_letter(word[0]), word[1:]
        if not rest:
            return first
        self.tokens.insert(self.at, Token("word", rest, False))
        if len(rest) > 3 and rest not in FUNCTIONS:
            raise Unreadable(f"{word!r} is no product of symbols")
        if len(rest) == 1 or rest in FUNCTIONS:
            return _times(first, self.power())
        self.at += 1
        return _times(first, self.letters(rest))

    def plain_letter(self, letter: str) -> Tree:
        return ("const", letter) if letter in "ei" else ("sym", letter)

    def letter(self, letter: str) -> Tree:
        if letter in "ei" and not self.sees("_"):
            return ("const", letter)
        if letter in "fgh" and self.sees("("):
            self.at += 1
            inner = self.statements()
            self.need(")")
            return ("fn", "call " + letter, inner)
        return self.symbol(letter)

    def symbol(self, name: str) -> Tree:
        if self.take("_"):
            if self.take("{"):
                parts = []
                while not self.take("}"):
                    if self.here is None:
                        raise Unreadable("a subscript never closes")
                    parts.append(self.here.text)
                    self.at += 1
                name += "_" + "".join(parts)
            elif self.here is not None:
                name += "_" + self.here.text
                self.at += 1
        return ("sym", name)

    def _text(self, token: Token) -> Tree:
        word = token.text
        if word in FUNCTIONS or word in _ALIASES or (len(word) == 1 and word.isalpha()):
            return self._word(token)
        if re.fullmatch(r"[0-9A-Z]+", word) and self.sees("_"):
            self.at += 1
            return ("based", word.lstrip("0") or "0", self.base())
        if re.fullmatch(r"[-+]?\d[\d,]*(?:\.\d+)?", word):
            return number(word.replace(",", "")) if word[0] not in "+-" else ("neg", number(word[1:].replace(",", "")))
        return ("sym", " ".join(word.lower().split()))

    def _op(self, token: Token) -> Tree:
        op = token.text
        if op == "{":
            return self.braced()
        if op in ("(", "["):
            return self.bracketed(op)
        if op == "\\{":
            return self.set()
        if op == "|":
            self.bars += 1
            inner = self.sum()
            self.need("|")
            self.bars -= 1
            return ("fn", "abs", inner)
        if op in ("$", "\\$", "€", "£", "¥", "₹"):
            return self.money(op.lstrip("\\"))
        if op in ("+", "-", "±"):
            inner = self.power()
            return inner if op == "+" else ("neg", inner) if op == "-" else ("pm", inner)
        raise Unreadable(f"{op!r} is unexpected")

    def money(self, sign: str) -> Tree:
        value = self.power()
        if (
            self.here is not None
            and self.here.kind in ("word", "text")
            and self.here.text.lower() in ("million", "billion", "thousand")
        ):
            scale = {"thousand": 10**3, "million": 10**6, "billion": 10**9}[self.here.text.lower()]
            self.at += 1
            value = ("mul", value, ("num", Fraction(scale), 0))
        return ("unit", value, sign)

    def braced(self) -> Tree:
        if self.take("}"):
            raise Unreadable("an empty group")
        bars, self.bars = self.bars, 0
        tree = self.statements()
        self.bars = bars
        self.need("}")
        return ("set", *tree[1:]) if tree[0] == "list" else tree

    def bracketed(self, opening: str) -> Tree:
        bars, self.bars = self.bars, 0
        tree = self.statements()
        self.bars = bars
        items = tree[1:] if tree[0] == "list" else (tree,)
        closing = self.here.text if self.sees(")", "]") else None
        if closing is None:
            raise Unreadable("a bracket never closes")
        self.at += 1
        square = opening == "[", closing == "]"
        if len(items) == 1:
            if square[0] != square[1]:
                raise Unreadable("brackets do not match")
            if opening == "(" and self.sees("_") and items[0][0] == "num" and items[0][2] == 0:
                self.at += 1
                return ("based", str(items[0][1]), self.base())
            return items[0]
        if square[0] != square[1]:
            if len(items) != 2:
                raise Unreadable("brackets do not match")
            return ("interval", *items, *square)
        return ("bracket" if square[0] else "tuple", *items)

    def set(self) -> Tree:
        if self.take("\\}"):
            return ("empty",)
        bars, self.bars = self.bars, 1  # a bar separates here, it opens no absolute value
        tree = self.statements()
        if self.take("|", ":"):
            self.bars = 0
            tree = self.statements()
            if tree[0] != "rel":
                raise Unreadable("a set builder without a condition")
            self.bars = bars
            self.need("\\}")
            return tree
        self.bars = bars
        self.need("\\}")
        return ("set", *(tree[1:] if tree[0] == "list" else (tree,)))

    def _cmd(self, token: Token) -> Tree:
        name = token.text
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            return ("div", self.argument(), self.argument())
        if name in ("sqrt", "cbrt"):
            return self.root(name)
        if name in ("binom", "dbinom", "tbinom"):
            return ("fn", "binom", self.argument(), self.argument())
        name = _ALIASES.get(name, name)
        if name in FUNCTIONS:
            return self.call(name)
        if name == "pi":
            return ("const", "pi")
        if name == "infty":
            return ("const", "inf")
        if name in _GREEK:
            return self.symbol(name)
        if name in ("emptyset", "varnothing"):
            return ("empty",)
        if name in ("mathbb", "Bbb"):
            return self.blackboard()
        if name in ("lfloor", "lceil"):
            inner = self.sum()
            closer = self.here
            if closer is None or closer.text != ("rfloor" if name == "lfloor" else "rceil"):
                raise Unreadable("a floor or ceiling never closes")
            self.at += 1
            return ("fn", name[1:], inner)
        if name == "begin":
            return self.matrix()
        if (
            name in ("angle", "triangle", "measuredangle")
            and self.here is not None
            and self.here.kind in ("word", "text")
        ):
            self.at += 1
            return ("sym", f"{name} {self.tokens[self.at - 1].text}")
        if name in ("overline", "widehat", "overrightarrow", "hat", "bar", "tilde", "dot", "ddot"):
            return ("sym", f"{name} {self.argument()!r}")
        raise Unreadable(f"\\{name} is not read")

    def blackboard(self) -> Tree:
        inner = self.argument()
        if inner == ("sym", "R"):
            return ("reals",)
        return ("sym", "mathbb " + _name(inner))

    def argument(self) -> Tree:
        r"""A braced group or one token: `\frac12` is one half."""
        if self.take("{"):
            tree = self.braced()
            return tree
        token = self.here
        if token is None:
            raise Unreadable("an argument is missing")
        if token.kind == "num" and len(token.text) > 1 and token.text[0] != ".":
            if not token.text.isdigit():
                raise Unreadable(f"an argument {token.text!r} without braces")
            self.at += 1
            self.tokens.insert(self.at, Token("num", token.text[1:], False))
            return number(token.text[0])
        return self.atom()

    def root(self, name: str) -> Tree:
        if name == "cbrt":
            return ("pow", self.radicand(), ("num", Fraction(1, 3), 0))
        if self.sees("["):
            self.at += 1
            index = self.sum()
            self.need("]")
            return ("pow", self.radicand(), ("div", ("num", Fraction(1), 0), index))
        return ("pow", self.radicand(), ("num", Fraction(1, 2), 0))

    def radicand(self) -> Tree:
        if self.sees("{"):
            return self.argument()
        if self.sees("-"):
            raise Unreadable("a root of nothing")
        return self.atom()

    def call(self, name: str) -> Tree:
        if name == "sqrt" or name == "cbrt":
            return self.root(name)
        base = power = None
        while self.sees("_", "^"):
            if self.take("_"):
                base = self.argument()
            else:
                self.at += 1
                power = self.exponent()
        bars = self.bars
        if self.sees("(", "[", "{"):
            token = self.here
            self.at += 1
            inner = self.braced() if token.text == "{" else self.bracketed(token.text)
            if self.sees("^") and power is None:
                self.at += 1
                power = self.exponent()
        else:
            inner = self.bare_argument()
        self.bars = bars
        if name == "log" and base is not None:
            tree: Tree = ("div", ("fn", "ln", inner), ("fn", "ln", base))
        elif name in ("log", "lg"):
            tree = ("div", ("fn", "ln", inner), ("fn", "ln", ("num", Fraction(10), 0)))
        elif name == "exp":
            tree = ("pow", ("const", "e"), inner)
        elif inner[0] in ("tuple", "bracket", "set"):
            tree = ("fn", name, *inner[1:])
        else:
            tree = ("fn", name, inner)
        if power is None:
            return tree
        if power == ("neg", ("num", Fraction(1), 0)) and name in ("sin", "cos", "tan"):
            return ("fn", "arc" + name, *tree[2:])
        return ("pow", tree, power)

    def bare_argument(self) -> Tree:
        """The argument of a function without brackets: an implicit product up to the next function or sign."""
        if self.take("-"):
            return ("neg", self.power())
        tree = self.power()
        while self.here is not None and not self.is_function(self.here):
            if self.here.kind == "word" and self.here.text in ("e", "i") or self.here.kind == "num":
                break
            if not self.starts_factor(tree) or self.sees("(", "["):
                break
            tree = _times(tree, self.power())
        return tree

    def is_function(self, token: Token) -> bool:
        return token.kind in ("cmd", "word", "text") and (token.text in FUNCTIONS or token.text in _ALIASES)

    def matrix(self) -> Tree:
        self.need("{")
        name = self.here.text if self.here is not None else ""
        self.at += 1
        self.need("}")
        if name in ("cases", "aligned"):
            return self.system()
        if name == "array":
            self.need("{")
            while not self.take("}"):
                if self.here is None:
                    raise Unreadable("an array never starts")
                self.at += 1
        elif name not in ("pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix"):
            raise Unreadable(f"environment {name!r} is not read")
        if self.states_something():
            return self.system()
        rows: list[list[Tree]] = [[]]
        while not self.ends():
            if self.here is not None and self.here.kind == "cmd" and self.here.text == "hline":
                self.at += 1
                continue
            rows[-1].append(self.sum())
            if self.take("\\\\"):
                rows.append([])
            elif not self.take("&"):
                break
        self.end()
        rows = [row for row in rows if row]
        if not rows or len({len(row) for row in rows}) != 1:
            raise Unreadable("rows of a matrix differ in length")
        return ("matrix", tuple(tuple(row) for row in rows))

    def states_something(self) -> bool:
        """Whether a relation stands before the next end of an environment: then it is no matrix."""
        for token in self.tokens[self.at :]:
            if token.kind == "cmd" and token.text == "end":
                return False
            if token.kind == "op" and token.text in RELATIONS:
                return True
        return False

    def ends(self) -> bool:
        return self.here is not None and self.here.kind == "cmd" and self.here.text == "end"

    def end(self) -> None:
        if not self.ends():
            raise Unreadable("an environment never ends")
        self.at += 1
        self.need("{")
        self.at += 1
        self.need("}")

    def system(self) -> Tree:
        r"""Statements on lines of their own: `\begin{cases} x = 1 \\ y = 2 \end{cases}`."""
        items = [self.statement()]
        while self.take("\\\\", ",") and not self.ends():
            items.append(self.statement())
        self.end()
        return ("list", *items)


def _joins(token: Token) -> bool:
    """Whether a word separates statements."""
    return token.kind in ("word", "text") and token.text.strip(" ,").lower() in ("and", "or", "and/or", "")


def _times(left: Tree, right: Tree) -> Tree:
    return ("mul", *left[1:], right) if left[0] == "mul" else ("mul", left, right)


def _quantity(tree: Tree) -> bool:
    """Whether a unit may follow: the last factor is a number, a percentage, a constant or a root."""
    while tree[0] in ("mul", "neg", "add"):
        tree = tree[-1]
    return (
        tree[0] in ("num", "pct")
        or tree == ("const", "pi")
        or (
            tree[0] in ("pow", "div")
            and all(t[0] in ("num", "const", "pow", "mul", "div", "neg", "add") for t in tree[1:])
        )
    )


def _plain(tree: Tree) -> bool:
    r"""Made of numbers alone: in `2 \pi h` the h is a symbol."""
    return tree[0] == "num" or (
        tree[0] in ("add", "mul", "div", "neg", "pow", "pct", "pm") and all(_plain(part) for part in tree[1:])
    )


def _is_mixed(left: Tree, right: Tree, glued: Token) -> bool:
    r"""`3\frac{1}{2}` is three and a half; `2\frac{3}{2}` is a product."""
    whole = left[0] == "num" and left[2] == 0 and left[1].denominator == 1 and left[1] > 0
    parts = glued.kind == "cmd" and right[0] == "div" and all(t[0] == "num" and t[2] == 0 for t in right[1:])
    return whole and parts and 0 < right[1][1] < right[2][1]


def _mixed_plain(reader: _Reader, whole: Tree, top: Tree) -> Tree | None:
    """`1 1/2`, with the reader standing before the slash."""
    after = reader.tokens[reader.at + 1] if reader.at + 1 < len(reader.tokens) else None
    if not reader.sees("/") or after is None or after.kind != "num" or not after.text.isdigit() or whole[2] or top[2]:
        return None
    bottom = number(after.text)
    if not 0 < top[1] < bottom[1]:
        return None
    reader.at += 2
    return ("add", whole, ("div", top, bottom))


def _repeating(stem: str, period: str) -> Tree:
    decimals = len(stem.partition(".")[2])
    value = Fraction(stem + "0" if stem.endswith(".") else stem) + Fraction(
        int(period), (10 ** len(period) - 1) * 10**decimals
    )
    return ("num", value, 0)


def _name(tree: Tree) -> str:
    return str(tree[1]) if tree[0] in ("sym", "const") else repr(tree)
