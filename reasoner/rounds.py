"""The rounds of STaR: sample -> verify -> rationalise -> sift -> train from the base again -> weights into the engines.

The counterpart of `train.steps`, on the same stage. What is kept, and how much each path counts, is decided in
`star.py`; TRL stays behind `learner.py`. Every round leaves `paths-N.jsonl`, the rows it trained on, beside the
journal, which holds all rollouts, those with a hint marked in their task's meta.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoTokenizer

from reasoner import checkpoints
from reasoner.checkpoints import Position
from reasoner.config import ConfigError
from reasoner.credit import spread
from reasoner.evaluate import greedily
from reasoner.learner import prefer, supervise
from reasoner.model import export, load, save
from reasoner.samples import logprobs
from reasoner.star import Star, VStar, reason_to_drop, resample, sift, stripped, structure, weights
from reasoner.train import Deck, Stage, draw, push, statistics, tokens_so_far
from rollouts.base import Group, Rollout
from rollouts.journal import Journal, cut, read
from rollouts.roll_out import encode
from search.base import derive
from search.export import Row, dpo
from search.metrics import Interval, best_of_k, interval, pass_at_k
from search.sample import Sample
from verifiers.base import Task


@dataclass(frozen=True)
class Harvest:
    """What one round found: rows for each problem that has any, and how the others were lost."""

    groups: list[Group]  # as sampled
    hinted: list[Group]  # drawn with the answer as a hint, for the failed ones
    problems: dict[str, list[Row]]  # by task id
    dropped: Counter[str]
    dropped_hinted: Counter[str]
    threshold: float | None = None  # nats per token that a rationalisation had to reach
    worth: float | None = None  # nats per token by which the hint made those that are right likelier


def rounds(stage: Stage, tasks: Sequence[Task], heldout: Sequence[Task], start: Position, tell: Any) -> dict[str, Any]:
    """All rounds of a run, from `start` on; returns what they add to its summary."""
    run, star, clock = stage.run, stage.run.learner, stage.clock
    base = load(Path(start.base), torch.float32).state_dict()
    deck = Deck(tasks, run.seed)
    with _files(stage.folder, start) as (journal, log):
        past = remember(stage.folder, star)
        for number in range(start.step, run.steps):
            laps = dict(clock.seconds)
            chosen = [deck[number * run.tasks_per_step + i] for i in range(run.tasks_per_step)]
            with clock.phase("rollouts"):
                harvest = gather(stage, chosen, number)
            for group in (*harvest.groups, *harvest.hinted):
                journal.append(group, step=number, version=number)
            journal.flush(to_disk=True)
            _require_something(stage, harvest, number)
            row = {"step": number, "version": number, **report(harvest, past.solved)}
            past.add(harvest.groups, star)
            past.problems = {**past.problems, **harvest.problems} if star.accumulate else harvest.problems
            with clock.phase("learn"):
                stage.model.load_state_dict(base)
                row |= learn_from(stage, past.problems, number)
            with clock.phase("sync"):
                push(stage.engine, stage.model, number + 1, export)
            with clock.phase("eval"):
                options = {"seed": run.seed}
                judged = stage.loop.run(greedily(heldout, stage.engine, stage.pool, stage.tokenizer, **options))
            row |= {f"heldout_{name}": value for name, value in accuracies(judged).items()}
            row |= {f"seconds_{p}": clock.seconds[p] - laps.get(p, 0.0) for p in ("rollouts", "learn", "sync")}
            log.write(json.dumps(row) + "\n")
            log.flush()
            os.fsync(log.fileno())
            past.curve.append({"greedy": row["heldout_greedy"], "by_level": row["heldout_by_level"]})
            past.spent += row["tokens_generated"]
            reached = {"metrics": log.tell(), "journal": journal.path.stat().st_size}
            _save(stage, replace(start, step=number + 1, version=number + 1, **reached))
            tell(number + 1, f"held out {row['heldout_greedy']:.1%}  coverage {row['coverage_all']:.0%}")
            if 0 < run.token_budget <= past.spent:
                break
    found: dict[str, Any] = {"rounds": {"kind": type(star).__name__, "heldout": past.curve}}
    if isinstance(star, VStar):
        found["rounds"]["verifier"] = {"pairs": len(past.pairs), "file": train_verifier(stage, past.pairs)}
    return found


@dataclass
class Past:
    """What a round knows of those before it."""

    solved: set[str]  # ids of the tasks that were solved without a hint
    pairs: list[Row]  # right and wrong paths, for V-STaR's verifier
    problems: dict[str, list[Row]]  # what the last round trained on
    curve: list[dict[str, Any]]  # held-out accuracies: the base's, then each round's
    spent: int  # tokens generated

    def add(self, groups: Sequence[Group], star: Star) -> None:
        for group in groups:
            if any(r.verdict.correct for r in group.rollouts):
                self.solved.add(group.task.id)
            if isinstance(star, VStar):
                self.pairs += _pairs(group, star.pairs)


def remember(folder: Path, star: Star) -> Past:
    """The past of a run, read from what it has written."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    base = [group for _, _, group in read(folder / "evaluation-base.jsonl") if len(group.rollouts) == 1]
    curve = [accuracies(base)]
    curve += [{"greedy": row["heldout_greedy"], "by_level": row["heldout_by_level"]} for row in rows]
    past = Past(set(), [], {}, curve, sum(row["tokens_generated"] for row in rows))
    past.add([group for _, _, group in read(folder / "journal.jsonl") if not group.task.meta.get("hinted")], star)
    if rows:
        for line in (folder / f"paths-{len(rows) - 1}.jsonl").read_text().splitlines():
            row = json.loads(line)
            past.problems.setdefault(row.pop("task"), []).append(row)
    return past


