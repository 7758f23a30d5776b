"""What is judged, and the judgement.

Knows nothing of how a response was made (no tokens, no engines, no search). Standard library only.
Neighbours: every judge in this room returns a `Verdict`; `rollouts` pairs it with the path it judges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Message = Mapping[str, str]  # {"role": "user", "content": "What is 3 + 4?"}
Status = Literal["scored", "abstained", "failed"]


@dataclass(frozen=True, slots=True)
class Task:
    """One question with the key to judge its answers.

    Example:
        Task(id="chain_sum/train/17", prompt=({"role": "user", "content": "3 + 4 ="},), reference="7", verifier="math")
    """

    id: str  # stable across runs
    prompt: tuple[Message, ...]
    reference: Any  # what the judge needs; never rendered into a prompt
    verifier: str  # name in the registry: who judges it
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The text of the prompt: two tasks with the same question are the same instance."""
        return "\n".join(message["content"] for message in self.prompt)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judgement. `score` and `correct` are set only when the verifier could decide.

    A verifier that cannot decide abstains; one that breaks fails. Neither is ever a silent 0:
    such a rollout is left out of its group and counted by `why`.

    Example:
        Verdict("scored", score=1.0, correct=True, answer="7", why="equal as integers")
    """

    status: Status
    score: float | None = None  # in [0, 1] when scored, else None
    correct: bool | None = None  # None when not scored
    answer: str | None = None  # canonical form of the answer found, None when there is none
    steps: tuple[float, ...] = ()  # process scores, one per step of the response; () when not scored
    why: str = ""  # one line for a person
    seconds: float = 0.0
    evidence: Mapping[str, Any] = field(default_factory=dict)  # policy, isolation level, per-test results ...

    def __post_init__(self) -> None:
        if self.status not in ("scored", "abstained", "failed"):
            raise ValueError(f"status={self.status!r}: a verdict is 'scored', 'abstained' or 'failed'")
        if type(self.correct).__name__ not in ("bool", "bool_", "NoneType"):  # any text would be true further on
            raise ValueError(f"correct={self.correct!r}: give True or False when scored, else None")
        if self.answer is not None and not isinstance(self.answer, str):
            raise ValueError(f"answer={self.answer!r} is no text: give the answer as a string, or None")
        if not all(0.0 <= step <= 1.0 for step in self.steps):  # also refuses NaN
            raise ValueError(f"steps={self.steps!r:.200}: the score of a step lies in [0, 1]")
        scored = self.status == "scored"
        if scored != (self.score is not None) or scored != (self.correct is not None):
            raise ValueError(
                f"a {self.status} verdict has score={self.score}, correct={self.correct}: "
                "give both when scored, neither otherwise"
            )
        if self.score is not None and not 0.0 <= self.score <= 1.0:  # also refuses NaN
            raise ValueError(f"score={self.score} is outside [0, 1]: rescale it before making the Verdict")
        if "\n" in self.why:  # an exception's message, as a rule
            object.__setattr__(self, "why", " ".join(self.why.split()))

    @classmethod
    def abstain(cls, why: str, **fields: Any) -> Verdict:
        return cls("abstained", why=why, **fields)

    @classmethod
    def fail(cls, why: str, **fields: Any) -> Verdict:
        return cls("failed", why=why, **fields)


class Verifier(Protocol):
    """A judge: plain, synchronous, deterministic; runs in a worker process that can be killed."""

    def verify(self, task: Task, response: str) -> Verdict:
        """Judge one response. Errors may rise: the pool turns them into a `failed` verdict."""
        ...

    def check(self, task: Task) -> None:
        """Raise ValueError when `task.reference` cannot be read. Called once, when tasks are loaded."""
        ...

    def answer(self, response: str) -> str | None:
        """The final answer found in a response, in canonical form, without the reference."""
        ...

    def equal(self, left: str, right: str) -> bool:
        """Whether two answers (as `answer` gives them) are the same answer. Symmetric."""
        ...
