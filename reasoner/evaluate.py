"""Held-out accuracy: one greedy path and n sampled ones per task, judged by the task's verifier.

The search gets no guide here, so the answer key cannot reach it: `guide=None` is the one visible line.
Neighbours: `search.metrics` and `search.marginal` hold the definitions: expectations over k-subsets of the n samples,
exact but for the marginal, which averages seeded subsets. `compare` reads its groups with `read`, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reasoner.config import ConfigError, Evaluation
from rollouts.base import Group
from rollouts.episode import Episode
from rollouts.roll_out import roll_out
from search.base import Engine, Sampling, Search, Trajectory, derive
from search.marginal import AtK, Estimate, at_k, estimate
from search.metrics import Interval, interval, pass_at_k
from search.sample import Sample
from verifiers import Pool
from verifiers.base import Task

Table = dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """One task after evaluation: its greedy rollout and its sampled ones."""

    greedy: Group
    sampled: Group


async def evaluate(
    tasks: Sequence[Task],
    engine: Engine,
    pool: Pool,
    tokenizer: Any,
    settings: Evaluation,
    *,
    seed: int,
    episode: Episode | None = None,
) -> list[Judged]:
    """Roll out every task greedily and n times at temperature 1, the law whose marginal is reported.

    Args:
        episode: how tasks that answer back are played; None samples.
    """
    options = {"pool": pool, "tokenizer": tokenizer, "seed": derive(seed, "evaluate"), "guide": None}  # no answer key
    way = replace(episode, n=settings.n) if episode else Sample(n=settings.n)
    greedy = await greedily(tasks, engine, pool, tokenizer, seed=seed, episode=episode)
    sampled = await roll_out(tasks, way, engine.at(temperature=1.0, top_p=1.0), **options)
    return [Judged(g, s) for g, s in zip(greedy, sampled, strict=True)]


async def greedily(
    tasks: Sequence[Task],
    engine: Engine,
    pool: Pool,
    tokenizer: Any,
    *,
    seed: int,
    episode: Episode | None = None,
) -> list[Group]:
    """The greedy path of every task, judged."""
    options = {"seed": derive(seed, "evaluate"), "guide": None}  # no answer key
    way = replace(episode, n=1) if episode else Sample(n=1)
    return await roll_out(tasks, way, engine.at(temperature=0.0), pool, tokenizer, **options)


async def table(judged: Sequence[Judged], pool: Pool, k: int) -> Table:
    """The metrics of summary.json, each with its 95% interval over tasks and the tokens it spends per task.

    A rollout that the verifier could not judge is left out of its task; a task without any is left out and counted.
    """
    usable = [j for j in judged if j.greedy.scored and len(j.sampled.scored) >= k]
    if not usable:
        raise ValueError(
            f"none of {len(judged)} tasks has a judged greedy path and {k} judged samples: see verdicts' `why`"
        )
    greedy = [float(j.greedy.scored[0].verdict.correct) for j in usable]
    counts = [(len(j.sampled.scored), sum(bool(r.verdict.correct) for r in j.sampled.scored)) for j in usable]
    votes = [await _votes(j.sampled, pool, k) for j in usable]
    values = {
        "greedy": greedy,
        "mean_at_k": [right / n for n, right in counts],
        "pass_at_k": [pass_at_k(n, right, k) for n, right in counts],
        "maj_at_k": [majority for majority, _ in votes],
        "marginal_at_k": [marginal for _, marginal in votes],
    }
    intervals = {name: interval(per_task) for name, per_task in values.items()}
    greedy_tokens = sum(j.greedy.rollouts[0].trajectory.sampled_tokens for j in usable) / len(usable)
    sampled = [r.trajectory.sampled_tokens for j in usable for r in j.sampled.rollouts]
    path_tokens = sum(sampled) / len(sampled)
    return {
        **{name: each.mean for name, each in intervals.items()},
        "k": k,
        "n": max(n for n, _ in counts),
        "tasks": len(usable),
        "not_judged": len(judged) - len(usable),
        "ci": {name: _pair(each) for name, each in intervals.items()},
        "tokens": {"greedy": greedy_tokens, "mean_at_k": path_tokens}
        | {name: k * path_tokens for name in ("pass_at_k", "maj_at_k", "marginal_at_k")},
    }


async def _votes(group: Group, pool: Pool, k: int) -> tuple[float, float]:
    """Expected accuracy of the majority and of the max-marginal answer over k of the samples."""
    reading = await read(group, pool)
    return reading.at(k, "vote").value, reading.at(k, "horvitz_thompson").value


@dataclass(frozen=True)
class Reading:
    """The judged paths of one task as the estimators of `search.marginal` want them."""

    task: str  # its id
    paths: list[Trajectory]
    answers: list[str | None]  # as the verifier reads them; None also for a path that did not finish
    correct: list[bool]
    same: Mapping[tuple[str, str], bool]

    def at(self, k: int, method: str, subsets: int = 200) -> AtK:
        """Expected accuracy of the estimator's answer over k of the paths, drawn alike."""
        # The sampling error of 200 subsets a task, averaged over the tasks, is far below that of the tasks themselves.
        settings = {"method": method, "seed": derive(self.task), "subsets": subsets}
        return at_k(self.paths, self.correct, k, equal=self.equal, answer=self.answers, **settings)

    def estimate(self, method: str, sampling: Sampling | None = None) -> Estimate:
        """sampling: how the paths were drawn, so that the marginal of a tempered model is called one."""
        return estimate(self.paths, equal=self.equal, answer=self.answers, method=method, sampling=sampling)

    def equal(self, left: str, right: str) -> bool:
        return self.same[left, right]


def require_steps(search: Search, delimiter: str, groups: Sequence[Group], where: str = "search") -> None:
    """ConfigError when a search goes by steps and none of these responses has one."""
    texts = [r.trajectory.text for group in groups for r in group.rollouts]
    if getattr(search, "until", "end") == "step" and texts and not any(delimiter in text for text in texts):
        raise ConfigError(
            f"{where} goes by steps, but none of {len(texts)} responses contains sampling.step = {delimiter!r} (e.g. "
            f"{texts[0][:80]!r}): set the delimiter that this model writes, or until = 'end'"
        )


async def read(group: Group, pool: Pool) -> Reading:
    """Leaves out what the verifier could not judge. A path that hit the length limit is unfinished, never a vote."""
    scored = group.scored
    answers = [r.verdict.answer if r.trajectory.end == "stop" else None for r in scored]
    same = await _equalities(group.task.verifier, answers, pool)
    correct = [bool(r.verdict.correct) for r in scored]
    return Reading(group.task.id, [r.trajectory for r in scored], answers, correct, same)


async def _equalities(verifier: str, answers: Sequence[str | None], pool: Pool) -> dict[tuple[str, str], bool]:
    """Whether each two of the distinct answers are the same, asked of the verifier in its killable workers."""
    distinct = sorted({a for a in answers if a is not None})
    pairs = [(a, b) for a in distinct for b in distinct if a != b]
    verdicts = await pool.equal(verifier, pairs)
    return dict(zip(pairs, verdicts, strict=True)) | {(a, a): True for a in distinct}


def _pair(each: Interval) -> tuple[float, float]:
    return (each.low, each.high)
