r"""Where the final answer stands in a response.

Finds text, never judges it: knows no numbers and no reference. A response commits to an answer with a marker
(`\boxed{}`, `<answer>`, `####`, "Answer:") or by being nothing but the answer. Boxes must agree; of statements in
words the last that is meant counts (`verifiers.commitment` says which are). What is found goes to `verifiers.math`.
Limits: markers are English; a box inside an unclosed `<think>` is a thought, not an answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from verifiers.commitment import refuted, revised, stance, standing, unfenced

BARE = 240  # characters: a response no longer than this may be an answer without any marker
LONGEST = 4000  # characters of an answer; what is longer is no answer
TAIL = 50_000  # characters at the end of a response that are looked at
BOXES = 64  # a response with more boxes commits to nothing
CUES = 16  # statements in words, from the end, that are looked at

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_CUE = re.compile(
    r"\b(?:final\s+)?ans(?:wer)?\b[*_\s]*(?:(?:of|to|for)\b[^.:=\n]{1,80}?)?(?:\b(?:is|was|equals|should\s+be|"
    r"must\s+be|would\s+be)\b\s*:?|:|=|：)[*_]*[ \t]*|答案\s*(?:是|为|：|:)+\s*",
    re.IGNORECASE,
)
_RESULT = re.compile(r"\b(?:result|solution|value)s?\s+(?:is|are|equals)\b\s*:?\s*", re.IGNORECASE)
_CONCLUDED = re.compile(r"\b(?:final|finally|therefore|thus|hence|conclude|altogether|in total|so)\b", re.I)
_HEDGED = re.compile(r"\b(?:or|either|maybe|perhaps|possibly|alternatively|another|also|might|could)\b", re.I)
_BEFORE = re.compile(r"(?:-|\d|\\(?:sqrt|[dt]?frac)\s*\{\s*)$")  # of a formula that goes on into a box
_AFTER = re.compile(r"\s*\^(?!\s*\{?\s*\\circ)(?:\{[^{}]*\}|\w)|\s*\\?%|\s*[-+*/]\s*\d+")  # or out of it
_BARE_BOX = re.compile(r"[^\s$\\{}]+")
_IS_ANSWER = re.compile(r"\s+is\s+(?:the|my|our)\s+(?:final\s+|correct\s+)?(?:answer|solution)$", re.I)
_JOIN = re.compile(
    r"(?:[\s$,;&.]|\\[()\[\],;:! ]|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|[A-Za-z](?:_\w)?\s*=)*"
)
_INTEGER = re.compile(r"-?\d+")
_MATH = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SENTENCE = re.compile(
    r"\.(?=\s+[A-Z]|\s*$)|(?<=[\d$)}])\s+(?=\(?(?:(?:and|but)\s+)?not\s)|,\s+(?=(?:so|which|because|since|as|where|when|but|not|thus|hence|therefore|making|"
    r"giving)\b)|\s+(?=I hope it is correct)|\s+(?:because|since|so that|which|hence|therefore)\b"
)


@dataclass(frozen=True, slots=True)
class Found:
    """The texts a response commits to. They must agree with each other: more than one is normally a contradiction."""

    texts: tuple[str, ...]  # the last is the final one
    marker: str


def final(response: str) -> Found | None:
    """The final answer of a response as it is written there; None when it commits to none."""
    text = after_thinking(response)
    if text is None:
        return None
    text = standing(text[-TAIL:])
    outside = unfenced(text)
    text = outside if _BOX.search(outside) or _CUE.search(outside) else text
    tags = list(_TAG.finditer(text)) if "</answer>" in text.lower() else []
    if tags:
        inner = [_inside_tag(tag.group(1).strip()) for tag in tags]
        if refuted(text[tags[-1].end() :], inner[-1][-1]):
            return None
        outside = _boxes(_TAG.sub(" ", text))
        return _found((*outside, *(t for texts in inner for t in texts)), "tag")
    if "boxed" in text or "fbox" in text:
        boxes = _boxes(text)
        if boxes:
            return _found((*boxes, *_stated_after(text, boxes[-1])), "box")
        if not _box_spans(text) and _BOX.search(text) and "{}" not in text:
            return None  # a box that never closes (the response was cut off), or far too many
    for marker, find in (("####", _hashes), ("cue", _cue), ("bare", _bare), ("math", _lone_math), ("result", _result)):
        candidate = find(text)
        if candidate is False:
            return None
        if candidate and not _BOX.search(candidate):
            return _found((candidate,), marker)
    return None


def _found(texts: tuple[str, ...], marker: str) -> Found | None:
    if not texts or not texts[-1].strip() or len(texts[-1]) > LONGEST:
        return None
    return Found(tuple(dict.fromkeys(t.strip() for t in texts if t.strip())), marker)


def after_thinking(text: str) -> str | None:
    """What follows the thought; None when the thought never ends, which is no answer of any kind."""
    end = text.rfind("</think>")
    if end >= 0:
        return text[end + 8 :]
    return None if "<think>" in text else text


def _inside_tag(tag: str) -> tuple[str, ...]:
    boxes = _boxes(tag)
    if boxes:
        return boxes
    cue = _cue(tag)
    return (cue or tag,)


def closing(text: str, start: int) -> int:
    """Index of the brace that closes the one at `start`, or -1."""
    depth, i, size = 0, start, len(text)
    while i < size:
        c = text[i]
        if c == "\\":
            i += 2
            continue
        if c == "{":
            depth += 1
        elif c == "}":
            depth -= 1
            if not depth:
                return i
        i += 1
    return -1


def _boxes(text: str) -> tuple[str, ...]:
    """What the boxes commit to: neighbours on one line are one list, a revision or a conclusion drops what came before.

    An intermediate result may be boxed on the way to a "therefore"; an alternative or a second answer may not.
    """
    groups: list[list[str]] = []
    denied, end, answered = set(), 0, False
    spans = _box_spans(text)
    for i, (start, stop, content) in enumerate(spans):
        between, end = text[end:start], stop
        behind = text[stop : spans[i + 1][0] if i + 1 < len(spans) else None]
        stands = stance(text, start)
        if stands == "denied":
            denied.add(content)
        if stands != "meant" or refuted(behind, content):
            continue
        if groups and (revised(between) or (not answered and _concluded(between))):
            groups = [[content]]
        elif groups and "\n" not in between and len(between) < 60 and _JOIN.fullmatch(between):
            groups[-1].append(content)
        else:
            groups.append([content])
        answered = "answer" in between[-60:].lower()
    if groups and denied & {*groups[-1]}:
        return ()
    return tuple(", ".join(dict.fromkeys(group)) for group in groups)


def _concluded(between: str) -> bool:
    return bool(_CONCLUDED.search(between)) and not _HEDGED.search(between)


def _box_spans(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of each box that is not empty, of nested ones the innermost; [] when one is cut off."""
    spans: list[tuple[int, int, str]] = []
    matches = list(_BOX.finditer(text))
    for match in matches if len(matches) <= BOXES else ():
        at = match.end()
        if text[at : at + 1] == "{":
            end = closing(text, at)
            if end < 0:
                return []
            content, stop = text[at + 1 : end].strip(), end + 1
        else:
            bare = _BARE_BOX.match(text, at)
            content, stop = (bare.group().rstrip(".,"), bare.end()) if bare else ("", at)
        if spans and match.start() < spans[-1][1]:
            spans[-1] = (*spans[-1][:2], content)
        elif content:
            spans.append((match.start(), stop, _with_its_formula(text, match.start(), stop, content)))
    return spans


