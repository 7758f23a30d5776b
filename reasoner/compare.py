"""Searches side by side: the same held-out tasks, one budget of tokens, every comparison paired.

`compare` is what `reasoner search` runs: grow each method to the budget on training tasks, search and judge the
held-out ones, and write what `compare_page` shows. No method ever sees an answer key: `Open` is the only guide here.
Neighbours: `evaluate` reads judged paths, `search.marginal` and `search.metrics` hold the definitions.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from reasoner import train
from reasoner.config import Comparison, ConfigError, Method, at_temperature, to_dict
from reasoner.engine import open_engine, require_room, scoring_engine
from reasoner.evaluate import Reading, read, require_steps
from reasoner.folder import new_folder, versions, write_json
from reasoner.progress import Screen
from reasoner.tree_data import Rows, rows_of
from rollouts.journal import Journal
from rollouts.roll_out import Searched, encode, search_tasks
from rollouts.score import Open
from search import AtK, BestOf, Sample, marginal
from search.base import Engine, Trajectory, derive
from search.metrics import compare as paired
from search.metrics import holm, interval
from search.tree import Ledger, key, nodes
from verifiers import Pool
from verifiers.base import Task

Row = dict[str, Any]
SHOWN = 6  # tasks whose trees are kept for the page
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # sample sizes of a curve

SUBSETS = 50  # of a task's paths, where an expectation over them has no closed form


@dataclass(frozen=True)
class Stage:
    """What is alive during a comparison."""

    comparison: Comparison
    engine: Engine
    tokenizer: Any
    judges: Pool  # hold the answer key
    open: Pool  # never sees it: scores paths and reads answers for searches
    scorers: Mapping[str, Engine]  # by checkpoint, of scores with a model of their own


@dataclass(frozen=True)
class Result:
    """A method on all tasks."""

    method: Method
    found: list[Searched]
    readings: dict[str, Reading]  # by task, of those that could be judged
    seconds: float

    @property
    def estimator(self) -> str:
        return self.method.estimator or self.method.search.method

    @property
    def ledger(self) -> Ledger:
        return sum((each.tree.ledger for each in self.found), Ledger())

    @property
    def cost(self) -> float:
        """Generated tokens a task."""
        return self.ledger.generated / len(self.found)

    @property
    def independent(self) -> bool:
        """Whether any k of its paths are what it would have drawn with k paths in all."""
        search = self.method.search
        return isinstance(search, BestOf) or isinstance(search, Sample) and not search.arithmetic

    def worth(self, tasks: Sequence[str]) -> dict[str, float]:
        return {task: accuracy(self.readings[task], self.estimator) for task in tasks}

    def at(self, k: int, tasks: Sequence[str]) -> dict[str, AtK]:
        """Expected accuracy of k of the independent paths, by task."""
        readings = [self.readings[task] for task in tasks]
        return {r.task: r.at(min(k, len(r.paths)), self.estimator, SUBSETS) for r in readings}

    def within(self, tokens: float, tasks: Sequence[str]) -> tuple[dict[str, float], float]:
        """By task, the accuracy at about so many tokens, and how many they are: all, where paths hang together."""
        n = max(len(each.group.rollouts) for each in self.found)
        k = max(1, round(n * tokens / self.cost)) if tokens < self.cost else n
        if not self.independent or k >= n:
            return self.worth(tasks), self.cost
        return {task: point.value for task, point in self.at(k, tasks).items()}, self.cost * k / n


def compare(comparison: Comparison, checkpoint: Path | None, *, ray: str, screen: Screen) -> Path:
    """Run every method; returns the folder with summary.json, trees.json, a journal per method, report.html."""
    from reasoner.compare_page import write_page

    run = comparison.run()
    train_tasks, heldout = load_tasks(comparison)
    with ExitStack() as stack:
        if checkpoint is None:
            with screen.bar("warm-up", getattr(run.base, "steps", 1)) as tell:
                told = lambda step, total, loss: tell(step, f"loss {loss:.3f}")  # noqa: E731
                checkpoint = run.base.prepare(train_tasks, Path(run.cache), run.seed, told)
        stage = _open(comparison, checkpoint, [*train_tasks, *heldout], ray, screen, stack)
        methods, results = asyncio.run(_run(stage, train_tasks[: comparison.sizing], heldout, screen))
        rows = asyncio.run(_exported(stage, methods, train_tasks[: comparison.export], screen))
        folder = new_folder(Path(run.out) / run.name)
        write_json(folder / "config.json", to_dict(replace(comparison, methods=tuple(methods))))
        for result in results:
            with Journal(folder / f"{result.method.name}.jsonl") as journal:
                for each in result.found:
                    journal.append(each.group, step=0, version=0)
    if comparison.export:
        rows.write(folder / "training")
    summary = summarise(results) | {"name": run.name, "seed": run.seed, "budget": comparison.budget}
    write_json(folder / "summary.json", summary | {"checkpoint": str(checkpoint), "versions": versions()})
    write_json(folder / "trees.json", trees(results))
    write_page(folder)
    return folder


def load_tasks(comparison: Comparison) -> tuple[list[Task], list[Task]]:
    """Training and held-out tasks, every reference readable by its verifier."""
    try:
        train_tasks, heldout = train.load_tasks(comparison.run())
    except ConfigError as error:  # the same keys by other names
        raise ConfigError(str(error).replace("evaluate.tasks", "heldout")) from None
    if comparison.export > len(train_tasks):
        raise ConfigError(
            f"export = {comparison.export} exceeds the {len(train_tasks)} training tasks: lower it or add some"
        )
    return train_tasks, heldout


def _open(
    comparison: Comparison, checkpoint: Path, tasks: Sequence[Task], ray: str, screen: Screen, stack: ExitStack
) -> Stage:
    from transformers import AutoTokenizer

    run = comparison.run()
    screen.say(f"engine    {run.engine.kind} on {checkpoint}")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    require_room(run, tokenizer, tasks)
    engine = stack.enter_context(open_engine(run, checkpoint, tokenizer, ray))
    options = {"timeout": run.verify_timeout, "policies": dict(run.policies)}
    judges, open_ = (stack.enter_context(Pool(run.verifier_workers, **options)) for _ in range(2))
    scores = [method.score or comparison.score for method in comparison.methods]
    own = {score.checkpoint: score for score in scores if score is not None and score.checkpoint}
    serve = {name: scoring_engine(run, score, engine, tokenizer, ray) for name, score in own.items()}
    scorers = {name: stack.enter_context(each) for name, each in serve.items()}
    stage = Stage(comparison, engine, tokenizer, judges, open_, scorers)
    for method in comparison.methods:
        _require_writable(method, stage, tasks[0])
    return stage


def _require_writable(method: Method, stage: Stage, task: Task) -> None:
    """What a search or a score writes into a path must be spelled by the model's vocabulary."""
    score = method.score or stage.comparison.score
    turns = [getattr(owner, name, None) for owner in (method.search, score) for name in ("critique", "request", "ask")]
    texts = [getattr(method.search, name, None) for name in ("wait", "finish")]
    path = Trajectory(encode(stage.tokenizer, task))
    for text, turn in [*((t, True) for t in turns), *((t, False) for t in texts)]:
        if isinstance(text, str) and "write" in stage.engine.offers:
            try:
                stage.engine.write(path, text, turn=turn)
            except ValueError as error:
                raise ConfigError(f"methods.{method.name}: this model cannot read {text!r}: {error}") from None