@contextmanager
def _files(folder: Path, start: Position) -> Iterator[tuple[Journal, Any]]:
    """The journal and metrics.jsonl, both cut to where the last whole round ended."""
    for name, size in (("journal.jsonl", start.journal), ("metrics.jsonl", start.metrics)):
        (folder / name).touch()
        cut(folder / name, size)
    with Journal(folder / "journal.jsonl") as journal, (folder / "metrics.jsonl").open("a") as log:
        yield journal, log


def _save(stage: Stage, position: Position) -> None:
    spent = {"seconds": {**stage.clock.seconds, "total": stage.clock.total()}, "tokens": tokens_so_far(stage, position)}
    checkpoints.write(stage.folder, stage.model, stage.tokenizer, {}, replace(position, **spent))


def gather(stage: Stage, tasks: Sequence[Task], number: int) -> Harvest:
    """The E-step: paths of the model as it is now, verified, rationalised where they fail, and sifted."""
    run, star = stage.run, stage.run.learner
    groups = draw(stage, tasks, seed=derive(run.seed, "train", number))
    kept, dropped = sift(groups, star.keep)
    problems = {group.task.id: rows for group, rows in zip(groups, kept, strict=True) if rows}
    failed = [group.task for group in groups if group.task.id not in problems]
    if not (star.rationalise and failed):
        return Harvest(groups, [], problems, dropped, Counter())
    helped = star.helped(failed)
    answers = draw(stage, helped, seed=derive(run.seed, "hinted", number), search=Sample(star.rationalise))
    threshold = quantile(_nats_per_token(stage, [r for g in groups for r in g.rollouts]), star.plausible)
    candidates, improbable, worth = _plausible(stage, failed, answers, threshold)
    rows, dropped_hinted = sift(candidates, star.keep, star.hint)
    problems |= {task.id: each for task, each in zip(failed, rows, strict=True) if each}
    dropped_hinted["improbable without the hint"] += improbable
    return Harvest(groups, answers, problems, dropped, +dropped_hinted, threshold, worth)