def _stated_after(text: str, box: str) -> tuple[str, ...]:
    """The answer in words after the last box that must agree with it: after a revision, or a number after a number."""
    rest = text[[match.end() for match in _BOX.finditer(text)][-1] :]
    revision = revised(rest)
    answer = _cue(rest[revision.end() if revision else 0 :])
    numbers = answer and _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(box)
    return (answer,) if answer and (revision or numbers) else ()


def _with_its_formula(text: str, start: int, stop: int, content: str) -> str:
    r"""What a box says together with what is glued to it: `-\boxed{4}` says -4, `\boxed{4}^2` 16."""
    before, after = _BEFORE.search(text[max(0, start - 20) : start]), _AFTER.match(text, stop)
    if not before and not after:
        return content
    return f"{before.group() if before else ''}({content}){after.group() if after else ''}"


def _hashes(text: str) -> str | None:
    at = text.rfind("####")
    if at < 0:
        return None
    line, _, rest = text[at + 4 :].lstrip("# \t").partition("\n")
    return None if rest.strip() or re.match(r"\s*(?:step|solution)\b", line, re.I) else trim(line)


def _result(text: str) -> str | Literal[False] | None:
    return _cue(text, _RESULT)


def _cue(text: str, pattern: re.Pattern[str] = _CUE) -> str | Literal[False] | None:
    """What follows the last "the answer is" that is meant; False when it is taken back or denied later."""
    denied = set()
    for cue in reversed(list(pattern.finditer(text))[-CUES:]):
        rest = text[cue.end() :].lstrip(" \t*_")[:LONGEST]
        answer = _stated(rest)
        stands = stance(text, cue.start(), cue.group())
        if stands == "denied":
            denied.add(answer)
        elif stands == "meant" and not (answer and answer.endswith("?")):
            return False if answer in denied or _withdrawn(rest, answer or "") else answer
    return None


