"""Which tasks may search now: as many as the engines' KV cache can hold, whatever their number.

A tree whose paths do not fit makes an engine throw one path's KV away to go on with another, and compute it again.
Knows tasks, engines and searches only by how many tokens they need. Neighbour: `roll_out`.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from rollouts.request import KV_BLOCK


class Admission:
    """Lets tasks in, in their order, while what they may need fits into `room` tokens (None: always).

    A task that needs more than there is runs alone.
    """

    def __init__(self, room: int | None) -> None:
        self.room = room
        self._used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def held(self, need: int) -> AsyncIterator[None]:
        """Waits until there is room for `need` tokens, and gives it back at the end."""
        if self.room is None:
            yield
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((need, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.done() or turn.cancelled():
                self._waiting = deque(pair for pair in self._waiting if pair[1] is not turn)
                raise
            self._give_back(need)
            raise
        try:
            yield
        finally:
            self._give_back(need)

    def _give_back(self, need: int) -> None:
        self._used -= need
        self._admit()

    def _admit(self) -> None:
        while self._waiting and (self._used == 0 or self._used + self._waiting[0][0] <= self.room):
            need, turn = self._waiting.popleft()
            if not turn.done():
                self._used += need
                turn.set_result(None)


def need_of(search: Any, prompt: int, response: int) -> int:
    """Tokens of KV that a search may hold at once: its prompt, and every path that it keeps alive in full length.

    A path has whole blocks of its own: one that it begins in the middle, and as many as its response fills.
    """
    knobs = {name: getattr(search, name, 1) for name in ("n", "k", "width", "branch", "lanes")}
    live = max(knobs["n"], knobs["k"], knobs["lanes"], knobs["width"] * knobs["branch"])
    return prompt + live * (1 + math.ceil(response / KV_BLOCK)) * KV_BLOCK
