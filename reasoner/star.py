"""Learning from verified paths: what a round of STaR keeps, and how much each kept path counts.

A variant is a frozen dataclass whose fields are its TOML keys (`[learner] kind = "star"`). This file decides; it knows
no model, no engine and no trainer. Neighbours: `rounds.py` runs the rounds, `search/export.py` picks diverse paths,
`learner.supervise` trains on them.

One unit of weight for each solved problem makes a round a step of Monte-Carlo EM on the log-marginal
log sum over paths of p(path, right answer | question); one unit for each kept path makes it a policy gradient with 0/1
reward, in which easy problems count most (Zelikman et al. 2022, section 3.1).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import Formatter

from rollouts.base import Group, Rollout
from search.base import Trajectory
from search.export import Row, sft
from verifiers.base import Task


@dataclass(frozen=True)
class Star:
    """Sample, verify, rationalise what failed, train from the base again (Zelikman et al. 2022, arXiv:2203.14465)."""

    updates: int = 40  # optimizer steps of the first round
    growth: float = 1.2  # each round takes so many times the steps of the one before
    repeats: int = 30  # times that a kept path is seen in a round on average, at most: few paths end a round early
    batch: int = 32
    lr: float = 1e-4
    keep: int = 4  # verified paths of a problem at most, no two with the same intermediate results
    em: bool = True  # one unit of weight for each solved problem; false: one for each path
    accumulate: bool = False  # train on the newest paths of every problem so far, not on the last round's alone
    rationalise: int = 4  # paths drawn with the answer as a hint for each failed problem; 0: none
    hint: str = "{question}\n\nHint: {answer}"  # the question that rationalisation asks
    plausible: float = 0.05  # a rationalisation must be likelier, per token and without the hint, than this share of
    # the paths that the model says by itself; 0 keeps all

    def __post_init__(self) -> None:
        for name, least in (
            ("updates", 1),
            ("growth", 1.0),
            ("batch", 1),
            ("repeats", 1),
            ("keep", 1),
            ("rationalise", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small: give at least {least}")
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be positive")
        if not 0 <= self.plausible < 1:
            raise ValueError(f"plausible={self.plausible} must lie in [0, 1): it is a share of the model's own paths")
        fields = {name for _, name, _, _ in Formatter().parse(self.hint) if name is not None}
        if fields != {"question", "answer"}:
            raise ValueError(f"hint={self.hint!r} must name {{question}} and {{answer}}, and nothing else in braces")

    def check(self, steps: int) -> None:
        """Raise ValueError when so many rounds make no sense."""

    def helped(self, tasks: Sequence[Task]) -> list[Task]:
        """The tasks with the answer in the question, [] without rationalisation. Raises ValueError where none fits."""
        if not self.rationalise:
            return []
        for task in tasks:
            if not isinstance(task.reference, str | int | float):
                raise ValueError(
                    f"task {task.id}: a {type(task.reference).__name__} is no answer to put into a question: set "
                    "learner.rationalise = 0"
                )
        return [hinted(task, self.hint) for task in tasks]

    def length(self, number: int, rows: int | None = None) -> int:
        """Optimizer steps of round `number`, counted from 0, when it has kept so many rows."""
        most = round(self.updates * self.growth**number)
        return most if rows is None else max(1, min(most, rows * self.repeats // self.batch))


@dataclass(frozen=True)
class RestEM(Star):
    """Expectation-maximisation by sampling alone: no hints, up to 10 paths a problem, each of equal weight
    (Singh et al. 2023, arXiv:2312.06585). The temperature of its E-step is `sampling.temperature`, 0.7 in the paper."""

    keep: int = 10
    em: bool = False
    rationalise: int = 0
    growth: float = 1.0


@dataclass(frozen=True)
class RFT(Star):
    """Rejection-sampling fine-tuning: one round, all distinct paths (Yuan et al. 2023, arXiv:2308.01825)."""

    keep: int = 100
    em: bool = False
    rationalise: int = 0

    def check(self, steps: int) -> None:
        if steps > 1:
            raise ValueError(f"steps = {steps} rounds of kind 'rft', which has one: set steps = 1, or kind = 'rest_em'")


@dataclass(frozen=True)
class VStar(Star):
    """STaR whose wrong paths train a verifier, which then picks among samples (Hosseini et al. 2024, arXiv:2402.06457).

    The verifier is the last generator after DPO on (right, wrong) pairs of all rounds; its score of a path is the
    path's log-probability.
    """

    rationalise: int = 0
    em: bool = False
    accumulate: bool = True
    pairs: int = 8  # of a problem and round at most
    verifier_updates: int = 100
    verifier_lr: float = 1e-4
    beta: float = 0.1  # of DPO


STARS: dict[str, type[Star]] = {"star": Star, "rest_em": RestEM, "rft": RFT, "v_star": VStar}

EQUALITY = re.compile(r"(?<![-+*/×÷^().,\d ])[-+*/×÷^().,\d ]++=\s*-?\d(?:[\d./,]*\d)?")  # linear: tried once per run
GIVEAWAYS = ("hint", "given answer", "provided answer", "answer provided", "answer given", "told the answer")


def structure(text: str) -> tuple[str, ...]:
    """What makes a path the path it is: its equalities between numbers in order, or, where it states none, its lines
    before the last. () for a path that merely states an answer.

    Example:
        structure("4 + 8 = 12\\n12-5=7\\nAnswer: 7")  # ("4+8=12", "12-5=7")
    """
    found = ["".join(match.split()).lstrip(",.") for match in EQUALITY.findall(text) if re.search(r"\d.*=", match)]
    lines = [" ".join(line.lower().split()) for line in text.splitlines() if line.strip()]
    return tuple(found or lines[:-1])


def hinted(task: Task, hint: str) -> Task:
    """The task with the answer in its question. `meta["hinted"]` marks its rollouts in the journal."""
    *before, last = task.prompt
    content = hint.format(question=last["content"], answer=task.reference)
    return replace(task, prompt=(*before, {**last, "content": content}), meta={**task.meta, "hinted": True})


def leaks(text: str, hint: str) -> bool:
    """Whether a path tells that it was helped: a giveaway, or two words in a row of the hint's own wording."""
    plain = " ".join(re.findall(r"[a-z]+", text.lower()))
    wording = [re.findall(r"[a-z]+", literal.lower()) for literal, _, _, _ in Formatter().parse(hint)]
    pairs = [" ".join(pair) for words in wording for pair in zip(words, words[1:], strict=False)]
    return any(re.search(rf"\b{phrase}\b", plain) for phrase in (*GIVEAWAYS, *pairs))