async def _run(
    stage: Stage, sizing: Sequence[Task], heldout: Sequence[Task], screen: Screen
) -> tuple[list[Method], list[Result]]:
    comparison = stage.comparison
    probe = [each.group for each in await _search(stage, Method("probe", Sample(n=4)), sizing)]
    for method in comparison.methods:
        require_steps(method.search, stage.engine.sampling.step, probe, f"methods.{method.name}.search")
    methods: list[Method] = []
    for method in comparison.methods:
        before = zip(comparison.methods, methods, strict=False)
        same = next((grown for one, grown in before if _draws_alike(one, method)), None)
        grown, tokens = (replace(method, search=same.search), 0.0) if same else await grow(stage, method, sizing)
        methods.append(grown)
        if tokens:
            screen.say(f"grown     {grown.name}: {_size(grown.search)}, {tokens:.0f} tokens a task")
    results: list[Result] = []
    with screen.bar("methods", len(methods)) as tell:
        for done, method in enumerate(methods, start=1):
            begun = time.perf_counter()
            same = next((r for r in results if _draws_alike(r.method, method)), None)
            found = same.found if same else await _search(stage, method, heldout)
            seconds = same.seconds if same else time.perf_counter() - begun
            read_all = [await read(each.group, stage.judges) for each in found]
            judged = {reading.task: reading for reading in read_all if reading.paths}
            results.append(Result(method, found, judged, seconds))
            tell(done, method.name)
    return methods, results


