"""How an answer grows: steps, paths, and the one verb that extends them.

Token ids are the only truth; text is derived from ids and never turned back into them.
Knows nothing of verifiers, models, Ray or vLLM. Neighbours: every search in this room is written for one
task against `Engine`; `rollouts` makes `Engine` real and runs many tasks at once.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar, Literal, NamedTuple, Protocol

Ending = Literal["stop", "length"]
Offer = Literal["logprobs", "top", "arithmetic", "write"]


class Alternative(NamedTuple):
    """A token that could have come at some position, and its log-probability there."""

    id: int
    logprob: float
    text: str
    ends: bool = False  # whether this token would end the path


@dataclass(frozen=True, slots=True)
class Step:
    """A run of tokens that was added to a path in one piece.

    Example:
        Step(ids=(12, 7, 1), logprobs=(-0.1, -0.7, -0.0), text="3+4", versions=((5, 0, 3),))
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of `ids`, under the policy that sampled them (nats); 0 where not sampled, NaN unknown
    text: str = ""
    sampled: bool = True  # False: written by the search or an environment, so never trained on
    versions: tuple[tuple[int, int, int], ...] = ()  # (policy version, start, end) spans over `ids`
    top: tuple[tuple[Alternative, ...], ...] = ()  # likeliest first, per position, when `Sampling.top` asks for them
    cached: int = 0  # tokens of the prefix whose KV the engine still had: what the ledger does not count as prefilled
    # Experts that read the path, for router replay, int16 (tokens, layers, experts per token), where the engine records
    # them: of the path's tokens up to the last of `ids`, which nothing has read, less those that earlier steps hold.
    experts: bytes = b""

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.logprobs), f"{len(self.ids)} ids but {len(self.logprobs)} logprobs"
        assert len(self.top) in (0, len(self.ids)), f"{len(self.ids)} ids but alternatives at {len(self.top)} positions"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A prompt and the steps taken from it: a leaf of some tree, or a whole answer.

    `seed` is the identity of the path for randomness: child i of a path samples with `derive(seed, i)`,
    so the same seed gives the same tree under any scheduling order.
    """

    prompt: tuple[int, ...]
    steps: tuple[Step, ...] = ()
    end: Ending | None = None  # "stop": ended by itself; "length": hit the limit (unfinished); None: may go on
    seed: int = 0
    log_weight: float = 0.0  # of a path that was not drawn plainly (particles, without replacement); see `marginal`
    value: float | None = None  # what the search's scorer said of it
    _ids: tuple[int, ...] | None = field(default=None, init=False, repr=False, compare=False)  # when first asked for

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and steps: what the engine continues from."""
        if self._ids is None:
            object.__setattr__(self, "_ids", (*self.prompt, *chain.from_iterable(step.ids for step in self.steps)))
        return self._ids

    @property
    def text(self) -> str:
        """The response, without the prompt."""
        return "".join(step.text for step in self.steps)

    @property
    def length(self) -> int:
        """Tokens of the response, sampled or not: what `Sampling.max_tokens` limits."""
        return sum(len(step.ids) for step in self.steps)

    @property
    def sampled_tokens(self) -> int:
        return sum(len(step.ids) for step in self.steps if step.sampled)

    @property
    def logprob(self) -> float:
        """Log-probability of the sampled tokens in nats, under the policy that sampled them."""
        return sum(lp for step in self.steps if step.sampled for lp in step.logprobs)

    def grow(self, step: Step, *, end: Ending | None = None, seed: int | None = None) -> Trajectory:
        seed = self.seed if seed is None else seed
        grown = Trajectory(self.prompt, (*self.steps, step), end, seed, self.log_weight, self.value)
        object.__setattr__(grown, "_ids", self.ids + step.ids)
        return grown

    def valued(self, value: float) -> Trajectory:
        """The same path with a scorer's word on it."""
        same = Trajectory(self.prompt, self.steps, self.end, self.seed, self.log_weight, value)
        object.__setattr__(same, "_ids", self._ids)
        return same


@dataclass(frozen=True, slots=True)
class Until:
    """Where one extension stops: the granularity of a search."""

    kind: Literal["end", "step", "tokens"]
    tokens: int = 0


END = Until("end")  # solution level: to the end of the answer
STEP = Until("step")  # step level: to the next step delimiter


def TOKENS(count: int) -> Until:  # noqa: N802 (reads like END and STEP)
    """Token level: exactly `count` more tokens, or fewer if the answer ends."""
    if count < 1:
        raise ValueError(f"TOKENS({count}): give at least 1 token")
    return Until("tokens", count)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an engine draws tokens. `temperature` 0 is greedy: logprobs are then those of the model at temperature 1."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256  # of the whole response, over all its steps
    step: str = "\n"  # the delimiter that ends a step
    arithmetic: bool = False  # the n children of one call are drawn from stratified codes (Vilnis et al. 2023)
    top: int = 0  # alternatives to report at every position, the sampled token always among them; 0: none


