"""reasoning-gym's own scorers as a judge: one plug-in for every dataset of that package.

The reference is `{"dataset": name, "entry": {...}}`, the entry as the dataset gave it, with its `metadata`. Scores
between 0 and 1 are partial credit; correct means 1. Knows nothing of the tasks themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from verifiers.base import Task, Verdict
from verifiers.extract import after_thinking

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class ReasoningGym:
    """Scores what stands in the last `<answer>` tags, or the whole response where there are none."""

    def verify(self, task: Task, response: str) -> Verdict:
        answer = self.answer(response)
        scorer = _scorer(task.reference["dataset"])
        score = float(scorer.score_answer(answer, entry=task.reference["entry"]))
        return Verdict("scored", score, score >= 1.0, answer=answer, why=f"{task.reference['dataset']}: {score:.3g}")

    def check(self, task: Task) -> None:
        reference = task.reference
        if not isinstance(reference, dict) or not {"dataset", "entry"} <= reference.keys():
            raise ValueError(f'task {task.id}: reference={reference!r:.80}: give {{"dataset": name, "entry": {{...}}}}')
        _scorer(reference["dataset"])

    def answer(self, response: str) -> str | None:
        said = after_thinking(response) or ""
        found = _ANSWER.findall(said)
        return (found[-1] if found else said).strip() or None

    def equal(self, left: str, right: str) -> bool:
        return left == right


@cache
def _scorer(dataset: str) -> Any:
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(dataset, size=1, seed=0)
    except ValueError as error:
        raise ValueError(f'reasoning_gym has no dataset "{dataset}": {error}') from error
