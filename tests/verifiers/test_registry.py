"""Judges plug in by three lines, by class and by entry point, and combine; a bad name or policy is named."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

import verifiers
from reasoner.verify import add_arguments, run
from verifiers import Task, Verdict, get, known, verifier
from verifiers.selftest import Case, selftest


def verdict(name, response, reference="7", **policy):
    return get(name, **policy).verify(Task("t", (), reference, name), response)


@verifier("registry: parity")
def parity(task, response):
    return int(response) % 2 == int(task.reference) % 2


@verifier("registry: says")
def says(response, reference, *, value=None):
    answers = {"true": True, "false": False, "half": 0.5, "none": None, "numpy": np.bool_(True), "text": "yes"}
    answers |= {"float": np.float64(0.25), "over": 1.5, "nan": float("nan"), "verdict": Verdict.abstain("by itself")}
    return answers.get(response, value)


@verifier("registry: other names")
def other_names(t, r):
    return r == t.reference


@verifier("registry: strict")
@dataclass(frozen=True)
class Strict:
    margin: float = 0.0

    def verify(self, task, response):
        try:
            near = abs(float(response) - float(task.reference)) <= self.margin
        except ValueError:
            return Verdict.abstain("no number")
        return Verdict("scored", float(near), near, answer=response)

    def check(self, task):
        float(task.reference)

    def answer(self, response):
        return response

    def equal(self, left, right):
        return left == right


def test_false_and_low_scores_are_not_correct():
    assert verdict("registry: says", "false").correct is False
    assert (said := verdict("registry: says", "half")).score == 0.5 and said.correct is False
    assert verdict("registry: says", "float").score == 0.25


def test_why_is_one_line_whatever_an_exception_says():
    assert Verdict.fail("RuntimeError: first\n   second line\n").why == "RuntimeError: first second line"


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "great", "score": None, "correct": None},
        {"correct": "no"},
        {"correct": 1},
        {"score": float("nan")},
        {"answer": 7},
        {"steps": (1.0, float("nan"))},
        {"steps": (5.0,)},
    ],
)
def test_what_is_no_verdict_is_refused_where_it_is_made(fields):
    with pytest.raises(ValueError, match=f"{[*fields][0]}="):
        Verdict(**{"status": "scored", "score": 1.0, "correct": True} | fields)


def test_function_may_return_bool_float_verdict_or_none():
    assert verdict("registry: parity", "9").correct is True
    assert verdict("registry: says", "true").score == 1.0
    assert verdict("registry: says", "numpy").correct is True
    assert verdict("registry: says", "none").status == verdict("registry: says", "verdict").status == "abstained"


@pytest.mark.parametrize("response", ["over", "nan", "text"])
def test_function_that_returns_no_score_is_told_so(response):
    with pytest.raises((ValueError, TypeError)):
        verdict("registry: says", response)


def test_function_gets_what_its_parameters_are_called():
    assert verdict("registry: other names", "7").correct is True
    assert verdict("registry: says", "?", value=True).correct is True


def test_function_of_other_than_two_parameters_is_refused():
    verifier("registry: three")(lambda task, response, more: True)
    with pytest.raises(ValueError, match="task, response"):
        get("registry: three")


def test_class_takes_its_policy_and_names_a_foreign_key():
    assert verdict("registry: strict", "7.2", margin=0.5).correct is True
    with pytest.raises(ValueError, match='"magrin".*did you mean "margin"'):
        get("registry: strict", magrin=1)


def test_second_judge_is_asked_only_when_the_first_abstains():
    asked = []
    verifier("registry: asked")(lambda task, response: asked.append(response) or True)
    both = "registry: strict | registry: asked"
    assert verdict(both, "8").correct is False and not asked
    assert verdict(both, "eight").correct is True and asked == ["eight"]
    joined = get("registry: strict") | get("registry: parity") | get("registry: asked")
    assert joined.verify(Task("t", (), "7", ""), "8").correct is False
    with pytest.raises(ValueError, match="its parts do"):
        get(both, margin=1)


def test_first_judge_that_breaks_is_not_covered_up():
    with pytest.raises(ValueError, match="invalid literal"):
        verdict("registry: parity | registry: strict", "x")


def test_weighted_sum_is_correct_only_when_every_part_is():
    parts = {"registry: strict": 3.0, "registry: says": 1.0}
    said = verdict("weighted", "7", parts={"registry: strict": 3.0, "registry: parity": 1.0})
    assert said.score == 1.0 and said.correct is True and said.answer == "7"
    said = verdict("weighted", "9", parts={"registry: strict": 3.0, "registry: parity": 1.0})
    assert said.score == 0.25 and said.correct is False
    assert verdict("weighted", "none", parts=parts).status == "abstained"
    with pytest.raises(ValueError, match="positive weight"):
        get("weighted", parts={"registry: strict": 0.0})


def test_name_is_taken_once():
    with pytest.raises(ValueError, match="belongs to"):
        verifier("math")(parity)
    assert verifier("registry: parity")(parity) is parity


def test_entry_points_of_installed_packages_are_known(monkeypatch):
    class Point:
        name = "registry: installed"

        def load(self):
            return Strict

    monkeypatch.setattr(verifiers, "entry_points", lambda group: [Point()] if group == "reasoner.verifiers" else [])
    assert "registry: installed" in known()
    assert verdict("registry: installed", "7").correct is True


@pytest.mark.parametrize("name", ["math", "process_math", "code", "arc", "reasoning_gym"])
def test_built_in_judge_has_every_method(name):
    judge = get(name)
    assert all(callable(getattr(judge, method)) for method in ("verify", "check", "answer", "equal"))


def test_reasoning_gym_scores_by_its_own_rule():
    reference = {
        "dataset": "chain_sum",
        "entry": {"question": "", "answer": "-4", "metadata": {"source_dataset": "chain_sum"}},
    }
    assert verdict("reasoning_gym", "so <answer>-4</answer>", reference).correct is True
    assert verdict("reasoning_gym", "so <answer>4</answer>", reference).correct is False
    assert verdict("reasoning_gym", "", reference).correct is False
    assert verdict("reasoning_gym", "<think><answer>-4</answer>", reference).correct is False
    assert verdict("reasoning_gym", "<think><answer>-4</answer></think> who knows", reference).correct is False
    with pytest.raises(ValueError, match="t9.*dataset"):
        get("reasoning_gym").check(Task("t9", (), "-4", "reasoning_gym"))
    with pytest.raises(ValueError, match="no_such"):
        get("reasoning_gym").check(Task("t9", (), {"dataset": "no_such", "entry": {}}, "reasoning_gym"))


# -- self-test and command line ----------------------------------------------------------------------------------


@verifier("registry: gullible")
def gullible(task, response):
    return "boxed" in response or response == task.reference


@verifier("registry: hashed")
def hashed(task, response):
    return hash(response) % 2 / 2 + 0.25


def test_selftest_finds_a_judge_that_accepts_spam():
    checks = {c.name: c.against for c in selftest("registry: gullible", [Case("7", ("7",), ("8", "\\boxed{8}"))])}
    assert (
        not checks["accepts the gold"]
        and checks["refuses corrupted answers"]
        and checks["accepts no empty or spam string"]
    )


def test_selftest_finds_a_judge_that_depends_on_the_hash_seed():
    words = tuple(f"word {i}" for i in range(20))
    checks = {c.name: c.against for c in selftest("registry: hashed", [Case("7", (), words)])}
    assert checks["gives the same verdict under another PYTHONHASHSEED"]
    assert not checks["gives the same verdict in another order"]


SLOW = ("code", "reasoning_gym")


@pytest.mark.parametrize(
    "name", ["math", "process_math", "arc", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_built_in_judge_passes_its_selftest(name):
    assert [check for check in selftest(name) if check.against] == []


def command(*words, capsys):
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    status = run(parser.parse_args(words))
    said = capsys.readouterr()
    return status, said.out, said.err


def test_command_prints_a_verdict_with_its_evidence(capsys):
    status, out, _ = command("--gold", "\\frac12", "--answer", "\\boxed{0.6}", "--json", capsys=capsys)
    said = json.loads(out)
    assert status == 1 and said["correct"] is False and "policy" in said["evidence"]
    status, out, _ = command("--gold", "\\frac12", "--answer", "\\boxed{0.5}", capsys=capsys)
    assert status == 0 and out.startswith("accepted")


def test_command_prints_a_confusion_table_and_every_disagreement(tmp_path, capsys):
    file = tmp_path / "cases.jsonl"
    rows = [("7", "\\boxed{7}", True), ("7", "\\boxed{8}", True), ("7", "\\boxed{9}", False)]
    file.write_text("\n".join(json.dumps({"gold": g, "answer": a, "expected": e}) for g, a, e in rows))
    status, out, _ = command("--file", str(file), "--json", capsys=capsys)
    said = json.loads(out)
    assert status == 1 and said["right"] == 2 and [row["line"] for row in said["disagreements"]] == [2]
    assert (
        said["table"]["true"]["accepted"] == said["table"]["true"]["refused"] == said["table"]["false"]["refused"] == 1
    )
    status, out, _ = command("--file", str(file), capsys=capsys)
    assert "2 of 3 as expected" in out and "line 2" in out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--verifier", "mth", "--gold", "1", "--answer", "1"), 'did you mean "math"'),
        (("--gold", "1", "--answer", "1", "--policy", "unitz=1"), 'did you mean "units"'),
        (("--gold", "1", "--answer", "1", "--policy", "units"), "KEY=VALUE"),
        (("--gold", "1"), "--answer"),
        (("--gold", "", "--answer", "1"), "cannot be read"),
        (("--verifier", "code", "--gold", "7", "--answer", "7"), "unreadable code reference"),
        (("--file", "/nonexistent.jsonl"), "nonexistent"),
        (("--selftest", "registry: parity"), "no cases"),
    ],
)
def test_command_names_what_is_wrong(words, named, capsys):
    status, out, err = command(*words, capsys=capsys)
    assert status == 2 and named in err and not out


def test_command_names_the_line_that_is_no_case(tmp_path, capsys):
    file = tmp_path / "cases.jsonl"
    file.write_text('{"gold": "7", "answer": "7", "expected": true}\n{"gold": "7", "answer": "7", "expected": "yes"}\n')
    status, _, err = command("--file", str(file), capsys=capsys)
    assert status == 2 and "cases.jsonl:2" in err
