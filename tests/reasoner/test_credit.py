import pytest

from reasoner.credit import CREDITS, GRPO, Shuffled
from rollouts.base import Group, Rollout
from search.base import Step, Trajectory
from verifiers.base import Task, Verdict

TASK = Task("t/1", ({"role": "user", "content": "?"},), "7", "math")


def rollout(score: float | None, seed: int = 0, ids=(5, 6)) -> Rollout:
    steps = (Step(ids, (-0.5,) * len(ids)), Step((7,), (0.0,), sampled=False), Step((8,), (-0.25,)))
    verdict = Verdict("scored", score, score == 1.0) if score is not None else Verdict.fail("broke")
    return Rollout(TASK, Trajectory((1, 2), steps, "stop", seed=seed), verdict)


def group(*scores: float | None) -> Group:
    return Group(TASK, tuple(rollout(s, seed=i) for i, s in enumerate(scores)))


@pytest.mark.parametrize("rule", CREDITS.values())
@pytest.mark.parametrize("scores", [(1.0, 1.0, 1.0), (0.0, 0.0), (0.5,), (None, None), (1.0, None)])
def test_group_that_agrees_teaches_nothing(rule, scores):
    assert rule()(group(*scores)) == []


def test_advantage_is_the_score_minus_the_mean_of_the_judged():
    samples = GRPO()(group(1.0, 0.0, None, 0.0))
    assert len(samples) == 3  # the failed one is left out, not scored 0
    assert [s.advantages[2] for s in samples] == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_only_sampled_tokens_are_taught_and_keep_the_samplers_logprobs():
    sample = GRPO()(group(1.0, 0.0))[0]
    assert sample.ids == (1, 2, 5, 6, 7, 8)
    assert sample.loss_mask == (False, False, True, True, False, True)
    assert sample.logprobs == (0.0, 0.0, -0.5, -0.5, 0.0, -0.25)
    assert sample.advantages == (0.0, 0.0, 0.5, 0.5, 0.0, 0.5)


def test_scaling_divides_by_the_standard_deviation():
    assert GRPO(scale_by_std=True)(group(1.0, 0.0))[0].advantages[2] == pytest.approx(1.0)


def test_shuffling_keeps_the_scores_and_loses_their_owners():
    owners = set()
    for seed in range(20):
        samples = Shuffled(seed)(group(1.0, 0.0, 0.0, 0.0))
        advantages = [s.advantages[2] for s in samples]
        assert sorted(advantages) == pytest.approx([-0.25, -0.25, -0.25, 0.75])
        owners.add(advantages.index(max(advantages)))
    assert len(owners) > 1
    assert Shuffled(3)(group(1.0, 0.0)) == Shuffled(3)(group(1.0, 0.0))
