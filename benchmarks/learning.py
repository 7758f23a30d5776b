"""What each way of learning makes of the same generated tokens; writes benchmarks/results/learning.json.

    python -m benchmarks.learning [PART ...] [--seeds 3]       make bench-learning, FULL=1 for three seeds

methods  GRPO, RLOO, process credit, STaR, EM-STaR, ReST-EM and V-STaR's selection on one task, from one base a seed,
         each stopped when it has generated the same number of tokens in training
star     n-digit addition: one round with rationalisation and one without, then rounds to the end (configs/star.toml)
process  credit for steps against credit for outcomes where few paths are right as a whole: sums of eight terms, from
         a base that slips in every third line; the tokens that each needs for the accuracy that outcomes end with
table    the same rules on a policy that is a table of chances, where no model stands between a rule and what it does

Everything runs on the in-process engine. A method's settings are those in METHODS; none was tuned more than another.
Intervals are of 95%, over the held-out tasks, each with its mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console

from reasoner.config import load
from reasoner.credit import GRPO, Credit, Process, assign
from reasoner.demonstrations import expression
from reasoner.progress import Screen
from reasoner.train import train
from rollouts.base import Group, Rollout
from rollouts.journal import read
from rollouts.roll_out import encode
from search.base import Step, Trajectory
from search.metrics import interval
from verifiers.base import Task, Verdict
from verifiers.process import step_scores

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "learning.json"
CONFIG = HERE.parent / "configs" / "star.toml"
QUICKSTART = HERE.parent / "configs" / "quickstart.toml"
BUDGET = 100_000  # tokens generated in training

TASK = [  # two-digit sums: the base guesses at most of them, works some, and makes a slip in every fifth line
    "tasks.digits=2",
    "tasks.train=900",
    "tasks.heldout=100",
    "tasks.verifier=process_math",  # judges answers as `math` does, and steps for those who ask
    'policies={process_math={outcome={form="simplest"}}}',
    "evaluate.tasks=100",
    "evaluate.n=8",
    "evaluate.k=8",
    "sampling.max_tokens=40",
    "base.hidden=64",
    "base.guess=0.6",
    "base.slip=0.2",
    "base.hinted=0.4",
    "base.longer=0.35",
    "base.steps=600",
]
POLICY = ["learner={}", "steps=200", "tasks_per_step=32", "search.n=8", "learner.lr=1.5e-4", "learner.lr_warmup=3"]
ROUNDS = ["steps=20", "tasks_per_step=128", "search.n=8", "learner.updates=60", "learner.batch=32"]
HINTS = [*ROUNDS, "learner.kind=star", "learner.rationalise=2"]
METHODS = {
    "GRPO": [*POLICY, "credit.kind=grpo"],
    "RLOO": [*POLICY, "credit.kind=rloo"],
    "process credit": [*POLICY, "credit.kind=process"],
    "STaR": [*HINTS, "learner.em=false"],
    "EM-STaR": [*HINTS, "learner.em=true"],
    "ReST-EM": [*ROUNDS, "learner.kind=rest_em", "learner.rationalise=0"],
    "V-STaR": [*ROUNDS, "learner.kind=v_star", "learner.rationalise=0", "learner.verifier_lr=3e-4"],
}

LONG = [  # seven lines of work, every third of them with a slip: next to no path is right as a whole
    "tasks.params={min_terms=8, max_terms=8, min_digits=1, max_digits=1}",
    "tasks.train=4000",
    "tasks.heldout=100",
    "tasks.verifier=process_math",
    'policies={process_math={outcome={form="simplest"}, rule="rewrite"}}',
    "engine={kind='paged', max_model_len=160}",
    "sampling.max_tokens=90",
    "evaluate={tasks=100, n=8, k=8}",
    "steps=120",
    "tasks_per_step=16",
    "search.n=8",
    "learner={lr=1.5e-4, lr_warmup=3}",  # of 7e-5, 1.5e-4 and 4e-4 the best for GRPO
    "checkpoint_every=1000",
]
SLIP = 0.35  # chance of a random result in a line that LONG's base is shown
SHOWN = 450  # batches of 16 of such work
CHOSEN_ON = 0  # the seed on which LONG was chosen; those measured come after it
CREDIT = {
    "GRPO": ["credit.kind=grpo"],
    "process": ["credit.kind=process"],
    "process, forecast": ["credit.kind=process", "credit.forecast=true"],
}

TABLED: dict[str, Credit] = {"GRPO": GRPO(), "process": Process(), "process, forecast": Process(forecast=True)}


def methods(seeds: int, names: list[str], scratch: Path) -> dict[str, Any]:
    """The table: a row for each method, in the order of METHODS."""
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            overrides = [*TASK, *METHODS[name], f"token_budget={BUDGET}", f"seed={seed}"]
            runs[name].append(measured(f"{name}-{seed}", overrides, scratch))
            print(f"{name}, seed {seed}: greedy {runs[name][-1]['final']['greedy']:.1%}", flush=True)
    return {
        "budget": BUDGET,
        "seeds": list(range(seeds)),
        "rows": [row(name, found) for name, found in runs.items()],
        "tokens to reach": reach(runs),
    }


def process(seeds: int, scratch: Path) -> dict[str, Any]:
    """Kinds of credit on long sums, all from one base; seeds differ in the order of the tasks and in the paths."""
    numbers = range(CHOSEN_ON + 1, CHOSEN_ON + 1 + seeds)
    base = slipping_base(scratch)
    runs: dict[str, list[dict]] = {name: [] for name in CREDIT}
    for seed in numbers:
        for name, credit in CREDIT.items():
            overrides = [*LONG, f"base={{kind='pretrained', path='{base}'}}", *credit, f"seed={seed}"]
            runs[name].append(measured(f"long-{name}-{seed}", overrides, scratch, QUICKSTART))
            print(f"{name}, seed {seed}: mean {runs[name][-1]['final']['mean_at_k']:.1%}", flush=True)
    needed = reach(runs)
    places = {name: [scratch / "runs" / f"long-{name}-{seed}".replace(" ", "-") for seed in numbers] for name in CREDIT}
    return {
        "seeds": list(numbers),
        "rows": [row(name, found) for name, found in runs.items()],
        "tokens to reach": needed,
        "mean share": mean_share(needed),
        "tokens to GRPO's best": reach(runs, best=True),
        "lines": {name: [lines(place) for place in found] for name, found in places.items()},
        "worked": {name: [worked(place) for place in found] for name, found in places.items()},
    }


def slipping_base(scratch: Path) -> Path:
    """The quickstart's base, taught besides to work LONG's sums line by line, with slips."""
    folder = scratch / "slipping"
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoTokenizer

    from reasoner.learner import supervise
    from reasoner.model import load as load_model
    from reasoner.model import save

    asked = load(QUICKSTART)
    start = asked.base.prepare(asked.tasks.load()[0], Path(asked.cache), asked.seed, lambda *_: None)
    model, tokenizer = load_model(start, torch.float32), AutoTokenizer.from_pretrained(start)
    noise, tasks = random.Random(0), load(QUICKSTART, LONG).tasks.load()[0]
    rows = []
    for task in noise.choices(tasks, k=SHOWN * 16):
        prompt = list(encode(tokenizer, task))
        text = slipping(expression(task), noise)
        response = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append((prompt + response, [False] * len(prompt) + [True] * len(response)))
    supervise(model, tokenizer, rows, steps=SHOWN, batch=16, lr=2e-3, seed=0, folder=scratch / "shown")
    save(model, tokenizer, folder)
    return folder


def slipping(sum_: str, noise: random.Random, slip: float = SLIP) -> str:
    """The running total of a sum, one operation a line, some with a random result with which the work goes on."""
    total, *rest = sum_.split(" ")
    lines = []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        right = int(total) + int(operator + term)
        after = noise.randrange(-20, 41) if noise.random() < slip else right
        lines.append(f"{total}{operator}{term}={after}")
        total = str(after)
    return "\n".join([*lines, f"Answer: {total}"])


def lines(run: Path, steps: int = 5) -> dict[str, list[float]]:
    """Of the lines of the first and of the last steps' work: the share that carries out a part of the question, as the
    step scores say, and the share that states a true equality."""
    own: dict[int, list[tuple[float, float]]] = {}
    for step, _, group in read(run / "journal.jsonl"):
        for rollout in group.scored:
            true = step_scores(rollout.trajectory.text)
            own.setdefault(step, []).extend(list(zip(rollout.verdict.steps, true, strict=True))[:-1])
    ordered = [own[step] for step in sorted(own)]
    ends = [[pair for each in part for pair in each] for part in (ordered[:steps], ordered[-steps:])]
    return {
        name: [statistics.fmean(pair[i] for pair in end) for end in ends]
        for i, name in enumerate(("carried out", "true"))
    }


def worked(run: Path) -> dict[str, float]:
    """Of the right answers that were sampled before and after: the share in which every line carried something out.
    The others are right by luck."""
    shares = {}
    for when in ("base", "final"):
        sampled = [g for _, _, g in read(run / f"evaluation-{when}.jsonl") if len(g.rollouts) > 1]
        right = [r.verdict for group in sampled for r in group.scored if r.verdict.correct]
        shares[when] = sum(min(verdict.steps) == 1 for verdict in right) / max(1, len(right))
    return shares


def table(seeds: int, lines: int, right: float, facts: int = 200, steps: int = 60) -> dict[str, Any]:
    """The same rules on a policy that is a table: each line of a task is one of `facts`, and comes out right with that
    fact's own chance, at first `right`. Adam's steps, accuracy without noise."""
    runs: dict[str, list[dict]] = {name: [] for name in TABLED}
    for seed in range(seeds):
        for name, rule in TABLED.items():
            runs[name].append({"curve": tabled(rule, seed, lines, facts, right, steps), "rounds": None})
    needed = reach(runs)
    return {
        "seeds": list(range(seeds)),
        "lines": lines,
        "start": right**lines,
        "final": {name: [run["curve"][-1][1] for run in found] for name, found in runs.items()},
        "tokens to reach": needed,
        "mean share": mean_share(needed),
    }


def tabled(rule: Credit, seed: int, lines: int, facts: int, right: float, steps: int) -> list[tuple[int, float]]:
    """(lines written before, accuracy then) of a run: 16 tasks a step, 8 paths each."""
    draw, tests = numpy.random.default_rng(seed), numpy.random.default_rng(0).integers(facts, size=(2000, lines))
    logits_F = torch.full((facts,), math.log(right / (1 - right)), requires_grad=True)
    adam, curve = torch.optim.Adam([logits_F], lr=0.05), []
    for step in range(steps):
        chances_F = logits_F.detach().sigmoid().numpy()
        curve.append((step * 16 * 8 * lines, float(chances_F[tests].prod(1).mean())))
        slopes_F = numpy.zeros(facts)
        for task in draw.integers(facts, size=(16, lines)):
            good = draw.random((8, lines)) < chances_F[task]
            samples = assign(rule, [Group(LINES, tuple(map(shown, good)))], "".join)
            for sample in samples:  # the prompt, then a digit and a line break in turn; d log p / d logit = digit - p
                advantages, digits = numpy.array(sample.advantages[1::2]), numpy.array(sample.ids[1::2], dtype=float)
                numpy.add.at(slopes_F, task, advantages * (digits - chances_F[task]))
        logits_F.grad = torch.tensor(-slopes_F / (16 * 8), dtype=torch.float32)
        adam.step()
    return curve


LINES = Task("lines", ({"role": "user", "content": "?"},), "1", "math")


def shown(good: Any) -> Rollout:
    """A path whose lines are 1 where they are right and 0 where not."""
    text = "\n".join("1" if each else "0" for each in good)
    path = Trajectory(("?",), (Step(tuple(text), (0.0,) * len(text), text),), "stop")
    return Rollout(LINES, path, Verdict("scored", float(good.all()), bool(good.all()), steps=tuple(map(float, good))))


def mean_share(needed: dict[str, Any]) -> dict[str, Any]:
    """Of the methods that reached the level with every seed, over seeds."""
    reached = {name: shares for name, shares in needed.items() if len(shares) > 1 and None not in shares}
    return {name: asdict(interval(shares, unit=False)) for name, shares in reached.items()}


def measured(name: str, overrides: list[str], scratch: Path, config: Path = CONFIG) -> dict[str, Any]:
    """One run: its accuracies before and after, what each held-out task got, its curve, its tokens and its seconds.

    What an interrupted benchmark has measured already is read from `scratch`.
    """
    done = scratch / f"{name}.json"
    if done.exists():
        return json.loads(done.read_text())
    where = [f"name={name.replace(' ', '-')}", f"out={scratch}/runs", f"cache={scratch}/cache"]
    with (scratch / "log.txt").open("a") as log:
        folder = train(load(config, [*overrides, *where]), ray="local", screen=Screen(Console(file=log)))
    summary = json.loads((folder / "summary.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {
        "base": summary["base"],
        "final": summary["final"],
        "rounds": summary.get("rounds"),
        "tasks": per_task(folder / "evaluation-final.jsonl"),
        "tokens": sum(step["tokens_generated"] for step in steps),
        "curve": curve(steps),
        "steps": len(steps),
        "seconds": {key: summary["seconds"][key] for key in ("rollouts", "learn", "total")},
    }
    done.write_text(json.dumps(found))
    return found


def per_task(journal: Path) -> dict[str, list[float]]:
    """What each held-out task got: its greedy path, and the mean of its sampled ones."""
    found: dict[str, list[float]] = {"greedy": [], "mean_at_k": []}
    for _, _, group in read(journal):
        right = [float(bool(r.verdict.correct)) for r in group.scored]
        if right:
            found["greedy" if len(group.rollouts) == 1 else "mean_at_k"].append(statistics.fmean(right))
    return found


def curve(steps: list[dict]) -> list[tuple[int, float]]:
    """(tokens generated before, accuracy of the paths drawn then on new training tasks), by step."""
    spent, points = 0, []
    for step in steps:
        points.append((spent, step["reward_mean"] or 0.0))
        spent += step["tokens_generated"]
    return points


def row(name: str, runs: list[dict]) -> dict[str, Any]:
    """One line of the table: means over seeds, with intervals over tasks."""
    line: dict[str, Any] = {"method": name, "seeds": len(runs)}
    for measure in ("greedy", "mean_at_k"):
        every = [run["tasks"][measure] for run in runs]
        found = interval([statistics.fmean(values) for values in zip(*every, strict=True)])
        line[measure] = found.mean
        line[f"{measure}_ci"] = (found.low, found.high)
        line[f"{measure}_by_seed"] = [run["final"][measure] for run in runs]
    for measure in ("pass_at_k", "maj_at_k", "marginal_at_k", "selected_at_k"):
        if all(measure in run["final"] for run in runs):
            line[measure] = statistics.fmean(run["final"][measure] for run in runs)
            line[f"{measure}_by_seed"] = [run["final"][measure] for run in runs]
    line["base_greedy"] = statistics.fmean(run["base"]["greedy"] for run in runs)
    line["base_mean_at_k"] = statistics.fmean(run["base"]["mean_at_k"] for run in runs)
    line["tokens"] = statistics.fmean(run["tokens"] for run in runs)
    line["steps"] = [run["steps"] for run in runs]
    line["seconds"] = {key: statistics.fmean(run["seconds"][key] for run in runs) for key in runs[0]["seconds"]}
    line["curves"] = [run["curve"] for run in runs]
    return line


def reach(runs: dict[str, list[dict]], window: int = 5, best: bool = False) -> dict[str, Any]:
    """Tokens that a method needs for the training accuracy GRPO ends with, as a share of GRPO's; None: never.

    GRPO's level is the mean of its last `window` steps; policy gradients are smoothed over as many, rounds are not.
    best: its highest mean of as many steps instead, which says more where GRPO ends no higher than it began.
    """
    if "GRPO" not in runs:
        return {}
    shares: dict[str, Any] = {}
    for name in runs:
        each = []
        for grpo, other in zip(runs["GRPO"], runs[name], strict=True):
            means = smoothed(grpo["curve"], window)
            level = max(means) if best else means[-1]
            width = 1 if other["rounds"] else window
            needed = [tokens_at(run["curve"], level, w) for run, w in ((grpo, window), (other, width))]
            each.append(None if None in needed else needed[1] / needed[0])
        shares[name] = each
    return shares


def tokens_at(points: list[tuple[int, float]], level: float, window: int) -> int | None:
    """Tokens spent when the mean of `window` steps first reaches a level."""
    found = zip(points[window - 1 :], smoothed(points, window), strict=True)
    return next((spent for (spent, _), mean in found if mean >= level), None)


def smoothed(points: list[tuple[int, float]], window: int) -> list[float]:
    """The mean of each `window` steps in a row."""
    return [
        statistics.fmean(value for _, value in points[end - window : end]) for end in range(window, len(points) + 1)
    ]


def star(scratch: Path) -> dict[str, Any]:
    """Addition: all rounds with rationalisation, and one without, from one base."""
    helped = measured("star", [], scratch)
    alone = measured("no hints", ["steps=1", "learner.rationalise=0"], scratch)
    first, without = helped["rounds"]["heldout"][1], alone["rounds"]["heldout"][1]
    return {
        "base": helped["rounds"]["heldout"][0],
        "rounds": helped["rounds"]["heldout"][1:],
        "one round without rationalisation": without,
        "ratio after one round": first["greedy"] / without["greedy"] if without["greedy"] else None,
        "final": helped["final"],
        "tokens": helped["tokens"],
        "seconds": helped["seconds"],
    }


def show(part: str, found: dict[str, Any]) -> None:
    """The part's result as a person reads it."""
    if part == "star":
        for number, each in enumerate([found["base"], *found["rounds"]]):
            print(f"round {number}: {each['greedy']:.1%}", {k: f"{v:.0%}" for k, v in each["by_level"].items()})
        print(f"one round without rationalisation: {found['one round without rationalisation']['greedy']:.1%}")
        return
    for each in found.get("settings", ()):
        print(f"{each['lines']} lines, {each['start']:.1%} at first:", each["tokens to reach"])
    for line in found.get("rows", ()):
        low, high = line["greedy_ci"]
        greedy = f"greedy {line['greedy']:.1%} ({low:.1%} to {high:.1%})"
        others = f"mean {line['mean_at_k']:.1%}  majority {line['maj_at_k']:.1%}"
        picked = f"  chosen {line['selected_at_k']:.1%}" if "selected_at_k" in line else ""
        print(f"{line['method']:<15} {greedy}  {others}{picked}  {line['tokens']:.0f} tokens")
    if "rows" in found:
        print("tokens for GRPO's last training accuracy, as a share of GRPO's:", found["tokens to reach"])


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("torch", "trl", "transformers")},
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="methods, star, process, table; default: all")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method")
    parser.add_argument("--only", nargs="*", metavar="METHOD", help=f"some of: {', '.join(METHODS)}")
    parser.add_argument("--keep", metavar="DIR", help="leave the runs there, and go on with those that are there")
    args = parser.parse_args()
    if unknown := (set(args.parts) - {"methods", "star", "process", "table"}) | (set(args.only or ()) - set(METHODS)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        parts = {
            "methods": lambda: methods(args.seeds, args.only or list(METHODS), scratch),
            "star": lambda: star(scratch),
            "process": lambda: process(args.seeds, scratch),
            "table": lambda: {
                "settings": [table(max(3, args.seeds), *each) for each in ((4, 0.57), (8, 0.6), (10, 0.6))]
            },
        }
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        for name in args.parts or parts:
            print(f"-- {name}", flush=True)
            result = parts[name]()
            found[name] = {**result, **machine()}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            show(name, result)


if __name__ == "__main__":
    main()
