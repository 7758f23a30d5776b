"""Steps that must carry out the question: what is true and beside the point is found out, what is worked is not."""

import random
import time

import pytest

from verifiers import get
from verifiers.base import Task
from verifiers.expression import parse
from verifiers.numbers import begin, rational_or_none
from verifiers.process import asked, rewritings
from verifiers.rewriting import Left, size

BESIDE_THE_POINT = [  # (question, a step that states no false equality and carries nothing of it out)
    ("4 + 3 - 2 =", "5+4=9"),  # a number that was not asked
    ("4 + 3 - 2 =", "4-3=1"),  # another sign
    ("4 + 3 - 2 =", "3-4=-1"),
    ("4 + 3 - 2 =", "4+2=6"),  # a term that is subtracted
    ("4 + 3 - 2 =", "4*3=12"),
    ("4 + 3 - 2 =", "4+4=8"),  # there is one 4
    ("4 + 3 - 2 =", "4=4"),
    ("4 + 3 - 2 =", "4+0=4"),
    ("4 + 3 - 2 =", "4+3=3+4"),  # as much is left as before
    ("4 + 3 - 2 =", "7=4+3"),
    ("4 + 3 - 2 =", "0=0"),
    ("4 + 3 - 2 =", "1+1=2, 4+3=7"),  # one of two
    ("4 + 3 - 2 =", "so it is"),
    ("4 + 3 - 2 =", ""),
    ("4 + 3 - 2 =", "x = 4+3 = 7"),
    ("4 + 3 * 2 =", "4+3=7"),  # the 3 belongs to the product
    ("(4 + 3) * 2 =", "3*2=6"),
    ("12 / 4 - 1 =", "4/12=1/3"),
    ("2^3 + 1 =", "3^2=9"),
    ("2^3 + 1 =", "3+1=4"),
    ("10 / 3 + 1 =", "10/3=3.33"),  # right as a rounded number, and another value
    ("10 / 3 + 1 =", "10/3≈3.3333333"),
    ("4 + 3 - 2 =", "4+3=7-2=5"),  # false besides
    ("1/0 + 2 =", "1/0=5"),
]  # fmt: skip
WORKED = [
    ("4 + 3 - 2 =", "4+3=7\n7-2=5\nAnswer: 5"),
    ("4 + 3 - 2 =", "3-2=1\n1+4=5"),  # in any order
    ("4 + 3 - 2 =", "4+3-2=5"),
    ("4 + 3 - 2 =", "4+3-2=7-2=5"),
    ("4 + 3 - 2 =", "4+3-2=7-2\n7-2=5"),
    ("4 - 1 - 7 =", "1+7=8\n4-8=-4"),  # what is subtracted together
    ("12 / 2 / 3 =", "2*3=6\n12/6=2"),
    ("What is (3+4)*2 - 12/(2*3)?", "2*3=6\n3+4=7\n12/6=2\n7*2=14\n14-2=12"),
    ("5 - (3 - 4) =", "3-4=-1\n5--1=6"),
    ("5 - 3*4 + 1 =", "-3*4=-12\n5-12=-7\n-7+1=-6"),
    ("0 + 0 + 5 =", "0+0=0\n0+5=5"),
    ("2^3 + 1 =", "2^3=8\n8+1=9"),
    (r"$\sqrt{16} + 2$", "\\sqrt{16}=4\n4+2=6"),
    ("1/2 + 1/3 =", "1/2+1/3=5/6"),
    ("6 x 7 + 2 =", "Step 1: 6 x 7 = 42\nStep 2: 42 + 2 = 44"),
    ("4 + 3 - 2 =", "4+3=<<4+3=7>>7\nThen 7 - 2 = 5."),
]  # fmt: skip


@pytest.mark.parametrize(("question", "step"), BESIDE_THE_POINT)
def test_a_step_beside_the_point_carries_nothing_out(question, step):
    assert rewritings(question, f"{step}\nAnswer: 1")[0] is False


@pytest.mark.parametrize(("question", "text"), WORKED)
def test_every_step_of_a_worked_expression_carries_something_out(question, text):
    assert all(rewritings(question, text))


