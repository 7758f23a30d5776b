r"""An answer's text as trees: cleaning, multiple choice, words, and the two readings of an ambiguous comma.

Knows no equality. Neighbours: `verifiers.expression` parses, `verifiers.math` compares what is read here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from verifiers.expression import FUNCTIONS, Tree, Unreadable, normalise, number, parse
from verifiers.numbers import rational_or_none

_WRAP = re.compile(
    r"\\(?:text|mathrm|textbf|textit|textrm|textsf|textnormal|mbox|hbox|mathbf|mathit|mathsf|boldsymbol|bm|rm|bf|"
    r"emph|underline|operatorname)(?![A-Za-z])\s*\{([^{}]*)\}"
)
_LEAD = re.compile(
    r"^(?:(?:therefore|thus|hence|so|then)[,:]?\s+)?(?:(?:the|my|our)\s+)?(?:(?:final|correct|"
    r"right)\s+)?(?:answer|ans|result|solution|option|choice|value|probability|total|sum|product|number|area|"
    r"volume|perimeter|length|distance|ratio|remainder|difference|average|mean|maximum|minimum|cost|price)s?\b(?:\s+of\s+[^=\n]{1,40}?(?=\s+(?:is|are|equals)"
    r"\b))?\s*(?:(?:is|are|equals|:|=)\s*)*"
    r"|^(?:approximately|approx\.?|about|roughly|exactly|simply|just|given by|equal to|"
    r"(?:so|then|therefore|thus|hence|(?:we|i) (?:get|got|have|find|found|obtain)|it is|it's|that is|i\.e\.)[,:]?)\s+",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"^\(?\s*([A-Ja-j])\s*(?:\)\s*[.:]?|[.:](?!\d))\s*(\S.*)?$|^\[([A-Ja-j])\]$|^([A-J])$", re.DOTALL)
_OTHER_CHOICE = re.compile(r"^(?:or|and)\b|^[,;/&+*^=<>]|(?:^|[\s,;])\(?[A-J](?:[).:]|$|\s*(?:,|or|and)\b)")
_WORDS_ONLY = re.compile(r"[A-Za-z][A-Za-z\s'\-.,&]*")
_KNOWN = FUNCTIONS | frozenset(
    "pi inf infinity and or frac alpha beta gamma delta theta lambda mu phi omega sigma tau rho".split()
)
_FOREIGN = re.compile(
    r"(?=.*[^\W\d_a-zA-Z]{2})(?!.*[α-ωΑ-Ω])[^\W\d_][\w\s'.,-]*"
)  # words in other alphabets, or with accents
_CONDITION = re.compile(  # "..., k in Z": which numbers a letter of a general solution runs through
    r"(?<=[^\s{(|:])\s*(?:[,;]|\(|\\text\s*\{\s*,?\s*(?:where|for|with)\s*\}|(?:where|"
    r"for)\b)\s*[a-zA-Z]\s*\\in\s*(?:\\math(?:bb|bf|rm)\s*)?\{?\s*[ZNQ]\s*\}?(?:\s*[_^]\s*\{?[+*]\}?)?\s*\)?$"
)
_CLOCK = re.compile(r"\d{1,2}(?::\d\d)?\s*[ap]\.?m\.?", re.IGNORECASE)
_NAMED_NUMBER = re.compile(
    r"(?!sqrt|cbrt|infinity|"
    + "|".join(sorted(w for w in _KNOWN if len(w) > 3))
    + r")[A-Za-z]{4,},? \d{1,4}(?:(?:st|nd|rd|th)?,? \d{1,4})?"
)  # June 20, 1999
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SPELLED = {word: value for value, word in enumerate(_SMALL)} | {
    f"{tens} {one}".removesuffix(" zero"): 10 * ten + value
    for ten, tens in enumerate(_TENS, 2)
    for value, one in enumerate(_SMALL[:10])
}
_NOTHING = frozenset(
    (
        "no solution",
        "no solutions",
        "no real solution",
        "no real solutions",
        "empty set",
        "null set",
        "no such number exists",
    )
)
_EVERYTHING = frozenset(
    (
        "all real numbers",
        "all reals",
        "real numbers",
        "all real number",
        "set of all real numbers",
        "set of real numbers",
    )
)
_BASED = re.compile(r"\(?([0-9A-Z]*[0-9][0-9A-Z]*|[A-F]{2,})\)?_\{?(\d{1,2})\}?$")


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer says. `trees` holds the likeliest reading first."""

    text: str  # canonical: cleaned, without spaces that mean nothing
    trees: tuple[Tree, ...]  # () when it is no mathematics
    words: str = ""  # comparable words when the answer is text
    choice: str = ""  # letter of a multiple-choice answer
    why: str = ""  # why it could not be read


