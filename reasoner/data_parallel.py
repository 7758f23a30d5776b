"""The policy's learner on several workers: Ray Train starts them, accelerate joins them, each learns a share.

    driver: the loop  -- batch -->  desk  -- the same batch -->  workers: `learner.learn`, gradients averaged by DDP
       model        <-- weights --        <-- of the first --

The driver keeps the loop, the engines and the journal; after each step its model holds the workers' weights. A worker
that dies ends the run, which is then resumed: its optimizer state is in the checkpoint. Next to `rollouts/cluster.py`
the only file that imports ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.train.torch import TorchTrainer

from reasoner.config import Learner
from reasoner.credit import Sample
from rollouts.host import ClusterError

SNAPSHOT = "snapshot"  # an order, in place of a batch
POLL = 1.0  # seconds between two looks at whether the workers are alive


def learn_together(
    model: Any, tokenizer: Any, loop: Callable[..., Any], learner: Learner, *, folder: Path, **options: Any
) -> None:
    """`learner.learn` on `learner.workers` workers of the Ray cluster: the same arguments, the same gradients.

    Raises ClusterError when the cluster lacks room for the workers, and when one of them fails.
    """
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    _require_room(learner.workers, "GPU" if use_gpu else "CPU")
    desk = ray.remote(_Desk).options(num_cpus=0, max_concurrency=1000).remote(learner.workers)
    job = ray.put((model, tokenizer, learner, {**options, "folder": folder}))
    trainer = TorchTrainer(
        _work,
        train_loop_config={"desk": desk, "job": job},
        scaling_config=train.ScalingConfig(num_workers=learner.workers, use_gpu=use_gpu),
        run_config=train.RunConfig(storage_path=str(folder.resolve()), name="workers"),
    )
    with ThreadPoolExecutor(1, "learner") as thread:
        workers = thread.submit(trainer.fit)
        try:
            _drive(model, loop, desk, workers)
        finally:
            ray.get(desk.put.remote(None))  # they end
    _result(workers)


def _drive(model: Any, loop: Callable[..., Any], desk: Any, workers: Future[Any]) -> None:
    """Hand each batch that the loop yields to the workers, and their answer back to it."""

    def ask(order: Any) -> Any:
        ray.get(desk.put.remote(order))
        answer = desk.answer.remote()
        while not ray.wait([answer], timeout=POLL)[0]:
            if workers.done():
                _result(workers)
                raise ClusterError("the learner's workers ended before the run did")
        return ray.get(answer)

    batches = loop(lambda: ask(SNAPSHOT))
    try:
        samples = next(batches)
        while True:
            metrics, weights = ask(samples)
            model.load_state_dict(weights)
            samples = batches.send(metrics)
    except StopIteration:
        pass


def _result(workers: Future[Any]) -> None:
    try:
        error = workers.result().error
    except Exception as raised:
        error = raised
    if error:
        last = str(error).strip().splitlines()[-1]
        raise ClusterError(f"the learner's workers failed: {last}: go on with --resume") from error


class _Desk:
    """An actor between the driver and the workers: batches on one side, the first worker's answers on the other."""

    def __init__(self, workers: int) -> None:
        self._orders: list[asyncio.Queue[Any]] = [asyncio.Queue() for _ in range(workers)]
        self._answers: asyncio.Queue[Any] = asyncio.Queue()

    async def put(self, order: Any) -> None:
        for queue in self._orders:
            queue.put_nowait(order)

    async def take(self, rank: int) -> Any:
        return await self._orders[rank].get()

    async def tell(self, answer: Any) -> None:
        self._answers.put_nowait(answer)

    async def answer(self) -> Any:
        return await self._answers.get()


def _work(config: dict[str, Any]) -> None:
    """What each worker runs: TRL's trainer, fed with its share of what lies on the desk."""
    from reasoner.learner import learn

    model, tokenizer, learner, options = ray.get(config["job"])
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()

    def shares(snapshot: Callable[[], Any]) -> Generator[list[Sample], dict[str, float], None]:
        while (order := ray.get(config["desk"].take.remote(rank))) is not None:
            if isinstance(order, str):
                answer = snapshot() if rank == 0 else None
            else:
                metrics = yield share(order, rank, world)
                answer = (metrics, {name: t.cpu() for name, t in model.state_dict().items()}) if rank == 0 else None
            if rank == 0:
                ray.get(config["desk"].tell.remote(answer))

    learn(model, tokenizer, shares, learner, **options)


def share(samples: Sequence[Sample], rank: int, world: int) -> list[Sample]:
    """The samples of one worker; together the workers have each once."""
    if len(samples) < world:
        raise ValueError(f"a batch of {len(samples)} samples is too small for learner.workers = {world}: lower it")
    return list(samples[rank::world])


def _require_room(workers: int, kind: str) -> None:
    """Ray Train waits for resources without an end, so look first."""
    free = ray.available_resources().get(kind, 0)
    if free < workers:
        raise ClusterError(
            f"learner.workers = {workers} needs 1 {kind} each, the Ray cluster has {free:g} left beside the engines: "
            "lower learner.workers or add nodes"
        )
