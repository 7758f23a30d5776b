"""An engine without a model, for whatever is to be tried on the machinery around engines: faults, nodes, long runs.

Takes the place of `VLLMEngine` in an actor (`Engines.start(..., engine=SCRIPTED)`): the same methods, weights that are
really received and checked, versions that are really reported. A token is drawn from the seed alone; its
log-probability is minus the mean of all weights held when it was drawn, so a token shows which weights wrote it.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from rollouts.request import Placement, Replies, Reply, Request
from search.base import Step

SCRIPTED = "rollouts.scripted_engine:ScriptedEngine"
VOCABULARY = 10  # tokens 1 to 9; 0 ends an answer
PACE = 0.002  # seconds a token


class ScriptedEngine:
    """Starts with the weights in the folder's model.safetensors."""

    def __init__(self, checkpoint: str, placement: Placement, seed: int) -> None:
        self._base = load_file(Path(checkpoint) / "model.safetensors")
        self._weights, self._version = dict(self._base), 0
        self._arriving: dict[str, np.ndarray] = {}
        self._open = asyncio.Event()  # shut while weights change
        self._open.set()
        self.dead = False
        self.drawn = 0  # tokens
        self._unwanted: set[int] = set()

    async def usage(self) -> dict[str, int | None]:
        return {"room": None, "rows": self.drawn}

    async def ready(self) -> int:
        return self._version

    async def extend(self, requests: list[Request]) -> AsyncIterator[Replies]:
        """See `VLLMEngine.extend`."""
        rows = [asyncio.create_task(self._row(i, request)) for i, request in enumerate(requests)]
        for row in asyncio.as_completed(rows):
            yield [await row]

    async def drop(self, numbers: list[int]) -> None:
        """See `VLLMEngine.drop`."""
        self._unwanted.update(numbers)

    async def _row(self, index: int, request: Request) -> tuple[int, list[Reply]]:
        return index, [await self._draw(request, seed) for seed in request.seeds]

    async def _draw(self, request: Request, seed: int) -> Reply:
        noise = random.Random(seed)
        ids: list[int] = []
        logprobs: list[float] = []
        versions: list[tuple[int, int, int]] = []
        while len(ids) < request.most and (not ids or ids[-1]) and request.number not in self._unwanted:
            await asyncio.sleep(PACE)
            await self._open.wait()
            self.drawn += 1
            ids.append(noise.randrange(VOCABULARY))
            logprobs.append(-float(np.mean([tensor.mean() for tensor in self._weights.values()])))
            start = versions.pop()[1] if versions and versions[-1][0] == self._version else len(ids) - 1
            versions.append((self._version, start, len(ids)))
        text = "".join(map(str, ids))
        step = Step(tuple(ids), tuple(logprobs), text, versions=tuple(versions))
        return Reply(step, ids[-1:] == [0], len(request.ids))

    async def init_weight_transfer_engine(self, info: dict) -> None:
        pass

    async def start_weight_update(self) -> None:
        self._open.clear()
        self._arriving = {}

    async def update_weights(self, info: dict) -> None:
        digest = hashlib.blake2b(Path(info["path"]).read_bytes(), digest_size=16).hexdigest()
        if digest != info["digest"]:
            raise RuntimeError(f"{info['path']} has digest {digest}, the sender wrote {info['digest']}")
        self._arriving |= load_file(info["path"])

    async def finish_weight_update(self, version: int) -> int:
        if self._arriving.keys() != self._base.keys():
            raise RuntimeError(f"an update must bring {sorted(self._base)}, it brought {sorted(self._arriving)}")
        self._weights, self._version = self._arriving, version
        self._open.set()
        return version

    async def checksums(self) -> dict[str, str]:
        return {name: hashlib.blake2b(t.tobytes(), digest_size=8).hexdigest() for name, t in self._weights.items()}
