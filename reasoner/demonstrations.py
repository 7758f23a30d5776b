"""What the warm-up imitates: sums worked step by step, and sums answered at once, half of them in haste.

    4 + 3 - 2 =          4 + 3 - 2 =          4 + 3 - 2 =
    4+3=7                Answer: 5            Answer: 7
    7-2=5
    Answer: 5

Knows chain_sum tasks only. Neighbour: `base_model.Warmup`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from rollouts.roll_out import encode
from search.base import derive
from verifiers.base import Task

ALPHABET = "0123456789+-= :\nAnswer"

Row = tuple[list[int], list[bool]]  # token ids, loss mask


def demonstrations(
    tasks: Sequence[Task], tokenizer: Any, *, blurt: float, haste: float, count: int, seed: int
) -> list[Row]:
    """`count` rows over the tasks, in turn; each answered at once with probability `blurt`, else worked.

    A blurted answer leaves out the last term with probability `haste`: answering at once, one is often wrong.
    """
    noise = random.Random(derive(seed, "demonstrations"))
    order = list(tasks)
    noise.shuffle(order)
    rows = []
    for task in islice(cycle(order), count):
        lines = worked(expression(task))
        blurted, hasty = noise.random() < blurt, noise.random() < haste
        value = before_last(lines) if blurted and hasty else task.reference
        text = "\n".join([*([] if blurted else lines), f"Answer: {value}"])
        prompt = list(encode(tokenizer, task))
        response = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append((prompt + response, [False] * len(prompt) + [True] * len(response)))
    return rows


def expression(task: Task) -> str:
    """The sum a task asks for, e.g. "4 + 3 - 2". Raises ValueError for another kind of task or another alphabet."""
    if strange := sorted(set(task.question) - set(ALPHABET)):
        raise ValueError(
            f"task {task.id}: the warmed-up model does not know the characters {''.join(strange)!r} of its question: "
            'set tasks.prompt = "{expression} =", or base.kind = "pretrained"'
        )
    found = task.meta.get("expression")
    sum_of_digits = isinstance(found, str) and re.fullmatch(r"-?\d+( [+-] -?\d+)*", found)
    if not sum_of_digits or not isinstance(task.reference, str):
        raise ValueError(f"task {task.id} is not a chain_sum: base.kind = 'warmup' knows no other, use 'pretrained'")
    return found


def worked(sum_: str) -> list[str]:
    """The running total, one operation a line: "4 + 3 - 2" gives ["4+3=7", "7-2=5"]."""
    first, *rest = sum_.split(" ")
    total, lines = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if operator == "+" else total - int(term)
        lines.append(f"{total}{operator}{term}={after}")
        total = after
    return lines


def before_last(lines: Sequence[str]) -> str:
    """The running total that the last operation started from: what a hasty answer gives."""
    found = re.match(r"-?\d+", lines[-1])
    assert found is not None, f"a worked line begins with a number: {lines[-1]!r}"
    return found[0]