def _plausible(
    stage: Stage, tasks: Sequence[Task], groups: Sequence[Group], threshold: float | None
) -> tuple[list[Group], int, float | None]:
    """The groups with the plain questions, without right paths that the model would not say by itself; how many those
    are; and what the hint was worth: the mean log p(path | with hint) - log p(path | without), per token."""
    plain = []
    for task, group in zip(tasks, groups, strict=True):
        prompt = encode(stage.tokenizer, task)
        changed = [Rollout(task, stripped(r.trajectory, prompt), r.verdict) for r in group.rollouts]
        plain.append(Group(task, tuple(changed)))
    right = [r for group in plain for r in group.rollouts if reason_to_drop(r, stage.run.learner.hint) is None]
    if threshold is None or not right:
        return plain, 0, None
    values = _nats_per_token(stage, right)
    helped = [r.trajectory.logprob / r.trajectory.sampled_tokens for r in right]  # as it was sampled
    poor = {id(r) for r, value in zip(right, values, strict=True) if value < threshold}
    sound = [Group(g.task, tuple(r for r in g.rollouts if id(r) not in poor)) for g in plain]
    return sound, len(poor), fmean(helped) - fmean(values)


def _nats_per_token(stage: Stage, rollouts: Sequence[Rollout]) -> list[float]:
    """Mean log-probability of the tokens of each finished path under the learner's model, given its own prompt."""
    ended = [r.trajectory for r in rollouts if r.trajectory.end == "stop"]
    totals = logprobs(stage.model, [spread(path, 0.0) for path in ended], stage.tokenizer.pad_token_id)
    return [total / path.sampled_tokens for total, path in zip(totals, ended, strict=True)]


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of the values lie below; None without values, or for a share of 0."""
    if not values or share == 0:
        return None
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def learn_from(stage: Stage, problems: dict[str, list[Row]], number: int) -> dict[str, Any]:
    """The M-step: the learner's model, just reset to the base, trained on the kept rows by their weights."""
    star, seed = stage.run.learner, derive(stage.run.seed, "round", number)
    rows = [row for each in problems.values() for row in each]
    steps = star.length(number, len(rows))
    picked = resample(weights(list(problems.values()), star.em), steps * star.batch, seed)
    with (stage.folder / f"paths-{number}.jsonl").open("w") as file:
        for task, each in problems.items():
            file.writelines(json.dumps({"task": task, **row}) + "\n" for row in each)
    losses: list[float] = []
    supervise(
        stage.model,
        stage.tokenizer,
        [_supervised(rows[i]) for i in picked],
        steps=steps,
        batch=star.batch,
        lr=star.lr,
        seed=seed % 2**32,
        folder=stage.folder / "trainer",
        progress=lambda step, loss: losses.append(loss),
    )
    return {"updates": steps, "rows": len(rows), "loss": fmean(losses[-10:])}


def _supervised(row: Row) -> tuple[list[int], list[bool]]:
    return row["prompt"] + row["completion"], [False] * len(row["prompt"]) + list(map(bool, row["mask"]))


def report(harvest: Harvest, solved: set[str]) -> dict[str, Any]:
    """What a round's paths looked like. `solved`: tasks that earlier rounds solved without a hint."""
    groups = harvest.groups
    right = {g.task.id: [r for r in g.rollouts if reason_to_drop(r) is None] for g in groups}
    own = {name: rollouts for name, rollouts in right.items() if rollouts}
    keys = [len({structure(r.trajectory.text) for r in rollouts}) for rollouts in own.values()]
    counted = [(len(g.scored), sum(bool(r.verdict.correct) for r in g.scored)) for g in groups if g.scored]
    k = min((n for n, _ in counted), default=1)
    once = fmean(right / n for n, right in counted) if counted else 0.0
    often = fmean(pass_at_k(n, right, k) for n, right in counted) if counted else 0.0
    both = statistics([*groups, *harvest.hinted])
    kept = sum(map(len, harvest.problems.values()))
    kept_own = sum(len(rows) for name, rows in harvest.problems.items() if name in own)
    return statistics(groups) | {
        "tokens_generated": both["tokens_generated"],
        "seconds_verify": both["seconds_verify"],
        "coverage": len(own) / len(groups),  # problems with a verified path
        "coverage_all": len(harvest.problems) / len(groups),  # and with the rationalised ones
        "new_solved": len(own.keys() - solved),
        "unique_paths": fmean(keys) if keys else 0.0,  # different ones for each problem solved
        "pass_at_1": once,
        "pass_at_k": often,
        "pass_gap": often - once,
        "k": k,
        "kept": kept_own,
        "kept_hinted": kept - kept_own,
        "lost": dict(harvest.dropped),
        "lost_hinted": dict(harvest.dropped_hinted),
        "threshold": harvest.threshold,
        "hint_worth": harvest.worth,
    }