def stripped(path: Trajectory, prompt: Sequence[int]) -> Trajectory:
    """A rationalisation as an answer to the question without the hint."""
    return replace(path, prompt=tuple(prompt))


def reason_to_drop(rollout: Rollout, hint: str | None = None) -> str | None:
    """Why a path is not learned from, None when it may be. hint: it was drawn with this one."""
    if rollout.verdict.status != "scored":
        return rollout.verdict.status
    if rollout.trajectory.end != "stop":
        return "unfinished"
    if not rollout.verdict.correct:
        return "wrong"
    if hint is not None and not structure(rollout.trajectory.text):
        return "states the answer"
    if hint is not None and leaks(rollout.trajectory.text, hint):
        return "tells of the hint"
    return None


def sift(groups: Sequence[Group], keep: int, hint: str | None = None) -> tuple[list[list[Row]], Counter[str]]:
    """For each group the rows worth learning from, distinct and far apart, at most `keep`; and the others by reason."""
    kept, dropped = [], Counter()
    for group in groups:
        reasons = [reason_to_drop(r, hint) for r in group.rollouts]
        good = [r.trajectory for r, reason in zip(group.rollouts, reasons, strict=True) if reason is None]
        rows = sft(good, [True] * len(good), keep, key=lambda path: structure(path.text))
        dropped.update(reason for reason in reasons if reason is not None)
        distinct = len({structure(path.text) for path in good})
        dropped.update({"same results": len(good) - distinct, "beyond keep": distinct - len(rows)})
        kept.append(rows)
    return kept, +dropped


def weights(problems: Sequence[Sequence[Row]], em: bool) -> list[float]:
    """Of every row, in order: equal shares of one unit for each problem, or one unit for each row."""
    return [1 / len(rows) if em else 1.0 for rows in problems for _ in rows]


def resample(weights: Sequence[float], count: int, seed: int) -> list[int]:
    """`count` indices, each about count * weight / total times (never off by 1 or more), in random order.

    Systematic resampling: unbiased for any weights, with the least noise. TRL's SFT takes no weight per sample.
    """
    noise = random.Random(seed)
    total, point = sum(weights), noise.random()
    chosen, reached = [], 0.0
    for index, weight in enumerate(weights):
        reached += weight * count / total
        while point < reached and len(chosen) < count:
            chosen.append(index)
            point += 1
    chosen += [len(weights) - 1] * (count - len(chosen))  # rounding
    noise.shuffle(chosen)
    return chosen
