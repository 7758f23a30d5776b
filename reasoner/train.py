"""The loop: tasks -> rollouts -> verdicts -> journal -> credit -> one learner step -> weights into the engines.

`train` sets the stage: tasks, base model, engines, an evaluation before and after. `steps` is the loop itself, a
generator that the learner pulls: what stands after its `yield` happens when that step is done. Heavy libraries are
imported where they are first needed, so that a mistake in a config is told before they load.
"""

from __future__ import annotations

import errno
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from reasoner import checkpoints
from reasoner.checkpoints import Position
from reasoner.config import ConfigError, Run, to_dict
from reasoner.contrast import until_contrast
from reasoner.credit import Process, assign
from reasoner.curriculum import Pools
from reasoner.engine import open_engine, require_room, scoring_engine
from reasoner.evaluate import evaluate, require_steps, table
from reasoner.folder import new_folder, read_json, require_room_for, versions, write_json
from reasoner.progress import Clock, PeakMemory, Screen, step_line
from reasoner.star import Star, VStar
from rollouts.base import Group
from rollouts.episode import Episode
from rollouts.feed import Batch, Feed
from rollouts.journal import Journal, cut, mend
from rollouts.loop import Loop
from rollouts.roll_out import roll_out
from rollouts.score import WithKey
from search.base import derive
from verifiers import Pool, get
from verifiers.base import Task

PHASES = ("warmup", "start", "eval", "rollouts", "verify", "learn", "sync", "save")
LAPS = ("rollouts", "learn", "sync", "save")  # of one step, by the learner's clock; `save` is of the step before
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk
NOTHING: tuple[None, Position, None] = (None, Position(), None)  # to go on from


@dataclass(frozen=True)
class Stage:
    """What is alive during a run."""

    run: Run
    engine: Any  # cluster.Engines or LocalEngine
    model: Any
    tokenizer: Any
    pool: Pool
    loop: Loop
    clock: Clock
    screen: Screen
    folder: Path
    scorer: Any  # the engine that the search's score reads


def load_tasks(run: Run) -> tuple[list[Task], list[Task]]:
    """Training and held-out tasks, every reference readable by its verifier."""
    train_tasks, heldout = run.tasks.load()
    names = {task.verifier for task in train_tasks + heldout}
    if unused := sorted(set(run.policies) - {part.strip() for name in names for part in name.split("|")}):
        raise ConfigError(
            f"policies.{unused[0]} is for a verifier that no task has: they have {', '.join(sorted(names))}"
        )
    judges = {name: get(name, **run.policies.get(name, {})) for name in names}
    for task in train_tasks + heldout:
        judges[task.verifier].check(task)
    if len(train_tasks) < run.tasks_per_step:
        raise ConfigError(
            f"tasks_per_step = {run.tasks_per_step} exceeds the {len(train_tasks)} training tasks: lower it or add some"
        )
    if len(heldout) < run.evaluate.tasks:
        raise ConfigError(
            f"evaluate.tasks = {run.evaluate.tasks} exceeds the {len(heldout)} held-out tasks: lower it or add some"
        )
    run.base.check(train_tasks)
    if isinstance(run.credit, Process):
        run.credit.check(names)
    if isinstance(run.learner, Star):
        run.learner.helped(train_tasks)
    for task in train_tasks if run.curriculum else ():
        run.curriculum.pool_of(task)
    return train_tasks, heldout[: run.evaluate.tasks]


def train(run: Run, *, ray: str, screen: Screen, resume: Path | None = None) -> Path:
    """Run everything a config describes; returns the run's folder. The engines and Ray end with it.

    Args:
        resume: folder of a run that was interrupted, to go on with.
    """
    if run.engine.kind == "openai":
        raise ConfigError(
            f"engine.kind = 'openai': no weights can be pushed to {run.engine.url}, so nothing is learned there: train "
            "with engine.kind = 'vllm', or evaluate and search"
        )
    clock = Clock()
    train_tasks, heldout = load_tasks(run)
    from reasoner import learner  # noqa: F401 (without TRL nothing is learned: say so before anything is computed)

    with PeakMemory() as memory, ExitStack() as stack:
        if resume:
            stack.enter_context(checkpoints.lock(resume))
            if read_json(resume / "summary.json") is not None:
                screen.say(f"{resume} is complete: nothing to resume")
                return resume
        stage, start = open_stage(run, train_tasks, heldout, ray, clock, screen, stack, resume=resume)
        try:
            summary = _learn_and_measure(stage, train_tasks, heldout, start)
        except ConfigError:  # what only a run can show: nothing verified, no steps
            raise
        except ValueError as error:  # no longer a mistake in the config: keep its traceback
            raise RuntimeError(f"the run broke: {error}") from error
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise OSError(
                f"{error.strerror} under {stage.folder}. What the run has written is whole: make room, then go on with "
                f"`reasoner train --resume {stage.folder}`"
            ) from error
        summary["peak_rss_bytes"] = memory.bytes
        write_json(stage.folder / "summary.json", summary)
    return stage.folder