@lru_cache(maxsize=8192)
def read(text: str) -> Reading:
    """The reading of one answer. Never raises: what cannot be read has no trees, no words and says why."""
    try:
        clean = cleaned(text)
    except Unreadable as error:
        return Reading("", (), why=str(error))
    plain = _unwrapped(clean)
    if not re.search(r"\w", plain) and "emptyset" not in clean and not re.fullmatch(r"\\\{\s*\\\}", clean):
        return Reading("", (), why="an empty answer")
    letter, rest = _choice(clean)
    if letter:
        inner = read(rest) if rest else None
        text = f"({letter}) {inner.text}" if inner else letter
        return Reading(
            text, inner.trees if inner else (("sym", letter),), words=inner.words if inner else "", choice=letter
        )
    lead = _LEAD.match(plain) if plain != clean else None
    if lead and lead.end() < len(plain):
        return read(plain[lead.end() :])
    if _is_words(plain, wrapped=plain != clean):
        return _words(plain)
    if not clean.isascii() and _FOREIGN.fullmatch(plain):
        return Reading(plain, (), words=" ".join(plain.casefold().split()))
    trees, why = _trees(plain if _WRAP.fullmatch(clean) else clean)
    if not trees and plain != clean:
        trees, again = _trees(plain)
        why = why or again
    if not trees and re.search(r"[A-Za-z]{3}", plain) and not re.search(r"[\\^_{}=]", plain):
        return Reading(" ".join(plain.split()), (), words=_comparable(plain), why=why)
    return Reading(_canonical(clean, trees), trees, why="" if trees else why)


def cleaned(text: str) -> str:
    """Without dollar signs of mathematics, sentence ends, boxes and lead-ins."""
    text = normalise(text.strip())
    text = re.sub(r"\\\(|\\\)|\\\[|\\\]|\$\$", " ", text) if "\\" in text or "$$" in text else text
    text = text.strip().strip("`").strip()
    text = text[1:-1] if len(text) > 2 and text[0] == text[-1] == '"' else text
    if "$" in text.replace("\\$", ""):
        text = _without_delimiters(text)
    while text.startswith("**") and text.endswith("**") and len(text) > 4:
        text = text[2:-2].strip()
    text = _LEAD.sub("", _LEAD.sub("", text)) if text[:1].isalpha() else text.lstrip("= ")
    text = text.lstrip("*")
    text = text.strip()
    while text and text[-1] in ".,;:\n " and not text.endswith("..."):
        text = text[:-1].rstrip()
    if text.endswith("\\\\"):
        text = text[:-2].rstrip()
    text = _CONDITION.sub("", text).strip() if "\\in" in text else text.strip()
    if len(text) > 2 and text[0] == "{" and _closes(text, "{", "}") and "," not in text:
        text = text[1:-1].strip()
    return text


