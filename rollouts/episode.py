"""Plays a task that answers back: perceive, plan, act, reflect.

A rollout policy beside the searches: it needs an environment and a tokenizer, so it lives here and not in `search`.
What the environment says enters the path as a step that was not sampled, so it is never trained on. Neighbours:
`environment` holds the worlds, `roll_out` plays many episodes at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from rollouts.base import Rollout
from rollouts.environment import TOOLS, Environment, Observation, open_world
from search.base import END, STEP, Engine, Score, Trajectory, derive, require, sane
from verifiers import Pool
from verifiers.base import Task, Verdict
from verifiers.process import verified


@dataclass(frozen=True)
class Episode:
    """`n` episodes of a task, each of at most `turns` messages.

    A message is planned (one line after `plan`), then sampled to its end after `act` and given to the environment; its
    reply is read in the next turn, which begins with a line after `reflect`: a finding. A finding is kept only when a
    verifier says it is right: `verifier` by name (it sees the task without its reference), else arithmetic that states
    an equality and holds. When the next message might not fit into `context` tokens, the episode goes on in a new
    context: the task, the findings kept, and the last reply. plan, act or reflect = "" leaves that line out.
    """

    n: int = 8
    turns: int = 8
    context: int = 1024
    plan: str = "Plan:"
    act: str = "Action:"
    reflect: str = "Finding:"
    verifier: str = ""
    tool: str = ""  # for tasks without an environment of their own: "python"
    seconds: float = 10.0  # that an environment may take for one reply
    method: ClassVar[str] = "vote"

    def __post_init__(self) -> None:
        sane(self, positive=("n", "turns", "context", "seconds"), tool=("", *TOOLS))

    def check(self, engine: Engine, score: Score | None) -> None:
        require(self, engine, score, until="step" if self.plan or self.reflect else "end", offers=("write",))

    async def play(
        self, task: Task, root: Trajectory, engine: Engine, pool: Pool, encode: Callable[[Task], tuple[int, ...]]
    ) -> list[Rollout]:
        """The judged episodes of a task.

        Args:
            encode: a task's prompt as token ids, for new contexts.
        """
        if task.verifier != "environment" and not self.tool:
            raise ValueError(f"task {task.id} has no environment: set search.tool, or use another search.kind")
        roots = [replace(root, seed=derive(root.seed, "episode", i)) for i in range(self.n)]
        return list(await asyncio.gather(*(_Play(self, task, r, engine, pool, encode).rollout() for r in roots)))


@dataclass
class _Play:
    """One episode under way."""

    policy: Episode
    task: Task
    path: Trajectory
    engine: Engine
    pool: Pool
    encode: Callable[[Task], tuple[int, ...]]
    findings: list[str] = field(default_factory=list)
    rejected: int = 0
    earlier: list[Trajectory] = field(default_factory=list)

    async def rollout(self) -> Rollout:
        world: Environment | None = None
        message, seen, turn = "", Observation("", score=None), 0
        try:
            world = await self._ask(partial(open_world, self.task, self.policy.tool))
            await self._ask(world.reset)
            for turn in range(1, self.policy.turns + 1):
                message = await self._act()
                if self.path.end == "length":
                    break
                seen = await self._ask(partial(world.step, message))
                if seen.done or turn == self.policy.turns:
                    break
                await self._perceive(seen.text)
                if self.path.end == "length":
                    break
        except _Broken as broken:
            verdict = Verdict.fail(str(broken))
        else:
            verdict = await self._verdict(seen, message)
        finally:
            if world is not None:
                _in_thread(world.close)
        facts = {"turns": turn, "findings": tuple(self.findings), "findings_rejected": self.rejected}
        verdict = replace(verdict, evidence={**verdict.evidence, **facts, "contexts": len(self.earlier) + 1})
        return Rollout(self.task, self.path, verdict, tuple(self.earlier))

    async def _act(self) -> str:
        """Plan, then sample a message to its end; returns its text."""
        if self.policy.plan:
            await self._line(self.policy.plan)
        if self.path.end != "length" and (self.policy.act or self.path.end == "stop"):
            self.path = self.engine.write(self.path, self.policy.act or "\n")
        return await self._sample(END) if self.path.end is None else ""

    async def _perceive(self, text: str) -> None:
        """Read a reply, note what it taught, and make room for the next message."""
        before = self.path
        self.path = self.engine.write(self.path, text, turn=True)
        if self.policy.reflect and self._room() > 0:
            finding = await self._line(self.policy.reflect)
            if finding and await self._holds(finding):
                self.findings += [finding] if finding not in self.findings else []
            elif finding:
                self.rejected += 1
        if self._room() < self.engine.sampling.max_tokens and self.path.end != "length":
            self._compact(before if self._room() <= 0 else self.path, text)

    async def _line(self, header: str) -> str:
        if self.path.end == "length":
            return ""
        self.path = self.engine.write(self.path, header)
        return (await self._sample(STEP)).strip()

    async def _sample(self, until: Any) -> str:
        """Extend the path in place; each message may be as long as one response may."""
        longest = min(self.path.length + self.engine.sampling.max_tokens, self.policy.context - len(self.path.prompt))
        grown = await self.engine.at(max_tokens=longest).extend(self.path, until=until)
        if not grown:  # a budget is spent
            self.path = replace(self.path, end="length")
            return ""
        said = grown[0].steps[len(self.path.steps) :]
        self.path = grown[0]
        return "".join(step.text for step in said)

    def _room(self) -> int:
        return self.policy.context - len(self.path.ids)

    def _compact(self, closed: Trajectory, reply: str) -> None:
        """Go on in a new context that holds the task, the findings and the last reply."""
        notes = "\n".join(["Found so far:", *self.findings]) if self.findings else "Nothing found so far."
        *others, last = self.task.prompt
        page = {**last, "content": f"{last['content']}\n{notes}\n{reply}"}
        prompt = self.encode(replace(self.task, prompt=(*others, page)))
        fresh = Trajectory(prompt, seed=derive(self.path.seed, "context", len(self.earlier)))
        self.earlier.append(closed)
        full = self.policy.context - len(prompt) < self.engine.sampling.max_tokens  # even the notes fill it
        self.path = replace(fresh, end="length") if full else fresh

    async def _holds(self, finding: str) -> bool:
        if not self.policy.verifier:
            return verified(finding) is True
        keyless = replace(self.task, reference=None, verifier=self.policy.verifier)
        return (await self.pool.verify(keyless, [finding]))[0].correct is True

    async def _verdict(self, seen: Observation, message: str) -> Verdict:
        """The world's score where it keeps one, else the verifier's word on the last message."""
        if self.task.verifier != "environment":
            return (await self.pool.verify(self.task, [message]))[0]
        score = seen.score or 0.0
        return Verdict("scored", score, score >= 1.0, why="solved" if score >= 1.0 else f"ended at {score:.2f} of 1")

    async def _ask(self, call: Callable[[], Any]) -> Any:
        """Call the environment off the event loop, within the deadline. What it raises becomes _Broken."""
        kind = self.task.reference["kind"] if self.task.verifier == "environment" else self.policy.tool
        try:
            return await asyncio.wait_for(asyncio.wrap_future(_in_thread(call)), self.policy.seconds)
        except TimeoutError:
            raise _Broken(f"environment {kind} gave no reply within {self.policy.seconds:g} s") from None
        except Exception as error:
            raise _Broken(f"environment {kind} raised {type(error).__name__}: {error}"[:200]) from error


class _Broken(Exception):
    """An environment that raised or hung: its episode is failed and counted."""


def _in_thread(call: Callable[[], Any]) -> Future:
    """A future of the call in a daemon thread: one that hangs cannot keep the program from ending."""
    future: Future = Future()
    future.set_running_or_notify_cancel()  # whoever stops waiting does not cancel it

    def work() -> None:
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, daemon=True).start()
    return future


POLICIES: dict[str, type] = {"episode": Episode}
