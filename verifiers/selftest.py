"""Tries a judge on what training will show it, and says what failed.

A judge that is not deterministic, that rejects its own gold, that accepts corrupted answers or spam, or that cannot be
stopped, teaches the policy that. Runs through the pool, as in training. Knows the form of responses for the built-in
judges; for others the caller gives cases. Neighbours: `pool`; `reasoner verify --selftest` prints the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verifiers.base import Task, Verdict
from verifiers.pool import Pool

DEADLINE_S = 2.0
SLACK_S = 0.25
SPAM = (
    "",
    " ",
    ":",
    "\n\n",
    "Solution",
    "Let's think step by step.",
    "Answer:",
    "\\boxed{}",
    "0=0",
    "<answer></answer>",
    "```\n```",
)


@dataclass(frozen=True)
class Case:
    """A reference with responses that must be accepted and refused."""

    reference: Any
    good: tuple[str, ...]
    bad: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """One property, and what speaks against it: "" when nothing does."""

    name: str
    against: str


def selftest(name: str, cases: Sequence[Case] = (), **policy: Any) -> list[Check]:
    """Every property of the judge called `name`. Raises ValueError for a judge whose responses it knows no form of."""
    cases = tuple(cases) or CASES.get(name, ())
    if not cases:
        raise ValueError(f'no cases for "{name}": give some with --file, rows of gold, answer and expected')
    pairs = [(case.reference, response) for case in cases for response in (*case.good, *case.bad)]
    hostile = [(cases[0].reference, text) for text in HOSTILE.get(name, HOSTILE_TEXT)]
    with Pool(policies={name: policy}, env={"PYTHONHASHSEED": "1"}) as pool:
        first = _ask(pool, name, pairs)
        reordered = _ask(pool, name, pairs[::-1])[::-1]
        alone = [_ask(pool, name, [pair])[0] for pair in pairs]
        spam = [(case.reference, text) for case in cases for text in SPAM]
        on_spam = _ask(pool, name, spam)
        on_hostile = [_ask(pool, name, [pair], DEADLINE_S)[0] for pair in hostile]
        again = _ask(pool, name, pairs)
    with Pool(policies={name: policy}, env={"PYTHONHASHSEED": "2"}) as pool:
        reseeded = _ask(pool, name, pairs)
    wanted = [good for case in cases for good in [True] * len(case.good) + [False] * len(case.bad)]
    return [
        Check("accepts the gold", _against(pairs, first, [good or None for good in wanted])),
        Check("refuses corrupted answers", _against(pairs, first, [None if good else False for good in wanted])),
        Check("accepts no empty or spam string", _against(spam, on_spam, [False] * len(spam))),
        Check("gives the same verdict in another order", _differs(pairs, first, reordered)),
        Check("gives the same verdict one at a time", _differs(pairs, first, alone)),
        Check("gives the same verdict under another PYTHONHASHSEED", _differs(pairs, first, reseeded)),
        Check("accepts nothing that hangs or hoards memory", _against(hostile, on_hostile, [False] * len(hostile))),
        Check(f"ends what hangs within {DEADLINE_S:g} s + {SLACK_S:g} s", _late(hostile, on_hostile)),
        Check("is whole afterwards", _differs(pairs, first, again)),
    ]


def _ask(pool: Pool, name: str, pairs: Sequence[tuple[Any, str]], timeout: float = 30.0) -> list[Verdict]:
    calls = [("verify", (Task(f"selftest/{i}", (), ref, name), text)) for i, (ref, text) in enumerate(pairs)]
    return pool.submit(name, calls, timeout=timeout).result()


def _against(pairs: Sequence[tuple[Any, str]], verdicts: Sequence[Verdict], wanted: Sequence[bool | None]) -> str:
    """What was not accepted where True is wanted, or accepted where False is; None asks for nothing."""
    wrong = [
        f"{text[:60]!r}: {v.status}, {v.why}"
        for (_, text), v, want in zip(pairs, verdicts, wanted, strict=True)
        if want is not None and want != (v.correct is True)
    ]
    return "; ".join(wrong[:3])


def _same(left: Verdict, right: Verdict) -> bool:
    return (left.status, left.score, left.correct, left.answer) == (
        right.status,
        right.score,
        right.correct,
        right.answer,
    )


def _differs(pairs: Sequence[tuple[Any, str]], before: Sequence[Verdict], after: Sequence[Verdict]) -> str:
    wrong = [
        f"{text[:60]!r}: {a.status} {a.score}, then {b.status} {b.score} ({b.why})"
        for (_, text), a, b in zip(pairs, before, after, strict=True)
        if not _same(a, b)
    ]
    return "; ".join(wrong[:3])


def _late(pairs: Sequence[tuple[Any, str]], verdicts: Sequence[Verdict]) -> str:
    late = [(text, v) for (_, text), v in zip(pairs, verdicts, strict=True) if v.seconds > DEADLINE_S + SLACK_S]
    return "; ".join(f"{text[:60]!r} took {v.seconds:.2f} s" for text, v in late[:3])


# -- cases of the built-in judges --------------------------------------------------------------------------------

_SQUARE = {
    "kind": "call",
    "entry_point": "square",
    "tests": [{"args": [3], "expected": 9}, {"args": [-2], "expected": 4}],
    "time_limit_s": 1.0,
}
_DOUBLE = {"kind": "stdio", "tests": [{"stdin": "3\n", "stdout": "6\n"}], "time_limit_s": 1.0}
_MIRROR = {
    "train": [{"input": [[1, 2], [0, 3]], "output": [[2, 1], [3, 0]]}],
    "test": [{"input": [[4, 0, 0], [5, 6, 0]], "output": [[0, 0, 4], [0, 6, 5]]}],
}
_SUM = {
    "dataset": "chain_sum",
    "entry": {"question": "4 - 1 - 7 =", "answer": "-4", "metadata": {"source_dataset": "chain_sum"}},
}

CASES: dict[str, tuple[Case, ...]] = {
    "math": (
        Case("7", ("\\boxed{7}", "So the answer is \\boxed{7}."), ("\\boxed{8}", "\\boxed{-7}", "\\boxed{70}")),
        Case("\\frac{1}{2}", ("\\boxed{\\frac{1}{2}}", "\\boxed{0.5}"), ("\\boxed{\\frac{2}{1}}", "\\boxed{0.4}")),
        Case("(1, 2)", ("\\boxed{(1,2)}",), ("\\boxed{(2,1)}", "\\boxed{\\{1,2\\}}")),
        Case("x^2 - 1", ("\\boxed{(x-1)(x+1)}",), ("\\boxed{x^2 + 1}",)),
    ),
    "code": (
        Case(
            _SQUARE,
            ("def square(x): return x * x",),
            ("def square(x): return 9", "import os\nos._exit(0)", "square = 9"),
        ),
        Case(_DOUBLE, ("print(2 * int(input()))",), ("print(6); 1 / 0", "print(5)", "raise SystemExit")),
    ),
    "arc": (
        Case(
            _MIRROR,
            ("0 0 4\n0 6 5", "[[0,0,4],[0,6,5]]"),
            ("4 0 0\n5 6 0", "0 0 4\n0 6", "0 0 4\n0 6 5\n\n0 0 4\n0 6 6"),
        ),
    ),
    "reasoning_gym": (
        Case(_SUM, ("-4", "<answer>-4</answer>"), ("4", "-5", "<answer>-4</answer> <answer>4</answer>")),
    ),
}

CASES["process_math"] = CASES["math"]

HOSTILE_TEXT = (
    "\\boxed{10^{10^{10}}}",
    "\\boxed{" + "(" * 5000 + "1" + ")" * 5000 + "}",
    "\\boxed{" * 2000 + "1" + "}" * 2000,
    "\\boxed{" + "\\sqrt{1+" * 500 + "2" + "}" * 500 + "}",
    "\\boxed{9^{9^{9^{9}}} \\bmod 7}",
    "\\boxed{1000000!}",
    "\\boxed{" + "9" * 200_000 + "}",
    "\\boxed{(x+y+z)^{5000}}",
    "\\boxed{" + "+".join(f"\\sin^{{{k}}}(x)" for k in range(1, 300)) + "}",
    "{" * 50_000,
    "x " * 500_000,
)
HOSTILE = {
    "code": (
        "while True: pass",
        "x = bytearray(1 << 40)",
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        "import os\nwhile True: os.fork()",
        "import time\ntime.sleep(60)",
        "while True: print('x' * 100_000)",
        "def square(x):\n    while True: pass",
        "def square(x): return square(x)",
        "x = " + "(" * 5000 + ")" * 5000,
    )
}
