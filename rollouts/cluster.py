"""Ray: starts or joins a cluster, places engine actors on it, routes extensions to them, sends them new weights.

The only file that imports ray. Knows nothing of tasks, verifiers or learning. `Engines` is the `Engine` that a search
sees: it gathers the extensions asked for in one turn of the event loop into one call per actor.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rollouts.request import Placement, Reply, Request
from rollouts.writing import write
from search.base import END, Offer, Sampling, Trajectory, Until
from search.tree import Ledger

if TYPE_CHECKING:
    import torch

CONNECT_DEADLINE = 20.0  # seconds for a Ray address to answer
START_DEADLINE = 300.0  # seconds for an engine to load its checkpoint
REPLY_DEADLINE = 600.0  # seconds without any reply from an engine that has work
SYNC_DEADLINE = 300.0  # seconds for one phase of a weight push
CHUNK_BYTES = 256 * 2**20  # one file of a weight push holds about this much


class ClusterError(RuntimeError):
    """What a person can mend: an address that does not answer, too few resources, an engine that died."""


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
        ray.init(address="local", include_dashboard=False, object_store_memory=256 * 2**20, **options)
    else:
        _require_answer(address)
        ray.init(address=address, **options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler ends the process at once, with a stack trace
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """`ray.init` waits for minutes on a dead address, so ask first, in a process that can be given up on."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    if address != "auto":
        command += ["--address", address]
    try:
        done = subprocess.run(command, capture_output=True, timeout=CONNECT_DEADLINE)
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        raise ClusterError(
            f"no Ray cluster answers at {address!r} within {CONNECT_DEADLINE:.0f} s: start one with "
            "`ray start --head`, correct the address, or use --ray local"
        )