class Engine(Protocol):
    """Extends paths. vLLM in Ray actors, transformers in process, scripted, or the exact toy chain."""

    sampling: Sampling
    offers: frozenset[Offer]  # what else it can give; a search that needs more says so before it starts

    async def extend(self, path: Trajectory, *, n: int = 1, until: Until = END) -> list[Trajectory]:
        """`n` continuations of `path`, child i seeded by `derive(path.seed, i)`; fewer when a budget is spent.

        The token that ends a path is part of it, with its logprob. Raises ValueError for a path that has ended.
        """
        ...

    def at(self, **changes: float | int | str) -> Engine:
        """The same engine with other sampling settings, e.g. `engine.at(temperature=0.0)`."""
        ...

    def write(self, path: Trajectory, text: str, *, turn: bool = False) -> Trajectory:
        """The path, open again, with `text` added by the search as a step that is not sampled (offer "write").

        A path that had stopped loses the token that ended it. turn: the text is the user's next message, put in the
        model's chat format; otherwise the response goes on with it.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        ...


Decode = Callable[[Sequence[int]], str]  # text of token ids, without special tokens
Score = Callable[[Trajectory], Awaitable[float]]  # bound by the caller: a search never sees the reference answer


class Search(Protocol):
    """A way to spend compute on one task, written as if alone; the engine batches across tasks.

    `method` names the estimator in `marginal` that picks the answer among the paths it returns; `size` the knob that
    buys more compute; `responses` is how many responses' worth of tokens it generates at most, or nearly so.
    """

    method: ClassVar[str]
    size: ClassVar[str]

    @property
    def responses(self) -> int: ...

    def check(self, engine: Engine, score: Score | None) -> None:
        """Raise ValueError when the engine or the scorer lacks what this search needs. (Knobs: `__post_init__`.)"""
        ...

    async def run(self, root: Trajectory, engine: Engine, score: Score | None) -> list[Trajectory]: ...


def granularity(until: str | int) -> Until:
    """A search's `until` as configs write it: "end", "step", or a number of tokens."""
    if isinstance(until, int):
        return TOKENS(until)
    if until not in ("end", "step"):
        raise ValueError(f"until={until!r}: write 'end', 'step', or a number of tokens")
    return END if until == "end" else STEP


def sane(search: object, *, positive: tuple[str, ...] = (), **choices: tuple[str, ...]) -> None:
    """What a search's `__post_init__` is made of: wrong knobs are found when a config is read, not when it runs."""
    kind = type(search).__name__
    for knob in positive:
        if not getattr(search, knob) > 0:
            raise ValueError(f"{kind}: {knob}={getattr(search, knob)} must be positive")
    for knob, allowed in choices.items():
        if getattr(search, knob) not in allowed:
            raise ValueError(f"{kind}: {knob}={getattr(search, knob)!r} is none of {', '.join(allowed)}")
    granularity(getattr(search, "until", "end"))


def require(
    search: object,
    engine: Engine,
    score: Score | None,
    *,
    judged: bool = False,
    until: str | int = "end",
    offers: tuple[Offer, ...] = (),
) -> None:
    """What a search's `check` is made of: each need that is not met is a ValueError that says what to do."""
    kind = type(search).__name__
    if judged and score is None:
        raise ValueError(
            f"{kind} needs a score and has none: give one, in a config a [score] table (kind = 'process' ...)"
        )
    if granularity(until) == STEP and not engine.sampling.step:
        raise ValueError(f"{kind} searches by steps but sampling.step is empty: set the delimiter, e.g. '\\n'")
    for offer in offers:
        if offer not in getattr(engine, "offers", ("logprobs",)):
            raise ValueError(f"{kind} needs an engine that offers {offer!r}; {type(engine).__name__} does not")


def bind(search: Search, answer: Callable[[str], str | None], equal: Callable[[str, str], bool] | None) -> Search:
    """The search with the task's own reading of answers, if it looks at answers at all (like the score, no knob)."""
    fields = {"answer": answer, "equal": equal}
    return replace(search, **{name: value for name, value in fields.items() if hasattr(search, name)})


def step_ends(path: Trajectory, delimiter: str, decode: Decode | None) -> list[int]:
    """For each step of a response, how many tokens of it lie up to the step's end, however it was drawn.

    A token belongs to the step of its first character; a step inside one token has none. What ends the path without a
    delimiter belongs to the last step, the end-of-sequence token too.
    """
    ids = path.ids[len(path.prompt) :]
    count = path.text.count(delimiter)
    assert decode is not None or not count, "steps inside a path need decode"
    reach = range(1, len(ids) + 1)
    ends = [1 + bisect_left(reach, k, key=lambda n: decode(ids[:n]).count(delimiter)) for k in range(1, count + 1)]
    return [*ends[:-1], len(ids)] if path.text.endswith(delimiter) else [*ends, len(ids)]


def again(path: Trajectory, turn: int) -> Trajectory:
    """The same path with another seed, to draw further children of it: turn 0 draws the first ones."""
    return path if turn == 0 else replace(path, seed=derive(path.seed, "again", turn))


def derive(*parts: int | str) -> int:
    """A 63-bit seed hashed from its parts. Never base + i: such seeds collide across requests."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
