"""From groups of judged paths to what the model is told: one advantage per token.

A credit rule is a frozen dataclass whose fields are its TOML keys and whose call maps a Group to Samples. To add one:
write it here and name it in CREDITS. A rule that needs the whole batch has a method `over_batch` besides; `assign`
calls both. Knows nothing of TRL or torch.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from rollouts.base import Group, Rollout
from search.base import Decode, Trajectory, derive, step_ends
from search.marginal import estimate
from verifiers import get
from verifiers.base import Verdict

WITHOUT_STEPS = frozenset({"math", "code", "arc", "reasoning_gym"})  # verifiers that give no step scores


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows of equal length, one entry per token of a path, prompt included.

    Example, a prompt P and an answer A that was sampled:
        ids=P + A, loss_mask=[False] * len(P) + [True] * len(A), logprobs=[0.0] * len(P) + logprobs_A,
        advantages=[0.0] * len(P) + [0.5] * len(A)
    """

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]  # True where the policy sampled the token
    logprobs: tuple[float, ...]  # under the policy that sampled it (nats); 0.0 where not sampled
    advantages: tuple[float, ...]
    experts: bytes = b""  # that read the tokens, the last one left out, where the engine records them: see `Step`

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.loss_mask), len(self.logprobs), len(self.advantages)}
        assert len(lengths) == 1, f"rows of a sample differ in length: {lengths}"


class Credit(Protocol):
    def __call__(self, group: Group) -> list[Sample]:
        """The samples of a group, [] when it teaches nothing."""
        ...


def assign(rule: Credit, groups: Sequence[Group], decode: Decode | None = None) -> list[Sample]:
    """The samples of a batch. Raises ValueError naming task and verifier for step scores that a rule cannot use.

    decode: token ids to the text that verifiers saw; only rules that credit steps need it.
    """
    if hasattr(rule, "decode"):
        rule = replace(rule, decode=decode)
    if getattr(rule, "prm", ""):
        from reasoner.prm import with_step_scores

        groups = with_step_scores(groups, rule.prm, rule.delimiter, decode)
    samples = [sample for group in groups for sample in rule(group)]
    return rule.over_batch(samples) if hasattr(rule, "over_batch") else samples


@dataclass(frozen=True, slots=True)
class GRPO:
    """Score minus the group's mean (Shao et al. 2024, arXiv:2402.03300), by default not divided by the standard
    deviation, which overweights tasks that are nearly solved or nearly hopeless (Liu et al. 2025, arXiv:2503.20783)."""

    scale_by_std: bool = False

    def __call__(self, group: Group) -> list[Sample]:
        judged, scores = _judged(group)
        if len(set(scores)) < 2:  # agreement teaches nothing
            return []
        mean = statistics.fmean(scores)
        scale = statistics.pstdev(scores) if self.scale_by_std else 1.0
        return _even(judged, [(s - mean) / scale for s in scores])


@dataclass(frozen=True, slots=True)
class DrGRPO:
    """GRPO done right (Liu et al. 2025, arXiv:2503.20783): no standard deviation. Its other half, a loss divided by a
    constant instead of by lengths, is `learner.loss = "dr_grpo"`."""

    def __call__(self, group: Group) -> list[Sample]:
        return GRPO(scale_by_std=False)(group)


@dataclass(frozen=True, slots=True)
class RLOO:
    """Score minus the mean of the others (Ahmadian et al. 2024, arXiv:2402.14740): no bias, where GRPO's own score in
    its baseline shrinks the expected gradient by (n - 1) / n."""

    def __call__(self, group: Group) -> list[Sample]:
        judged, scores = _judged(group)
        if len(set(scores)) < 2:
            return []
        total, others = math.fsum(scores), len(scores) - 1
        return _even(judged, [s - (total - s) / others for s in scores])


@dataclass(frozen=True, slots=True)
class ReinforcePP:
    """REINFORCE++ (Hu et al. 2025, arXiv:2501.03262): advantages normalised over the tokens of the whole batch.

    group_baseline: first subtract each group's mean, the paper's variant for reasoning tasks. Without it, groups that
    agree teach how their task compares with the others, and one path per task is enough.
    """

    group_baseline: bool = True

    def __call__(self, group: Group) -> list[Sample]:
        if self.group_baseline:
            return GRPO()(group)
        judged, scores = _judged(group)
        return _even(judged, scores)

    def over_batch(self, samples: list[Sample]) -> list[Sample]:
        taught = [a for s in samples for a, learned in zip(s.advantages, s.loss_mask, strict=True) if learned]
        if len(set(taught)) < 2:  # the whole batch agrees
            return []
        mean, std = statistics.fmean(taught), statistics.pstdev(taught)
        return [_with(s, [(a - mean) / std for a in s.advantages]) for s in samples]


