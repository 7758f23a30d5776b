"""How the comparison of ways of learning reads its runs, and that every method of it is a config that loads."""

from dataclasses import replace

import pytest

from benchmarks.learning import (
    CONFIG,
    CREDIT,
    DIGITS,
    METHODS,
    TABLED,
    TASK,
    long_sums,
    reach,
    row,
    tabled,
    tokens_at,
    write_long_sums,
)
from reasoner.config import load


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


def test_outcomes_and_steps_are_compared_at_the_same_settings_on_long_sums(tmp_path):
    write_long_sums(tmp_path)
    outcomes, steps, forecast = (load(CONFIG, [*long_sums(tmp_path), *CREDIT[name]]) for name in CREDIT)
    assert replace(outcomes, credit=steps.credit) == steps and outcomes.credit != steps.credit
    assert replace(steps, credit=forecast.credit) == forecast and forecast.credit.forecast and not steps.credit.forecast
    train, heldout = steps.tasks.load()
    assert {task.meta["level"] for task in train} == {1, DIGITS}
    assert {task.meta["level"] for task in heldout} == {DIGITS} and len(heldout) >= steps.evaluate.tasks


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


def test_an_interval_is_over_tasks_each_with_its_mean_over_seeds():
    line = row("GRPO", [run([0.5], greedy=(1.0, 0.0)), run([0.5], greedy=(0.0, 1.0))])
    assert line["greedy"] == 0.5 and line["greedy_by_seed"] == [0.5, 0.5]
    low, high = line["greedy_ci"]
    assert low <= 0.5 <= high and "selected_at_k" not in line
