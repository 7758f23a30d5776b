"""From a group of judged paths to what the model is told: one advantage per token.

A credit rule is a frozen dataclass whose fields are its TOML keys and whose call maps a Group to Samples. To add one:
write it here and name it in CREDITS. Knows nothing of TRL or torch.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, replace
from typing import Protocol

from rollouts.base import Group
from search.base import Trajectory, derive


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

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.loss_mask), len(self.logprobs), len(self.advantages)}
        assert len(lengths) == 1, f"rows of a sample differ in length: {lengths}"


class Credit(Protocol):
    def __call__(self, group: Group) -> list[Sample]:
        """The samples of a group, [] when it teaches nothing."""
        ...


@dataclass(frozen=True, slots=True)
class GRPO:
    """Score minus the group's mean (Shao et al. 2024, arXiv:2402.03300), by default not divided by the standard
    deviation, which overweights tasks that are nearly solved or nearly hopeless (Liu et al. 2025, arXiv:2503.20783)."""

    scale_by_std: bool = False

    def __call__(self, group: Group) -> list[Sample]:
        scored = [r for r in group.scored if r.trajectory.sampled_tokens]
        scores = [r.verdict.score for r in scored]
        if len(set(scores)) < 2:  # agreement teaches nothing
            return []
        mean = statistics.fmean(scores)
        scale = statistics.pstdev(scores) if self.scale_by_std else 1.0
        return [spread(r.trajectory, (s - mean) / scale) for r, s in zip(scored, scores, strict=True)]


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


CREDITS: dict[str, type[Credit]] = {"grpo": GRPO, "shuffled": Shuffled}


def spread(path: Trajectory, advantage: float) -> Sample:
    """A sample that gives every sampled token of a path the same advantage."""
    tokens = [(i, s.sampled, lp) for s in path.steps for i, lp in zip(s.ids, s.logprobs, strict=True)]
    blank = len(path.prompt)
    return Sample(
        ids=path.ids,
        loss_mask=(False,) * blank + tuple(sampled for _, sampled, _ in tokens),
        logprobs=(0.0,) * blank + tuple(lp if sampled else 0.0 for _, sampled, lp in tokens),
        advantages=(0.0,) * blank + tuple(advantage if sampled else 0.0 for _, sampled, _ in tokens),
    )
