"""Credit rules against gradients enumerated by hand: what each is, in expectation, the gradient of."""

import itertools
import math
import statistics

import pytest

from reasoner.credit import (
    CREDITS,
    GRPO,
    RLOO,
    DrGRPO,
    Marginal,
    MaxRL,
    Process,
    ReinforcePP,
    Shuffled,
    Tree,
    assign,
    step_ends,
)
from rollouts.base import Group, Rollout
from search.base import Step, Trajectory
from verifiers.base import Task, Verdict

TASK = Task("t/1", ({"role": "user", "content": "?"},), "7", "math")
DECODE = "".join  # the ids of these tests' texts are their characters
BY_OUTCOME = [rule for rule in CREDITS.values() if rule not in (Process, Marginal)]


def rollout(score: float | None, seed: int = 0, ids=(5, 6)) -> Rollout:
    steps = (Step(ids, (-0.5,) * len(ids)), Step((7,), (0.0,), sampled=False), Step((8,), (-0.25,)))
    verdict = Verdict("scored", score, score == 1.0) if score is not None else Verdict.fail("broke")
    return Rollout(TASK, Trajectory((1, 2), steps, "stop", seed=seed), verdict)


def group(*scores: float | None) -> Group:
    return Group(TASK, tuple(rollout(s, seed=i, ids=(5 + 10 * i, 6)) for i, s in enumerate(scores)))


def told(text: str, score: float | None, steps=(), end="stop", answer=None, status="scored") -> Rollout:
    """A sampled response, one token a character."""
    path = Trajectory(("?",), (Step(tuple(text), (-0.1,) * len(text), text),), end)
    if status != "scored":
        return Rollout(TASK, path, Verdict(status, answer=answer, why="?"))
    return Rollout(TASK, path, Verdict("scored", score, score == 1.0, answer=answer, steps=steps))


def advantages(samples) -> list[float]:
    return [s.advantages[2] for s in samples]


@pytest.mark.parametrize("rule", BY_OUTCOME)
@pytest.mark.parametrize("scores", [(1.0, 1.0, 1.0), (0.0, 0.0), (0.5,), (None, None), (1.0, None)])
def test_group_that_agrees_teaches_nothing(rule, scores):
    assert assign(rule(), [group(*scores)]) == []


@pytest.mark.parametrize("rule", BY_OUTCOME)
def test_what_could_not_be_judged_is_left_out_and_never_scored_0(rule):
    with_failed, without = assign(rule(), [group(1.0, None, 0.0)]), assign(rule(), [group(1.0, 0.0)])
    if rule is not Shuffled:
        assert advantages(with_failed) == pytest.approx(advantages(without))
    assert len(with_failed) == 2


@pytest.mark.parametrize("rule", [GRPO, DrGRPO, RLOO, ReinforcePP, MaxRL, Tree])
def test_the_advantages_of_a_group_sum_to_zero(rule):
    assert sum(advantages(assign(rule(), [group(1.0, 0.25, 0.0, 0.0)]))) == pytest.approx(0.0, abs=1e-12)


def test_advantage_is_the_score_minus_the_mean_of_the_judged():
    samples = GRPO()(group(1.0, 0.0, None, 0.0))
    assert advantages(samples) == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert advantages(DrGRPO()(group(1.0, 0.0, None, 0.0))) == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_only_sampled_tokens_are_taught_and_keep_the_samplers_logprobs():
    sample = GRPO()(group(1.0, 0.0))[0]
    assert sample.ids == (1, 2, 5, 6, 7, 8)
    assert sample.loss_mask == (False, False, True, True, False, True)
    assert sample.logprobs == (0.0, 0.0, -0.5, -0.5, 0.0, -0.25)
    assert sample.advantages == (0.0, 0.0, 0.5, 0.5, 0.0, 0.5)


def test_scaling_divides_by_the_standard_deviation():
    assert advantages(GRPO(scale_by_std=True)(group(1.0, 0.0)))[0] == pytest.approx(1.0)


def test_leave_one_out_compares_with_the_others_alone():
    assert advantages(RLOO()(group(1.0, 0.5, 0.0))) == pytest.approx([0.75, 0.0, -0.75])


def test_maxrl_weighs_by_one_over_the_success_rate():
    assert advantages(MaxRL()(group(1.0, 0.0, 0.0, 0.0))) == pytest.approx([3.0, -1.0, -1.0, -1.0])


