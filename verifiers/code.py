"""Judges a program by hidden tests: function calls or stdin/stdout, in the sandbox, outputs compared out here.

References:
    {"kind": "call", "entry_point": "solve", "tests": [{"args": [3], "expected": 9}, ...]}     ("kwargs" optional)
    {"kind": "stdio", "tests": [{"stdin": "3\\n", "stdout": "9\\n"}, ...]}
each with optional `time_limit_s` (per test) and `memory_limit_mb`. The response is the program, bare or in a fenced
block.

Expected outputs never enter the sandbox, and the program sees an input only when it is called with it. What it returns
is read as plain data: no method of an object it made is ever asked whether it equals something. Values compare as
Python's `==` does on plain data, with two freedoms: a tuple may stand for a list, since JSON has no tuples, and floats
compare up to `tolerance`. Printed text compares by lines, without trailing blanks. A program must end with status 0.
Knows nothing of how programs are held (`sandbox`). Grids that programs transform are judged in `arc`, through here.
"""

from __future__ import annotations

import ast
import cmath
import json
import math
import re
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

from verifiers import jail
from verifiers.base import Task, Verdict
from verifiers.extract import after_thinking
from verifiers.sandbox import Limits, Run, Sandbox

_FENCE = re.compile(
    r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)
_PYTHON = ("python", "py", "python3", "")
PASSED = "passed"
REPLY_BYTES = 1 << 16  # beyond what the expected output needs: bounds the cost of a reply made to be slow to read


@dataclass(frozen=True)
class Code:
    """Correct means every test passed. `credit` says what the score is: "all" gives 1 or 0 and stops at the first test
    that is not passed; "tests" gives the share of tests passed and runs them all.

    `total_limit_s` bounds all tests of one program together. `isolation` is as in `sandbox`: "none" must be asked for.
    """

    credit: Literal["all", "tests"] = "all"
    time_limit_s: float = 3.0
    total_limit_s: float = 8.0
    memory_limit_mb: int = 512
    tolerance: float = 1e-9
    isolation: str = "auto"

    def __post_init__(self) -> None:
        if self.credit not in ("all", "tests"):
            raise ValueError(f'credit="{self.credit}": choose "all" (1 or 0) or "tests" (the share of tests passed)')
        if self.time_limit_s > self.total_limit_s:
            raise ValueError(
                f"time_limit_s={self.time_limit_s} for one test exceeds total_limit_s={self.total_limit_s} for all: "
                "lower the first or raise the second"
            )

    def verify(self, task: Task, response: str) -> Verdict:
        reference = task.reference
        _check(task)
        program = extract(response, reference.get("entry_point"))
        sandbox = shared_sandbox(self.isolation)
        evidence = {"policy": asdict(self), "isolation": sandbox.level}
        if program is None:
            return Verdict("scored", 0.0, False, why="no program in the response", evidence=evidence)
        results = []
        for result in self._results(reference, program, sandbox):
            results.append(result)
            if result != PASSED and self.credit == "all":
                break
        passed, count = results.count(PASSED), len(reference["tests"])
        bad = next(((i, r) for i, r in enumerate(results) if r != PASSED), None)
        results += ["not run"] * (count - len(results))
        return Verdict(
            "scored",
            passed / count if self.credit == "tests" else float(passed == count),
            passed == count,
            answer=program,
            why=f"all {count} tests passed" if bad is None else f"{passed} of {count} passed; test {bad[0]}: {bad[1]}",
            evidence={**evidence, "tests": tuple(results)},
        )

    def _results(self, reference: Mapping[str, Any], program: str, sandbox: Sandbox) -> Iterator[str]:
        """One word or line per test: PASSED, or what happened."""
        one = reference.get("time_limit_s", self.time_limit_s)
        end = time.monotonic() + max(self.total_limit_s, one)
        limits = Limits(memory_mb=reference.get("memory_limit_mb", self.memory_limit_mb))
        judge = self._stdio if reference["kind"] == "stdio" else self._calls
        yield from judge(reference, program, sandbox, limits, lambda: min(one, end - time.monotonic()))

    def _stdio(self, reference, program, sandbox, limits, seconds) -> Iterator[str]:
        for test in reference["tests"]:
            if (left := seconds()) <= 0:
                return
            room = max(limits.output_bytes, 2 * len(test["stdout"].encode()))
            said = sandbox.script(program, stdin=test["stdin"], seconds=left, limits=replace(limits, output_bytes=room))
            if said.error:
                last = said.stderr.strip().splitlines()[-1:] or [""]
                yield f"{said.error} {last[0]}".strip()[:300]
            elif lines(said.stdout) == lines(test["stdout"]):
                yield PASSED
            else:
                yield f"printed {_short(said.stdout)}, expected {_short(test['stdout'])}"

    def _calls(self, reference, program, sandbox, limits, seconds) -> Iterator[str]:
        """All tests call into one process; where it ends, the rest call into a new one."""
        longest = max(len(jail.encode(test["expected"])) for test in reference["tests"])
        limits = replace(limits, output_bytes=REPLY_BYTES + 8 * longest)
        run: Run | None = None
        try:
            for test in reference["tests"]:
                if (left := seconds()) <= 0:
                    return
                until = time.monotonic() + left
                if run is None:
                    run = sandbox.open(program, entry_point=reference["entry_point"], limits=limits, seconds=left)
                reply = run.loaded
                if not reply.error:
                    args, kwargs = test.get("args", []), test.get("kwargs", {})
                    reply = run.call(args, kwargs, seconds=until - time.monotonic())
                if reply.error:
                    yield reply.error
                    run.close()
                    run = None
                elif same(test["expected"], reply.value, self.tolerance):
                    yield PASSED
                else:
                    yield f"returned {_short(reply.value)}, expected {_short(test['expected'])}"
        finally:
            if run is not None:
                run.close()

    def check(self, task: Task) -> None:
        _check(task)
        assert shared_sandbox(self.isolation).level, "NoIsolation is raised where the machine offers none"

    def answer(self, response: str) -> str | None:
        """The program, without comments and layout; None when there is none that parses."""
        program = extract(response)
        try:
            return None if program is None else ast.unparse(ast.parse(program)) or None
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None

    def equal(self, left: str, right: str) -> bool:
        return left == right


