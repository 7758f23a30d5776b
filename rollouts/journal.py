"""The append-only record of every rollout: one JSON line per group, and one per batch that was taken to learn from.

Resume, replay, the report and datasets are queries on it. Lines are written whole or not at all: when the disk is full
the file is cut back to its last whole record, and a torn last line (a kill) is cut when the journal is opened or read.
"""

from __future__ import annotations

import json
import os
import zlib
from array import array
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
            cut(path, sum(len(line) for line in _whole_lines(path)))
        self._file = path.open("ab", buffering=0)
        self._pending: list[bytes] = []
        self._end = path.stat().st_size  # of what is written and pending

    def append(self, group: Group, *, step: int, version: int, ticket: int | None = None) -> int:
        """Add a group; returns where its line begins.

        Args:
            version: of the policy when its rollouts began.
            ticket: its task's number in the order of drawing.
        """
        rollouts = [_row(r) for r in group.rollouts]
        row = {"step": step, "version": version, "ticket": ticket, "task": asdict(group.task), "rollouts": rollouts}
        return self._add(row)

    def take(self, step: int, tickets: list[int], dropped: dict[int, str]) -> None:
        """Add that a step learns from these groups, and leaves out those for a reason."""
        self._add({"take": step, "tickets": tickets, "dropped": dropped})

    def _add(self, row: dict[str, Any]) -> int:
        line = json.dumps(row, separators=(",", ":"), default=str).encode() + b"\n"
        self._pending.append(line)
        start, self._end = self._end, self._end + len(line)
        return start

    def flush(self, *, to_disk: bool = False) -> int:
        """Hand what was added to the system (to_disk: to the disk); returns the size of the file."""
        data, self._pending = memoryview(b"".join(self._pending)), []
        whole = self._end - len(data)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            os.ftruncate(self._file.fileno(), whole)
            self._end = whole
            raise
        if to_disk:
            os.fsync(self._file.fileno())
        return self._end

    def close(self) -> None:
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> Iterator[tuple[int, int, Group]]:
    """(step, policy version, group) in the order that a learner was given them, then those of no batch.

    A torn last line is left out.
    """
    waiting: dict[int, dict[str, Any]] = {}  # for the batch that takes it, by ticket
    for line in _whole_lines(path):
        row = json.loads(line)
        if "take" in row:
            done = sorted((*row["tickets"], *map(int, row["dropped"])))
            yield from (_entry(waiting.pop(ticket)) for ticket in done if ticket in waiting)
        elif row.get("ticket") is None:
            yield _entry(row)
        else:
            waiting[row["ticket"]] = row
    yield from (_entry(row) for _, row in sorted(waiting.items()))


def _entry(row: dict[str, Any]) -> tuple[int, int, Group]:
    return row["step"], row["version"], group_of(row)


def read_at(path: Path, offset: int) -> tuple[int, Group]:
    """(policy version, group) of the line that begins there."""
    with path.open("rb") as file:
        file.seek(offset)
        row = json.loads(file.readline())
    return row["version"], group_of(row)


def scan(path: Path, start: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(where it begins, where it ends, record) from `start` on, up to the first line that is torn or no record."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n") or not isinstance(row, dict) or not row.keys() & {"task", "take"}:
                return
            yield start, start + len(line), row
            start += len(line)


def mend(path: Path, since: int, size: int = 1) -> int:
    """Cut a journal after its last whole record; returns the bytes cut off.

    size: groups of a batch, where one that is not whole must be rolled out anew as one: what there is of it is cut too.
    """
    end, places = since, []  # of the groups that no batch took
    for place, end, row in scan(path, since):  # noqa: B007
        if "task" in row:
            places.append(place)
        else:
            places.clear()
    if surplus := len(places) % size:
        end = places[-surplus]
    return cut(path, end)


def cut(path: Path, size: int) -> int:
    """Shorten the file to `size`; returns how many bytes that took off."""
    surplus = path.stat().st_size - size
    if surplus > 0:
        os.truncate(path, size)
    return max(0, surplus)


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield line


def group_of(row: dict[str, Any]) -> Group:
    """Of a record that has a task."""
    task = Task(**{**row["task"], "prompt": tuple(row["task"]["prompt"])})
    return Group(task, tuple(_rollout(task, r) for r in row["rollouts"]))


def _single(values: tuple[float, ...]) -> list[float]:
    """As float32, which is what learns: nine digits bring back every bit of it."""
    return [float(f"{value:.9g}") for value in array("f", values)]


def _row(rollout: Rollout) -> dict[str, Any]:
    row = {**_path_row(rollout.trajectory), "verdict": asdict(rollout.verdict)}
    return row | {"earlier": [_path_row(path) for path in rollout.earlier]} if rollout.earlier else row


def _path_row(path: Trajectory) -> dict[str, Any]:
    return {
        "prompt_ids": path.prompt,
        "steps": [
            {
                "ids": s.ids,
                "logprobs": _single(s.logprobs),
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
