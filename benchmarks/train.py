"""Speed of training: against TRL's own GRPOTrainer, and rollouts ahead of it; writes benchmarks/results/train.json.

    python -m benchmarks.train [peer] [step] [lag] [--full]       make bench-train, FULL=1 for the full form

peer  The quickstart's base, tasks and hyperparameters: this system with the engine in its own process, with vLLM,
      synchronous and with max_lag = 1, and TRL's GRPOTrainer with its own generation (transformers). Seconds of
      training until a held-out greedy accuracy is reached. Weights are copied every few steps and evaluated when
      training is over, off the clock.
step  SmolLM2-135M: seconds of a step, with vLLM, synchronous and with max_lag = 1, and with TRL. Verdicts are tossed:
      it gets so little right that groups would agree, which this system does not learn from and TRL does.
lag   Engines on another machine: rollouts that take a known latency longer and none of our cores. Throughput and
      accuracy at max_lag = 0, at 4, and at 4 without the importance correction.

`step` is the median time of a step by the clock; `cpu_step` is the processor time of the run's own process, which moves
less when others use the machine, but leaves out vLLM's process. Further arguments override keys of
configs/quickstart.toml. Every run has a process of its own; runs of one part follow each other, round by round in the
full form. Start-up and evaluation are not counted. TRL gets the verdicts in its own process, where they cost least.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rollouts.local_engine import LocalEngine
from verifiers.base import Verdict

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "train.json"
CONFIGS = HERE.parent / "configs"
TARGETS = (0.5, 0.6, 0.7, 0.8)  # held-out greedy accuracy
LATENCY = 1.0  # seconds that another machine's engine takes longer for a group
ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
COPIES = 6  # of the weights, over a run


class Slowed(LocalEngine):
    """An engine whose every answer comes later by a latency that costs this machine nothing."""

    def __init__(self, engine: LocalEngine, seconds: float) -> None:
        self.__dict__ |= engine.__dict__
        self.seconds = seconds

    async def extend(self, *arguments: Any, **options: Any) -> Any:
        paths = await super().extend(*arguments, **options)
        await asyncio.sleep(self.seconds)
        return paths


def coin(text: str) -> float:
    """A verdict for a model that gets nothing right: nearly every group has contrast, so that everything is learned."""
    return float(zlib.crc32(text.encode()) % 2)


class Coin:
    """A pool of verifiers that tosses a coin."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    async def verify(self, task: Any, responses: list[str], **_: Any) -> list[Verdict]:
        return [Verdict("scored", score=score, correct=score == 1.0) for score in map(coin, responses)]


