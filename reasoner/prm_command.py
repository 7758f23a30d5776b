"""`reasoner prm`: process reward models from the command line: label, train, implicit, bench.

    reasoner prm label runs/quickstart --out labels.jsonl
    reasoner prm train labels.jsonl --base runs/quickstart/checkpoint --out prm
    reasoner prm bench heldout.jsonl --prm prm

Parses and prints. Neighbours: `step_labels.py` and `prm.py` do the work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from reasoner.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Example: reasoner prm label runs/quickstart --out labels.jsonl"
    verbs = parser.add_subparsers(required=True, metavar="label|train|implicit|bench")

    def verb(name: str, call: Any, about: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=about, description=about)
        sub.set_defaults(verb=call)
        return sub

    sub = verb("label", _label, "label the steps of a run's rollouts, as a file in ProcessBench's form")
    sub.add_argument("run", type=Path, help="folder of a run (its journal), or one of its evaluation-*.jsonl files")
    sub.add_argument(
        "--by", default="rule", choices=("rule", "paths", "rollouts", "bisection"),
        help="stated equalities | other paths of the group | n continuations of each step | of some, by bisection",
    )  # fmt: skip
    sub.add_argument("--n", type=int, default=8, help="continuations of a step (default: 8)")
    sub.add_argument("--hard", action="store_true", help="with --by rollouts: 1 if any continuation is right, else 0")
    sub.add_argument("--limit", type=int, help="label at most this many distinct paths")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="a JSONL file to write")

    sub = verb("train", _train, "train a generative model on labelled steps: + or - behind each step")
    sub.add_argument("labels", type=Path, help="a file that `reasoner prm label` wrote")
    sub.add_argument("--base", type=Path, required=True, help="folder of the checkpoint to start from")
    sub.add_argument("--steps", type=int, default=800, help="optimizer steps (default: 800)")
    sub.add_argument("--batch", type=int, default=24, help="paths per step (default: 24)")
    sub.add_argument("--lr", type=float, default=8e-4, help="learning rate (default: 8e-4)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")

    sub = verb("implicit", _implicit, "take the log-ratio of an outcome-trained model to its reference as the judge")
    sub.add_argument("trained", type=Path, help="folder of the outcome-trained checkpoint")
    sub.add_argument("--reference", type=Path, required=True, help="folder of the checkpoint that it was trained from")
    sub.add_argument("--beta", type=float, default=0.05, help="how much a nat of log-ratio counts (default: 0.05)")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")

    sub = verb("bench", _bench, "F1 of a model at naming the first wrong step, and its calibration error")
    sub.add_argument("file", type=Path, help="JSONL: problem, steps, label = index of the first wrong step or -1")
    sub.add_argument("--prm", type=Path, required=True, help="folder of a process reward model")
    sub.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    args.verb(args)


def _label(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from reasoner import step_labels

    folder, file = (args.run, args.run / "journal.jsonl") if args.run.is_dir() else (args.run.parent, args.run)
    for needed in (file, folder / "config.json", folder / "checkpoint" / "config.json"):
        if not needed.is_file():
            raise ConfigError(f"{needed} does not exist: give the folder of a run that was trained")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    config = json.loads((folder / "config.json").read_text())
    delimiter = config["sampling"]["step"]
    rollouts = list(_distinct(file, args.limit))
    if args.by == "rule":
        values = [step_labels.by_rule(r, delimiter) for r, _ in rollouts]
    elif args.by == "paths":
        groups = {id(group): step_labels.by_paths(group, delimiter, decode=decode) for _, group in rollouts}
        values = [groups[id(group)][group.scored.index(r)] for r, group in rollouts]
    else:
        values = asyncio.run(_sampled(args, folder, config, tokenizer, delimiter, decode, [r for r, _ in rollouts]))
    rows = [step_labels.row(r, v, delimiter, decode) for (r, _), v in zip(rollouts, values, strict=True)]
    step_labels.write(rows, args.out)
    wrong = sum(row["label"] >= 0 for row in rows)
    print(f"{args.out}: {len(rows)} distinct paths, {wrong} with a wrong step")


def _distinct(file: Path, limit: int | None) -> Iterator[tuple[Any, Any]]:
    """Judged rollouts and their groups, no path twice."""
    from rollouts.journal import read

    seen: set[tuple[int, ...]] = set()
    for _, _, group in read(file):
        for rollout in group.scored:
            if rollout.trajectory.ids not in seen and rollout.trajectory.sampled_tokens:
                if limit is not None and len(seen) == limit:
                    return
                seen.add(rollout.trajectory.ids)
                yield rollout, group


async def _sampled(
    args: Any, folder: Path, config: Any, tokenizer: Any, delimiter: str, decode: Any, rollouts: list[Any]
) -> list[list[float]]:
    """Values from fresh continuations by the run's checkpoint."""
    import torch

    from reasoner import step_labels
    from reasoner.model import load
    from rollouts.local_engine import LocalEngine
    from search.base import Sampling
    from verifiers import Pool

    sampling = Sampling(**{**config["sampling"], "temperature": 1.0, "top_p": 1.0})
    engine = LocalEngine(load(folder / "checkpoint", torch.float32), tokenizer, sampling)
    by = step_labels.by_bisection if args.by == "bisection" else partial(step_labels.by_rollouts, hard=args.hard)
    with Pool(2, timeout=config["verify_timeout"], policies=config["policies"]) as pool:
        work = (
            by(r, engine, partial(pool.verify, r.task), args.n, delimiter=delimiter, decode=decode) for r in rollouts
        )
        values = list(await asyncio.gather(*work))
    print(f"{engine.ledger.generated} tokens generated for the labels")
    return values