def expected_gradient(rule, paths: dict[tuple, tuple[float, float, dict]], n: int) -> dict[str, float]:
    """The exact mean over all n-tuples of independent paths of 1/n sum_i sum_t A_it d log p(token t) / d parameter.

    paths: ids -> (probability, score, {parameter: (position, derivative of the log-probability of that token)}).
    """
    gradient: dict[str, float] = {}
    for drawn in itertools.product(paths, repeat=n):
        rollouts = tuple(
            Rollout(TASK, Trajectory((1,), (Step(ids, (0.0,) * len(ids)),), "stop"), Verdict("scored", s, s == 1.0))
            for ids, s in ((ids, paths[ids][1]) for ids in drawn)
        )
        probability = math.prod(paths[ids][0] for ids in drawn)
        for sample in assign(rule, [Group(TASK, rollouts)]):
            for name, (position, slope) in paths[sample.ids[1:]][2].items():
                term = probability / n * sample.advantages[1 + position] * slope
                gradient[name] = gradient.get(name, 0.0) + term
    return gradient


def coin(p: float) -> dict:
    """One token: right with probability p. The derivative of the success rate by p is 1."""
    return {(8,): (p, 1.0, {"p": (0, 1 / p)}), (9,): (1 - p, 0.0, {"p": (0, -1 / (1 - p))})}


@pytest.mark.parametrize("p", [0.1, 0.6])
@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize(
    ("rule", "truth"),
    [
        (RLOO(), lambda p, n: 1.0),
        (Tree(), lambda p, n: 1.0),
        (GRPO(), lambda p, n: (n - 1) / n),
        (MaxRL(), lambda p, n: sum((1 - p) ** (k - 1) for k in range(1, n))),  # d/dp of log p, cut after n - 1 terms
    ],
)
def test_the_expected_gradient_is_the_one_the_rule_claims(rule, truth, p, n):
    assert expected_gradient(rule, coin(p), n)["p"] == pytest.approx(truth(p, n))


def test_sibling_baselines_are_unbiased_and_have_less_variance():
    """Two tokens, four paths with any scores: the gradient by all three parameters, exact, and its spread."""
    a, b = 0.3, {0: 0.6, 1: 0.2}
    scores = {(0, 0): 1.0, (0, 1): 0.9, (1, 0): 0.2, (1, 1): 0.0}
    paths = {}
    for (x, y), score in scores.items():
        first, second = (a if x == 0 else 1 - a), (b[x] if y == 0 else 1 - b[x])
        slopes = {"a": (0, (1 if x == 0 else -1) / first), f"b{x}": (1, (1 if y == 0 else -1) / second)}
        paths[x, y] = (first * second, score, slopes)
    value = {x: b[x] * scores[x, 0] + (1 - b[x]) * scores[x, 1] for x in (0, 1)}
    truth = {"a": value[0] - value[1], "b0": a * 0.1, "b1": (1 - a) * 0.2}
    assert expected_gradient(Tree(), paths, 3) == pytest.approx(truth)
    assert expected_gradient(RLOO(), paths, 3) == pytest.approx(truth)

    def square(rule) -> float:
        total = 0.0
        for drawn in itertools.product(paths, repeat=3):
            steps = [Trajectory((1,), (Step(ids, (0.0, 0.0)),), "stop") for ids in drawn]
            judged = [Verdict("scored", scores[ids], False) for ids in drawn]
            rollouts = tuple(Rollout(TASK, t, v) for t, v in zip(steps, judged, strict=True))
            samples = rule(Group(TASK, rollouts))
            weight = math.prod(paths[ids][0] for ids in drawn)
            total += weight * sum(s.advantages[2] * paths[s.ids[1:]][2].get("b1", (1, 0))[1] for s in samples) ** 2
        return total

    assert square(Tree()) < 0.8 * square(RLOO())


def test_shared_tokens_cancel_and_credit_begins_at_the_fork():
    paths = [told("abX", 1.0), told("abY", 0.0), told("c", 0.0)]
    samples = Tree()(Group(TASK, tuple(paths)))
    assert samples[0].advantages[1:] == pytest.approx((1.0, 1.0, 1.0))  # a: others 0, 0; at b and X: the sibling's 0
    assert samples[1].advantages[1:] == pytest.approx((-0.5, -1.0, -1.0))
    assert samples[2].advantages[1:] == pytest.approx((-0.5,))
    assert sum(s.advantages[2] for s in samples[:2]) == pytest.approx(0.0)  # at b, which only those two share


