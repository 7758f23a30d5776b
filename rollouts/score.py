"""What a search may know of its task: scores by kind, and the one place where a score is bound to a task.

A score that is bound for an evaluation gets a `Question`, a type without the reference, and a pool of workers that no
reference ever goes through. A score that needs the answer key (`verifier`) is another type, and only `WithKey` takes
it: `Open` refuses it when it is made. `roll_out` calls either; evaluation accepts `Open` alone.
What this does not stop: code in this process that looks through the interpreter itself (other frames, `gc`).
Knows no Ray, no vLLM, no config. Neighbours: `search.self_score`, `search.confidence`, `verifiers.process`; `roll_out`
is the caller.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Protocol

from search.base import Engine, Score, Search, Trajectory, bind
from search.confidence import StepConfidence
from search.self_score import ASK, SelfScore
from verifiers import Pool, get
from verifiers.base import Message, Task


@dataclass(frozen=True, slots=True)
class Question:
    """A task as a search in evaluation may know it: no reference, and no `meta`, where a source may keep it too."""

    id: str
    prompt: tuple[Message, ...]
    verifier: str  # whose reading of answers counts; not who judges them


class ScoreKind(Protocol):
    """What a `[score]` table picks by its `kind`."""

    checkpoint: str  # of the model that scores; "": the model that is searched, or none

    def check(self, engine: Engine) -> None:
        """Raise ValueError when the engine (its `sampling` and `offers`) cannot serve this score."""
        ...


class OpenScore(ScoreKind, Protocol):
    """Scores paths from the question alone."""

    def open(self, question: Question, engine: Engine, pool: Pool) -> Score: ...


class KeyedScore(ScoreKind, Protocol):
    """Scores paths by the answer key: for making training data."""

    def unlock(self, task: Task, engine: Engine, pool: Pool) -> Score: ...


@dataclass(frozen=True)
class Process:
    """Rules in place of a trained model: the judge `steps` checks every equality that the path states.

    Steps end at the engine's `sampling.step`, and only whole ones count: of a path that goes on, what stands after the
    last delimiter is not judged yet. Of a path that a search wrote into (a revision), what follows the last written
    part is judged.
    """

    unchecked: float = 0.5  # worth of a step with nothing to check
    join: str = "mean"  # mean | min | product | last, over the steps so far
    checkpoint: ClassVar[str] = ""

    def __post_init__(self) -> None:
        get("steps", unchecked=self.unchecked, join=self.join)

    def check(self, engine: Engine) -> None:
        _require_steps(engine)

    def open(self, question: Question, engine: Engine, pool: Pool) -> Score:
        delimiter = engine.sampling.step
        policy = {"delimiter": delimiter, "unchecked": self.unchecked, "join": self.join}
        task = Task(question.id, question.prompt, None, "steps")

        async def score(path: Trajectory) -> float:
            call = ("verify", (task, whole_steps(path, delimiter)))
            (verdict,) = await asyncio.wrap_future(pool.submit("steps", [call], **policy))
            return self.unchecked if verdict.score is None else verdict.score  # not checked within its deadline

        return score


@dataclass(frozen=True)
class SelfJudgement:
    """The searched model's own yes or no to a question about its path: one token, read from the alternatives."""

    ask: str = ASK
    yes: str = "yes"
    no: str = "no"
    top: int = 20
    checkpoint: ClassVar[str] = ""

    def check(self, engine: Engine) -> None:
        if missing := {"write", "top"} - engine.offers:
            raise ValueError(
                f"it needs an engine that offers {' and '.join(sorted(missing))}: use engine.kind = 'local', or "
                "score.kind = 'process'"
            )

    def open(self, question: Question, engine: Engine, pool: Pool) -> Score:
        return SelfScore(engine, self.ask, self.yes, self.no, self.top)


@dataclass(frozen=True)
class Confidence:
    """The policy's own confidence: of each step the probability of its least probable token, joined over the steps.

    Read from the log-probabilities that the path was drawn with: no token is generated or read for it. Of a path that a
    search wrote into, what follows the last written part counts.
    """

    join: str = "min"  # min | mean | product | last, over the steps so far
    checkpoint: ClassVar[str] = ""

    def __post_init__(self) -> None:
        StepConfidence(self.join, "", None)

    def check(self, engine: Engine) -> None:
        if "logprobs" not in engine.offers:
            raise ValueError(
                "it is made of the sampler's log-probabilities, and this engine gives none: use an engine that offers "
                "'logprobs', or score.kind = 'process'"
            )
        if self.join != "min":
            _require_steps(engine)

    def open(self, question: Question, engine: Engine, pool: Pool) -> Score:
        return StepConfidence(self.join, engine.sampling.step, engine.decode)


SIGN_ALONE = (1.0, 0.0, 0.0)


def mixed(mix: Sequence[float], sign: float, least: float) -> float:
    """What a process reward model makes of a step: the logistic of a x sign + b x odds(least) + c, mix being (a, b, c).

    Args:
        sign: the log-odds with which it says + rather than -.
        least: log-probability of the step's least probable token; its log-odds are what counts.
    """
    logit = mix[0] * sign + mix[1] * odds(math.exp(least)) + mix[2]
    return 1 / (1 + math.exp(-max(-700.0, logit)))


def odds(chance: float) -> float:
    """Log-odds, in [-14, 14]."""
    chance = min(max(chance, 1e-6), 1 - 1e-6)
    return math.log(chance / (1 - chance))


