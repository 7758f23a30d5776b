"""Tasks that answer back: gymnasium's worlds, reasoning-gym's puzzles with several tries, and Python as a tool.

An environment is plain and synchronous: `reset` gives the first observation, `step` takes a message of the policy as
text. It knows no tokens and no engine. Sources make tasks whose reference says how to open their world again, so a
world's randomness hangs on the task alone. Neighbours: `episode` plays them, `tasks` holds the other sources.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

from rollouts.tasks import DRY, ReasoningGym, Source, Split, apart, messages
from search.base import derive
from verifiers import verifier
from verifiers.base import Task, Verdict
from verifiers.reasoning_gym import ReasoningGym as Scorer
from verifiers.sandbox import Sandbox

PRINTED = 2000  # characters of a program's output that the policy is shown
_CODE = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)
_MARKED = re.compile(r"\x1b\[[\d;]*m(.*?)\x1b\[0m", re.DOTALL)  # a terminal's colours show where things are


@dataclass(frozen=True, slots=True)
class Observation:
    """What the world shows after a message. `score` in [0, 1] is the episode's so far; None leaves it to the verifier
    of the task, which judges the last message."""

    text: str
    done: bool = False
    score: float | None = None


class Environment(Protocol):
    def reset(self) -> str:
        """The first observation; it stands in the task's prompt already."""
        ...

    def step(self, message: str) -> Observation:
        """Answer one message. Errors may rise: the episode is then failed and counted, never scored 0."""
        ...

    def close(self) -> None: ...


class Gymnasium:
    """A gymnasium environment with discrete actions, as text. Unknown actions are told so and change nothing."""

    def __init__(self, id: str, params: Mapping[str, Any], actions: list[str], low: float, high: float, seed: int):
        self._id, self._params, self._actions, self._seed = id, params, actions, seed
        self._low, self._high, self._return = low, high, 0.0
        self._env: Any = None

    def reset(self) -> str:
        gymnasium = _gymnasium()
        self._env = gymnasium.make(self._id, **self._params)
        if "ansi" in self._env.metadata.get("render_modes", ()):  # a picture in text says more than a number
            self._env.close()
            self._env = gymnasium.make(self._id, render_mode="ansi", **self._params)
        seen, _ = self._env.reset(seed=self._seed)
        return self._text(seen)

    def step(self, message: str) -> Observation:
        line = (message.strip().splitlines() or [""])[-1].lower()
        words = re.findall(r"[\w-]+", line)
        named = [(words.index(name.lower()), i) for i, name in enumerate(self._actions) if name.lower() in words]
        if not named:
            return Observation(
                f"{line[:40]!r} is no action: end with one of {', '.join(self._actions)}", score=self.score
            )
        seen, reward, ended, cut, _ = self._env.step(max(named)[1])
        self._return += float(reward)
        return Observation(self._text(seen), bool(ended or cut), self.score)

    @property
    def score(self) -> float:
        return min(1.0, max(0.0, (self._return - self._low) / (self._high - self._low)))

    def _text(self, seen: Any) -> str:
        text = self._env.render() if self._env.render_mode == "ansi" else str(seen)
        return _MARKED.sub(r"[\1]", text).strip()

    def close(self) -> None:
        if self._env is not None:
            self._env.close()


class Puzzle:
    """A reasoning-gym question that may be tried several times; after each try the world tells its score."""

    def __init__(self, dataset: str, entry: Mapping[str, Any], tries: int) -> None:
        self._task = Task("puzzle", (), {"dataset": dataset, "entry": entry}, "reasoning_gym")
        self._left = tries

    def reset(self) -> str:
        return self._task.reference["entry"]["question"]

    def step(self, message: str) -> Observation:
        self._left -= 1
        verdict = Scorer().verify(self._task, message)
        if verdict.correct or not self._left:
            return Observation("", done=True, score=verdict.score)
        return Observation(f"Not solved: {verdict.score:.2f} of 1. Tries left: {self._left}.", score=verdict.score)

    def close(self) -> None:
        pass


class Python:
    """Code execution as a tool for any task: a message with a ```python block is run in the sandbox and answered with
    what it prints; a message without one is the final answer, judged by the task's own verifier."""

    def __init__(self, seconds: float = 5.0) -> None:
        self._sandbox = Sandbox()
        self._seconds = seconds

    def reset(self) -> str:
        return ""

    def step(self, message: str) -> Observation:
        blocks = _CODE.findall(message)
        if not blocks:
            return Observation("", done=True)
        output = self._sandbox.script(blocks[-1], stdin="", seconds=self._seconds)
        parts = (output.stdout, output.stderr if output.error else "", output.error)
        shown = "\n".join(part.strip() for part in parts if part.strip()) or "(no output)"
        return Observation(shown if len(shown) <= PRINTED else f"{shown[:PRINTED]} ... (cut)")

    def close(self) -> None:
        self._sandbox.close()


