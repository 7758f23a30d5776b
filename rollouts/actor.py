"""What runs in an engine's own process: the engine, and the stream of its replies to the driver.

`cluster` makes a Ray actor of `EngineActor`; this file knows no Ray. Whatever breaks is told as Lost (the engine cannot
go on) or Refused (it can), in words: the driver knows none of the engine's own exceptions.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import platform
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from rollouts.host import ClusterError, Lost, Refused
from rollouts.request import Placement, Replies, Request


class EngineActor:
    """An engine, imported when it is first needed, so that a driver never loads vllm."""

    def __init__(self, engine: str, checkpoint: str, placement: Placement, seed: int) -> None:
        self._make, self._arguments = engine, (checkpoint, placement, seed)
        self._engine: Any = None
        self._said: list[tuple[int, Replies | Exception]] = []  # by number of the call, not yet sent
        self._news = asyncio.Event()

    async def ready(self) -> int:
        """The version of the weights being served; returns once the engine can work."""
        async with self._telling():
            if self._engine is None:
                _require_folder(self._arguments[0])
                module, name = self._make.split(":")
                self._engine = getattr(importlib.import_module(module), name)(*self._arguments)
            return await self._engine.ready()

    async def pids(self) -> list[int]:
        """This process and those it started."""
        me = psutil.Process()
        return [me.pid, *(child.pid for child in me.children(recursive=True))]

    async def usage(self) -> dict[str, Any]:
        async with self._telling():
            return await self._engine.usage()

    async def extend(self, number: int, requests: list[Request]) -> None:
        """Sample; what comes of it goes out with `replies`, under this number."""
        try:
            async with self._telling():
                async for complete in self._engine.extend(requests):
                    self._say(number, complete)
        except (Lost, Refused) as error:
            self._say(number, error)

    def _say(self, number: int, told: Replies | Exception) -> None:
        self._said.append((number, told))
        self._news.set()

    async def replies(self) -> AsyncIterator[list[tuple[int, Replies | Exception]]]:
        """What comes of every call, for ever. What is there at one moment goes out in one piece."""
        while True:
            await self._news.wait()
            self._news.clear()
            said, self._said = self._said, []
            yield said

    async def drop(self, numbers: list[int]) -> None:
        async with self._telling():
            await self._engine.drop(numbers)

    async def init_weight_transfer_engine(self, info: dict) -> None:
        async with self._telling():
            await self._engine.init_weight_transfer_engine(info)

    async def start_weight_update(self) -> None:
        async with self._telling():
            await self._engine.start_weight_update()

    async def update_weights(self, data: np.ndarray, digest: str) -> None:
        """`data` (bytes of a safetensors file) lies in the node's object store, which the engine's workers cannot read:
        they get it as a file in memory, which ends with this process."""
        async with self._telling():
            with os.fdopen(os.memfd_create("weights"), "wb") as file:
                file.write(data)
                file.flush()
                path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
                await self._engine.update_weights({"path": path, "digest": digest})

    async def finish_weight_update(self, version: int) -> int:
        async with self._telling():
            return await self._engine.finish_weight_update(version)

    async def checksums(self) -> dict[str, str]:
        async with self._telling():
            return await self._engine.checksums()

    @asynccontextmanager
    async def _telling(self) -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:
            words = f"{type(error).__name__}: {last_line(error)}"
            raise (Lost if self._engine is not None and self._engine.dead else Refused)(words) from None


def _require_folder(checkpoint: str) -> None:
    if not Path(checkpoint).is_dir():
        raise ClusterError(
            f"{checkpoint} is not on node {platform.node()}: put it (--cache) on a file system that all nodes see"
        )


def last_line(error: BaseException) -> str:
    """The line of a message that says what happened, where it ends with a traceback."""
    text = str(error).strip()
    return text.splitlines()[-1][:500] if text else type(error).__name__
