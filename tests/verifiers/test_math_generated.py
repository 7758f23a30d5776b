r"""True variants and near misses made from golds of every family: the figures that the judge must keep."""

import importlib.util
from pathlib import Path

import pytest

from verifiers.math import Math

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "verifiers_math.py"


@pytest.fixture(scope="module")
def made():
    spec = importlib.util.spec_from_file_location("verifiers_math_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def judged(made):
    rows = list(made.cases(6000, seed=11))
    return rows, made.judged(rows, made.own)


def test_near_misses_are_refused(judged):
    wrong = [case for case, got in judged[1]["wrong"] if got is True]
    assert len(wrong) <= 0.001 * judged[1]["near_misses"], wrong[:5]


def test_true_variants_are_accepted(judged):
    wrong = [case for case, got in judged[1]["wrong"] if case.equal]
    assert len(wrong) <= 0.01 * judged[1]["true_variants"], wrong[:5]


def test_equality_is_symmetric(judged):
    for case in judged[0][:1500]:
        assert Math().equal(case.gold, case.answer) == Math().equal(case.answer, case.gold), case


def test_every_gold_equals_itself(judged):
    for gold in {case.gold for case in judged[0]}:
        assert Math().equal(gold, gold), gold


@pytest.mark.slow
def test_an_ordinary_verdict_takes_less_than_a_millisecond(judged):
    assert judged[1]["per_second"] > 1000
    assert judged[1]["p99_ms"] < 100