@dataclass(frozen=True)
class ProcessModel:
    """A trained process reward model: its + or - behind the path, one token (`reasoner prm train`).

    A path is worth no more than what it grew from was. Where the model's `prm.json` says how, the sign is joined by the
    log-probability that the step's least probable token was drawn with; the first token of a later step, where the
    model says its sign, does not count.
    """

    checkpoint: str
    top: int = 20
    yes: ClassVar[str] = "+"
    no: ClassVar[str] = "-"

    def check(self, engine: Engine) -> None:
        SelfJudgement(top=self.top).check(engine)

    def open(self, question: Question, engine: Engine, pool: Pool) -> Score:
        judge = SelfScore(engine, ask="", yes=self.yes, no=self.no, top=self.top, turn=False)
        settings = Path(self.checkpoint) / "prm.json"
        mix = json.loads(settings.read_text()).get("mix", SIGN_ALONE) if settings.is_file() else SIGN_ALONE
        lowest: dict[tuple[int, ...], float] = {}  # an error is not mended by what follows
        prompt: asyncio.Future[float] | None = None  # read before its first children, who would each read it at once

        async def score(path: Trajectory) -> float:
            nonlocal prompt
            prompt = prompt or asyncio.ensure_future(judge(Trajectory(path.prompt)))
            await asyncio.shield(prompt)
            value, ids = await judge(path), path.prompt
            if any(mix[1:]):
                drawn = path.steps[-1].logprobs[len(path.steps) > 1 :]
                value = mixed(mix, odds(value), min(drawn, default=0.0))
            for step in path.steps:
                value, ids = min(value, lowest.get(ids, 1.0)), ids + step.ids
            lowest[path.ids] = value
            return value

        return score


@dataclass(frozen=True)
class VerifierScore:
    """The task's own verifier with its answer key, for training: a path that ended is worth its verdict.

    A path that goes on has no answer yet and is worth what `Process` says of its steps; one that ran into the limit is
    worth 0, one whose verdict is no score (abstained, failed) `unjudged`.
    """

    unjudged: float = 0.5
    checkpoint: ClassVar[str] = ""

    def check(self, engine: Engine) -> None:
        _require_steps(engine)

    def unlock(self, task: Task, engine: Engine, pool: Pool) -> Score:
        steps = Process().open(question_of(task), engine, pool)

        async def score(path: Trajectory) -> float:
            if path.end is None:
                return await steps(path)
            if path.end == "length":
                return 0.0
            (verdict,) = await pool.verify(task, [path.text])
            return self.unjudged if verdict.score is None else verdict.score

        return score


def whole_steps(path: Trajectory, delimiter: str) -> str:
    """The path's own text after the last part that its search wrote, without a step that may still go on."""
    own = path.steps
    for i, step in enumerate(path.steps):
        if not step.sampled:
            own = path.steps[i + 1 :]
    text = "".join(step.text for step in own)
    if path.end == "stop":
        return text
    head, found, _ = text.rpartition(delimiter)
    return head + found


def _require_steps(engine: Engine) -> None:
    if not engine.sampling.step:
        raise ValueError("it judges steps, but sampling.step is empty: set the delimiter, e.g. '\\n'")


SCORES: dict[str, type[ScoreKind]] = {
    "process": Process,
    "self": SelfJudgement,
    "confidence": Confidence,
    "prm": ProcessModel,
    "verifier": VerifierScore,
}


def question_of(task: Task) -> Question:
    return Question(task.id, task.prompt, task.verifier)


@dataclass(frozen=True)
class Open:
    """What a search may know where its result is an evaluation: nothing that depends on the answer key.

    pool: one of its own, never the one that judges. engine: the one that is searched, or that serves the score's own
    checkpoint.
    """

    pool: Pool
    engine: Engine
    score: OpenScore | None = None

    def __post_init__(self) -> None:
        refuse_key(self.score)

    def score_of(self, task: Task) -> Score | None:
        return None if self.score is None else self.score.open(question_of(task), self.engine, self.pool)


@dataclass(frozen=True)
class WithKey:
    """What a search may know where it makes training data: also the verdict on a finished path."""

    pool: Pool
    engine: Engine
    score: OpenScore | KeyedScore | None = None

    def score_of(self, task: Task) -> Score | None:
        if hasattr(self.score, "unlock"):
            return self.score.unlock(task, self.engine, self.pool)
        return Open(self.pool, self.engine, self.score).score_of(task)


Guide = Open | WithKey


def refuse_key(score: ScoreKind | None) -> None:
    """Raise ValueError for a score that reads the answer key: the line that keeps an evaluation honest."""
    if score is not None and not hasattr(score, "open"):
        raise ValueError(
            f"a {type(score).__name__} reads the answer key, and an evaluation that searches with the key measures "
            "nothing: use score.kind = 'process', 'self' or 'confidence', or keep 'verifier' for training"
        )


def read_by(search: Search, verifier: str, pool: Pool) -> Search:
    """The search with the task's own reading and comparing of answers, where it looks at answers at all.

    Asked of the verifier in its killable workers; the event loop waits meanwhile (a search asks in plain calls), at
    most the pool's deadline.
    """
    if not hasattr(search, "answer"):
        return search

    @cache
    def answer(text: str) -> str | None:
        return pool.submit(verifier, [("answer", (text,))]).result()[0]

    @cache
    def equal(left: str, right: str) -> bool:
        return pool.submit(verifier, [("equal", (left, right))]).result()[0]

    return bind(search, answer, equal)
