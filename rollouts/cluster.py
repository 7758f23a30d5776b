"""Ray: starts or joins a cluster, hosts engines in actors on its nodes, carries new weights to them.

The only file that imports ray. Knows nothing of tasks, verifiers or learning. `Engines` is the `Engine` that a search
sees; behind it, `fleet` keeps the actors at work whatever dies.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rollouts.actor import EngineActor, last_line
from rollouts.admission import Admission
from rollouts.fleet import EngineState, Fleet
from rollouts.host import ClusterError, Deadlines, Lost, NoRoom, Refused, Weights
from rollouts.request import Placement, Replies, Reply, Request
from rollouts.writing import write
from search.base import END, Offer, Sampling, Trajectory, Until
from search.tree import Ledger

if TYPE_CHECKING:
    import torch

CONNECT_DEADLINE = 20.0  # seconds for a Ray address to answer
CHUNK_BYTES = 256 * 2**20  # one file of a weight push holds about this much
VLLM = "rollouts.vllm_engine:VLLMEngine"


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """A connection to Ray: "local" starts one here, "auto" joins a running one, anything else is its address.

    A cluster that this process started ends with it. Raises ClusterError within 20 s if the address does not answer.
    """
    if ray.is_initialized():  # held by a caller, e.g. a test session
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about CUDA_VISIBLE_DEVICES
    os.environ.setdefault("RAY_worker_niceness", "0")  # engines are no background work: the learner waits for them
    if address == "local":
        ray.init(address="local", include_dashboard=False, object_store_memory=_object_store(), **options)
    else:
        _join(address, options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler ends the process at once, with a stack trace
    try:
        yield
    finally:
        ray.shutdown()


def _object_store() -> int:
    """Bytes at most: room for two versions of the weights of a model of 500 million parameters, taken when used."""
    return max(256 * 2**20, min(4 * 2**30, shutil.disk_usage("/dev/shm").free // 2))


def _join(address: str, options: dict[str, Any]) -> None:
    if "://" in address:
        raise ClusterError(
            f"--ray {address!r}: a driver joins its cluster directly, not through a client: run it on a node of the "
            "cluster with --ray auto, or submit it with `ray job submit` (docs/cluster.md)"
        )
    _require_answer(address)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"this machine is no node of the Ray cluster at {address!r} ({last_line(error)}): join it first with "
            "`ray start --address=ADDRESS`, or submit the run with `ray job submit` (docs/cluster.md)"
        ) from error


def _require_answer(address: str) -> None:
    """`ray.init` waits for minutes on a dead address, so ask first, in a process that can be given up on.

    Where nothing listens at all, that is known at once.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    if address != "auto":
        command += ["--address", address]
    try:
        done = subprocess.run(command, capture_output=True, timeout=CONNECT_DEADLINE) if _listens(address) else None
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        raise ClusterError(
            f"no Ray cluster answers at {address!r} within {CONNECT_DEADLINE:.0f} s: start one with "
            "`ray start --head`, correct the address, or use --ray local"
        )


