"""Labels of steps: by rule, from the paths of a group, and from rollouts of an engine that says what it is told to."""

import asyncio
import json

import pytest

from reasoner import step_labels
from rollouts.base import Group, Rollout
from search.base import Step, Trajectory
from search.scripted import Scripted
from verifiers.base import Task, Verdict

TASK = Task("t/1", ({"role": "user", "content": "1 + 2 + 3 + 4 ="},), "10", "math")


def decode(ids) -> str:
    return "".join(chr(i) for i in ids if i)


def rollout(text: str, correct: bool, *, end="stop", seed=0) -> Rollout:
    ids = (*map(ord, text), 0) if end == "stop" else tuple(map(ord, text))
    path = Trajectory((1, 1), (Step(ids, (-0.1,) * len(ids), text),), end, seed=seed)
    return Rollout(TASK, path, Verdict("scored", float(correct), correct))


async def judge(texts):
    """Right when the answer is 10; a response without an answer cannot be judged."""
    return [
        Verdict("scored", float(t.endswith(" 10")), t.endswith(" 10")) if "Answer" in t else Verdict.abstain("none")
        for t in texts
    ]


@pytest.mark.parametrize(
    ("text", "correct", "values"),
    [
        ("1+2=3\n3+3=6\n6+4=10\nAnswer: 10", True, [1, 1, 1, 1]),
        ("1+2=3\n3+3=7\n7+4=11\nAnswer: 11", False, [1, 0, 0, 0]),
        ("1+2=3\n3+3=6\n6+4=10\nAnswer: 11", False, [1, 1, 1, 0]),  # no false equality: the answer's step is wrong
        ("Answer: 9", False, [0]),
        ("", False, [0]),
    ],
)
def test_the_rule_names_the_first_false_equality_or_the_wrong_answer(text, correct, values):
    assert step_labels.by_rule(rollout(text, correct)) == values


def test_a_row_says_where_each_step_is_judged():
    text = "1+2=3\n3+3=7\nAnswer: 7"
    row = step_labels.row(rollout(text, False), [1.0, 0.0, 0.0], "\n", decode)
    assert row["steps"] == ["1+2=3", "3+3=7", "Answer: 7"] and row["label"] == 1 and row["problem"] == TASK.question
    assert [decode(row["ids"][2:end]) for end in row["ends"]] == ["1+2=3\n", "1+2=3\n3+3=7\n", text]
    assert row["ids"][row["ends"][-1]] == 0  # what ends the path stands behind the last judgement
    cut = step_labels.row(rollout(text, False, end="length"), [1.0, 0.0, 0.0], "\n", decode)
    assert cut["ends"] == row["ends"] and len(cut["ids"]) == cut["ends"][-1]


def test_values_that_do_not_fit_the_steps_are_refused():
    with pytest.raises(ValueError, match=r"t/1.*1 values for 2 steps"):
        step_labels.row(rollout("1+2=3\nAnswer: 3", False), [1.0], "\n", decode)


def test_paths_of_a_group_share_the_values_of_shared_steps():
    group = Group(TASK, (rollout("a\nb", True), rollout("a\nc", False), rollout("d\nb", False), rollout("a\nb", True)))
    assert step_labels.by_paths(group, decode=decode) == [[0.5, 1.0], [0.5, 0.0], [0.0, 0.0], [0.5, 1.0]]


def continuing(right_of: dict[str, int], calls: list[str]) -> Scripted:
    """Of the continuations of a text, the first `right_of[text]` end right; one in each call says nothing at all."""

    def reply(text: str, child: int) -> str:
        calls.append(text)
        if child == 7:
            return "no idea"
        return "Answer: 10" if child < right_of[text] else "Answer: 9"

    return Scripted(reply)


def test_monte_carlo_values_are_shares_of_the_continuations_that_could_be_judged():
    path = rollout("1+2=3\n3+3=7\nAnswer: 7", False)
    engine = continuing({"1+2=3\n": 7, "1+2=3\n3+3=7\n": 1}, calls := [])
    soft = asyncio.run(step_labels.by_rollouts(path, engine, judge, 8, decode=decode))
    assert soft == pytest.approx([1.0, 1 / 7, 0.0])  # the eighth could not be judged; the last step is the outcome
    hard = asyncio.run(step_labels.by_rollouts(path, engine, judge, 8, decode=decode, hard=True))
    assert hard == [1.0, 1.0, 0.0] and len(calls) == 32


def test_a_step_that_nobody_can_judge_is_an_error_and_no_zero():
    engine = Scripted(lambda text, child: "no idea")
    with pytest.raises(ValueError, match=r"t/1: none of 4 continuations"):
        asyncio.run(step_labels.by_rollouts(rollout("1+2=3\nAnswer: 9", False), engine, judge, 4, decode=decode))


@pytest.mark.parametrize("first_wrong", range(8))
def test_bisection_finds_the_error_that_all_rollouts_find_with_fewer(first_wrong):
    lines = [f"line {i}" for i in range(7)]
    text = "\n".join([*lines, "Answer: 9"])
    prefixes = ["".join(f"{line}\n" for line in lines[: i + 1]) for i in range(7)]
    engine = continuing({p: 3 * (i < first_wrong) for i, p in enumerate(prefixes)}, calls := [])
    everywhere = asyncio.run(step_labels.by_rollouts(rollout(text, False), engine, judge, 4, decode=decode, hard=True))
    exhaustive = len(calls)
    calls.clear()
    bisected = asyncio.run(step_labels.by_bisection(rollout(text, False), engine, judge, 4, decode=decode))
    assert bisected == everywhere == [float(i < first_wrong) for i in range(8)]
    assert len(calls) == 12 and exhaustive == 28  # log2 of 8 steps, times 4


def test_bisection_asks_nothing_of_a_right_solution():
    engine = Scripted(lambda text, child: pytest.fail("asked"))
    assert asyncio.run(step_labels.by_bisection(rollout("a\nb\nc", True), engine, judge, 4, decode=decode)) == [1.0] * 3


@pytest.mark.parametrize(
    "line",
    ["{", '{"problem": "p", "steps": ["a"]}', '{"problem": "p", "steps": ["a"], "label": 1}',
     '{"problem": "p", "steps": [], "label": -1}', '{"problem": "p", "steps": "a", "label": 0}', "3"],
)  # fmt: skip
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    file = tmp_path / "bench.jsonl"
    file.write_text(json.dumps({"problem": "p", "steps": ["a"], "label": -1}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        step_labels.read(file)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "bench.jsonl").write_text("")
    with pytest.raises(ValueError, match="no lines"):
        step_labels.read(tmp_path / "bench.jsonl")
