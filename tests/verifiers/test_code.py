# ruff: noqa: E501 (programs stand on one line each)
"""Honest programs are accepted, wrong ones refused, and references that cannot be read are named."""

import json

import pytest

from verifiers import humaneval
from verifiers.base import Task
from verifiers.code import Code, extract, same
from verifiers.jail import decode, encode
from verifiers.sandbox import Sandbox

JUDGE = Code()


def call(tests, entry_point="solve", **limits):
    return {
        "kind": "call",
        "entry_point": entry_point,
        "tests": [{"args": a, "expected": e} for a, e in tests],
        **limits,
    }


def stdio(*tests, **limits):
    return {"kind": "stdio", "tests": [{"stdin": i, "stdout": o} for i, o in tests], **limits}


def verdict(reference, response, judge=JUDGE):
    return judge.verify(Task("t", (), reference, "code"), response)


SQUARE = call([([3], 9), ([-4], 16)])
SQUARE_IO = stdio(("3\n", "9\n"), ("-4\n", "16\n"))

HONEST = {
    "plain": (SQUARE, "def solve(x): return x * x"),
    "fenced": (SQUARE, "Sure.\n\n```python\ndef solve(x):\n    return x * x\n```\nThis squares."),
    "fenced, unlabelled": (SQUARE, "```\ndef solve(x):\n    return x * x\n```"),
    "fenced, unclosed": (SQUARE, "```py\ndef solve(x):\n    return x * x"),
    "indented fence": (SQUARE, "1. Code:\n   ```python\n   def solve(x):\n       return x * x\n   ```"),
    "example of use last": (SQUARE, "```python\ndef solve(x): return x * x\n```\nUse:\n```python\nprint(solve(3))\n```"),
    "bare, with a fence in its docstring": (SQUARE, 'def solve(x):\n    """Squares.\n\n    ```\n    solve(3)\n    ```\n    """\n    return x * x'),
    "after thinking": (SQUARE, "<think>```python\ndef solve(x): return 0\n```</think>```python\ndef solve(x): return x * x\n```"),
    "prints as well": (SQUARE, "def solve(x):\n    print('debug', x)\n    return x * x"),
    "reads and closes its own output": (SQUARE, "import sys\nsys.stdout.close()\ndef solve(x): return x * x"),
    "main block that reads": (SQUARE, "def solve(x): return x * x\nif __name__ == '__main__':\n    print(solve(int(input())))"),
    "lambda": (SQUARE, "solve = lambda x: x * x"),
    "class with __call__": (SQUARE, "class S:\n    def __call__(self, x): return x * x\nsolve = S()"),
    "a float that is whole": (SQUARE, "def solve(x): return float(x * x)"),
    "subclass with the right value": (SQUARE, "class I(int): pass\ndef solve(x): return I(x * x)"),
    "enum": (SQUARE, "import enum\nclass E(enum.IntEnum):\n    A = 9\n    B = 16\ndef solve(x): return E(x * x)"),
    "named tuple": (call([([1, 2], [2, 1])]), "from collections import namedtuple\nP = namedtuple('P', 'a b')\ndef solve(a, b): return P(b, a)"),
    "tuple for a list": (call([([[1, 2]], [2, 1])]), "def solve(a): return tuple(reversed(a))"),
    "counter": (call([(["aab"], {"a": 2, "b": 1})]), "from collections import Counter\ndef solve(s): return Counter(s)"),
    "integer keys": (call([([2], {"0": 0, "1": 1})]), "def solve(n): return {i: i for i in range(n)}"),
    "set": (call([([[1, 1, 2]], {1, 2})]), "def solve(a): return set(a)"),
    "bytes": (call([([b"ab"], b"ba")]), "def solve(a): return a[::-1]"),
    "none": (call([([1], None)]), "def solve(x): pass"),
    "nan": (call([([1], float("nan"))]), "def solve(x): return float('nan')"),
    "float": (call([([0.1, 0.2], 0.3)]), "def solve(a, b): return a + b"),
    "big integers": (call([([2000], 2**2000)]), "def solve(n): return 2 ** n"),
    "huge integers": (call([([20000], 2**20000)]), "def solve(n): return 1 << n"),
    "unicode": (call([(["grün\u2028\ud800"], "\ud800\u2028nürg")]), "def solve(s): return s[::-1]"),
    "keyword": ({"kind": "call", "entry_point": "solve", "tests": [{"kwargs": {"x": 3}, "expected": 9}]}, "def solve(x): return x * x"),
    "changes its argument": (call([([[3, 1, 2]], [1, 2, 3])]), "def solve(a):\n    a.sort()\n    return a"),
    "recursion of 50,000": (call([([50000], 50000)]), "import sys\nsys.setrecursionlimit(10**6)\ndef solve(n): return n and 1 + solve(n - 1)"),
    "decorated and typed": (SQUARE, "from functools import lru_cache\n@lru_cache(None)\ndef solve(x: int) -> int: return x * x"),
    "dataclass": (SQUARE, "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef solve(x): return P(x).x * P(x).x"),
    "regex, datetime, decimal": (SQUARE, "import re, datetime, decimal, fractions, heapq, bisect, itertools, math\ndef solve(x): return x * x"),
    "threads": (SQUARE, "from concurrent.futures import ThreadPoolExecutor\ndef solve(x):\n    with ThreadPoolExecutor(4) as p:\n        return sum(p.map(abs, [x] * abs(x)))"),
    "processes": (SQUARE, "import multiprocessing as m\ndef f(x): return x * x\ndef solve(x):\n    with m.get_context('fork').Pool(2) as p:\n        return p.map(f, [x])[0]"),
    "asyncio": (SQUARE, "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x * x\ndef solve(x): return asyncio.run(f(x))"),
    "subprocess": (SQUARE, "import subprocess\ndef solve(x): return x * x if subprocess.run(['true']).returncode == 0 else 0"),
    "zoneinfo": (SQUARE, "import zoneinfo\nzoneinfo.ZoneInfo('Europe/Berlin')\ndef solve(x): return x * x"),
    "numpy numbers": (SQUARE, "import numpy as np\ndef solve(x): return np.square(np.int64(x))"),
    "numpy arrays": (call([([[[1, 2], [3, 4]]], [[1, 3], [2, 4]])]), "import numpy as np\ndef solve(a): return np.array(a).T"),
    "a temporary file": (SQUARE, "import tempfile\ndef solve(x):\n    with tempfile.TemporaryFile('w+') as f:\n        f.write(str(x * x)); f.seek(0)\n        return int(f.read())"),
    "catches its own exits": (SQUARE, "def solve(x):\n    try: exit()\n    except SystemExit: return x * x"),
    "pickles itself": (SQUARE, "import pickle\nclass A:\n    def __init__(self, x): self.x = x\ndef solve(x): return pickle.loads(pickle.dumps(A(x))).x ** 2"),
    "unusual text in the source": (SQUARE, "# π ünïcode \U0001f600\ndef solve(x): return x * x"),
    "stdio": (SQUARE_IO, "print(int(input()) ** 2)"),
    "stdio, main block": (SQUARE_IO, "def main():\n    print(int(input()) ** 2)\nif __name__ == '__main__':\n    main()"),
    "stdio, sys.stdin": (SQUARE_IO, "import sys\nfor line in sys.stdin: sys.stdout.write(str(int(line) ** 2))"),
    "stdio, buffer": (SQUARE_IO, "import sys\nn = int(sys.stdin.buffer.read())\nsys.stdout.buffer.write(b'%d\\n' % (n * n))"),
    "stdio, open(0)": (SQUARE_IO, "print(int(open(0).read()) ** 2)"),
    "stdio, os.read": (SQUARE_IO, "import os\nos.write(1, str(int(os.read(0, 99)) ** 2).encode())"),
    "stdio, exit": (SQUARE_IO, "print(int(input()) ** 2)\nexit()"),
    "stdio, sys.exit(0)": (SQUARE_IO, "import sys\nprint(int(input()) ** 2)\nsys.exit(0)"),
    "stdio, trailing blanks": (SQUARE_IO, "print(int(input()) ** 2, end=' \\n\\n')"),
    "stdio, thread": (SQUARE_IO, "import threading\nt = threading.Thread(target=lambda: print(int(input()) ** 2))\nt.start()"),
    "stdio, recursion in a thread": (SQUARE_IO, "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(64 << 20)\ndef m(): print(int(input()) ** 2)\nt = threading.Thread(target=m); t.start(); t.join()"),
    "stdio, atexit": (SQUARE_IO, "import atexit\nn = int(input())\natexit.register(lambda: print(n * n))"),
    "stdio, child process": (SQUARE_IO, "import os\npid = os.fork()\nif pid == 0:\n    os._exit(0)\nos.waitpid(pid, 0)\nprint(int(input()) ** 2)"),
    "stdio, does not read all": (stdio(("3\n" * 100_000, "9\n")), "print(int(input()) ** 2)"),
    "stdio, long input and output": (stdio(("1\n" * 200_000, "1\n" * 200_000)), "import sys\nsys.stdout.write(sys.stdin.read())"),
    "stdio, chatty on stderr": (SQUARE_IO, "import sys\nprint('x' * 500_000, file=sys.stderr)\nprint(int(input()) ** 2)"),
    "stdio, carriage returns": (SQUARE_IO, "print(int(input()) ** 2, end='\\r\\n')"),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_program_is_accepted(name):
    said = verdict(*HONEST[name])
    assert said.correct is True and said.score == 1.0, said.why


WRONG = {
    "off by one": (SQUARE, "def solve(x): return x * x + 1"),
    "wrong sign": (SQUARE, "def solve(x): return x * abs(x)"),
    "right for the first test only": (SQUARE, "def solve(x): return 9"),
    "no such function": (SQUARE, "def solved(x): return x * x"),
    "not callable": (SQUARE, "solve = 9"),
    "too few parameters": (SQUARE, "def solve(): return 9"),
    "syntax error": (SQUARE, "def solve(x) return x * x"),
    "in a thought that never ends": (SQUARE, "<think>```python\ndef solve(x): return x * x\n```"),
    "prose": (SQUARE, "The square of x is x times x."),
    "empty": (SQUARE, ""),
    "empty fence": (SQUARE, "```python\n```"),
    "shorter list": (call([([1], [1, 2, 3])]), "def solve(x): return [1, 2]"),
    "longer list": (call([([1], [1, 2])]), "def solve(x): return [1, 2, 3]"),
    "other order": (call([([1], [1, 2])]), "def solve(x): return [2, 1]"),
    "set for a list": (call([([1], [1, 2])]), "def solve(x): return {1, 2}"),
    "keys for a list": (call([([1], [1, 2])]), "def solve(x): return {1: 1, 2: 2}"),
    "text for a list": (call([([1], ["a", "b"])]), "def solve(x): return 'ab'"),
    "bytes for text": (call([([1], "ab")]), "def solve(x): return b'ab'"),
    "zero for none": (call([([1], None)]), "def solve(x): return 0"),
    "none for zero": (call([([1], 0)]), "def solve(x): return None"),
    "empty list for none": (call([([1], None)]), "def solve(x): return []"),
    "float near an integer": (call([([1], 10)]), "def solve(x): return 10.000000000000002"),
    "float that is off": (call([([1], 0.3)]), "def solve(x): return 0.3001"),
    "nan for a float": (call([([1], 0.3)]), "def solve(x): return float('nan')"),
    "float of a big integer": (call([([1], 2**60 + 1)]), "def solve(x): return float(2**60)"),
    "merged keys": (call([([1], {"1": 1, "2": 2})]), "def solve(x): return {1: 1, '1': 1, 2: 2}"),
    "two keys that look alike": (call([([1], {"1": 1})]), "def solve(x): return {1: 2, '1': 1}"),
    "stdio, wrong": (SQUARE_IO, "print(int(input()) * 2)"),
    "stdio, extra line": (SQUARE_IO, "print('Answer:')\nprint(int(input()) ** 2)"),
    "stdio, leading blank line": (SQUARE_IO, "print()\nprint(int(input()) ** 2)"),
    "stdio, joined lines": (stdio(("", "1\n2\n")), "print('1 2')"),
    "stdio, one line short": (stdio(("", "1\n2\n")), "print('1')"),
    "stdio, memory": (stdio(("3\n", "9\n"), memory_limit_mb=64), "x = bytearray(100 << 20)\nprint(int(input()) ** 2)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_program_is_refused(name):
    said = verdict(*WRONG[name])
    assert said.status == "scored" and said.correct is False and said.score == 0.0, said


def test_partial_credit_is_given_by_name_only():
    program = "def solve(x): return 9"
    assert verdict(SQUARE, program).score == 0.0
    shared = verdict(SQUARE, program, Code(credit="tests"))
    assert shared.score == 0.5 and shared.correct is False
    assert shared.evidence["tests"] == ("passed", "returned 9, expected 16")


def test_crash_in_one_test_leaves_the_others_their_credit():
    program = "import os\ndef solve(x): return x * x if x > 0 else os._exit(1)"
    tests = call([([2], 4), ([-1], 1), ([3], 9)])
    assert verdict(tests, program, Code(credit="tests")).score == pytest.approx(2 / 3)


def test_all_tests_together_end_in_time():
    judge = Code(credit="tests", time_limit_s=0.2, total_limit_s=0.5)
    said = verdict(call([([i], 0) for i in range(50)]), "def solve(x):\n  while True: pass", judge)
    assert said.correct is False and said.evidence["tests"].count("time limit exceeded") == 3
    assert said.evidence["tests"].count("not run") == 47


@pytest.mark.parametrize(
    ("reference", "named"),
    [
        ({"kind": "calls", "tests": []}, "calls"),
        ({"kind": "call", "tests": [{"args": [], "expected": 1}]}, "entry_point"),
        ({"kind": "call", "entry_point": "f()", "tests": [{"args": [], "expected": 1}]}, "entry_point"),
        ({"kind": "call", "entry_point": "f", "tests": []}, "at least one"),
        ({"kind": "call", "entry_point": "f", "tests": [{"args": []}]}, "expected"),
        ({"kind": "call", "entry_point": "f", "tests": [{"args": [], "expected": object()}]}, "plain data"),
        ({"kind": "stdio", "tests": [{"stdin": "1"}]}, "stdout"),
        ({"kind": "stdio", "tests": [{"stdin": 1, "stdout": "1"}]}, "text"),
        ({"kind": "stdio", "tests": [{"stdin": "", "stdout": "1"}], "time_limit_s": 0}, "time_limit_s"),
        ("9", "unreadable"),
    ],
)
def test_unreadable_reference_is_named(reference, named):
    with pytest.raises(ValueError, match=named) as error:
        JUDGE.check(Task("task/7", (), reference, "code"))
    assert "task/7" in str(error.value)


def test_policy_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="time_limit_s=9"):
        Code(time_limit_s=9.0, total_limit_s=5.0)
    with pytest.raises(ValueError, match="half"):
        Code(credit="half")


@pytest.mark.parametrize("value", [None, True, 7, -(2**70), 2**70, 1.5, "é", [1, [2]], (1, (2,)), {"a": 1}, {1: (2,)}, {"~": 3}, {1, 2},
                                   frozenset("a"), b"\xff", 1 + 2j])  # fmt: skip
def test_plain_data_crosses_the_wall_unchanged(value):
    back = decode(json.loads(encode(value)))
    assert back == value and type(back) is type(value)


def test_same_is_not_fooled_by_what_equals_everything():
    class Anything:
        def __eq__(self, other):
            return True

        __hash__ = None

    assert not any(same(expected, Anything()) for expected in (9, "9", [9], {"a": 9}, None, True, {9}, 9.0, (9,)))


def test_answer_is_the_program_without_layout():
    assert JUDGE.answer("```python\ndef f(x):   # why\n  return x\n```") == JUDGE.answer("def f(x):\n    return x")
    assert JUDGE.answer("no program here") is None
    assert extract("") is None


def test_verdict_does_not_depend_on_chance():
    program = "import random\nprint(random.random())"
    said = {verdict(stdio(("", "0")), program).why for _ in range(3)}
    assert len(said) == 1


def test_sandbox_that_was_killed_starts_again():
    with Sandbox() as sandbox:
        assert sandbox.script("print(1)", stdin="", seconds=2.0).stdout == "1\n"
        sandbox._server.process.kill()
        sandbox._server.process.wait()
        assert sandbox.script("print(1)", stdin="", seconds=2.0).stdout == "1\n"


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_humaneval_solutions_are_accepted_and_a_mutation_of_each_is_refused(every):
    """The mutation is the first that HumanEval's own test refuses; both run in the sandbox."""
    tasks = humaneval.load()
    assert len(tasks) == 164
    judge = Code(time_limit_s=1.0)
    with Sandbox() as sandbox:
        for task in tasks[::every]:
            solution, entry_point = task.meta["solution"], task.reference["entry_point"]
            assert judge.verify(task, solution).correct is True, task.id
            for mutant in humaneval.mutants(solution, entry_point):
                own = sandbox.script(f"{mutant}\n{task.meta['test']}\ncheck({entry_point})", stdin="", seconds=1.0)
                if own.error:
                    assert judge.verify(task, mutant).correct is False, f"{task.id}\n{mutant}"
                    break
            else:
                pytest.fail(f"{task.id}: no mutation is seen by its tests")
