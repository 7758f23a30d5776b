r"""Step scores: a false equality is found, and nothing else is called false."""

import time

import pytest

from verifiers import get
from verifiers.base import Task
from verifiers.process import ProcessMath, Steps, findings, first_wrong, step_scores

FALSE = [
    "3+4=8", "So 3 + 4 = 7 and 7+5 = 13.", "12 - 5 = 7 - 2 = 5", "10/3 = 3.34", "2/3=0.65",
    r"$3+4=7$ so \(2\cdot 5 = 11\)", "x=3+4=8", "3+4=<<3+4=8>>8", "Step 2: 5*6 = 31", "5 x 6 = 31",
    "1,000 + 500 = 1,600", r"\frac{1}{2} + \frac13 = \frac26", r"\sqrt{16}=5", "2^10 = 1000",
    "The total is $3 + $4 = $8.", "3·4=13", "1/2 = 5%", "a = b = 3 = 4", "1 = 2", "6 ÷ 2 = 4", "10^{10^{10}} = 5",
    "−3 + 5 = 8",
]  # fmt: skip
NOT_FALSE = [
    "", "no numbers here", "3+4=7", "2x = 6 => x = 3", "10/3 = 3.33", "10/3 ≈ 3", "2/3=0.66", "x = 3+4 = 7",
    "3+4=<<3+4=7>>7", "1. 3+4 = 7", "- 3 + 4 = 7", "20% of 50 = 10", "3 apples + 4 apples = 7 apples",
    "2 hours = 120 minutes", "17 mod 5 = 2", "f(2, 3) = 5", "gcd(12, 18) = 6", "5! = 120", "C(5,2) = 10",
    "sin 30 = 1/2", "e = 5", "He pays 3*$4=$12", "2(3+4) = 14", "7 = 1 (mod 3)", "3:4 = 6:8", "log 100 = 2",
    "13/4 = 3 remainder 1",
    "9 = 10 minus 1", "7 + 5 = 12 cm", "He has 2 times 3 + 4 = 10", "3 < 4 = 5", "5 = 10/2 > 3", "100 - 30% = 70",
    "= 7", "3 + = 7", "1/2 = 50%", "0 = 0", r"3.14 = \pi", "i = 1", "x_1 = 5, x_2 = 6", "[3+4]*2 = 14",
]  # fmt: skip


@pytest.mark.parametrize("step", FALSE)
def test_a_false_equality_scores_its_step_zero(step):
    assert step_scores(step) == (0.0,)


@pytest.mark.parametrize("step", NOT_FALSE)
def test_what_is_true_or_no_arithmetic_is_never_called_false(step):
    assert set(step_scores(step)) <= {1.0}


def test_each_step_has_one_score_and_the_first_wrong_one_is_found():
    scores = step_scores("3+4=7\n\n7+5=13\n13+1=15\nAnswer: 15\n")
    assert scores == (1.0, 1.0, 0.0, 0.0, 1.0)
    assert first_wrong(scores) == 2
    assert first_wrong((1.0, 1.0)) is None


def test_the_delimiter_cuts_the_steps():
    assert step_scores("3+4=7; 7+5=13; done", delimiter=";") == (1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="delimiter"):
        ProcessMath(delimiter="")


def test_the_verdict_is_of_the_answer_and_carries_the_steps():
    verdict = ProcessMath().verify(Task("t", (), "13", "process_math"), "3+4=7\n7+5=13\nAnswer: 13")
    assert (verdict.correct, verdict.score, verdict.answer) == (True, 1.0, "13")
    assert verdict.steps == (1.0, 0.0, 1.0)
    assert verdict.evidence["first_wrong_step"] == 1


def test_a_right_chain_to_no_answer_is_wrong():
    verdict = ProcessMath().verify(
        Task("t", (), "7", "process_math"),
        "3+4=7 is what I get when I add the two of them up and then I stop to say any more about it",
    )
    assert verdict.correct is False
    assert verdict.steps == (1.0,)


def test_hostile_steps_are_bounded():
    text = "\n".join(["(1+2)^{60}" * 30 + "=5"] * 20 + ["1+" * 400 + "1=401", "=" * 500, "1=1" * 500])
    assert len(step_scores(text)) == 23


def test_the_work_on_all_steps_of_a_response_is_bounded_together():
    hard = r"(\sqrt{2}+\sqrt{3}+\sqrt{5}+\pi)^{30} = 4"
    start = time.perf_counter()
    found = findings("\n".join([hard] * 3000))
    assert time.perf_counter() - start < 20  # about a second on a free core, two minutes without a bound
    assert found[0] is False and found[-1] is None


def test_work_that_is_shown_and_true_is_worth_more_than_an_answer_out_of_nowhere():
    worked, blurted, wrong = "3+4=7\n7-2=5\nAnswer: 5", "Answer: 5", "3+4=8\n8-2=6\nAnswer: 6"
    assert findings(worked) == (True, True, None) and findings(wrong) == (False, True, None)
    score = {text: Steps().verify(None, text).score for text in (worked, blurted, wrong, "")}
    assert score[worked] == pytest.approx(2.5 / 3) and score[blurted] == score[""] == 0.5
    assert score[worked] > score[blurted] >= score[wrong]


def test_steps_are_judged_without_a_look_at_the_task():
    assert Steps().verify(None, "3+4=7").correct and not Steps(join="min").verify(None, "1+1=2\n1+1=3").score


@pytest.mark.parametrize("policy", [{"delimiter": ""}, {"unchecked": 1.5}, {"join": "sum"}])
def test_a_policy_of_steps_that_makes_no_sense_is_refused(policy):
    with pytest.raises(ValueError, match=next(iter(policy))):
        Steps(**policy)


def test_the_policy_of_the_outcome_may_be_given_as_a_table():
    task = Task("t", ({"role": "user", "content": "3 + 4 ="},), "7", "process_math")
    strict = get("process_math", outcome={"form": "simplest"})
    assert get("process_math").verify(task, "Answer: 3+4").correct
    assert not strict.verify(task, "Answer: 3+4").correct and strict.verify(task, "3+4=7\nAnswer: 7").correct
    with pytest.raises(ValueError, match="form"):
        get("process_math", outcome={"from": "simplest"})