class Copies:
    """The weights at some steps, and the seconds of training until then, by the clock and of processor time."""

    def __init__(self, model: Any, steps: int) -> None:
        self.every = max(1, steps // COPIES)
        self.model, self.kept, self.ends, self.cores = model, [], [], []
        self.begin = time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter() - self.begin
        self.ends.append(now)
        self.cores.append(time.process_time())
        if done % self.every == 0:
            self.kept.append((done, now, {k: v.detach().clone() for k, v in self.model.state_dict().items()}))

    def curve(self, evaluate: Any) -> list[dict[str, float]]:
        found = []
        for step, seconds, weights in self.kept:
            self.model.load_state_dict(weights)
            last = step == self.kept[-1][0]
            found.append({"step": step, "seconds": seconds, **evaluate(self.model, sampled=last)})
        return found


def ours(config: Path, overrides: list[str], latency: float, tossed: bool) -> dict[str, Any]:
    """A run of this system: `reasoner train` without its evaluations."""
    from reasoner import learner, train  # noqa: F401 (imported before the clock starts)
    from reasoner.config import load
    from reasoner.evaluate import greedily
    from reasoner.progress import Clock, Screen

    run = load(config, overrides)
    tasks, heldout = train.load_tasks(run)
    with ExitStack() as stack:
        stage, start = train.open_stage(run, tasks, heldout, "local", Clock(), Screen(), stack)
        stage.loop.run(
            greedily(heldout, stage.engine, stage.pool, stage.tokenizer, seed=0)
        )  # a run evaluates first, too
        if latency:
            stage = replace(stage, engine=Slowed(stage.engine, latency))
        if tossed:
            stage = replace(stage, pool=Coin(stage.pool))
        copies = Copies(stage.model, run.steps)
        train.by_policy_gradient(
            stage, tasks, heldout, start, lambda done, note: (copies(done), stage.screen.say(note))
        )
        rows = [json.loads(line) for line in (stage.folder / "metrics.jsonl").open()]
        curve = copies.curve(_evaluation(run, stage.tokenizer, heldout, stage.pool, stage.loop))
    spent = {
        key: sum(row[f"seconds_{key}"] for row in rows) for key in ("generate", "rollouts", "learn", "sync", "save")
    }
    lags = [row["lag_mean"] for row in rows]
    return _result(copies, curve, sum(row["tokens_generated"] for row in rows)) | {
        "spent": spent,
        "lag": statistics.fmean(lags[len(lags) // 4 :]),
        "groups_dropped": sum(sum(row["groups_dropped"].values()) for row in rows),
    }


def peer(config: Path, overrides: list[str], tossed: bool) -> dict[str, Any]:
    """TRL's GRPOTrainer with its own generation, on the same base, tasks, order, verdicts and hyperparameters."""
    import torch
    from transformers import AutoTokenizer, TrainerCallback

    from reasoner import learner as ours
    from reasoner.config import load
    from reasoner.model import balance
    from reasoner.model import load as load_model
    from reasoner.train import Deck, load_tasks
    from rollouts.loop import Loop
    from verifiers import Pool, get

    run = load(config, overrides)
    tasks, heldout = load_tasks(run)
    checkpoint = run.base.prepare(tasks, Path(run.cache), run.seed, lambda *_: None)
    model, tokenizer = load_model(checkpoint, torch.float32), AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    deck = Deck(tasks, run.seed)
    drawn = [deck[ticket] for ticket in range(run.steps * run.tasks_per_step)]
    judge = get(drawn[0].verifier, **run.policies.get(drawn[0].verifier, {}))
    lengths: list[int] = []

    def reward(completions: list, completion_ids: list, number: list[int], **_: Any) -> list[float | None]:
        lengths.extend(map(len, completion_ids))
        texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        if tossed:
            return [coin(text) for text in texts]
        return [judge.verify(drawn[i], text).score for i, text in zip(number, texts, strict=True)]

    batch = run.tasks_per_step * run.search.n
    with tempfile.TemporaryDirectory() as scratch:
        args = ours.GRPOConfig(
            output_dir=scratch,
            max_steps=run.steps,
            per_device_train_batch_size=batch // run.learner.micro_batches,
            gradient_accumulation_steps=run.learner.micro_batches,
            num_generations=run.search.n,
            max_completion_length=run.sampling.max_tokens,
            temperature=run.sampling.temperature,
            learning_rate=run.learner.lr,
            lr_scheduler_type="linear",
            warmup_steps=run.learner.lr_warmup,
            weight_decay=0.0,
            max_grad_norm=run.learner.max_grad_norm,
            loss_type=run.learner.loss,
            scale_rewards="none",
            beta=0.0,
            shuffle_dataset=False,
            **ours._common(run.seed, ()),
        )
        from datasets import Dataset

        rows = [{"prompt": list(task.prompt), "number": i} for i, task in enumerate(drawn)]
        trainer = ours.GRPOTrainer(
            model, reward, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        copies = Copies(model, run.steps)

        class AfterStep(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                copies.begin = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                balance(model, run.learner.balance_rate)
                copies(state.global_step)

        trainer.add_callback(AfterStep())
        trainer.remove_callback(ours.PrinterCallback)
        trainer.train()
    with Pool(1, policies=dict(run.policies)) as pool, Loop() as loop:
        curve = copies.curve(_evaluation(run, tokenizer, heldout, pool, loop))
    return _result(copies, curve, sum(lengths))


def _evaluation(run: Any, tokenizer: Any, heldout: list, pool: Any, loop: Any) -> Any:
    """Weights to held-out accuracies: greedy, and if asked for the mean of eight samples a task."""
    from reasoner.evaluate import greedily
    from rollouts.roll_out import roll_out
    from search.sample import Sample

    def evaluate(model: Any, *, sampled: bool) -> dict[str, float]:
        if not heldout or run.steps < COPIES:
            return {}
        engine = LocalEngine(model, tokenizer, run.sampling)
        groups = loop.run(greedily(heldout, engine, pool, tokenizer, seed=run.seed))
        found = {"greedy": _accuracy(groups)}
        if sampled:
            found["mean"] = _accuracy(loop.run(roll_out(heldout, Sample(8), engine, pool, tokenizer, seed=run.seed)))
        return found

    return evaluate


def _accuracy(groups: list) -> float:
    return statistics.fmean(float(r.verdict.correct) for group in groups for r in group.scored)


def _result(copies: Copies, curve: list, tokens: int) -> dict[str, Any]:
    step, cores = (
        statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False)) for ends in (copies.ends, copies.cores)
    )
    each = {"step": step, "cpu_step": cores}
    return {"seconds": copies.ends[-1], "steps": len(copies.ends), **each, "tokens": tokens, "curve": curve}


def reached(curve: list[dict[str, float]], target: float) -> float | None:
    """Seconds until the greedy accuracy reaches the target, between two measurements by a straight line."""
    before = None
    for point in curve:
        if point["greedy"] >= target:
            if before is None or point["greedy"] == before["greedy"]:
                return point["seconds"]
            share = (target - before["greedy"]) / (point["greedy"] - before["greedy"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None


# --- the parts


def in_a_process(
    what: str, config: Path, overrides: list[str], latency: float = 0.0, tossed: bool = False
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        command = [sys.executable, "-m", "benchmarks.train", "--one", what, str(config), str(latency)]
        options = [f"out={scratch}/runs", "name=bench", *overrides]
        subprocess.run([*command, str(int(tossed)), str(out), *options], check=True, env=os.environ | ENVIRONMENT)
        return json.loads(out.read_text())


def against_peer(full: bool, more: list[str]) -> dict[str, Any]:
    """Rounds of four runs each; ratios are taken within a round."""
    steps = 60 if full else 12
    rounds = []
    for _ in range(3 if full else 1):
        common = [f"steps={steps}", *more]
        found = {
            "sync": in_a_process("ours", CONFIGS / "quickstart.toml", common),
            "trl": in_a_process("peer", CONFIGS / "quickstart.toml", common),
            "paged": in_a_process("ours", CONFIGS / "quickstart.toml", [*common, "engine.kind=paged"]),
            "max_lag=1": in_a_process("ours", CONFIGS / "quickstart.toml", [*common, "max_lag=1"]),
        }
        rounds.append(found)
    return {"rounds": rounds, "seconds_to": [_to_targets(found) for found in rounds]}


def _to_targets(found: dict[str, Any]) -> dict[str, Any]:
    table = {}
    for target in TARGETS:
        seconds = {name: reached(result["curve"], target) for name, result in found.items()}
        trl = seconds["trl"]
        ratios = {n: trl / s for n, s in seconds.items() if n != "trl" and s and trl}
        table[f"{target:.0%}"] = {"seconds": seconds, "times_faster_than_trl": ratios}
    return table


def per_step(full: bool, more: list[str]) -> dict[str, Any]:
    common = ["steps=5" if full else "steps=3", "checkpoint_every=100"]  # fewer than COPIES: nothing is evaluated
    config = CONFIGS / "smollm2.toml"
    found = {
        "sync": in_a_process("ours", config, common, tossed=True),
        "trl": in_a_process("peer", config, common, tossed=True),
        "max_lag=1": in_a_process("ours", config, [*common, "max_lag=1"], tossed=True),
    }
    kept = ("step", "cpu_step", "seconds", "steps", "tokens")
    return {name: {k: r[k] for k in kept} for name, r in found.items()}


def ahead(full: bool, more: list[str]) -> dict[str, Any]:
    common = ["steps=60" if full else "steps=20", "engine.kind=local", *more]
    config = CONFIGS / "quickstart.toml"
    return {
        "latency_s": LATENCY,
        "max_lag=0": in_a_process("ours", config, common, LATENCY),
        "max_lag=4": in_a_process("ours", config, [*common, "max_lag=4"], LATENCY),
        "max_lag=4, not corrected": in_a_process(
            "ours", config, [*common, "max_lag=4", "learner.importance=none"], LATENCY
        ),
    }


PARTS = {"peer": against_peer, "step": per_step, "lag": ahead}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--full", action="store_true", help="three rounds against the peer, more steps")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.one:
        what, config, latency, tossed, out = args.one
        given = (Path(config), [*args.parts, *rest])
        if what == "ours":
            result = ours(*given, float(latency), tossed == "1")
        else:
            result = peer(*given, tossed == "1")
        Path(out).write_text(json.dumps(result))
        return
    if unknown := [word for word in args.parts if not word.startswith("--") and word not in PARTS]:
        parser.error(f"unknown: {', '.join(unknown)}; keys of the config are overridden as --key=value")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["machine"] = {"cores": os.cpu_count(), "cpu": platform.processor() or platform.machine()}
    results["versions"] = {name: version(name) for name in ("torch", "transformers", "trl")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    commit = commit.strip()
    more = [word[2:] for word in (*rest, *args.parts) if word.startswith("--")]  # argparse keeps those with spaces
    for part in [word for word in args.parts if not word.startswith("--")] or PARTS:
        started = time.perf_counter()
        results[part] = PARTS[part](args.full, more)
        results[part] |= {"wall_s": time.perf_counter() - started, "commit": commit}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(_short(results[part]), indent=1), flush=True)


def _short(value: Any) -> Any:
    """Without the curves."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items() if k != "curve"}
    return (
        [_short(v) for v in value]
        if isinstance(value, list)
        else round(value, 3)
        if isinstance(value, float)
        else value
    )


if __name__ == "__main__":
    main()
