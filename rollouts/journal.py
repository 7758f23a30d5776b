"""The append-only record of every rollout: one JSON line per group.

Resume, replay, the report and datasets are queries on it. A line is written whole or not at all as far as the file
system allows; a torn last line (a kill, a full disk) is cut when the journal is opened or read.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rollouts.base import Group, Rollout
from search.base import Step, Trajectory
from verifiers.base import Task, Verdict


class Journal:
    """Appends groups to a file. Opening one that ends in a torn line cuts that line off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            whole = sum(len(line) for line in _whole_lines(path))
            if whole < path.stat().st_size:
                with path.open("r+b") as file:
                    file.truncate(whole)
        self._file = path.open("ab")

    def append(self, group: Group, *, step: int, version: int) -> None:
        rollouts = [_row(r) for r in group.rollouts]
        row = {"step": step, "version": version, "task": asdict(group.task), "rollouts": rollouts}
        self._file.write(json.dumps(row, separators=(",", ":"), default=str).encode() + b"\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> Iterator[tuple[int, int, Group]]:
    """(step, policy version, group) in the order written; a torn last line is left out."""
    for line in _whole_lines(path):
        row = json.loads(line)
        task = Task(**{**row["task"], "prompt": tuple(row["task"]["prompt"])})
        yield row["step"], row["version"], Group(task, tuple(_rollout(task, r) for r in row["rollouts"]))


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield line


def _row(rollout: Rollout) -> dict[str, Any]:
    row = {**_path_row(rollout.trajectory), "verdict": asdict(rollout.verdict)}
    return row | {"earlier": [_path_row(path) for path in rollout.earlier]} if rollout.earlier else row


def _path_row(path: Trajectory) -> dict[str, Any]:
    return {
        "prompt_ids": path.prompt,
        "steps": [
            {
                "ids": s.ids,
                "logprobs": [round(lp, 6) for lp in s.logprobs],
                "text": s.text,
                "sampled": s.sampled,
                "versions": s.versions,
                **({"experts": b64encode(zlib.compress(s.experts)).decode()} if s.experts else {}),
            }
            for s in path.steps
        ],
        "end": path.end,
        "seed": path.seed,
        "value": path.value,
        "log_weight": path.log_weight,
    }


def _rollout(task: Task, row: dict[str, Any]) -> Rollout:
    verdict = Verdict(**{**row["verdict"], "steps": tuple(row["verdict"]["steps"])})
    return Rollout(task, _path(row), verdict, tuple(map(_path, row.get("earlier", ()))))


def _path(row: dict[str, Any]) -> Trajectory:
    steps = tuple(
        Step(
            ids=tuple(s["ids"]),
            logprobs=tuple(s["logprobs"]),
            text=s["text"],
            sampled=s["sampled"],
            versions=tuple(map(tuple, s["versions"])),
            experts=zlib.decompress(b64decode(s["experts"])) if "experts" in s else b"",
        )
        for s in row["steps"]
    )
    return Trajectory(
        tuple(row["prompt_ids"]),
        steps,
        end=row["end"],
        seed=row["seed"],
        value=row["value"],
        log_weight=row["log_weight"],
    )
