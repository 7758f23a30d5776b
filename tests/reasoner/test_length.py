"""Overlong and truncated responses, as credit sees them."""

import pytest

from reasoner.credit import GRPO
from reasoner.length import Length
from rollouts.base import Group, Rollout
from search.base import Step, Trajectory
from verifiers.base import Task, Verdict

TASK = Task("t/1", ({"role": "user", "content": "?"},), "7", "math")


def group(*made: tuple[int, float, str]) -> Group:
    return Group(
        TASK,
        tuple(
            Rollout(TASK, Trajectory((1,), (Step((5,) * n, (-0.1,) * n),), end), Verdict("scored", score, score == 1.0))
            for n, score, end in made
        ),
    )


def test_a_reward_falls_in_a_straight_line_before_the_limit():
    (found,) = Length(overlong=4)(
        [group((6, 1.0, "stop"), (8, 1.0, "stop"), (9, 0.0, "stop"), (10, 0.0, "length"))], 10
    )
    assert [r.bonus for r in found.rollouts] == [0.0, -0.5, -0.75, -1.0]
    assert [r.verdict.score for r in found.rollouts] == [1.0, 1.0, 0.0, 0.0]  # the verdicts stay
    assert [s.advantages[1] for s in GRPO()(found)] == pytest.approx([1.0625, 0.5625, -0.6875, -0.9375])


def test_length_alone_is_contrast_where_verdicts_agree():
    agreeing = group((6, 1.0, "stop"), (10, 1.0, "stop"))
    assert GRPO()(agreeing) == [] and len(GRPO()(Length(overlong=4)([agreeing], 10)[0])) == 2


def test_what_was_cut_off_is_left_out_and_no_wrong_answer():
    (found,) = Length(drop_truncated=True)([group((10, 0.0, "length"), (5, 1.0, "stop"), (5, 1.0, "stop"))], 10)
    assert len(found.rollouts) == 2 and GRPO()(found) == []


def test_by_default_nothing_changes():
    before = group((10, 0.0, "length"), (5, 1.0, "stop"))
    assert Length()([before], 10) == [before]
    with pytest.raises(ValueError, match="overlong = -1"):
        Length(overlong=-1)