def _listens(address: str) -> bool:
    """Whether something accepts connections at "HOST:PORT"; of any other form of address nothing is known: True."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_DEADLINE).close()
    except OSError:
        return False
    return True


class Engines:
    """Engine actors behind the `Engine` interface. Make with `start`; `at` gives views with other sampling."""

    def __init__(self, host: _Host, fleet: Fleet, sampling: Sampling) -> None:
        self._host, self._fleet = host, fleet  # shared by all views
        self.sampling = sampling

    @classmethod
    def start(
        cls,
        checkpoint: Path,
        placement: Placement,
        sampling: Sampling,
        seed: int,
        *,
        engine: str = VLLM,
        deadlines: Deadlines | None = None,
    ) -> Engines:
        """Place the actors and wait until each serves `checkpoint`. Raises ClusterError with what is missing.

        engine: "module:class" of what the actors run, with the methods of `vllm_engine.VLLMEngine`.
        """
        host = _Host(checkpoint, placement, seed, engine)
        return cls(host, Fleet(host, placement.count, deadlines), sampling)

    @property
    def offers(self) -> frozenset[Offer]:
        return self._host.placement.offers

    @property
    def ledger(self) -> Ledger:
        return self._fleet.ledger

    def at(self, **changes: float | int | str) -> Engines:
        return Engines(self._host, self._fleet, replace(self.sampling, **changes))

    def write(self, path: Trajectory, text: str, *, turn: bool = False) -> Trajectory:
        """See `search.base.Engine`. Raises ValueError for text that the vocabulary cannot spell."""
        return write(self._host.tokenizer, path, text, turn=turn)

    def decode(self, ids: Sequence[int]) -> str:
        return self._host.tokenizer.decode(ids, skip_special_tokens=True)

    async def extend(self, path: Trajectory, *, n: int = 1, until: Until = END) -> list[Trajectory]:
        """`n` continuations of `path`; see `search.base.Engine`."""
        if path.end is not None:
            raise ValueError(f"a path that ended ({path.end}) cannot be extended")
        room = min(self.sampling.max_tokens - path.length, self._host.placement.max_model_len - len(path.ids))
        request = Request.children(path, n, until, self.sampling, room)
        if room <= 0:
            return [replace(path, end="length", seed=seed) for seed in request.seeds]
        replies = await self._fleet.ask(hash(path.prompt), request)
        return [_grown(path, request, seed, reply) for seed, reply in zip(request.seeds, replies, strict=True)]

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Push weights into every engine, in flight. One that fails is replaced, and its successor gets them.

        Args:
            tensors: (name in the checkpoint, tensor), the whole model.
            version: of the policy, > 0.
        """
        self._fleet.push(Weights(version, tuple(_chunks(tensors))))

    def checksums(self) -> dict[str, str]:
        """Of the loaded tensors; raises ClusterError when two engines disagree."""
        first, *others = self._fleet.call("checksums")
        for other in others:
            differing = sorted(name for name in first if first[name] != other.get(name))
            if differing:
                raise ClusterError(f"engines hold different weights, first in {differing[0]}")
        return first

    @property
    def admission(self) -> Admission:
        """Of tasks to these engines, by what their KV caches hold together: one for all that use them."""
        if self._host.admission is None:
            rooms = [usage["room"] for usage in self.usage()]
            self._host.admission = Admission(None if None in rooms else sum(rooms))
        return self._host.admission

    def usage(self) -> list[dict[str, Any]]:
        """What each engine did so far: see `vllm_engine.VLLMEngine.usage`."""
        return self._fleet.call("usage")

    def states(self) -> list[EngineState]:
        """What each engine does now, the weights it holds and how far these are behind."""
        return self._fleet.states()

    @property
    def dropped(self) -> Counter[str]:
        """Requests that had to be asked again, by reason."""
        return self._fleet.dropped

    def record(self, path: Path) -> None:
        """Append every change of an engine's state, past and to come, to a file of JSON lines (`EngineState`)."""
        self._fleet.record(path)

    def pids(self) -> list[list[int]]:
        """The processes of each engine, on whatever node it is: its actor's, then those that this one started."""
        return self._fleet.call("pids")

    def stop(self) -> None:
        """End the actors and the processes they started; safe to call twice."""
        self._fleet.stop()


class _Host:
    """Engines as Ray actors, one to a bundle of a placement group that spreads them over the nodes."""

    def __init__(self, checkpoint: Path, placement: Placement, seed: int, engine: str) -> None:
        _require_resources(placement)
        self.placement = placement
        bundle = {"CPU": 1.0, **({"GPU": placement.gpus} if placement.gpus else {})}
        self._group = placement_group([bundle] * placement.count, strategy="SPREAD")
        self._options = dict(
            num_cpus=1,
            num_gpus=placement.gpus,
            runtime_env={"env_vars": _environment(checkpoint, placement)},
            max_concurrency=10_000,  # an async actor: many extensions wait at once
        )
        self._stopped = False
        self.admission: Admission | None = None  # until asked for
        self._checkpoint = checkpoint
        self._arguments = engine, str(checkpoint.resolve()), placement, seed

    @cached_property
    def tokenizer(self) -> Any:
        """Of the checkpoint, for what a search writes; loaded when first needed."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._checkpoint)

    async def start(self, seat: int, room: float) -> _Remote:
        node = await asyncio.to_thread(self._node, seat, room)
        bundle = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=seat)
        actor = ray.remote(EngineActor).options(scheduling_strategy=bundle, **self._options)
        return _Remote(actor.remote(*self._arguments), node)

    def _node(self, seat: int, room: float) -> str:
        """Where this seat's bundle is. Ray finds another node for it when it had to leave one that died."""
        deadline = time.monotonic() + room
        while True:
            if self._stopped:  # Ray may be down by now, and asked anything it would start a cluster that nobody stops
                raise NoRoom("the engines were stopped")
            place = placement_group_table(self._group)["bundles_to_node_id"].get(seat)
            names = {n["NodeID"]: n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]}
            if place in names:
                return f"{names[place]}/{place[:6]}"
            if time.monotonic() > deadline:
                raise NoRoom(f"no node has room for it within {room:g} s: {_shortage(self.placement)}")
            time.sleep(0.2)

    def stop(self) -> None:
        self._stopped = True
        remove_placement_group(self._group)