@dataclass(frozen=True, slots=True)
class MaxRL:
    """Score minus the mean, divided by the mean: hard tasks weigh 1 / success rate, as in the gradient of
    log p(right) (Tajwar et al. 2026, arXiv:2602.02710).

    With n paths its expectation is the gradient of the log's series up to the term of pass@(n - 1).
    """

    def __call__(self, group: Group) -> list[Sample]:
        judged, scores = _judged(group)
        if len(set(scores)) < 2:
            return []
        mean = statistics.fmean(scores)
        return _even(judged, [(s - mean) / mean for s in scores])


@dataclass(frozen=True, slots=True)
class Tree:
    """Siblings as the baseline: for each token, the score minus the mean of the other paths through the place before
    it; where a path is alone there, through the last place that it shares (compare TreeRL, Hou et al. 2025,
    arXiv:2506.11902).

    For groups of any size, from tree searches or plain samples. Shared tokens cancel out, credit begins at the fork.
    Where no two paths share a token it is RLOO; like it, unbiased for paths drawn independently.
    """

    def __call__(self, group: Group) -> list[Sample]:
        judged, scores = _judged(group)
        if len(set(scores)) < 2:
            return []
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node; the prompt is node 0
        routes = [_route(nodes, r.trajectory) for r in judged]
        through: dict[int, list[float]] = {}
        for route, score in zip(routes, scores, strict=True):
            for node in route:
                through.setdefault(node, []).append(score)
        sums = {node: (math.fsum(reached), len(reached)) for node, reached in through.items()}
        samples = []
        for rollout, route, score in zip(judged, routes, scores, strict=True):
            advantages, baseline = [], 0.0
            for node in route[:-1]:
                total, paths = sums[node]
                baseline = (total - score) / (paths - 1) if paths > 1 else baseline
                advantages.append(score - baseline)
            samples.append(spread(rollout.trajectory, advantages))
        return [s for s in samples if any(s.advantages)]


def _route(nodes: dict[tuple[int, int], int], path: Trajectory) -> list[int]:
    """The nodes of the token tree that a path goes through, the root first; new ones are entered."""
    route = [0]
    for token in path.ids[len(path.prompt) :]:
        route.append(nodes.setdefault((route[-1], token), len(nodes) + 1))
    return route


@dataclass(frozen=True, slots=True)
class Process:
    """Step scores as token advantages: a step earns the value after it less the value before it (Setlur et al. 2024,
    arXiv:2410.08146).

    The value after a step is the lowest step score so far, for an error is not mended by what follows; after the last
    step it is the outcome; before the first it is the group's mean outcome. So the gains of a path sum to what GRPO
    gives it, and stand at the steps that earned it. A group whose outcomes agree still teaches where its steps do not.

    forecast: a path without an error so far is worth less the more steps it still has to go: each goes right with the
        chance that the group's steps had. Without it what is learned from a step is its own error alone, and the first
        steps, which all paths reach without one, take most of it.

    The step scores are the verdicts' (`tasks.verifier = "process_math"`), or a process reward model's.
    """

    delimiter: str = "\n"  # ends a step: the verifier's
    prm: str = ""  # folder of a process reward model (`reasoner prm train`); "": the verifier's own step scores
    forecast: bool = False
    decode: Decode | None = None  # bound by `assign`

    def check(self, verifiers: Collection[str]) -> None:
        """Raise ValueError when these judges of the tasks, or the model, will give no step scores."""
        if self.prm and not (Path(self.prm) / "prm.json").is_file():
            raise ValueError(f"credit.prm = {self.prm!r} has no prm.json: give a folder that `reasoner prm` wrote")
        if not self.prm and (blind := sorted(WITHOUT_STEPS.intersection(verifiers))):
            raise ValueError(
                f"credit.kind = 'process' needs step scores and verifier {blind[0]} gives none: use tasks.verifier = "
                "'process_math', or credit.prm = a process reward model"
            )

    def __call__(self, group: Group) -> list[Sample]:
        judged, scores = _judged(group)
        if not judged:
            return []
        before, samples = statistics.fmean(scores), []
        lows = [lowest_so_far(_step_scores(rollout)) for rollout in judged]
        chance = survival(lows) if self.forecast else 1.0
        for rollout, score, low in zip(judged, scores, lows, strict=True):
            expected = [value * chance**left for left, value in enumerate(reversed(low))][::-1]
            values = [before, *expected[:-1], score]
            ends = step_ends(rollout.trajectory, self.delimiter, self.decode)
            if len(ends) != len(values) - 1:
                raise ValueError(
                    f"task {group.task.id}: {len(values) - 1} step scores for {len(ends)} steps: give credit.delimiter "
                    f"({self.delimiter!r}) and the verifier {group.task.verifier} the same"
                )
            gains = [after - b4 for b4, after in zip(values, values[1:], strict=False)]
            advantages = [g for g, a, b in zip(gains, [0, *ends], ends, strict=False) for _ in range(a, b)]
            samples.append(spread(rollout.trajectory, advantages))
        return [s for s in samples if any(s.advantages)]


def lowest_so_far(scores: Sequence[float]) -> list[float]:
    """An error is not mended by what follows."""
    return list(accumulate(scores, min))