async def _exported(stage: Stage, methods: Sequence[Method], tasks: Sequence[Task], screen: Screen) -> Rows:
    """Training data from the trees of training tasks: what the held-out ones hold must never be learnt."""
    if not tasks:
        return Rows()
    different = [m for i, m in enumerate(methods) if not any(_draws_alike(one, m) for one in methods[:i])]
    found = [await _search(stage, method, tasks) for method in different]
    rows = await rows_of(found, stage.judges, stage.tokenizer, stage.engine.sampling.step)
    screen.say(f"exported  {len(rows.sft)} paths, {len(rows.dpo)} pairs and {len(rows.steps)} labelled paths")
    return rows


def _draws_alike(one: Method, other: Method) -> bool:
    """Plain samples of one law are drawn once, and read by several estimators."""
    law = lambda method: (method.search, method.temperature, method.grow)  # noqa: E731
    return isinstance(one.search, Sample) and law(one) == law(other)


def _search(stage: Stage, method: Method, tasks: Sequence[Task]) -> Any:
    """Every method starts from the same seeds, so that luck is shared by all."""
    comparison, sampling = stage.comparison, at_temperature(stage.engine.sampling, method)
    engine = stage.engine.at(temperature=sampling.temperature)
    score = method.score or comparison.score
    scorer = stage.scorers.get(getattr(score, "checkpoint", ""), engine)
    guide = Open(stage.open, scorer, score)  # the answer key cannot be bound here
    seed = derive(comparison.seed, "search")
    return search_tasks(tasks, method.search, engine, stage.judges, stage.tokenizer, seed=seed, guide=guide)


async def grow(stage: Stage, method: Method, tasks: Sequence[Task]) -> tuple[Method, float]:
    """The method at the largest size whose mean cost on the training tasks lies within the budget, and that cost.

    Guesses in proportion to what a size cost, so three or four sizes are tried. One that is not grown costs 0 here.
    """
    budget = stage.comparison.budget
    if not method.grow or not hasattr(method.search, "size"):
        return method, 0.0
    cost: dict[int, float] = {}
    best, size = 1, 1
    for _ in range(5):
        found = await _search(stage, _sized(method, size), tasks)
        cost[size] = fmean(each.tree.ledger.generated for each in found)
        if size > 1 and cost[size] <= 1.01 * cost[best]:  # it has found all it can: more of it costs nothing more
            break
        best = max((s for s in cost if cost[s] <= budget), default=1)
        over = min((s for s in cost if cost[s] > budget), default=math.inf)
        size = int(min(max(best * budget / max(1.0, cost[best]), best + 1), 8 * best, over - 1))
        if size <= best:
            break
    return _sized(method, best), cost[best]


def _size(search: Any) -> str:
    return f"{search.size} {getattr(search, search.size)}"


def _sized(method: Method, size: int) -> Method:
    return replace(method, search=replace(method.search, **{method.search.size: size}))


# -- what was found -------------------------------------------------------------------------------------------------


def summarise(results: Sequence[Result]) -> Row:
    """Accuracies on the tasks that every method has a judged path for, and all paired comparisons."""
    everywhere = set.intersection(*(set(result.readings) for result in results))
    tasks = [each.group.task.id for each in results[0].found if each.group.task.id in everywhere]
    if not tasks:
        raise ValueError("no task was judged for every method: see the verdicts' `why` in the journals")
    return {
        "tasks": len(tasks),
        "not_judged": len(results[0].found) - len(tasks),
        "methods": {result.method.name: _row(result, tasks) for result in results},
        "comparisons": comparisons(results, tasks),
    }


def accuracy(reading: Reading, estimator: str) -> float:
    """Whether the estimator's answer is right, as judged on the paths that gave it; tied leaders share the credit."""
    found = reading.estimate(estimator)
    labels, names, _ = marginal.group(reading.answers, reading.equal)
    worth = []
    for leader in found.leaders:
        mine = [c for c, label in zip(reading.correct, labels, strict=True) if label == names.index(leader)]
        worth.append(fmean(mine))
    return fmean(worth) if worth else 0.0