def test_global_normalisation_spans_the_batch():
    samples = assign(ReinforcePP(), [group(1.0, 0.0), group(1.0, 0.0, 0.0, 0.0)])
    taught = [a for s in samples for a, m in zip(s.advantages, s.loss_mask, strict=True) if m]
    assert statistics.fmean(taught) == pytest.approx(0.0, abs=1e-12) and statistics.pstdev(taught) == pytest.approx(1.0)
    raw = [0.5, -0.5, 0.75, -0.25, -0.25, -0.25]  # three sampled tokens each
    assert advantages(samples) == pytest.approx([x / statistics.pstdev(raw) for x in raw])


def test_without_group_baselines_one_path_a_task_is_enough():
    samples = assign(ReinforcePP(group_baseline=False), [group(1.0), group(0.0), group(None)])
    assert advantages(samples) == pytest.approx([1.0, -1.0])
    assert samples[0].advantages[4] == 0.0  # what was not sampled stays untaught


def test_a_step_earns_what_it_changes():
    right = told("3+4=7\n7+5=12\nAnswer: 12", 1.0, steps=(1.0, 1.0, 1.0))
    wrong = told("3+4=7\n7+5=13\nAnswer: 13", 0.0, steps=(1.0, 0.0, 1.0))
    blurt = told("Answer: 9", 0.0, steps=(1.0,))
    samples = assign(Process(), [Group(TASK, (right, wrong, blurt))], DECODE)
    mean = 1 / 3
    assert samples[0].advantages[1:] == pytest.approx([1 - mean] * 6 + [0.0] * 17)
    assert samples[1].advantages[1:] == pytest.approx([1 - mean] * 6 + [-1.0] * 7 + [0.0] * 10)
    assert samples[2].advantages[1:] == pytest.approx([-mean] * 9)
    for sample, score in zip(samples, (1, 0, 0), strict=True):  # per step, a path's gains sum to what GRPO gives it
        firsts = [1, *(i + 2 for i, c in enumerate(sample.ids[1:]) if c == "\n")]
        assert sum(sample.advantages[i] for i in firsts) == pytest.approx(score - mean)


def test_with_a_forecast_a_path_is_worth_what_its_last_steps_leave_of_it():
    """Of 5 steps after right ones 4 went right: two steps from the end a path without an error is worth 0.8 squared."""
    right = told("3+4=7\n7+5=12\nAnswer: 12", 1.0, steps=(1.0, 1.0, 1.0))
    wrong = told("3+4=7\n7+5=13\nAnswer: 13", 0.0, steps=(1.0, 0.0, 1.0))
    samples = assign(Process(forecast=True), [Group(TASK, (right, wrong))], DECODE)
    assert samples[0].advantages[1:] == pytest.approx([0.64 - 0.5] * 6 + [0.8 - 0.64] * 7 + [0.2] * 10)
    assert samples[1].advantages[1:] == pytest.approx([0.64 - 0.5] * 6 + [-0.64] * 7 + [0.0] * 10)


def test_steps_teach_where_outcomes_agree():
    late = told("3+4=7\n7+5=13\nAnswer: 13", 0.0, steps=(1.0, 0.0, 1.0))
    blurt = told("Answer: 9", 0.0, steps=(1.0,))
    (sample,) = assign(Process(), [Group(TASK, (late, blurt))], DECODE)
    assert sample.ids[1:] == tuple("3+4=7\n7+5=13\nAnswer: 13")
    clean = told("3+4=7\nAnswer: 7", 1.0, steps=(1.0, 1.0))
    assert assign(Process(), [Group(TASK, (clean, clean))], DECODE) == []