WORLDS: dict[str, Any] = {"gymnasium": Gymnasium, "puzzle": Puzzle}
TOOLS: dict[str, Any] = {"python": Python}


def open_world(task: Task, tool: str) -> Environment:
    """The environment of a task; for tasks of other sources, the tool."""
    if task.verifier != "environment":
        return TOOLS[tool]()
    fields = dict(task.reference)
    return WORLDS[fields.pop("kind")](**fields)


@verifier("environment")
def environment(task: Task, response: str) -> Verdict:
    """Stands in the registry for tasks that are judged while they are played."""
    return Verdict.abstain("this task is judged by its environment: play it with [search] kind = 'episode'")


@dataclass(frozen=True)
class GymnasiumTasks:
    """Instances of a gymnasium environment with discrete actions, told apart by their first observation.

    The return of an episode is mapped from [low, high] to a score in [0, 1]; `high` or more is correct.

    Example:
        GymnasiumTasks("Blackjack-v1", actions=("stick", "hit"), low=-1.0, train=200, heldout=50).load()
    """

    id: str
    actions: tuple[str, ...]  # names in the order of the action numbers
    params: Mapping[str, Any] = field(default_factory=dict)
    low: float = 0.0
    high: float = 1.0
    train: int = 100
    heldout: int = 50
    seed: int = 0
    prompt: str = "{observation}\nActions: {actions}"

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}: they bound an episode's return")

    def load(self) -> Split:
        _gymnasium()
        seen: set[str] = set()
        heldout = self._distinct("heldout", self.heldout, seen)
        return apart(self._distinct("train", self.train, seen), heldout)

    def _distinct(self, split: str, wanted: int, seen: set[str]) -> list[Task]:
        tasks: list[Task] = []
        dry = 0
        for task in self._tasks(split):
            dry = dry + 1 if task.question in seen else 0
            if not dry:
                seen.add(task.question)
                tasks.append(replace(task, id=f"{self.id}/{split}/{len(tasks)}"))
            if len(tasks) == wanted:
                return tasks
            if dry == DRY:
                break
        raise ValueError(
            f"{self.id} gave {len(seen)} distinct first observations of the {self.train + self.heldout} asked for "
            f"(train={self.train}, heldout={self.heldout}): ask for fewer or set params that make it vary"
        )

    def _tasks(self, split: str) -> Iterator[Task]:
        for i in count():
            fields = {"id": self.id, "params": dict(self.params), "actions": list(self.actions)}
            fields |= {"low": self.low, "high": self.high, "seed": derive(self.seed, self.id, split, i) % 2**31}
            try:
                world = Gymnasium(**fields)
                shown = {"observation": world.reset(), "actions": ", ".join(self.actions)}
            except Exception as error:  # the library raises its own kinds
                raise ValueError(f"gymnasium cannot open {self.id!r} with {dict(self.params)}: {error}") from None
            self._require_names(world)
            world.close()
            prompt = messages(self.prompt, shown, self.id)
            yield Task("", prompt, {"kind": "gymnasium", **fields}, "environment", {"split": split})

    def _require_names(self, world: Gymnasium) -> None:
        space = world._env.action_space
        if getattr(space, "n", None) != len(self.actions):
            raise ValueError(
                f"{self.id} has {space}, actions = {list(self.actions)} names {len(self.actions)}: name each"
            )


@dataclass(frozen=True)
class PuzzleTasks:
    """Questions of a reasoning-gym generator that may be tried `tries` times, with the score told after each."""

    dataset: str
    params: Mapping[str, Any] = field(default_factory=dict)
    tries: int = 3
    train: int = 100
    heldout: int = 50
    seed: int = 0
    prompt: str = "{question}"

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ValueError(f"tries={self.tries} must be at least 1")

    def load(self) -> Split:
        one_turn = ReasoningGym(
            self.dataset, self.params, self.train, self.heldout, self.seed, "reasoning_gym", self.prompt
        )
        train, heldout = one_turn.load()
        return [self._again(task) for task in train], [self._again(task) for task in heldout]

    def _again(self, task: Task) -> Task:
        reference = {"kind": "puzzle", **task.reference, "tries": self.tries}
        return replace(task, reference=reference, verifier="environment")


INTERACTIVE: dict[str, type[Source]] = {"gymnasium": GymnasiumTasks, "puzzle": PuzzleTasks}


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError:
        raise ValueError("tasks.kind = 'gymnasium' needs the package gymnasium: pip install gymnasium") from None
    return gymnasium
