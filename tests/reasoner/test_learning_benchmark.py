"""How the comparison of ways of learning reads its runs, and that every method of it is a config that loads."""

import random
import re
from dataclasses import replace

import pytest

from benchmarks.learning import (
    CONFIG,
    CREDIT,
    LONG,
    METHODS,
    QUICKSTART,
    TABLED,
    TASK,
    lines,
    reach,
    row,
    slipping,
    tabled,
    tokens_at,
    worked,
)
from reasoner.config import load
from rollouts.base import Group, Rollout
from rollouts.journal import Journal
from search.base import Step, Trajectory
from verifiers import get
from verifiers.base import Task
from verifiers.process import step_scores


def run(values, *, tokens=100, rounds=None, greedy=(1.0, 0.0)):
    side = {"greedy": sum(greedy) / 2, "mean_at_k": 0.5, "pass_at_k": 0.5, "maj_at_k": 0.5, "marginal_at_k": 0.5}
    return {
        "base": side,
        "final": side,
        "rounds": rounds,
        "tasks": {"greedy": list(greedy), "mean_at_k": [0.5, 0.5]},
        "tokens": tokens * len(values),
        "curve": [(tokens * i, value) for i, value in enumerate(values)],
        "steps": len(values),
        "seconds": {"learn": 1.0},
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_config_that_loads(name):
    assert load(CONFIG, [*TASK, *METHODS[name], "token_budget=1000"]).token_budget == 1000


def test_outcomes_and_steps_are_compared_at_the_same_settings_on_long_sums():
    outcomes, steps, forecast = (load(QUICKSTART, [*LONG, *CREDIT[name]]) for name in CREDIT)
    assert replace(outcomes, credit=steps.credit) == steps and outcomes.credit != steps.credit
    assert replace(steps, credit=forecast.credit) == forecast and forecast.credit.forecast and not steps.credit.forecast


def test_the_base_of_long_sums_is_shown_lines_some_of_which_slip_and_the_work_goes_on_from_there():
    worked = [slipping("4 - 3 + 2 + 1", random.Random(seed)) for seed in range(200)]
    assert slipping("4 - 3 + 2", random.Random(0), slip=0) == "4-3=1\n1+2=3\nAnswer: 3"
    for text in worked:
        *steps, answer = text.split("\n")
        assert [step.split("=")[1] for step in steps[:-1]] == [re.match(r"-?\d+", step)[0] for step in steps[1:]]
        assert answer == f"Answer: {steps[-1].split('=')[1]}"
    right = [score for text in worked for score in step_scores(text)[:-1]]
    assert 0.58 < sum(right) / len(right) < 0.73


def test_lines_are_counted_by_what_they_carry_out_and_by_their_truth_and_right_answers_by_how_they_came(tmp_path):
    lucky, right, wrong = "9+1=10\n9+1=11\nAnswer: 5", "4+3=7\n7-2=5\nAnswer: 5", "4+3=7\n7-2=6\nAnswer: 6"
    with Journal(tmp_path / "journal.jsonl") as journal:
        for step, text in enumerate([lucky, right]):
            journal.append(judged(text), step=step, version=0)
    for when, texts in (("base", [lucky, wrong]), ("final", [lucky, right, right, right, wrong])):
        with Journal(tmp_path / f"evaluation-{when}.jsonl") as journal:
            journal.append(judged(right), step=0, version=0)  # the greedy path
            journal.append(judged(*texts), step=0, version=0)
    assert lines(tmp_path, steps=1) == {"carried out": [0.0, 1.0], "true": [0.5, 1.0]}
    assert worked(tmp_path) == {"base": 0.0, "final": 0.75}


def judged(*texts):
    task = Task("t", ({"role": "user", "content": "4 + 3 - 2 ="},), "5", "process_math")
    judge = get("process_math", rule="rewrite")
    paths = [Trajectory((0,), (Step((1,), (0.0,), text),), "stop") for text in texts]
    return Group(task, tuple(Rollout(task, p, judge.verify(task, t)) for p, t in zip(paths, texts, strict=True)))


def test_on_a_table_of_chances_every_rule_raises_the_chance_that_all_lines_are_right():
    for rule in TABLED.values():
        first, *_, last = tabled(rule, 0, 3, 20, 0.5, 12)
        assert first == (0, pytest.approx(0.125)) and last[1] > 0.2 and last[0] == 11 * 16 * 8 * 3


def test_a_level_is_reached_when_the_mean_of_a_window_is():
    points = [(0, 0.0), (100, 0.8), (200, 0.2), (300, 0.6), (400, 0.6)]
    assert tokens_at(points, 0.5, 1) == 100
    assert tokens_at(points, 0.5, 2) == 200
    assert tokens_at(points, 0.9, 1) is None


def test_tokens_to_reach_grpos_level_are_a_share_of_grpos_own():
    slow, quick = [0.1 * i for i in range(11)], [0.2 * i for i in range(11)]
    found = reach({"GRPO": [run(slow)], "quick": [run(quick)], "never": [run([0.0] * 11)]}, window=1)
    assert found == {"GRPO": [1.0], "quick": [0.5], "never": [None]}


def test_the_level_may_be_the_highest_that_grpo_had_at_any_time():
    rise_and_fall, quick = [0.1, 0.3, 0.5, 0.2, 0.1], [0.1, 0.5, 0.5, 0.5, 0.5]
    runs = {"GRPO": [run(rise_and_fall)], "quick": [run(quick)]}
    assert reach(runs, window=1, best=True) == {"GRPO": [1.0], "quick": [0.5]}


def test_an_interval_is_over_tasks_each_with_its_mean_over_seeds():
    line = row("GRPO", [run([0.5], greedy=(1.0, 0.0)), run([0.5], greedy=(0.0, 1.0))])
    assert line["greedy"] == 0.5 and line["greedy_by_seed"] == [0.5, 0.5]
    low, high = line["greedy_ci"]
    assert low <= 0.5 <= high and "selected_at_k" not in line