@dataclass(frozen=True)
class Start:
    """What training begins with."""

    position: Position = field(default_factory=Position)
    trainer: Mapping[str, Any] | None = None  # None: a new one


def open_stage(
    run: Run,
    tasks: Sequence[Task],
    heldout: Sequence[Task],
    ray: str,
    clock: Clock,
    screen: Screen,
    stack: ExitStack,
    checkpoint: Path | None = None,
    resume: Path | None = None,
) -> tuple[Stage, Start]:
    """Base model, engines, verifier pool and the run's folder, all closed by `stack`; and where training begins."""
    if not resume:
        require_room_for(Path(run.out) / run.name, "out")
    if hasattr(run.base, "steps") and not Path(run.cache).exists():  # a base that is made and not just read
        require_room_for(Path(run.cache) / "model", "cache")
    learned, position, trainer = next(checkpoints.newest(resume, screen.say), NOTHING) if resume else NOTHING
    if Path(position.base, "config.json").is_file():
        checkpoint = Path(position.base)  # of the interrupted run, though the code that made it may have changed
    with clock.phase("warmup"), screen.bar("warm-up", getattr(run.base, "steps", 1)) as tell:
        checkpoint = checkpoint or run.base.prepare(
            tasks, Path(run.cache), run.seed, lambda step, total, loss: tell(step, f"loss {loss:.3f}")
        )
    with clock.phase("start"):
        screen.say(f"engine    {run.engine.kind} on {checkpoint}")
        import torch
        from transformers import AutoTokenizer

        from reasoner.model import load

        served = run.engine.kind == "openai"  # elsewhere, and maybe too large for this machine
        # float32: small updates vanish in bfloat16 weights
        try:
            model = None if served else load(learned or checkpoint, torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        except (OSError, ValueError) as error:
            if learned or checkpoint.parent.resolve() != Path(run.cache).resolve():
                raise
            raise ConfigError(f"{checkpoint} is damaged ({error}): remove that folder, and it is made again") from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        helped = run.learner.helped(tasks) if isinstance(run.learner, Star) else []
        require_room(run, tokenizer, [*tasks, *heldout, *helped])
        engine = stack.enter_context(open_engine(run, checkpoint, tokenizer, ray))
        scorer = stack.enter_context(scoring_engine(run, run.score, engine, tokenizer, ray))
        pool = stack.enter_context(Pool(run.verifier_workers, timeout=run.verify_timeout, policies=dict(run.policies)))
        loop = stack.enter_context(Loop())
    folder = resume or new_folder(Path(run.out) / run.name)
    if not resume:
        stack.enter_context(checkpoints.lock(folder))
    elif learned:  # its driver may have been killed before it said so
        checkpoints.point(folder, learned)
    write_json(folder / "config.json", to_dict(run))
    tokenizer.save_pretrained(folder / "tokenizer")  # for the report, which spells tokens
    if run.engine.kind == "vllm":
        engine.record(folder / "events.jsonl")
    position = replace(position, base=str(checkpoint.resolve()))
    return Stage(run, engine, model, tokenizer, pool, loop, clock, screen, folder, scorer), Start(position, trainer)


def _learn_and_measure(stage: Stage, train_tasks: list[Task], heldout: list[Task], start: Start) -> dict[str, Any]:
    """Evaluate, train, evaluate again."""
    run = stage.run
    learn = _in_rounds if isinstance(run.learner, Star) else by_policy_gradient
    base, first = _remembered(stage, "base") or measure(stage, heldout, "base", step=0)
    with stage.screen.bar("training", run.steps, each=True) as tell:
        more = learn(stage, train_tasks, heldout, start, tell)
    final, last = measure(stage, heldout, "final", step=run.steps)
    if isinstance(run.learner, VStar):
        _choose(stage, final)
    return {
        **more,
        "name": run.name,
        "seed": run.seed,
        "base": base,
        "final": final,
        "mismatch": {"first": first, "last": last},
        "seconds": {**dict.fromkeys(PHASES, 0.0), **stage.clock.seconds, "total": stage.clock.total()},
        "tokens": tokens_so_far(stage, start.position),
        "faults": _faults(stage),
        "versions": versions(),
    }


def _states(stage: Stage) -> list[Any]:
    """Of the engines that live in other processes."""
    return stage.engine.states() if stage.run.engine.kind == "vllm" else []


def _faults(stage: Stage) -> dict[str, Any]:
    """What this driver's engines went through; `events.jsonl` has the time line."""
    if stage.run.engine.kind != "vllm":
        return {}
    restarts = sum(state.restarts for state in _states(stage))
    return {"engine_restarts": restarts, "asked_again": dict(stage.engine.dropped)}


def _in_rounds(stage: Stage, tasks: list[Task], heldout: list[Task], start: Start, tell: Any) -> dict[str, Any]:
    from reasoner.rounds import rounds

    _take_up(stage, start.position)
    return rounds(stage, tasks, heldout, start.position, tell)


def _choose(stage: Stage, final: dict[str, Any]) -> None:
    """Add to the final accuracies that of the trained verifier's choice among the samples."""
    from reasoner.rounds import selection

    k = final["k"]
    with stage.clock.phase("eval"):
        found = selection(stage.folder, k)
    final["selected_at_k"] = found.mean
    final["ci"]["selected_at_k"] = (found.low, found.high)
    stage.screen.say(f"verifier  its choice of {k} samples is right in {found.mean:.1%} of the tasks")


def by_policy_gradient(stage: Stage, tasks: list[Task], heldout: list[Task], start: Start, tell: Any) -> dict[str, Any]:
    run = stage.run
    if run.learner.workers > 1:
        from reasoner.data_parallel import learn_together as learn
    else:
        from reasoner.learner import learn
    _take_up(stage, start.position)
    deck = Pools(tasks, run.curriculum, run.seed, start.position.pools) if run.curriculum else Deck(tasks, run.seed)
    base = _base(run, start) if start.trainer else None
    with ExitStack() as stack:
        feed = open_feed(stage, deck, start.position, stack)
        learn(
            stage.model,
            stage.tokenizer,
            lambda trainer: steps(stage, feed, deck, start.position, trainer, tell),
            run.learner,
            steps=run.steps,
            seed=run.seed,
            temperature=run.sampling.temperature,
            max_completion=run.sampling.max_tokens,
            folder=stage.folder / "trainer",
            start=start.trainer,
            base=base,
        )
    return {}


def _base(run: Run, start: Start) -> Any:
    """The model that a resumed run began with, where the learner needs it."""
    import torch

    from reasoner.model import load

    needed = run.learner.kl or run.learner.lora
    return load(Path(start.position.base), torch.float32) if needed else None


def _take_up(stage: Stage, position: Position) -> None:
    """Go on from a position: the clock, and the policy in the engines."""
    from reasoner.model import export

    stage.clock.add(position.seconds)
    if position.version:
        push(stage.engine, stage.model, position.version, export)


def open_feed(stage: Stage, deck: Deck | Pools, position: Position, stack: ExitStack) -> Feed:
    """The run's rollouts, in its journal."""
    run, path = stage.run, stage.folder / "journal.jsonl"
    since = min(position.journal, path.stat().st_size) if path.exists() else 0
    # A step sampled in two parts would differ in the last bits where what is sampled beside a path shows in it.
    together = run.max_lag == 0 and not run.engine.independent
    if path.exists() and (lost := mend(path, since, run.tasks_per_step if together else 1)):
        unfinished = " or of an unfinished step" if together else ""
        stage.screen.say(f"journal   cut after its last whole record: {lost} bytes were torn{unfinished}")

    async def roll(ticket: int) -> Group:
        seed = derive(run.seed, "train", ticket // run.tasks_per_step)
        [group] = await _roll_out(stage, [deck[ticket]], seed=seed)
        return group

    journal = stack.enter_context(Journal(path))
    feed = Feed(
        stage.loop,
        journal,
        roll,
        per_step=run.tasks_per_step,
        max_lag=run.max_lag,
        timeout=run.rollout_timeout,
        total=run.steps * run.tasks_per_step,
        ledger=position.ledger,
        since=since,
    )
    if path.stat().st_size:
        steps_, groups, _ = feed.remembered
        stage.screen.say(
            f"resume    at step {position.step}: the journal repeats {steps_} steps and has {groups} groups more; what "
            "is missing is rolled out"
        )
    return feed


def steps(
    stage: Stage, feed: Feed, deck: Deck | Pools, start: Position, trainer: Callable[[], Any], tell: Any
) -> Iterator[Any]:
    """Yields the samples of each step that teaches something; is sent what the learner measured on them."""
    from reasoner.model import export

    run, clock = stage.run, stage.clock
    version, laps = start.version, dict(clock.seconds)
    path = stage.folder / "metrics.jsonl"
    path.touch()
    cut(path, start.metrics)  # what comes after the checkpoint is written again
    spent = sum(json.loads(line)["tokens_generated"] for line in path.open())
    with path.open("a") as log:
        for step in range(start.step, run.steps):
            with clock.phase("rollouts"):
                batch = until_contrast(partial(feed.batch, step, version), run.tasks_per_step, run.resample)
            if step == 0:
                require_steps(run.search, run.sampling.step, batch.groups)
            deck.learn(batch.groups)
            seen = run.length(batch.groups, run.sampling.max_tokens)
            samples = assign(run.credit, seen, partial(stage.tokenizer.decode, skip_special_tokens=True))
            row = {"step": step, "version": version, **statistics(batch.groups), **timing(batch)}
            clock.seconds["verify"] += row["seconds_verify"]
            if samples:  # groups that agree teach nothing; a step of only such groups goes by without an update
                with clock.phase("learn"):
                    row |= yield samples
                version += 1
                with clock.phase("sync"):
                    push(stage.engine, stage.model, version, export)
            row |= {f"seconds_{p}": clock.seconds[p] - laps.get(p, 0.0) for p in LAPS} | {"time": time.time()}
            laps = dict(clock.seconds)
            log.write(json.dumps(row) + "\n")
            log.flush()
            spent += row["tokens_generated"]
            last = step + 1 == run.steps or 0 < run.token_budget <= spent
            if last or (step + 1) % run.checkpoint_every == 0:
                with clock.phase("save"):
                    os.fsync(log.fileno())
                    position = replace(start, step=step + 1, version=version, metrics=log.tell(), pools=deck.state)
                    _save(stage, feed, trainer(), position, tokens_so_far(stage, start))
            tell(step + 1, step_line(row, batch.in_flight, _states(stage)))
            if last:
                return


def tokens_so_far(stage: Stage, start: Position) -> dict[str, int]:
    """What the engines sampled and read since the run began, but for what killed drivers did after a checkpoint."""
    spent = stage.engine.ledger
    return {name: start.tokens.get(name, 0) + getattr(spent, name) for name in ("generated", "prefilled")}


def _save(stage: Stage, feed: Feed, trainer: Any, position: Position, tokens: dict[str, int]) -> None:
    ledger, journal = feed.mark()
    position = replace(
        position,
        ledger=ledger,
        journal=journal,
        seconds={**stage.clock.seconds, "total": stage.clock.total()},
        tokens=tokens,
    )
    checkpoints.write(stage.folder, stage.model, stage.tokenizer, trainer, position)


def draw(stage: Stage, tasks: Sequence[Task], *, seed: int, search: Any = None) -> list[Group]:
    """The judged paths of training tasks, by the run's search or another."""
    return stage.loop.run(_roll_out(stage, tasks, seed=seed, search=search))


def _roll_out(
    stage: Stage, tasks: Sequence[Task], *, seed: int, search: Any = None
) -> Coroutine[Any, Any, list[Group]]:
    guide = WithKey(stage.pool, stage.scorer, stage.run.score)
    search = search or stage.run.search
    return roll_out(tasks, search, stage.engine, stage.pool, stage.tokenizer, seed=seed, guide=guide)


def push(engine: Any, model: Any, version: int, export: Any) -> None:
    """The learner's weights into the engine, under the names it wants."""
    from rollouts.local_engine import LocalEngine

    engine.load(model.state_dict() if isinstance(engine, LocalEngine) else export(model), version)


def measure(stage: Stage, tasks: Sequence[Task], name: str, *, step: int) -> tuple[dict[str, Any], float]:
    """The accuracies of the policy now in the engines, and how far the learner's log-probabilities are from theirs."""
    from reasoner.credit import spread
    from reasoner.samples import mismatch

    with stage.clock.phase("eval"):
        settings = stage.run.evaluate
        ways = {"episode": stage.run.search if isinstance(stage.run.search, Episode) else None, "seed": stage.run.seed}
        judged = stage.loop.run(evaluate(tasks, stage.engine, stage.pool, stage.tokenizer, settings, **ways))
        path = stage.folder / f"evaluation-{name}.jsonl"
        path.unlink(missing_ok=True)  # of a driver that ended in the middle of it
        with Journal(path) as journal:
            for each in judged:
                for group in (each.greedy, each.sampled):
                    journal.append(group, step=step, version=_version_of(group))
            journal.flush(to_disk=True)
        result = stage.loop.run(table(judged, stage.pool, settings.k))
        paths = [each.sampled.rollouts[0].trajectory for each in judged]
        samples = [spread(path, 0.0) for path in paths if path.sampled_tokens]
        known = stage.model is not None
        difference = mismatch(stage.model, samples, stage.tokenizer.pad_token_id) if known else None
    accuracy = f"greedy {result['greedy']:.1%}  mean {result['mean_at_k']:.1%}"
    stage.screen.say(f"{name:<9} {accuracy}" + (f"  mismatch {difference:.1e} nats" if known else ""))
    write_json(stage.folder / f"evaluation-{name}.json", result | {"mismatch": difference})
    return result, difference


def _remembered(stage: Stage, name: str) -> tuple[dict[str, Any], float] | None:
    """What an interrupted run measured."""
    result = read_json(stage.folder / f"evaluation-{name}.json")
    return None if result is None else (result, result.pop("mismatch"))


def _version_of(group: Group) -> int:
    """Of the policy that sampled the group's last token."""
    spans = [span for r in group.rollouts for s in r.trajectory.steps for span in s.versions]
    return max((version for version, _, _ in spans), default=0)


def timing(batch: Batch) -> dict[str, Any]:
    """How far a batch lags behind the learner, and what was left out of it."""
    return {
        "groups_dropped": dict(Counter(batch.dropped.values())),
        "lag_mean": sum(batch.lags) / len(batch.lags),
        "lag_max": max(batch.lags),
        "seconds_generate": batch.generate_s,
    }


def statistics(groups: Sequence[Group]) -> dict[str, Any]:
    """What a step's rollouts looked like, whatever the learner does with them."""
    rollouts = [r for group in groups for r in group.rollouts]
    scores = [r.verdict.score for r in rollouts if r.verdict.score is not None]
    agreeing = sum(len({r.verdict.score for r in group.scored}) == 1 for group in groups)
    unjudged = sum(not group.scored for group in groups)
    lengths = [r.trajectory.sampled_tokens for r in rollouts]
    lost = [r for r in rollouts if r.verdict.status != "scored"]
    dropped = Counter(f"{r.task.verifier} {r.verdict.status}: {r.verdict.why}"[:120] for r in lost)
    return {
        "reward_mean": sum(scores) / len(scores) if scores else None,  # nothing judged is not a reward of 0
        "solved_fraction": sum(any(r.verdict.correct for r in group.scored) for group in groups) / len(groups),
        "groups_used": len(groups) - agreeing - unjudged,
        "groups_agreeing": agreeing,
        "groups_unjudged": unjudged,
        "rollouts": len(rollouts),
        "dropped": dict(dropped),
        "truncated_fraction": sum(r.trajectory.end == "length" for r in rollouts) / len(rollouts),
        "tokens_generated": sum(lengths),
        "response_length_mean": sum(lengths) / len(lengths),
        "seconds_verify": sum(r.verdict.seconds for r in rollouts),
    }


class Deck:
    """The tasks for ever, in a new order each time round: ticket i is the i-th task drawn."""

    def __init__(self, tasks: Sequence[Task], seed: int) -> None:
        self._tasks, self._seed = tasks, seed
        self._epoch, self._order = -1, []

    state: ClassVar[Mapping[str, Any]] = {}

    def learn(self, groups: Sequence[Group]) -> None:
        """Nothing: the order is fixed."""

    def __getitem__(self, ticket: int) -> Task:
        epoch, place = divmod(ticket, len(self._tasks))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(self._tasks)
            random.Random(derive(self._seed, "order", epoch)).shuffle(self._order)
        return self._order[place]


def evaluate_checkpoint(run: Run, checkpoint: Path | None, *, ray: str, screen: Screen) -> tuple[Path, dict[str, Any]]:
    """The held-out accuracies of a checkpoint (default: the base model); returns the folder written and the result."""
    train_tasks, heldout = load_tasks(run)
    run = replace(run, name=f"{run.name}-eval")
    with ExitStack() as stack:
        stage, _ = open_stage(run, train_tasks, heldout, ray, Clock(), screen, stack, checkpoint)
        result, difference = measure(stage, heldout, "final", step=0)
    result |= {"mismatch": difference, "versions": versions(), "seed": run.seed}
    result["checkpoint"] = str(checkpoint or "base")
    write_json(stage.folder / "evaluation.json", result)
    return stage.folder, result
