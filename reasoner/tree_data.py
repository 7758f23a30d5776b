"""Searched trees of training tasks as training data, in the columns that TRL's trainers and `reasoner prm train` take.

`compare` calls it with the trees of every method; held-out tasks never come here. Which paths and pairs are worth
keeping is `search.export`'s choice; here they get their text, their labels and their files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from reasoner import step_labels
from rollouts.base import Group, Rollout
from rollouts.roll_out import Searched
from search.export import dpo, sft
from search.tree import ended
from verifiers import Pool

Row = dict[str, Any]
IGNORED = -100  # label of a token that nobody learns: torch's and TRL's


@dataclass
class Rows:
    """What was kept, a list for each file."""

    sft: list[Row] = field(default_factory=list)
    dpo: list[Row] = field(default_factory=list)
    steps: list[Row] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        folder.mkdir()
        for name in ("sft", "dpo", "steps"):
            step_labels.write(getattr(self, name), folder / f"{name}.jsonl")


async def rows_of(found: Sequence[Sequence[Searched]], pool: Pool, tokenizer: Any, delimiter: str) -> Rows:
    """Rows from the trees of the same tasks, grown by one method or more: every path that ended, returned or not.

    sft: input_ids and labels (-100 where nothing is learned: the prompt, and what a search wrote) of correct paths
        that differ; `weight` gives each task one unit in all.
    dpo: prompt, chosen, rejected as text, and the same as ids (prompt_ids ...): a right and a wrong path from where
        they part. A pair whose sides hold text that a search wrote is left out: TRL's columns cannot mask it.
    steps: ProcessBench's form with values, as `reasoner prm label --by paths` writes it, of paths without written text.
    """
    rows, decode = Rows(), partial(tokenizer.decode, skip_special_tokens=True)
    for group in await asyncio.gather(*(_judged(trees, pool) for trees in zip(*found, strict=True))):
        paths, correct = [r.trajectory for r in group.scored], [r.verdict.correct for r in group.scored]
        name = {"task": group.task.id}
        rows.sft += [name | _sft_row(row) for row in sft(paths, correct)]
        rows.dpo += [name | _pair(row, tokenizer) for row in dpo(paths, correct) if _sampled(row)]
        rows.steps += _labelled(group, delimiter, decode) if delimiter else []
    return rows


async def _judged(trees: Sequence[Searched], pool: Pool) -> Group:
    """The distinct paths of one task's trees that ended by themselves."""
    task = trees[0].group.task
    every = [path for each in trees if each.tree is not None for path in ended(each.tree.record.rows)]
    paths = list({path.ids: path for path in every if path.end == "stop" and path.sampled_tokens}.values())
    verdicts = await pool.verify(task, [path.text for path in paths]) if paths else []
    return Group(task, tuple(Rollout(task, p, v) for p, v in zip(paths, verdicts, strict=True)))


def _labelled(group: Group, delimiter: str, decode: Any) -> list[Row]:
    own = tuple(r for r in group.scored if all(step.sampled for step in r.trajectory.steps))
    values = step_labels.by_paths(Group(group.task, own), delimiter, decode=decode)
    return [step_labels.row(r, v, delimiter, decode) for r, v in zip(own, values, strict=True)]


def _sft_row(row: Row) -> Row:
    said = [i if own else IGNORED for i, own in zip(row["completion"], row["mask"], strict=True)]
    labels = [IGNORED] * len(row["prompt"]) + said
    return {"input_ids": row["prompt"] + row["completion"], "labels": labels, "weight": row["weight"]}


def _sampled(row: Row) -> bool:
    return all(row["chosen_mask"]) and all(row["rejected_mask"])


def _pair(row: Row, tokenizer: Any) -> Row:
    """The special tokens are in the text, so that it reads back as the ids where the tokenizer is able to."""
    sides = ("prompt", "chosen", "rejected")
    texts = {side: tokenizer.decode(row[side], skip_special_tokens=False) for side in sides}
    return texts | {f"{side}_ids": row[side] for side in sides}