def test_steps_point_the_way_more_surely_than_outcomes_where_few_paths_are_right():
    """Four independent steps, each right with chance 1/2: 1 path in 16. Of a pair of paths, the mean of the gradient
    along (1, 1, 1, 1) over its deviation, exactly."""

    def path(right: tuple[int, ...]) -> Rollout:
        lowest = tuple(float(all(right[: i + 1])) for i in range(4))
        return told("\n".join(map(str, right)), float(all(right)), steps=lowest)

    def sureness(rule) -> float:
        slopes = []
        for pair in itertools.product(itertools.product((0, 1), repeat=4), repeat=2):
            drawn = [path(right) for right in pair]
            slope = 0.0
            for sample in assign(rule, [Group(TASK, tuple(drawn))], DECODE):
                digits = [(int(c), a) for c, a in zip(sample.ids[1:], sample.advantages[1:], strict=True) if c != "\n"]
                slope += sum(a * (digit - 0.5) for digit, a in digits)  # d log p / d logit = digit - p
            slopes.append(slope)
        return statistics.fmean(slopes) / statistics.pstdev(slopes)

    assert sureness(Process()) > 3 * sureness(GRPO()) > 0


@pytest.mark.parametrize(
    ("ids", "ends"),
    [
        (("3", "\n", "4", "<eos>"), [2, 4]),
        (("3\n4", "<eos>"), [1, 2]),  # a token with two steps in it belongs to the first
        (("3", "\n\n", "4"), [2, 2, 3]),  # a step inside a token has none of its own
        (("3", "\n", "<eos>"), [3]),  # a delimiter at the end opens no step
        (("3",), [1]),
    ],
)
def test_steps_are_mapped_to_tokens_exactly(ids, ends):
    def decode(some):
        return "".join(some).replace("<eos>", "")

    path = Trajectory(("?",), (Step(ids, (0.0,) * len(ids), decode(ids)),), "stop")
    assert step_ends(path, "\n", decode) == ends


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((), "process_math"),
        ((1.0,), r"t/1.*1 step scores for 2 steps.*delimiter"),
    ],
)
def test_step_scores_that_cannot_be_used_name_task_and_verifier(steps, message):
    with pytest.raises(ValueError, match=message):
        assign(Process(), [Group(TASK, (told("3+4=7\nAnswer: 7", 1.0, steps=steps),))], DECODE)


def test_the_marginal_answer_is_rewarded_whatever_the_key_says():
    paths = (
        told("a", 0.0, answer="7"),
        told("b", 0.0, answer="14/2"),  # the verifier's equality, not the text's
        told("c", 1.0, answer="8"),
        told("d", None, answer=None, status="abstained"),
        told("e", None, status="failed"),
        told("f", 0.0, answer="7", end="length"),  # cut off: no answer
    )
    samples = Marginal()(Group(TASK, paths))
    assert [s.ids[1] for s in samples] == ["a", "b", "c", "d", "f"]
    assert [s.advantages[1] for s in samples] == pytest.approx([0.6, 0.6, -0.4, -0.4, -0.4])


def test_leaders_that_tie_share_the_reward_and_agreement_teaches_nothing():
    tie = Marginal()(Group(TASK, (told("a", 0.0, answer="7"), told("b", 0.0, answer="8"), told("c", 0.0))))
    assert [s.advantages[1] for s in tie] == pytest.approx([1 / 6, 1 / 6, -1 / 3])
    assert Marginal()(Group(TASK, (told("a", 0.0, answer="7"), told("b", 1.0, answer="7")))) == []
    assert Marginal()(Group(TASK, (told("a", 0.0), told("b", 1.0)))) == []  # no answer at all


def test_shuffling_keeps_the_scores_and_loses_their_owners():
    owners = set()
    for seed in range(20):
        found = advantages(Shuffled(seed)(group(1.0, 0.0, 0.0, 0.0)))
        assert sorted(found) == pytest.approx([-0.25, -0.25, -0.25, 0.75])
        owners.add(found.index(max(found)))
    assert len(owners) > 1
    assert Shuffled(3)(group(1.0, 0.0)) == Shuffled(3)(group(1.0, 0.0))


def test_a_reward_that_is_no_number_is_counted_under_its_verifier_and_taught_to_nobody():
    from reasoner.train import statistics

    with pytest.raises(ValueError, match="score=nan"):  # so the pool makes a failed verdict of it
        Verdict("scored", float("nan"), False)
    failed = Rollout(TASK, rollout(1.0).trajectory, Verdict.fail("ValueError: score=nan is outside [0, 1]"))
    spoiled = Group(TASK, (*group(1.0, 0.0).rollouts, failed))
    assert len(GRPO()(spoiled)) == 2
    assert statistics([spoiled])["dropped"] == {"math failed: ValueError: score=nan is outside [0, 1]": 1}