class _Remote:
    """One actor, with Ray's errors told as the fleet knows them.

    A call and a stream of Ray's cost about a millisecond of this process each, and a search by steps makes thousands:
    so the replies of all calls come in one stream, those of one step of the engine together.
    """

    def __init__(self, actor: Any, node: str) -> None:
        self._actor, self.node = actor, node
        self._calls: dict[int, asyncio.Queue[Replies | Exception]] = {}  # under way, by number
        self._numbers = itertools.count()
        self._listener: asyncio.Task[None] | None = None
        self._end: Exception | None = None  # why nothing is told any more

    async def call(self, method: str, *args: Any) -> Any:
        try:
            return await getattr(self._actor, method).remote(*args)
        except ray.exceptions.RayError as error:
            raise _told(error) from error

    async def extend(self, requests: list[Request]) -> AsyncIterator[Replies]:
        if self._end is not None:
            raise self._end
        number = next(self._numbers)
        self._calls[number] = told = asyncio.Queue()
        if self._listener is None:
            self._listener = asyncio.create_task(self._listen())
        try:
            self._actor.extend.options(num_returns=0).remote(number, requests)
            left = len(requests)
            while left:
                complete = await told.get()
                if isinstance(complete, Exception):
                    raise complete
                left -= len(complete)
                yield complete
        finally:
            del self._calls[number]

    async def _listen(self) -> None:
        """Hand every call its replies, as long as the actor lives."""
        try:
            async for batch in self._actor.replies.options(num_returns="streaming").remote():
                for number, told in await batch:
                    if number in self._calls:
                        self._calls[number].put_nowait(told)
        except Exception as error:
            self._end = _told(error) if isinstance(error, ray.exceptions.RayError) else error
            for told in self._calls.values():
                told.put_nowait(self._end)

    def kill(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
        ray.kill(self._actor)


def _told(error: Exception) -> Exception:
    """A Ray error as what it means for the engine."""
    if isinstance(error, ray.exceptions.RayTaskError):
        if isinstance(error.cause, Lost | Refused):
            return error.cause
        return Lost(last_line(error))
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return Lost("Ray killed it: its node is out of memory")
    return Lost("its process or its node died")


def _grown(path: Trajectory, request: Request, seed: int, reply: Reply) -> Trajectory:
    if reply.stopped:
        end = "stop"
    elif request.until.kind == "end" or len(reply.step.ids) >= request.room:
        end = "length"
    else:
        end = None
    return path.grow(reply.step, end=end, seed=seed)


def _chunks(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[ray.ObjectRef, str]]:
    """Tensors in Ray's object store as safetensors files of about CHUNK_BYTES; yields (reference, digest).

    Each node that has an engine fetches a chunk once.
    """
    from safetensors.torch import save

    def stored(chunk: dict[str, torch.Tensor]) -> tuple[ray.ObjectRef, str]:
        data = save(chunk)
        return ray.put(np.frombuffer(data, np.uint8)), hashlib.blake2b(data, digest_size=16).hexdigest()

    chunk: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        chunk[name] = tensor.detach().to("cpu", copy=True).contiguous()  # a copy: safetensors refuses shared storage
        size += tensor.nbytes
        if size >= CHUNK_BYTES:
            yield stored(chunk)
            chunk, size = {}, 0
    if chunk:
        yield stored(chunk)


def _environment(checkpoint: Path, placement: Placement) -> dict[str, str]:
    """vLLM reads part of its configuration from the environment only, before it is imported."""
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's core runs in the actor: see `vllm_engine`
    if placement.gpus:
        return env
    config = json.loads((checkpoint / "config.json").read_text())
    if config.get("kv_lora_rank") not in (None, 512):
        env["VLLM_MLA_DISABLE"] = "1"  # the CPU's MLA kernels know latent size 512 only; the same weights run expanded
    return env


def _require_resources(placement: Placement) -> None:
    if missing := _shortage(placement):
        raise ClusterError(f"{missing}: lower engine.count or engine.gpus, or add nodes")


def _shortage(placement: Placement) -> str:
    """What the cluster lacks for these engines even when nothing else runs on it, or ""."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(_fit(node, placement)) for node in nodes)
    if room >= placement.count:
        return ""
    have = ", ".join(f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes)
    need = f"1 CPU and {placement.gpus:g} GPU" if placement.gpus else "1 CPU"
    return f"engine.count = {placement.count} with {need} each, but the Ray cluster has room for {room} (nodes: {have})"


def _fit(node: dict[str, float], placement: Placement) -> float:
    """How many engines a node has room for."""
    return min(node.get("CPU", 0), node.get("GPU", 0) / placement.gpus if placement.gpus else float("inf"))