def _train(args: argparse.Namespace) -> None:
    from reasoner.prm import train
    from reasoner.progress import Screen
    from reasoner.step_labels import read

    rows = read(args.labels)
    if any("ids" not in row for row in rows):
        raise ConfigError(f"{args.labels} has rows without token ids: train on a file that `reasoner prm label` wrote")
    if not (args.base / "config.json").is_file():
        raise ConfigError(f"--base {args.base} has no config.json: give the folder of a checkpoint")
    with Screen().bar("process reward model", args.steps) as tell:
        options = {"steps": args.steps, "batch": args.batch, "lr": args.lr, "seed": args.seed}
        prm = train(rows, args.base, progress=lambda step, loss: tell(step, f"loss {loss:.3f}"), **options)
    prm.save(args.out)
    print(f"written: {args.out}")


def _implicit(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoTokenizer

    from reasoner.model import load
    from reasoner.prm import Prm, Settings

    settings = Settings("implicit", beta=args.beta, reference=str(args.reference.resolve()))
    load(args.reference, torch.float32)  # a mistake in the path is told now
    Prm(load(args.trained, torch.float32), AutoTokenizer.from_pretrained(args.trained), settings).save(args.out)
    print(f"written: {args.out}")


def _bench(args: argparse.Namespace) -> None:
    from reasoner.prm import Prm, bench
    from reasoner.step_labels import read

    result = bench(read(args.file), Prm.load(args.prm))
    if args.json:
        print(json.dumps(result))
        return
    several = f"{result['accuracy_on_wrong_of_several_steps']:.1%} of {result['wrong_of_several_steps']}"
    print(f"F1 {result['f1']:.3f}   (harmonic mean of the next two)")
    print(f"first wrong step named   {result['accuracy_on_wrong']:.1%} of {result['wrong']} wrong solutions")
    print(f"  of several steps       {several}")
    print(f"no step named            {result['accuracy_on_right']:.1%} of {result['right']} right solutions")
    print(f"calibration error        {result['ece']:.3f} over {result['steps_judged']} steps")