def _stated(rest: str) -> str | None:
    """The answer that opens a text: its first line, or the display or fenced line that stands in its place."""
    line, _, below = rest.lstrip("\n").partition("\n")
    if re.match(r"\s*(?:\\\[|\$\$)\s*$", line):  # a display that opens on its own line
        display = _MATH.search(rest)
        return trim(display.group()) if display else None
    return trim(below.partition("\n")[0] if line.startswith("```") else line)


def _withdrawn(rest: str, answer: str) -> bool:
    """Whether a text that opens with an answer takes it back, or revises it and names another number."""
    at = rest.find(answer)
    if at >= 0 and refuted(rest[at + len(answer) :], answer):
        return True
    after = "".join(re.split(r"[.!?]\s+", rest, maxsplit=1)[1:])
    return bool((revised(after) or re.match(r"no\b", after, re.IGNORECASE)) and re.search(r"\d", after))


def _bare(text: str) -> str | None:
    text = text.strip()
    if len(text) > BARE or "\n" in text.strip("$ \n"):
        return None
    if _MATH.search(text) and re.search(r"[A-Za-z]{2,}", _MATH.sub(" ", text)) and not _MATH.match(text):
        return None  # a sentence around a formula
    prose = re.sub(r"\\[A-Za-z]+|\$", " ", text)
    answer = trim(text) if len(re.findall(r"[A-Za-z]{3,}", prose)) <= 4 else None
    return None if answer and refuted(text[text.find(answer) + len(answer) :], answer) else answer


def _lone_math(text: str) -> str | None:
    """The only formula of the last paragraph."""
    last = text.strip().rpartition("\n\n")[2][-LONGEST // 2 :]
    spans = list(_MATH.finditer(last))
    if len(spans) != 1 or stance(last, spans[0].start()) != "meant":
        return None
    answer = trim(next(group for group in spans[0].groups() if group))
    return None if refuted(last[spans[0].end() :], answer) else answer


def trim(text: str) -> str:
    """One answer without the sentence around it."""
    text = text[:LONGEST].strip().strip("*_`").strip()
    span = _MATH.match(text)
    if span and not re.match(r"\s*(?:,|;|and\b|or\b|\\|%|[-+=<>^])", text[span.end() :]):
        tail = _SENTENCE.split(text[span.end() :])[0].strip(" *_")
        unit = re.match(r"[A-Za-z°/^0-9 ]{0,24}$", tail)
        return next(g for g in span.groups() if g).strip() + (" " + tail if unit and tail else "")
    end = _SENTENCE.search(text)
    if end and end.start():
        text = text[: end.start()]
    text = _IS_ANSWER.sub("", text)
    return text.strip().strip("*_`").strip()