def survival(lows: Sequence[Sequence[float]]) -> float:
    """The chance that a step goes right after steps that did: of all steps of a group, each `low` a path's lowest step
    score so far."""
    begun = math.fsum(math.fsum([1.0, *low[:-1]]) for low in lows if low)
    return math.fsum(math.fsum(low) for low in lows) / begun if begun else 1.0


def _step_scores(rollout: Rollout) -> tuple[float, ...]:
    steps, task = rollout.verdict.steps, rollout.task
    if not steps and rollout.trajectory.text:
        raise ValueError(
            f"task {task.id}: verifier {task.verifier} gives no step scores and credit.kind = 'process' needs them: "
            "use tasks.verifier = 'process_math', or credit.prm = a process reward model"
        )
    return steps


@dataclass(frozen=True, slots=True)
class Marginal:
    """For tasks without a reference: a path earns 1 when its answer is the one with the largest estimated marginal
    probability in its group, judged equal by the task's verifier, else 0 (compare TTRL, Zuo et al. 2025,
    arXiv:2504.16084); leaders that tie share it. Then as GRPO.

    It never looks at a verdict's score. It raises what the model already believes, right or wrong. Paths that the
    verifier failed on are left out; paths without an answer disagree.
    """

    method: str = "vote"  # an estimator of `search.marginal`

    def __call__(self, group: Group) -> list[Sample]:
        kept = tuple(r for r in group.rollouts if r.verdict.status != "failed" and r.trajectory.sampled_tokens)
        answers = [r.verdict.answer if r.trajectory.end == "stop" else None for r in kept]
        if not any(answers):
            return []
        equal = get(group.task.verifier).equal
        leaders = estimate([r.trajectory for r in kept], answer=answers, equal=equal, method=self.method).leaders
        rewards = [sum(_same(a, leader, equal) for leader in leaders) / len(leaders) for a in answers]
        verdicts = [Verdict("scored", score, score == 1, answer=a) for score, a in zip(rewards, answers, strict=True)]
        return GRPO()(
            replace(group, rollouts=tuple(replace(r, verdict=v) for r, v in zip(kept, verdicts, strict=True)))
        )


def _same(answer: str | None, other: str, equal: Callable[[str, str], bool]) -> bool:
    return answer is not None and (answer == other or (equal(answer, other) and equal(other, answer)))


@dataclass(frozen=True, slots=True)
class Shuffled:
    """GRPO on scores shuffled within the group: the control. What a run gains so was not learned from verdicts."""

    seed: int = 0

    def __call__(self, group: Group) -> list[Sample]:
        verdicts = [r.verdict for r in group.scored]
        root = group.rollouts[0].trajectory.seed if group.rollouts else 0
        random.Random(derive(self.seed, group.task.id, root)).shuffle(verdicts)
        shuffled = tuple(replace(r, verdict=v) for r, v in zip(group.scored, verdicts, strict=True))
        return GRPO()(replace(group, rollouts=shuffled))


CREDITS: dict[str, type[Credit]] = {
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "rloo": RLOO,
    "reinforce_pp": ReinforcePP,
    "maxrl": MaxRL,
    "tree": Tree,
    "process": Process,
    "marginal": Marginal,
    "shuffled": Shuffled,
}


def _judged(group: Group) -> tuple[list[Rollout], list[float]]:
    """The rollouts that can teach, and what each earned. Those the verifier could not judge are left out, never 0."""
    judged = [r for r in group.scored if any(path.sampled_tokens for path in r.contexts)]
    scores = [r.verdict.score + r.bonus for r in judged]
    return judged, scores


def _even(judged: Sequence[Rollout], advantages: Sequence[float]) -> list[Sample]:
    """Every sampled token of a rollout, in all its contexts, with the rollout's advantage."""
    pairs = zip(judged, advantages, strict=True)
    return [spread(path, a) for r, a in pairs for path in r.contexts if path.sampled_tokens]


def spread(path: Trajectory, advantage: float | Sequence[float]) -> Sample:
    """A sample that gives the sampled tokens of a path an advantage: the same one, or one per token of the response."""
    tokens = [(i, s.sampled, lp) for s in path.steps for i, lp in zip(s.ids, s.logprobs, strict=True)]
    blank = len(path.prompt)
    each = advantage if isinstance(advantage, Sequence) else (advantage,) * len(tokens)
    return Sample(
        ids=path.ids,
        loss_mask=(False,) * blank + tuple(sampled for _, sampled, _ in tokens),
        logprobs=(0.0,) * blank + tuple(lp if sampled else 0.0 for _, sampled, lp in tokens),
        advantages=(0.0,) * blank + tuple(a if t[1] else 0.0 for t, a in zip(tokens, each, strict=True)),
        experts=b"".join(s.experts for s in path.steps),
    )


def _with(sample: Sample, advantages: Sequence[float]) -> Sample:
    """The sample with other advantages where its tokens are learned from."""
    kept = tuple(a if learned else 0.0 for a, learned in zip(advantages, sample.loss_mask, strict=True))
    return replace(sample, advantages=kept)
