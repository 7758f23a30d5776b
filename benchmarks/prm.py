"""Process reward models on held-out solutions of a trained run; writes benchmarks/results/prm.json.

    python -m benchmarks.prm RUN [--steps 400] [--out FOLDER]          e.g. RUN = runs/quickstart

generative  trained on the run's journal, labels by rule: F1 at naming the first wrong step, and calibration error, on
            the rollouts of both evaluations, whose questions training never saw; and its sign without its surprise
baselines   the policy's own confidence (its least probable token of a step), and the implicit model (log-ratio of the
            run's last checkpoint to its base), neither of them trained for this
labels      how often Monte-Carlo values and bisection name the step that the rule names, and their tokens
tokens      what the judge reads and says for one generated token: groups judged in one pass; beam search step by step,
            served by the paged engine, whose prefix cache has pages of so many tokens
padding     of a training batch in the quickstart's shape, and what it costs

Distinct paths only, those of one step (an answer without work) told apart. About 5 minutes on a free core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from reasoner import step_labels
from reasoner.credit import GRPO, assign
from reasoner.model import load
from reasoner.paged_engine import paged_engine
from reasoner.prm import Prm, Settings, measured, tokenised, train
from reasoner.samples import collate
from rollouts.base import Group, Rollout
from rollouts.journal import read
from rollouts.local_engine import LocalEngine
from rollouts.roll_out import encode
from rollouts.score import SIGN_ALONE, ProcessModel, question_of
from search.base import Sampling, Trajectory, derive
from search.beam import Beam
from verifiers import Pool

RESULTS = Path(__file__).parent / "results" / "prm.json"
POLICY = {"math": {"form": "simplest"}}
LABELLED = 48  # wrong solutions of several steps whose first error rollouts are asked for
CONTINUATIONS = 8
SEARCHED = 24  # questions of the beam search


def rows_of(files: Iterable[Path], decode: Callable[..., str]) -> list[tuple[step_labels.Row, Rollout]]:
    """The distinct judged paths of journals, labelled by rule."""
    found: dict[tuple[int, ...], Rollout] = {}
    for file in files:
        for _, _, group in read(file):
            for rollout in group.scored:
                found.setdefault(rollout.trajectory.ids, rollout)
    return [(step_labels.row(r, step_labels.by_rule(r), "\n", decode), r) for r in found.values()]


def by_length(
    rows: Sequence[step_labels.Row], values: Sequence[Sequence[float]], threshold: float = 0.5
) -> dict[str, Any]:
    """Measured on solutions that show work, and on all."""
    several = [(row, value) for row, value in zip(rows, values, strict=True) if len(row["steps"]) > 1]
    keys = ("f1", "accuracy_on_right", "accuracy_on_wrong", "right", "wrong", "ece", "steps_judged")

    def shown(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
        result = measured([row for row, _ in pairs], [value for _, value in pairs], threshold)
        return {key: round(result[key], 4) for key in keys}

    return {"several_steps": shown(several), "all": shown(list(zip(rows, values, strict=True)))}


def confidence(model: Any, rows: Sequence[step_labels.Row]) -> list[list[float]]:
    """Of each step, the probability of its least probable token under the policy."""
    found = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row["ids"][: row["ends"][-1]]])
            said = Prm._said(model(input_ids=ids, use_cache=False).logits.log_softmax(-1), ids)[0].exp()
            starts = [row["prompt"], *row["ends"][:-1]]
            found.append([said[a:b].min().item() for a, b in zip(starts, row["ends"], strict=True)])
    return found


async def labels(checkpoint: Path, tokenizer: Any, wrong: Sequence[Rollout], decode: Any) -> dict[str, Any]:
    """Rollouts from every step and by bisection against the rule, on wrong solutions of several steps."""
    result: dict[str, Any] = {"solutions": len(wrong), "continuations": CONTINUATIONS}
    rule = [step_labels.by_rule(r).index(0.0) for r in wrong]
    ways = {
        "monte_carlo_soft": partial(step_labels.by_rollouts, hard=False),
        "monte_carlo_hard": partial(step_labels.by_rollouts, hard=True),
        "bisection": step_labels.by_bisection,
    }
    with Pool(2, policies=POLICY) as pool:
        for name, way in ways.items():
            engine = LocalEngine(load(checkpoint, torch.float32), tokenizer, Sampling(max_tokens=72))
            work = (way(r, engine, partial(pool.verify, r.task), CONTINUATIONS, decode=decode) for r in wrong)
            values = await asyncio.gather(*work)
            first = [next((i for i, v in enumerate(each) if v < 0.5), -1) for each in values]
            result[name] = {
                "names_the_rules_step": round(sum(a == b for a, b in zip(first, rule, strict=True)) / len(wrong), 3),
                "tokens_generated": engine.ledger.generated,
            }
    return result


async def tokens(policy: Path, prm: Prm, groups: dict[str, list[Group]], decode: Any) -> dict[str, Any]:
    """Tokens that the judge reads or says for each one that the policy says."""
    result: dict[str, Any] = {}
    for name, found in groups.items():
        paths = [r.trajectory for g in found for r in g.scored if r.trajectory.sampled_tokens]
        before = prm.tokens
        prm.values([(p.ids, len(p.prompt), step_labels.judged_at(p, "\n", decode)) for p in paths])
        result[f"one_pass, {name}"] = {"read": round((prm.tokens - before) / sum(p.length for p in paths), 3)}
    tasks = [g.task for g in groups["first step"][:SEARCHED]]
    for page in (16, 4, 1):
        engine = LocalEngine(load(policy, torch.float32), prm.tokenizer, Sampling(max_tokens=72))
        judge = paged_engine(prm.model, prm.tokenizer, Sampling(), page=page, context=128)
        judged, new = ProcessModel("").open(question_of(tasks[0]), judge, None), []

        async def score(path: Trajectory, judged: Any = judged, new: list[int] = new) -> float:
            new.append(len(path.steps[-1].ids))
            return await judged(path)

        roots = [Trajectory(encode(prm.tokenizer, t), seed=derive(0, t.id)) for t in tasks]
        await asyncio.gather(*(Beam().run(root, engine, score) for root in roots))
        said, spent = engine.ledger.generated, judge.ledger
        result[f"beam by steps, pages of {page}"] = {
            "read_and_said": round((spent.prefilled + spent.generated) / said, 3),
            "read_by_new_tokens": round(spent.prefilled / sum(new), 3),  # equal children are judged once
            "judgements": len(new),
            "said_per_judgement": spent.generated / len(new),
            "policy_generated": said,
        }
    return result


def padding(checkpoint: Path, tokenizer: Any, groups: dict[str, list[Group]]) -> dict[str, Any]:
    """Forward and backward over a batch: as the learner does it, packed into one row, and with its padding computed."""
    model, result = load(checkpoint, torch.float32).train(), {}
    for name, found in groups.items():
        batch = collate(assign(GRPO(), found), tokenizer.pad_token_id)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        packed, places = ids[mask.bool()][None], torch.cat([torch.arange(int(n)) for n in mask.sum(1)])[None]
        ways = {
            "masked": partial(model, input_ids=ids, attention_mask=mask, use_cache=False),
            "packed": partial(model, input_ids=packed, position_ids=places, use_cache=False),
            "padding_computed": partial(model, input_ids=ids, use_cache=False),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(5):
            for way, forward in ways.items():
                start = time.perf_counter()
                forward().logits.float().pow(2).mean().backward()
                best[way] = min(best[way], time.perf_counter() - start)
        result[name] = {
            "padding_share": round(1 - mask.float().mean().item(), 3),
            "packed_over_masked": round(best["packed"] / best["masked"], 3),
            "padding_computed_over_masked": round(best["padding_computed"] / best["masked"], 3),
        }
    return result


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread",
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--base", type=Path, help="checkpoint that the run began with, for the implicit model")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--out", type=Path, help="keep the trained model here")
    parser.add_argument("--prm", type=Path, help="measure this model, trained in the same way, instead of training one")
    args = parser.parse_args()
    checkpoint = args.run / "checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    learned = [row for row, _ in rows_of([args.run / "journal.jsonl"], decode)]
    held = rows_of([args.run / "evaluation-base.jsonl", args.run / "evaluation-final.jsonl"], decode)
    rows = [row for row, _ in held]
    result: dict[str, Any] = machine()
    start = time.perf_counter()
    settings = {"steps": args.steps, "batch": args.batch, "lr": args.lr}
    prm = Prm.load(args.prm) if args.prm else train(learned, checkpoint, **settings)
    result["training"] = {"paths": len(learned), **settings}
    if not args.prm:
        result["training"]["seconds"] = round(time.perf_counter() - start)
    if args.out:
        prm.save(args.out)
    places = [tokenised(row, tokenizer, "\n") for row in rows]
    result["generative"] = by_length(rows, prm.values(places), prm.settings.threshold) | asdict(prm.settings)
    print(json.dumps(result["generative"]), flush=True)
    alone = replace(prm, settings=replace(prm.settings, mix=SIGN_ALONE))
    result["generative, sign alone"] = by_length(rows, alone.values(places))
    policy = load(checkpoint, torch.float32)
    result["policy's confidence"] = by_length(rows, confidence(policy, rows))
    if args.base:
        implicit = Prm(policy, tokenizer, Settings("implicit"), load(args.base, torch.float32))
        result["implicit"] = by_length(rows, implicit.values(places))
    wrong = [r for row, r in held if row["label"] >= 0 and len(row["steps"]) > 1][:LABELLED]
    result["labels"] = asyncio.run(labels(checkpoint, tokenizer, wrong, decode))
    journal = list(read(args.run / "journal.jsonl"))
    groups = {name: [g for step, _, g in journal if step == at] for name, at in (("first step", 0), ("step 30", 30))}
    result["padding"] = padding(checkpoint, tokenizer, groups)
    result["tokens"] = asyncio.run(tokens(checkpoint, prm, groups, decode))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