class Engines:
    """Engine actors behind the `Engine` interface. Make with `start`; `at` gives views with other sampling."""

    def __init__(self, fleet: _Fleet, sampling: Sampling) -> None:
        self._fleet = fleet  # shared by all views
        self.sampling = sampling

    @classmethod
    def start(cls, checkpoint: Path, placement: Placement, sampling: Sampling, seed: int) -> Engines:
        """Place the actors and wait until each serves `checkpoint`. Raises ClusterError with what is missing."""
        return cls(_Fleet(checkpoint, placement, seed), sampling)

    @property
    def offers(self) -> frozenset[Offer]:
        return self._fleet.placement.offers

    @property
    def ledger(self) -> Ledger:
        return self._fleet.ledger

    def at(self, **changes: float | int | str) -> Engines:
        return Engines(self._fleet, replace(self.sampling, **changes))

    def write(self, path: Trajectory, text: str, *, turn: bool = False) -> Trajectory:
        """See `search.base.Engine`. Raises ValueError for text that the vocabulary cannot spell."""
        return write(self._fleet.tokenizer, path, text, turn=turn)

    async def extend(self, path: Trajectory, *, n: int = 1, until: Until = END) -> list[Trajectory]:
        """`n` continuations of `path`; see `search.base.Engine`."""
        if path.end is not None:
            raise ValueError(f"a path that ended ({path.end}) cannot be extended")
        room = min(self.sampling.max_tokens - path.length, self._fleet.placement.max_model_len - len(path.ids))
        request = Request.children(path, n, until, self.sampling, room)
        if room <= 0:
            return [replace(path, end="length", seed=seed) for seed in request.seeds]
        replies = await self._fleet.ask(hash(path.prompt), request)
        return [_grown(path, request, seed, reply) for seed, reply in zip(request.seeds, replies, strict=True)]

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Push weights into every engine in flight (vLLM's four phases) and check the version that each reports.

        Args:
            tensors: (name in the checkpoint, tensor), the whole model.
            version: of the policy, > 0.
        """
        call = self._fleet.call
        call("start_weight_update")
        folder = Path(tempfile.mkdtemp(prefix="reasoner-", dir="/dev/shm"))
        try:
            for path, digest in _chunks(tensors, folder):
                call("update_weights", {"path": str(path), "digest": digest})
                path.unlink()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        reported = call("finish_weight_update", version)
        if set(reported) != {version}:
            raise ClusterError(f"engines report versions {reported} after a push of version {version}")

    def checksums(self) -> dict[str, str]:
        """Of the loaded tensors; raises ClusterError when two engines disagree."""
        first, *others = self._fleet.call("checksums")
        for other in others:
            differing = sorted(name for name in first if first[name] != other.get(name))
            if differing:
                raise ClusterError(f"engines hold different weights, first in {differing[0]}")
        return first

    def stop(self) -> None:
        """End the actors and the processes they started; safe to call twice."""
        self._fleet.stop()


class _Fleet:
    """The actors, and the extensions that wait to be sent to them."""

    def __init__(self, checkpoint: Path, placement: Placement, seed: int) -> None:
        _require_resources(placement)
        self.placement = placement
        self.ledger = Ledger()
        self._checkpoint = checkpoint
        self._pending: list[tuple[int, Request, asyncio.Future]] = []
        self._tasks: set[asyncio.Task] = set()
        self._processes: list[psutil.Process] = []
        make = ray.remote(_Actor).options(
            num_cpus=1,
            # Weights go through this machine's /dev/shm, so engines live on the driver's node.
            scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
            num_gpus=placement.gpus,
            runtime_env={"env_vars": _environment(checkpoint, placement)},
            max_concurrency=10_000,  # an async actor: many extensions wait at once
        )
        self._actors = [make.remote(str(checkpoint.resolve()), placement, seed) for _ in range(placement.count)]
        try:
            families = ray.get([actor.pids.remote() for actor in self._actors], timeout=START_DEADLINE)
            self._processes = [psutil.Process(pid) for family in families for pid in family]
            self.call("init_weight_transfer_engine", {})
        except ray.exceptions.GetTimeoutError:
            self.stop()
            raise ClusterError(f"an engine did not load {checkpoint} within {START_DEADLINE:.0f} s") from None
        except ray.exceptions.RayError as error:
            self.stop()
            raise ClusterError(f"an engine could not start on {checkpoint}: {_root_cause(error)}") from error
        except BaseException:
            self.stop()
            raise

    @cached_property
    def tokenizer(self) -> Any:
        """Of the checkpoint, for what a search writes; loaded when first needed."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._checkpoint)

    def ask(self, key: int, request: Request) -> asyncio.Future:
        """Queue a request for the actor of its prompt (same prompt, same prefix cache), sent when this turn ends."""
        loop = asyncio.get_running_loop()
        if not self._pending:
            loop.call_soon(self._flush)
        reply = loop.create_future()
        self._pending.append((key % len(self._actors), request, reply))
        return reply

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        for index, actor in enumerate(self._actors):
            mine = [(request, reply) for owner, request, reply in pending if owner == index]
            if mine:
                task = asyncio.ensure_future(self._collect(actor, *zip(*mine, strict=True)))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _collect(self, actor: Any, requests: tuple[Request, ...], replies: tuple[asyncio.Future, ...]) -> None:
        """Run one call on an actor and hand each reply to whoever waits for it."""
        stream = actor.extend.options(num_returns="streaming").remote(list(requests))
        try:
            left = len(requests)
            while left:
                complete = await asyncio.wait_for(_next(stream), REPLY_DEADLINE)
                left -= len(complete)
                for index, steps in complete:
                    self.ledger.generated += sum(len(reply.step.ids) for reply in steps)
                    self.ledger.prefilled += sum(reply.prefilled for reply in steps)
                    self.ledger.cached += sum(reply.step.cached for reply in steps)
                    if not replies[index].done():  # cancelled by its search
                        replies[index].set_result(steps)
        except Exception as error:  # the rim: whatever broke, the callers must hear of it
            what = f"no reply within {REPLY_DEADLINE:.0f} s" if isinstance(error, TimeoutError) else _root_cause(error)
            for reply in replies:
                if not reply.done():
                    reply.set_exception(ClusterError(f"an engine failed: {what}"))

    def call(self, method: str, *args: Any) -> list[Any]:
        """The same call on every actor, within a deadline."""
        try:
            return ray.get([getattr(a, method).remote(*args) for a in self._actors], timeout=SYNC_DEADLINE)
        except ray.exceptions.GetTimeoutError:
            raise ClusterError(f"an engine did not finish {method} within {SYNC_DEADLINE:.0f} s") from None
        except ray.exceptions.RayError as error:
            raise ClusterError(f"{method} failed: {_root_cause(error)}") from error

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        for process in psutil.wait_procs(self._processes, timeout=3)[
            1
        ]:  # psutil knows a reused pid for another process
            process.kill()
        self._actors, self._processes = [], []


class _Actor:
    """What Ray runs: a VLLMEngine, imported on the worker so that the driver never loads vllm."""

    def __init__(self, checkpoint: str, placement: Placement, seed: int) -> None:
        from rollouts.vllm_engine import VLLMEngine

        self._engine = VLLMEngine(checkpoint, placement, seed)

    async def pids(self) -> list[int]:
        """This process and those it started; returns once the engine can work."""
        await self._engine.ready()
        me = psutil.Process()
        return [me.pid, *(child.pid for child in me.children(recursive=True))]

    async def extend(self, requests: list[Request]):
        async for complete in self._engine.extend(requests):
            yield complete

    async def init_weight_transfer_engine(self, info: dict) -> None:
        await self._engine.init_weight_transfer_engine(info)

    async def start_weight_update(self) -> None:
        await self._engine.start_weight_update()

    async def update_weights(self, info: dict) -> None:
        await self._engine.update_weights(info)

    async def finish_weight_update(self, version: int) -> int:
        return await self._engine.finish_weight_update(version)

    async def checksums(self) -> dict[str, str]:
        return await self._engine.checksums()


async def _next(stream: Any) -> list[tuple[int, list[Reply]]]:
    return await (await anext(stream))


def _grown(path: Trajectory, request: Request, seed: int, reply: Reply) -> Trajectory:
    if reply.stopped:
        end = "stop"
    elif request.until.kind == "end" or len(reply.step.ids) >= request.room:
        end = "length"
    else:
        end = None
    return path.grow(reply.step, end=end, seed=seed)


def _chunks(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> Iterator[tuple[Path, str]]:
    """Write tensors to files of about CHUNK_BYTES; yields (file, digest) as each is complete."""
    from safetensors.torch import save

    def written(chunk: dict[str, torch.Tensor], number: int) -> tuple[Path, str]:
        data = save(chunk)
        path = folder / f"{number}.safetensors"
        path.write_bytes(data)
        return path, hashlib.blake2b(data, digest_size=16).hexdigest()

    chunk: dict[str, torch.Tensor] = {}
    size = number = 0
    for name, tensor in tensors:
        chunk[name] = tensor.detach().to("cpu", copy=True).contiguous()  # a copy: safetensors refuses shared storage
        size += tensor.nbytes
        if size >= CHUNK_BYTES:
            yield written(chunk, number)
            chunk, size, number = {}, 0, number + 1
    if chunk:
        yield written(chunk, number)


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
    have = ray.cluster_resources()
    for kind, need in (("CPU", placement.count), ("GPU", placement.count * placement.gpus)):
        if have.get(kind, 0) < need:
            raise ClusterError(
                f"engine.count = {placement.count} needs {need:g} {kind}, the Ray cluster has {have.get(kind, 0):g}: "
                "lower engine.count or engine.gpus"
            )


def _root_cause(error: BaseException) -> str:
    """The last line of what a worker raised, without Ray's wrapping."""
    cause = error.as_instanceof_cause() if isinstance(error, ray.exceptions.RayTaskError) else error
    return str(cause).strip().splitlines()[-1][:500] if str(cause).strip() else type(cause).__name__
