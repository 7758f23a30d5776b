"""Searched and judged paths as training data: token ids, never text.

Rows are plain dicts of ids, ready for JSON lines. Knows nothing of trainers. Written tokens (prompts of a revision,
forced continuations) are masked out: nobody should learn to say what the search said.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from search.base import Trajectory

Row = dict[str, Any]


def sft(
    paths: Sequence[Trajectory],
    correct: Sequence[bool | None],
    keep: int = 4,
    key: Callable[[Trajectory], Sequence[Hashable]] | None = None,
) -> list[Row]:
    """Up to `keep` correct finished paths, no two alike, chosen to differ from each other as much as they can.

    The likeliest comes first; then, again and again, the path that is least like those chosen. Two paths are as alike
    as the prefix they share is long, or, with `key`, as their keys are similar: a key is the sequence of what matters
    in a path, and of paths with one key the likeliest stands for all.
    `weight` gives every question the same total, as Monte-Carlo EM on its marginal wants.
    """
    right = [p for p, c in zip(paths, correct, strict=True) if c and p.end == "stop"]
    pool: dict[Sequence[Hashable], Trajectory] = {}
    for path in sorted(right, key=lambda p: (-p.logprob, p.ids)):
        pool.setdefault(tuple(key(path)) if key else path.ids, path)
    alike = _similarity if key else shared
    chosen: list[Sequence[Hashable]] = []
    while len(chosen) < min(keep, len(pool)):
        left = [name for name in pool if name not in chosen]  # likeliest first
        chosen.append(min(left, key=lambda name: max((alike(name, other) for other in chosen), default=0)))
    return [_row(pool[name]) | {"weight": 1 / len(chosen)} for name in chosen]


def _similarity(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


def dpo(paths: Sequence[Trajectory], correct: Sequence[bool | None], pairs: int = 8) -> list[Row]:
    """Right and wrong finished paths that share a prefix: {prompt, chosen, rejected}, longest shared prefix first.

    The prefix is part of the prompt, so that the pair differs from its first token on. Each path is used once, and the
    pair must diverge at a sampled token: both sides must be the model's own choice.
    """
    ended = [(p, c) for p, c in zip(paths, correct, strict=True) if p.end == "stop" and c is not None]
    right = list({p.ids: p for p, c in ended if c}.values())
    wrong = list({p.ids: p for p, c in ended if not c}.values())
    order = sorted(((-shared(a.ids, b.ids), i, j) for i, a in enumerate(right) for j, b in enumerate(wrong)))
    rows, used = [], set()
    for length, i, j in order:
        fork = -length
        free = ("right", i) not in used and ("wrong", j) not in used
        if len(rows) < pairs and free and _sampled_at(right[i], fork) and _sampled_at(wrong[j], fork):
            used |= {("right", i), ("wrong", j)}
            rows.append(
                {
                    "prompt": list(right[i].ids[:fork]),
                    "chosen": list(right[i].ids[fork:]),
                    "rejected": list(wrong[j].ids[fork:]),
                    "chosen_mask": _mask(right[i])[fork - len(right[i].prompt) :],
                    "rejected_mask": _mask(wrong[j])[fork - len(wrong[j].prompt) :],
                }
            )
    return rows


@dataclass
class _Count:
    right: int = 0
    judged: int = 0


def step_labels(paths: Sequence[Trajectory], correct: Sequence[bool | None]) -> list[Row]:
    """One row per judged path: at the end of each step, how often paths through that very prefix were right.

    `ends`: positions after each step; `hard`: 1.0 where any path through it was right; `soft`: the share that was;
    `paths`: how many paths the label rests on (1 says little).
    """
    counts: dict[tuple[int, ...], _Count] = {}
    distinct = {path.ids: (path, right) for path, right in zip(paths, correct, strict=True)}
    judged = [(path, bool(right)) for path, right in distinct.values() if right is not None]
    for path, right in judged:
        for end in _ends(path):
            count = counts.setdefault(path.ids[: len(path.prompt) + end], _Count())
            count.judged += 1
            count.right += right
    rows = []
    for path, _ in judged:
        seen = [counts[path.ids[: len(path.prompt) + end]] for end in _ends(path)]
        rows.append(
            _row(path)
            | {
                "ends": _ends(path),
                "hard": [float(c.right > 0) for c in seen],
                "soft": [c.right / c.judged for c in seen],
                "paths": [c.judged for c in seen],
            }
        )
    return rows


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _row(path: Trajectory) -> Row:
    return {"prompt": list(path.prompt), "completion": list(path.ids[len(path.prompt) :]), "mask": _mask(path)}


def _mask(path: Trajectory) -> list[int]:
    return [int(step.sampled) for step in path.steps for _ in step.ids]


def _ends(path: Trajectory) -> list[int]:
    ends, at = [], 0
    for step in path.steps:
        at += len(step.ids)
        ends.append(at)
    return ends


def _sampled_at(path: Trajectory, position: int) -> bool:
    at = position - len(path.prompt)
    mask = _mask(path)
    return 0 <= at < len(mask) and bool(mask[at])
