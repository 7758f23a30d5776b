"""Where engines live, as the fleet sees it: what a host and an engine must do, by when, and what may go wrong.

Neighbours: `fleet` keeps the engines of a host at work; `cluster` is the host that puts them into Ray actors.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from typing import Any, Protocol

from rollouts.request import Replies, Request


class ClusterError(RuntimeError):
    """What a person can mend: an address that does not answer, too few resources, engines that keep dying."""


class Lost(Exception):
    """An engine is dead, hung or wrong, and must be replaced. Says why."""


class Refused(Exception):
    """An engine is well and will not do this: another one would not either. Says why."""


class NoRoom(Exception):
    """No node has the resources that an engine needs. Says what is missing."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds after which an engine counts as hung, by what it was asked for."""

    room: float = 20.0  # until some node has room for it
    start: float = 300.0  # until it has loaded its checkpoint
    sync: float = 120.0  # for one phase or one file of a weight push
    beat: float = 60.0  # to say which weights it serves, between two steps of its model
    reply: float = 300.0  # to send a reply, or the empty list that says it is still at work
    every: float = 2.0  # from one beat to the next
    retry: float = 60.0  # until a dead engine is tried again


@dataclass(frozen=True, slots=True)
class Weights:
    """One pushed version of the policy. Kept until the next, for engines that restart."""

    version: int
    chunks: tuple[tuple[Any, str], ...]  # (what `Remote.call` carries to an engine, the digest it must have there)
    sums: dict[str, str] = field(default_factory=dict)  # checksums of the loaded tensors, from the first engine


class Remote(Protocol):
    """One living engine. All calls raise Lost when it is gone and Refused when it is well but will not."""

    node: str

    def call(self, method: str, *args: Any) -> Awaitable[Any]: ...

    def extend(self, requests: list[Request]) -> AsyncIterator[Replies]: ...

    def kill(self) -> None: ...


class Host(Protocol):
    """Where engines live."""

    async def start(self, seat: int, room: float) -> Remote:
        """A new engine in that seat, which may still be loading. Raises NoRoom after `room` seconds."""
        ...

    def stop(self) -> None: ...