def test_what_was_carried_out_is_gone():
    assert rewritings("4 + 3 - 2 =", "4+3=7\n4+3=7\n7-2=5\n7-2=5\n5+0=5\nAnswer: 5") == (
        True, False, True, False, False, True,
    )  # fmt: skip


def test_after_a_false_step_its_result_is_nothing_to_go_on_with():
    assert rewritings("4 + 3 - 2 =", "4+3=8\n8-2=6\nAnswer: 6") == (False, False, True)


def test_only_the_last_step_may_be_without_an_equality():
    assert rewritings("4 + 3 - 2 =", "Answer: 5") == (True,)
    assert rewritings("4 + 3 - 2 =", "Answer: 5\nAnswer: 5\nAnswer: 5") == (False, False, True)
    assert rewritings("4 + 3 - 2 =", "") == ()


@pytest.mark.parametrize("question", ["no numbers", "3", "1 + 2 and 3 + 4", "x + 3 =", "20% of 50"])
def test_a_question_without_one_expression_is_refused_before_training(question):
    judge = get("process_math", rule="rewrite")
    with pytest.raises(ValueError, match="rule='true'"):
        judge.check(Task("t", ({"role": "user", "content": question},), "7", "process_math"))
    get("process_math").check(Task("t", ({"role": "user", "content": question},), "7", "process_math"))


def test_the_expression_is_found_among_words():
    assert asked("In 2 steps, what is 3 + 4?") == asked("3+4") and asked("Compute 3·4.") == asked("3*4 =")


def test_the_rule_is_a_policy_and_its_verdict_names_the_step():
    task = Task("t", ({"role": "user", "content": "4 + 3 - 2 ="},), "5", "process_math")
    lucky = "4+1=5\nAnswer: 5"
    assert get("process_math").verify(task, lucky).steps == (1.0, 1.0)
    verdict = get("process_math", rule="rewrite").verify(task, lucky)
    assert verdict.correct and verdict.steps == (0.0, 1.0) and verdict.evidence["first_wrong_step"] == 0
    assert "step 1 of 2 carries out no part" in verdict.why
    with pytest.raises(ValueError, match="rule='rewrites'"):
        get("process_math", rule="rewrites")


def test_hostile_steps_are_bounded():
    sums, deep = "+".join(["1"] * 140), "(" * 38 + "1+1" + ")" * 38
    start = time.process_time()
    steps = [f"{sums}=140", f"{deep}=2", "(1+2)^{60}" * 30 + "=5", "=" * 500, "9^{9^{9^9}}=1", "1=1" * 500]
    found = rewritings(f"{sums} =", "\n".join(steps * 15))
    assert time.process_time() - start < 5  # a fifth of a second on a free core
    assert len(found) == 90 and found[0] and not any(found[1:])


def test_whatever_is_stated_what_is_left_keeps_the_value_of_the_question_and_shrinks():
    noise, carried = random.Random(0), 0
    for _ in range(300):
        question = parse(expression(noise, 4))
        left, value = Left(question), rational_or_none(question)
        for _ in range(30 if value is not None else 0):
            members = [parse(expression(noise, noise.randrange(1, 3))) for _ in range(2)]
            worth = rational_or_none(members[0])
            if worth is not None and noise.random() < 0.7:
                members[1] = ("num", worth, 0)
            before = left.tree
            begin()
            if left.carry_out(members):
                carried += 1
                assert rational_or_none(divided(left.tree)) == value and size(left.tree) < size(before)
            else:
                assert left.tree == before
    assert carried > 50


def divided(tree):
    """A tree with its inverses as quotients, as `numbers` reads them."""
    parts = tuple(divided(part) if isinstance(part, tuple) else part for part in tree)
    return ("div", ("num", 1, 0), parts[1]) if tree[0] == "inv" else parts


def expression(noise, numbers):
    """Small numbers, so that parts are met by chance."""
    if numbers == 1:
        return str(noise.randrange(4))
    first = noise.randrange(1, numbers)
    parts = (expression(noise, count) for count in (first, numbers - first))
    return f"({noise.choice('+-*/').join(parts)})"
