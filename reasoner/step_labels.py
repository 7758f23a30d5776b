"""What each step of a response is worth: the labels that process reward models are trained on and measured by.

Three sources, from cheap to dear: a rule (every equality that is stated is checked), the other paths of a journal's
group, and fresh rollouts from each step, one by one or by bisection. Knows engines and
verifiers through their interfaces alone. Neighbours: `prm.py` trains on the rows; `credit.Process` uses such values.

A row is one JSON line in ProcessBench's form (Zheng et al. 2024, arXiv:2412.06559: id, problem, steps,
final_answer_correct, label = index of the first wrong step or -1) with what training needs besides: the token `ids` of
prompt and response, where each step `ends` among them, the steps' `values` in [0, 1] and the `delimiter`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rollouts.base import Group, Rollout
from search.base import Decode, Engine, Step, Trajectory, derive, step_ends
from search.export import step_labels
from verifiers.base import Verdict
from verifiers.process import first_wrong, step_scores

Row = dict[str, Any]
Judge = Callable[[Sequence[str]], Awaitable[Sequence[Verdict]]]  # of the texts of whole responses to one task


def row(rollout: Rollout, values: Sequence[float], delimiter: str, decode: Decode) -> Row:
    """The row of a judged path whose steps have these values; a step is wrong when its value is below 1/2."""
    path, task = rollout.trajectory, rollout.task
    ends = judged_at(path, delimiter, decode)
    steps = path.text.removesuffix(delimiter).split(delimiter)
    if not len(ends) == len(values) == len(steps):
        raise ValueError(f"task {task.id}: {len(values)} values for {len(steps)} steps that end at {ends}")
    return {
        "id": f"{task.id}/{path.seed}",
        "problem": task.question,
        "steps": steps,
        "final_answer_correct": rollout.verdict.correct,
        "label": next((i for i, value in enumerate(values) if value < 0.5), -1),
        "ids": list(path.ids),
        "prompt": len(path.prompt),
        "ends": ends,
        "values": list(values),
        "delimiter": delimiter,
    }


def judged_at(path: Trajectory, delimiter: str, decode: Decode) -> list[int]:
    """How many tokens of prompt and response a judge of each step has read: the token that ends the path is not one."""
    ends = [len(path.prompt) + end for end in step_ends(path, delimiter, decode)]
    return [*ends[:-1], ends[-1] - (path.end == "stop")]


def by_rule(rollout: Rollout, delimiter: str = "\n") -> list[float]:
    """1 up to the first step that states a false equality, 0 from there on.

    Where none does and the answer is wrong, the last step is wrong: it states the answer. (A step that takes a wrong
    number from the problem is not seen.)
    """
    scores = step_scores(rollout.trajectory.text, delimiter=delimiter) or (1.0,)
    wrong = first_wrong(scores)
    if wrong is None and rollout.verdict.correct is False:
        wrong = len(scores) - 1
    return [float(wrong is None or i < wrong) for i in range(len(scores))]


def by_paths(group: Group, delimiter: str = "\n", *, decode: Decode) -> list[list[float]]:
    """For each judged rollout of a group: after each step, the share of the group's paths through it that were right.

    Costs nothing, and says little where paths part early: a step that no other path shares is worth its own outcome.
    """
    rollouts = group.scored
    paths = [_cut(r.trajectory, delimiter, decode) for r in rollouts]
    rows = step_labels(paths, [r.verdict.correct for r in rollouts])
    found = {tuple(row["prompt"]) + tuple(row["completion"]): row["soft"] for row in rows}
    return [found[path.ids] for path in paths]


def _cut(path: Trajectory, delimiter: str, decode: Decode) -> Trajectory:
    """The same tokens, one step per step of the response."""
    ids = path.ids[len(path.prompt) :]
    ends = step_ends(path, delimiter, decode)
    pieces = [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return Trajectory(path.prompt, tuple(Step(piece, (0.0,) * len(piece)) for piece in pieces), path.end)


async def by_rollouts(
    rollout: Rollout, engine: Engine, judge: Judge, n: int, *, delimiter: str = "\n", decode: Decode, hard: bool = False
) -> list[float]:
    """Monte-Carlo values (Math-Shepherd, Wang et al. 2023, arXiv:2312.08935): the share of n continuations from each
    step that end right; `hard`: whether any does. The last step's value is the path's own outcome.

    Continuations that cannot be judged are left out. Raises ValueError where none can.
    """
    path = rollout.trajectory
    ends = judged_at(path, delimiter, decode)
    values = [await _value(rollout, end, engine, judge, n, decode) for end in ends[:-1]]
    values.append(float(bool(rollout.verdict.correct)))
    return [float(v > 0) for v in values] if hard else values


async def by_bisection(
    rollout: Rollout, engine: Engine, judge: Judge, n: int, *, delimiter: str = "\n", decode: Decode
) -> list[float]:
    """Hard values with the first error found by bisection (OmegaPRM, Luo et al. 2024, arXiv:2406.06592).

    It trusts that no right answer can be reached once an error is made: about log2(steps) places are tried instead of
    all. A path whose answer is right has no error.
    """
    ends = judged_at(rollout.trajectory, delimiter, decode)
    if rollout.verdict.correct:
        return [1.0] * len(ends)
    good, bad = -1, len(ends) - 1  # steps known to be right and wrong; the last one states a wrong answer
    while bad - good > 1:
        middle = (good + bad) // 2
        if await _value(rollout, ends[middle], engine, judge, n, decode) > 0:
            good = middle
        else:
            bad = middle
    return [float(i <= good) for i in range(len(ends))]


async def _value(rollout: Rollout, end: int, engine: Engine, judge: Judge, n: int, decode: Decode) -> float:
    """The share of n continuations of the path's first `end` tokens that end right."""
    path = rollout.trajectory
    begun = path.ids[len(path.prompt) : end]
    step = Step(begun, (0.0,) * len(begun), decode(begun), sampled=False)
    root = Trajectory(path.prompt, (step,), seed=derive(path.seed, "value", end))
    texts = [child.text for child in await engine.extend(root, n=n)]
    judged = [v.correct for v in await judge(texts) if v.status == "scored"]
    if not judged:
        raise ValueError(f"task {rollout.task.id}: none of {n} continuations could be judged")
    return sum(judged) / len(judged)


def write(rows: Iterable[Row], path: Path) -> None:
    """A file of these rows, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        for each in rows:
            file.write(json.dumps(each, ensure_ascii=False, separators=(",", ":")) + "\n")
    partial.replace(path)


def read(path: Path) -> list[Row]:
    """Rows of a ProcessBench-form file. Raises ValueError naming the line that is not one."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            found = json.loads(line)
            steps, label = found["steps"], found["label"]
            _, whole = str(found["problem"]), isinstance(label, int) and isinstance(steps, list)
            if not whole or not steps or not -1 <= label < len(steps):
                raise ValueError(f"label {label!r} with {len(steps)} steps")
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'{path}, line {number}: {error!r}: give {{"problem": text, "steps": [texts], "label": index of the '
                "first wrong step or -1}"
            ) from None
        rows.append(found)
    if not rows:
        raise ValueError(f"{path} has no lines: give a file in ProcessBench's form")
    return rows
