"""A week of training in a minute: the real loop, journal, checkpoints and verifier workers around a scripted engine and
a scripted learner; writes benchmarks/results/week.json.

    python -m benchmarks.week [--steps=10000]                     make bench-week

What must not grow does not: memory of every process after the first tenth, open files, processes; and the journal grows
by the same amount each step. The controller's own cost is the driver's processor time per step, all of it: there is no
model in it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from reasoner.checkpoints import Position
from reasoner.config import Learner, Run
from reasoner.progress import Clock, Screen
from reasoner.train import Deck, Stage, open_feed, steps
from rollouts.loop import Loop
from rollouts.request import Placement
from search.base import Sampling
from search.sample import Sample
from search.scripted import Scripted
from search.tree import Ledger
from verifiers import Pool
from verifiers.base import Task

RESULTS = Path(__file__).parent / "results" / "week.json"
PER_STEP, PATHS = 4, 4


@dataclass(frozen=True)
class Engine(Scripted):
    """Says what it is told to, under the version that was pushed last."""

    ledger: Ledger = field(default_factory=Ledger)
    pushed: list[int] = field(default_factory=lambda: [0])

    def load(self, tensors: Any, version: int) -> None:
        self.pushed[0] = version
        for _ in tensors:
            pass


class Characters:
    """A tokenizer: a character is a token."""

    pad_token_id = 0

    def apply_chat_template(self, messages: Any, **_: Any) -> list[int]:
        return [ord(c) for c in messages[0]["content"]]

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(map(chr, ids))

    def save_pretrained(self, folder: Any) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


class Weights:
    """A model with nothing to compute."""

    config = generation_config = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text("{}")


def answer(text: str, child: int) -> str:
    """Every second path is wrong, whatever the question."""
    return "Answer: 7" if child % 2 else "Answer: 8"


def simulate(folder: Path, count: int, max_lag: int, every: int) -> list[dict[str, Any]]:
    """The state of the driver and of its processes at every `every`-th step."""
    run = Run(
        name="week",
        steps=count,
        tasks_per_step=PER_STEP,
        max_lag=max_lag,
        search=Sample(n=PATHS),
        learner=Learner(),
        engine=Placement(kind="local"),
        sampling=Sampling(max_tokens=32),
        checkpoint_every=100,
    )
    tasks = [Task(f"sum/{i}", ({"role": "user", "content": f"{i} - {i} + 7 ="},), "7", "math") for i in range(500)]
    import torch  # noqa: F401 (what a checkpoint imports is no cost of a step)

    import reasoner.model  # noqa: F401

    me, seen = psutil.Process(), []
    with ExitStack() as stack:
        pool = stack.enter_context(Pool(1, timeout=10.0))
        loop = stack.enter_context(Loop())
        engine = Engine(answer)
        stage = Stage(run, engine, Weights(), Characters(), pool, loop, Clock(), Screen(), folder, engine)
        deck = Deck(tasks, 0)
        feed = open_feed(stage, deck, Position(), stack)
        begin, spent = time.perf_counter(), time.process_time()

        def tell(done: int, note: str) -> None:
            if done % every == 0:
                family = [me, *me.children(recursive=True)]
                seen.append(
                    {
                        "step": done,
                        "rss": sorted((p.memory_info().rss for p in family), reverse=True),
                        "files": me.num_fds(),
                        "threads": me.num_threads(),
                        "journal": (folder / "journal.jsonl").stat().st_size,
                        "wall_ms": 1000 * (time.perf_counter() - begin) / done,
                        "driver_ms": 1000 * (time.process_time() - spent) / done,
                    }
                )

        batches = steps(stage, feed, deck, Position(), dict, tell)
        samples, learned = next(batches), 0
        try:
            while True:
                learned += len(samples)
                samples = batches.send({"loss": 0.0, "grad_norm": 1.0, "entropy": 0.1, "mismatch": 0.0})
        except StopIteration:
            pass
    assert learned == count * PER_STEP * PATHS, f"{learned} samples learned from {count} steps"
    return seen


def judge(seen: list[dict[str, Any]]) -> dict[str, Any]:
    """What grew from the first tenth on."""
    first, rest = seen[max(0, len(seen) // 10 - 1)], seen[len(seen) // 10 :]
    sizes = [b["journal"] - a["journal"] for a, b in zip(seen, seen[1:], strict=False)]
    return {
        "steps": seen[-1]["step"],
        "processes": [len(first["rss"]), len(seen[-1]["rss"])],
        "memory_growth": [max(s["rss"][i] for s in rest) / size - 1 for i, size in enumerate(first["rss"])],
        "memory_mib": [size / 2**20 for size in seen[-1]["rss"]],
        "files": [first["files"], seen[-1]["files"]],
        "threads": [first["threads"], seen[-1]["threads"]],
        "journal_bytes_per_step": seen[-1]["journal"] / seen[-1]["step"],
        "journal_unevenness": max(sizes) / min(sizes) - 1,
        "wall_ms_per_step": seen[-1]["wall_ms"],
        "driver_ms_per_step": seen[-1]["driver_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": {"cores": os.cpu_count()}, "groups_per_step": PER_STEP, "paths": PATHS}
    for max_lag in (0, 2):
        with tempfile.TemporaryDirectory() as scratch:
            before = set(psutil.Process().children(recursive=True))
            results[f"max_lag={max_lag}"] = judge(simulate(Path(scratch), args.steps, max_lag, args.steps // 50))
            left = set(psutil.Process().children(recursive=True)) - before
            results[f"max_lag={max_lag}"]["processes_left_over"] = len(left)
        print(json.dumps(results[f"max_lag={max_lag}"], indent=1), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