@cache
def shared_sandbox(isolation: str) -> Sandbox:
    """One per process: a worker judges one program at a time."""
    return Sandbox(isolation)


def extract(response: str, entry_point: str | None = None) -> str | None:
    """The program in a response: the last fenced block that defines `entry_point`, else the last, else all of it."""
    response = after_thinking(response) or ""
    fenced = [(m[2].lower(), textwrap.dedent(m[3])) for m in _FENCE.finditer(response)]
    if not fenced:
        return textwrap.dedent(response).strip("\n") if response.strip() else None
    blocks = [text for language, text in fenced if language in _PYTHON] or [text for _, text in fenced]
    if entry_point is not None:
        defines = re.compile(
            rf"^(?:async def|def|class)\s+{re.escape(entry_point)}\b|^{re.escape(entry_point)}\s*=", re.M
        )
        unfenced = [response] if defines.search(response) else []  # a bare program with a fence in a docstring
        blocks = [text for text in blocks if defines.search(text)] or unfenced or blocks
    return blocks[-1] if blocks[-1].strip() else None


def lines(text: str) -> list[str]:
    """Printed text as judged: lines without trailing blanks, no empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def same(expected: Any, got: Any, tolerance: float = 1e-9) -> bool:
    """Whether plain data from the sandbox is what was expected. The recursion follows `expected`."""
    if isinstance(expected, list | tuple):
        return (
            isinstance(got, list | tuple if isinstance(expected, list) else type(expected) | list)
            and len(expected) == len(got)
            and all(same(left, right, tolerance) for left, right in zip(expected, got, strict=True))
        )
    if isinstance(expected, dict):
        if not isinstance(got, dict) or len(expected) != len(got):
            return False
        got = {_json_key(key) if key not in expected else key: value for key, value in got.items()}
        return expected.keys() == got.keys() and all(same(expected[key], got[key], tolerance) for key in expected)
    if isinstance(expected, int | float | complex):
        return isinstance(got, int | float | complex) and _close(expected, got, tolerance)
    kind = (set, frozenset) if isinstance(expected, set | frozenset) else type(expected)
    return isinstance(got, kind) and expected == got


def _json_key(key: Any) -> Any:
    """A key as a JSON object would hold it: references from files cannot say 1, only "1"."""
    return json.dumps(key) if isinstance(key, bool | int | float) or key is None else key


def _close(expected: complex, got: complex, tolerance: float) -> bool:
    if expected == got or not isinstance(expected, float | complex):
        return expected == got
    if expected != expected:
        return got != got
    try:
        return cmath.isclose(expected, got, rel_tol=tolerance, abs_tol=tolerance * 1e-3) and math.isfinite(abs(got))
    except OverflowError:
        return False


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a huge integer"
    return text if len(text) <= 80 else text[:77] + "..."


def _check(task: Task) -> None:
    """Raise ValueError, naming the task, for a reference that cannot be read."""
    try:
        _read(task.reference)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"task {task.id}: unreadable code reference: {error}") from error


def _read(reference: Mapping[str, Any]) -> None:
    kind = reference.get("kind")
    if kind not in ("call", "stdio"):
        raise ValueError(f'kind={kind!r}: give "call" or "stdio"')
    if not isinstance(reference.get("tests"), list | tuple) or not reference["tests"]:
        raise ValueError("tests: give a list of at least one test")
    for limit in ("time_limit_s", "memory_limit_mb"):
        if not reference.get(limit, 1) > 0:
            raise ValueError(f"{limit}={reference[limit]}: give a positive number")
    if kind == "call" and not str.isidentifier(reference.get("entry_point") or ""):
        raise ValueError(f"entry_point={reference.get('entry_point')!r}: give the name of the function to call")
    for number, test in enumerate(reference["tests"]):
        wanted = {"stdin", "stdout"} if kind == "stdio" else {"expected"}
        if missing := wanted - test.keys():
            raise ValueError(f"test {number} has no {', '.join(sorted(missing))}")
        if kind == "stdio":
            if not isinstance(test["stdin"], str) or not isinstance(test["stdout"], str):
                raise ValueError(f"test {number}: stdin and stdout must be text")
        else:
            jail.encode([list(test.get("args", [])), dict(test.get("kwargs", {})), test["expected"]])
