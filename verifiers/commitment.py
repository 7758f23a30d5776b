r"""Whether a response means what it states: the grammar of commitment.

"A common mistake is to say the answer is 42" states 42 and means it not. Denied, supposed, reported of others, asked,
struck out or taken back, a statement commits to nothing. Knows neither markers nor numbers' values; `verifiers.extract`
asks it about what it found.
Limit: this is a list of English turns of phrase, not understanding. What is denied in other words is missed.
"""

from __future__ import annotations

import re
from typing import Literal

BEFORE, AFTER = 200, 2000  # characters looked at before and after a statement

_CLAUSE = re.compile(
    r"[.!?;:](?=\s)|[,\n]|\b(?:but|and|so|hence|therefore|thus|however|then|whereas|while)\b", re.IGNORECASE
)
_SENTENCE = re.compile(r"[.!?](?=\s)|\n")
_LINK = re.compile(  # what may stand between the verb that governs a statement and what is stated
    r"(?:\b(?:the|my|our|this|it|that|an?|(?<!['’])[a-z]|answer|result|value|solution|correct|right|final|true|is|was|equals|"
    r"equal\s+to|be|should|would|must|simply|just)\b|[=:$\\(\[*_`\"'“\s])*$",
    re.IGNORECASE,
)
_OTHERS = (
    r"\b(?:one|some|many|most|people|students?|others?|you|they|he|she|someone|somebody|anyone|everyone|friend|teacher)"
)
_SAY = (
    r"(?:says?|said|thinks?|thought|believe[ds]?|claim(?:s|ed)?|guess(?:es|ed)?|answer(?:s|ed)?|expect(?:s|ed)?|"
    r"conclude[ds]?|argue[ds]?|writes?|wrote)"
)
_ADVERB = r"(?:(?:might|may|could|would|will|often|sometimes|usually|also|easily|first|even|initially)\s+)"
_FALSE = r"(?:wrong|incorrect|impossible|false|untrue|mistaken|erroneous)"
_DENIED = re.compile(
    r"(?:\bnot|n['’]t|\bnever|\bcannot)\s*(?:(?:\w+\s+){0,2}(?:think|believe|say|claim|conclude|mean|true|correct|right|"
    r"case|certain|sure|clear|write|put|give)\W*)?$|(?<!no )(?<!without )(?<!beyond )\bdoubt(?:ful)?\W*$|"
    rf"(?<!not )(?<!nothing )(?<!isn't )\b(?:{_FALSE}|naive|tempting|careless)(?:ly)?\b|"
    r"\b(?:mistake|error|trap|misconception)s?\s+(?:is|are|was|were|would\s+be|to|of|that)\b|"
    r"\b(?:first|initial|previous|earlier|original|old|preliminary|intermediate|common)\s*$|"
    r"\b(?<!value )of\s*$|\b(?:twice|half|double)\s*$",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(
    r"(?:\b(?:if|unless|whether|suppose|supposing|assume|assuming|imagine|pretend|let(?:['’]s|\s+us)\s+(?:say|guess|try))|"
    rf"{_OTHERS}\s+(?:{_ADVERB}*{_SAY}|{_ADVERB}+(?:get|gets|got))|"  # "you get 42" is what the response itself says
    r"\b(?:I|we)\s+(?:\w+\s+)?(?:thought|believed|assumed|guessed|said|claimed|expected))\W*$",
    re.IGNORECASE,
)
_GAP = r"[\s$.,;:*_)}\]—–-]*"
_IS = r"(?:is|was|would\s+be|seems|looks|s|can(?:not|['’]t)\s+be)\s+(?:\w+ly\s+)?"
_REFUTED = re.compile(  # right behind the statement
    rf"{_GAP}(?:(?:but|hmm|oh|well|wait|actually|which|that|this|it)\b\W*)*(?:\?|(?:{_IS})?(?:{_FALSE}\b(?!\s+answers?\b)|"
    r"not\s+(?:right|correct|possible|true|valid|it|the\s+(?:right|correct|answer|solution))\b)|"
    rf"{_IS}an?\s+(?:\w+\s+)?(?:mistake|error|trap)\b|no\s*(?:[,.:;!—–-]|wait)|scratch\s+that|on\s+second\s+thought|"
    r"(?:sorry\W+)?I\s+mean)",
    re.IGNORECASE,
)
_REPLACED = re.compile(  # by another number, in a sentence of its own or after "or"
    rf"(?:{_GAP}(?:(?:in\s+fact|really|rather|alternatively)\W+)?(?:it|that)(?:['’]s|\s+is|\s+was)\s+(?:really\s+|actually\s+|"
    rf"in\s+fact\s+)?|{_GAP}(?:or|alternatively)\W+(?:maybe\s+|perhaps\s+|possibly\s+)?)"
    r"\$?(-?\d+)\$?(?:[.,;!?)]+(?=\s|$)|\s*$)",
    re.IGNORECASE,
)
_REVISED = re.compile(
    r"\b(?<!no )(?<!any )(?<!not )(?:wait|actually|mistake|correction|correct(?:ed|ing)|wrong|incorrect|instead|"
    r"re-?check|re-?consider|error|oops|I\s+meant|scratch\s+that|on\s+second\s+thought|not\s+right)\b",
    re.IGNORECASE,
)
_STRUCK = re.compile(r"(?<![\w}])~~(?=\S)[^~\n]+~~(?![\w\\{])")
_FENCED = re.compile(r"^[ \t]*```[^\n]*\n.*?^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


def standing(text: str) -> str:
    """The text without what it strikes out."""
    return _STRUCK.sub(" ", text) if "~~" in text else text


def unfenced(text: str) -> str:
    """The text without its fenced blocks, which are quotations where an answer also stands outside them."""
    return _FENCED.sub("\n", text) if "```" in text else text


def stance(text: str, start: int, words: str = "") -> Literal["meant", "denied", "supposed"]:
    """How the response stands to the statement at `start`, whose own first words may be `words`.

    "If ... would" supposes in words alone: "if it takes 2 h, its speed would be" before a box is a final answer.
    """
    before = text[max(0, start - BEFORE) : start]
    governing = _LINK.sub("", _clause(before))
    if _DENIED.search(governing):
        return "denied"
    sentence = _SENTENCE.split(before)[-1]
    if _SUPPOSED.search(governing) or (
        words and re.search(r"\bif\b", sentence, re.I) and re.search(r"\bwould\b", sentence[-30:] + words, re.I)
    ):
        return "supposed"
    return "meant"


def _clause(before: str) -> str:
    """The clause that ends here. What "that" opens belongs to the verb before it."""
    breaks = [0, *(match.end() for match in _CLAUSE.finditer(before))]
    clause = before[breaks[-1] :]
    while len(breaks) > 1 and re.match(r"\s*that\b", clause):
        breaks.pop()
        clause = before[breaks[-1] :]
    return clause


def revised(between: str) -> re.Match[str] | None:
    """Where a text announces that what came before it does not stand."""
    return _REVISED.search(between)


def refuted(after: str, answer: str) -> bool:
    """Whether what directly follows a statement takes it back, or puts another number in its place."""
    after = after[:AFTER]
    replaced = _REPLACED.match(after)
    return bool(_REFUTED.match(after)) or bool(replaced and replaced[1] not in re.findall(r"-?\d+", answer))