def comparisons(results: Sequence[Result], tasks: Sequence[str]) -> list[Row]:
    """Every two methods on the same tasks at equal tokens; Holm's correction over all of them.

    Sizes are coarse, so of two methods that were grown to the budget the one that draws independent paths is read at
    the number of them that costs what the other cost.
    """
    rows = []
    for a, b in combinations(results, 2):
        limit = min(a.cost, b.cost) if a.method.grow and b.method.grow else math.inf
        (left, spent_a), (right, spent_b) = a.within(limit, tasks), b.within(limit, tasks)
        each = paired(left, right)
        row = {
            "a": a.method.name,
            "b": b.method.name,
            "difference": each.difference,
            "low": each.low,
            "high": each.high,
        }
        facts = {"p": each.p, "test": each.test, "discordant": each.discordant, "resolvable": each.resolvable}
        rows.append(row | facts | {"tokens": (spent_a, spent_b)})
    adjusted = holm({str(i): row["p"] for i, row in enumerate(rows)})
    return [row | {"holm": adjusted[str(i)]} for i, row in enumerate(rows)]


def _row(result: Result, tasks: Sequence[str]) -> Row:
    worth = result.worth(tasks)
    mine = interval(list(worth.values()))
    paths = [r.trajectory for each in result.found for r in each.group.rollouts]
    count, ledger, search = len(result.found), result.ledger, result.method.search
    return {
        "accuracy": mine.mean,
        "ci": (mine.low, mine.high),
        "search": repr(search),
        "size": {search.size: getattr(search, search.size)} if hasattr(search, "size") else {},
        "estimator": result.estimator,
        "tokens": {name: getattr(ledger, name) / count for name in ("generated", "prefilled", "cached", "judged")},
        "seconds": result.seconds,
        "paths": len(paths) / count,
        "unfinished": fmean(path.end != "stop" for path in paths) if paths else 1.0,
        "curve": curve(result, tasks),
        "by_task": worth,
    }


def curve(result: Result, tasks: Sequence[str]) -> list[Row]:
    """Accuracy against tokens over the k-subsets of independent paths; [] for a search whose paths hang together."""
    n = min(len(result.readings[task].paths) for task in tasks)
    if not result.independent or n < 2:
        return []
    path_tokens = fmean(fmean(p.sampled_tokens for p in result.readings[task].paths) for task in tasks)
    points = []
    for k in [k for k in GRID if k < n] + [n]:
        found = result.at(k, tasks).values()
        mine = interval([point.value for point in found])
        row = {"k": k, "tokens": k * path_tokens, "accuracy": mine.mean, "ci": (mine.low, mine.high)}
        points.append(row | {"exact": all(point.exact for point in found)})
    return points


def trees(results: Sequence[Result]) -> list[Row]:
    """The trees of the tasks on which the methods are most at odds: those that a person learns from."""
    everywhere = set.intersection(*(set(result.readings) for result in results))
    right = {t: fmean(accuracy(r.readings[t], r.estimator) for r in results) for t in everywhere}
    chosen = sorted(right, key=lambda task: (abs(right[task] - 0.5), task))[:SHOWN]
    by_task = [{each.group.task.id: each for each in result.found} for result in results]
    rows = []
    for name in chosen:
        task = by_task[0][name].group.task
        shown = [_tree(result, found[name]) for result, found in zip(results, by_task, strict=True)]
        reference = task.reference if isinstance(task.reference, str) else json.dumps(task.reference, default=str)
        rows.append({"task": name, "question": task.question, "reference": reference, "methods": shown})
    return rows


def _tree(result: Result, searched: Searched) -> Row:
    reading = result.readings[searched.group.task.id]
    found = reading.estimate(result.estimator, searched.tree.sampling)
    returned = [
        {
            "path": key(r.trajectory),
            "text": r.trajectory.text,
            "answer": r.verdict.answer,
            "correct": r.verdict.correct,
            "why": r.verdict.why,
            "value": r.trajectory.value,
            "logprob": r.trajectory.logprob if math.isfinite(r.trajectory.logprob) else None,
            "end": r.trajectory.end,
        }
        for r in searched.group.rollouts
    ]
    return {
        "name": result.method.name,
        "estimator": found.method,
        "answer": found.answer,
        "right": accuracy(reading, result.estimator),
        "masses": dict(found.masses),
        "interval": found.interval,
        "certified": found.certified,
        "caveat": found.caveat,
        "tokens": searched.tree.ledger.generated,
        "returned": returned,
        "nodes": nodes(searched.tree.record.rows),
    }
