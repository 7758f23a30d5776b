"""A judged path, and the judged paths of one task.

Joins the nouns of `verifiers` and `search`; knows no engine and no learner.
"""

from __future__ import annotations

from dataclasses import dataclass

from search.base import Trajectory
from verifiers.base import Task, Verdict


@dataclass(frozen=True, slots=True)
class Rollout:
    """One path and what the verifier said of it."""

    task: Task
    trajectory: Trajectory
    verdict: Verdict
    earlier: tuple[Trajectory, ...] = ()  # contexts of the same episode that were left for a fresh one, oldest first
    bonus: float = 0.0  # what the learner adds to the verdict's score: less than 0 for a response that is overlong

    @property
    def contexts(self) -> tuple[Trajectory, ...]:
        """Every path whose tokens the policy sampled for this verdict; one, unless an episode was compacted."""
        return (*self.earlier, self.trajectory)


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one task under one policy. Credit compares them with each other."""

    task: Task
    rollouts: tuple[Rollout, ...]

    @property
    def scored(self) -> tuple[Rollout, ...]:
        """Those the verifier could judge; the others are counted, never scored 0."""
        return tuple(r for r in self.rollouts if r.verdict.status == "scored")