def _closes(text: str, opening: str, closing: str) -> bool:
    """Whether the first bracket closes at the very end."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == opening) - (c == closing)
        if not depth:
            return i == len(text) - 1
    return False


def _without_delimiters(text: str) -> str:
    """Drops `$` around mathematics, keeps it before an amount of money."""
    bare = re.sub(r"\\\$", "\0", text)
    if bare.count("$") % 2:
        bare = re.sub(r"\$(?=\s*\d)", "\0", bare, count=1)
    return bare.replace("$", " ").replace("\0", "\\$").strip()


def _unwrapped(text: str) -> str:
    while "\\" in text:
        plainer = _WRAP.sub(r" \1 ", text)
        if plainer == text:
            break
        text = plainer
    return " ".join(text.split())


def _choice(text: str) -> tuple[str, str]:
    """The letter of a multiple-choice answer and the text after it."""
    match = _CHOICE.match(_unwrapped(text)) if "(" in text[:14] or text[:1] in "ABCDEFGHIJabcdefghij\\[" else None
    if not match:
        return "", ""
    letter, rest = match.group(1) or match.group(3) or match.group(4), match.group(2) or ""
    if rest and (
        _OTHER_CHOICE.search(rest)
        or letter.islower()
        or re.match(r"\(", rest)
        or not re.match(r"\(|.[.:)]\s|\\", _unwrapped(text))
    ):
        return "", ""
    return letter.upper(), rest


def _is_words(plain: str, *, wrapped: bool) -> bool:
    if _CLOCK.fullmatch(plain) or _NAMED_NUMBER.fullmatch(plain):
        return True
    if not _WORDS_ONLY.fullmatch(plain):
        return False
    words = re.findall(r"[A-Za-z]+", plain)
    if any(word in _KNOWN and word not in ("and", "or") for word in words):
        return False
    long = [word for word in words if len(word) >= 3 and word not in _KNOWN]
    return (
        bool(long)
        and (wrapped or len(words) > 1 or len(words[0]) >= 3)
        or (len(words) == 1 and words[0].lower() in ("no", "on", "up", "am", "pm", "it", "is", "go", "he"))
    )


def _comparable(plain: str) -> str:
    words = re.findall(r"[a-z]+|-?[0-9]+(?:\.[0-9]+)?|[<>+*/%$=]", plain.lower().replace(".m", "m"))
    return " ".join(word for word in words if word not in ("the", "a", "an"))


def _words(plain: str) -> Reading:
    words = _comparable(plain)
    words = {"dne": "does not exist", "none of these": "none of the above"}.get(words, words)
    if words in _SPELLED:
        return Reading(str(_SPELLED[words]), (number(str(_SPELLED[words])),), words=words)
    if words in _NOTHING:
        return Reading("no solution", (("empty",),))
    if words in _EVERYTHING:
        return Reading("all real numbers", (("reals",),))
    if words in ("infinity", "positive infinity", "negative infinity", "minus infinity"):
        infinite: Tree = ("const", "inf")
        return Reading(words, (("neg", infinite) if words[0] in "nm" else infinite,))
    return Reading(" ".join(plain.split()), (), words=words)


def _trees(text: str) -> tuple[tuple[Tree, ...], str]:
    based = _BASED.match(text.replace(" ", "").replace("\\text", ""))
    if based and re.search("[A-Z]", based.group(1)) and 2 <= int(based.group(2)) <= 36:
        return (("based", based.group(1).lstrip("0") or "0", int(based.group(2))),), ""
    found: list[Tree] = []
    why = ""
    grouped = re.search(r"\d,\d{3}(?!\d)", text) or re.search(r"\d \d{3}(?!\d)", text)
    glued = re.search(r"\d[A-Za-z](?![A-Za-z(_])", text)
    spaced = re.search(r"[\w}] +[A-Za-z](?![A-Za-z])", text)
    for options in (
        {},
        {"thousands": False} if grouped else None,
        {"letters": "always"} if glued else None,
        {"letters": "never"} if spaced else None,
    ):
        if options is None:
            continue
        try:
            tree = parse(text, **options)
        except Unreadable as error:
            why = why or str(error)
            continue
        except (ZeroDivisionError, IndexError, RecursionError) as error:
            why = why or repr(error)
            continue
        if tree not in found:
            found.append(tree)
    return tuple(found), why


def _canonical(text: str, trees: tuple[Tree, ...]) -> str:
    """One spelling for numbers; other answers keep theirs, with the spaces between commands gone."""
    if len(trees) == 1 and trees[0][0] in ("num", "div", "neg"):
        value = rational_or_none(trees[0])
        literal = trees[0] if trees[0][0] == "num" else ("num", 0, 0)
        if (
            value is not None
            and literal[2] < 4
            and max(value.numerator.bit_length(), value.denominator.bit_length()) < 400
        ):
            return str(value)
    return re.sub(r"\s*([-+*/^_=<>(){}\[\]|])\s*", r"\1", " ".join(text.split()))