def accuracies(groups: Sequence[Group]) -> dict[str, Any]:
    """Greedy accuracy of held-out tasks, and by `meta["level"]` of those that have one."""
    levels: dict[str, list[float]] = {}
    for group in groups:
        if group.scored:
            level = str(group.task.meta.get("level", ""))
            levels.setdefault(level, []).append(float(group.scored[0].verdict.correct))
    every = [right for each in levels.values() for right in each]
    by_level = {name: fmean(each) for name, each in sorted(levels.items()) if name}
    return {"greedy": fmean(every) if every else 0.0, "by_level": by_level}


def _require_something(stage: Stage, harvest: Harvest, number: int) -> None:
    """A round without a single verified path ends the run: what would it train on?"""
    if harvest.problems:
        return
    star, paths = stage.run.learner, [r for g in harvest.groups for r in g.rollouts]
    why = ", ".join(f"{count} {reason}" for reason, count in (harvest.dropped + harvest.dropped_hinted).most_common())
    cures = ["draw more paths (search.n)", "ask easier tasks (tasks)", "start from a better base (base)"]
    if not star.rationalise:
        cures.insert(0, "give the answer as a hint (learner.rationalise = 4)")
    elif harvest.dropped_hinted["improbable without the hint"]:
        cures.insert(0, f"accept rationalisations less likely than learner.plausible = {star.plausible}")
    cut = sum(r.trajectory.end == "length" for r in paths)
    if cut > len(paths) / 2:
        cures.insert(0, f"let paths end (sampling.max_tokens = {stage.run.sampling.max_tokens})")
    raise ConfigError(
        f"round {number} verified no path of {len(harvest.groups)} problems ({why}): there is nothing to learn from. "
        f"{'; or '.join(cures)}"
    )


# --- the verifier of V-STaR


def _pairs(group: Group, most: int) -> list[Row]:
    """Right and wrong paths of one problem, where every token of both was sampled."""
    paths = [r.trajectory for r in group.rollouts]
    rows = dpo(paths, [r.verdict.correct for r in group.rollouts], most)
    return [row for row in rows if all(row["chosen_mask"]) and all(row["rejected_mask"])]


def train_verifier(stage: Stage, pairs: Sequence[Row]) -> str:
    """DPO from the last generator; leaves the checkpoint `verifier` in the run's folder and returns its name."""
    run, star = stage.run, stage.run.learner
    if not pairs:
        raise ConfigError(
            "no problem had both a right and a wrong path, so no verifier can learn: raise search.n or "
            "sampling.temperature, or use learner.kind = 'star'"
        )
    model = copy.deepcopy(stage.model)
    with stage.clock.phase("learn"):
        prefer(
            model,
            stage.tokenizer,
            pairs,
            steps=star.verifier_updates,
            batch=min(star.batch, len(pairs)),
            lr=star.verifier_lr,
            beta=star.beta,
            seed=run.seed,
            folder=stage.folder / "trainer",
        )
    save(model, stage.tokenizer, stage.folder / "verifier")
    return "verifier"


def selection(folder: Path, k: int, evaluation: str = "evaluation-final.jsonl") -> Interval:
    """Accuracy of the verifier's choice among k samples, exact over the subsets of those in an evaluation's journal."""
    model = load(folder / "verifier", torch.float32)
    pad = AutoTokenizer.from_pretrained(folder / "verifier").pad_token_id
    values = []
    for _, _, group in read(folder / evaluation):
        if len(group.scored) < k:  # the greedy path of a task
            continue
        paths = [spread(r.trajectory, 0.0) for r in group.scored]
        right = [float(bool(r.verdict.correct)) for r in group.scored]
        values.append(best_of_k(logprobs(model, paths, pad), right, k))
    return interval(values)
