"""The command line: `reasoner train | eval | search | check | report | verify | prm | convert | distill`.

Parses, calls, and turns the mistakes a person can mend into one line and exit code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

try:
    import rollouts  # noqa: F401 (guards the name `verifiers` before anything imports it)
except ImportError as error:
    sys.exit(print(f"reasoner: {error}", file=sys.stderr) or 2)
from reasoner import convert_command, prm_command, verify  # noqa: E402
from reasoner.config import Comparison, ConfigError, Run, load, load_any, load_comparison, resume  # noqa: E402
from reasoner.star import Star  # noqa: E402
from rollouts.score import refuse_key  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    args.overrides = _overrides(parser, rest, takes="config" in args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return args.call(args) or 0
    except KeyboardInterrupt:
        again = "; where it has a folder, go on with `reasoner train --resume RUN`" if args.call is _train else ""
        print(f"reasoner: stopped; what the run has written so far is whole{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, e.g. `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        return 1
    except Exception as error:
        if args.debug or not _mendable(error):
            raise
        print(f"reasoner: {_told(error)}", file=sys.stderr)
        return 2


def _told(error: Exception) -> str:
    """One line. Where a part of the stack is not installed, what is missing and what works without."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    name = error.name.split(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
    if name not in ("ray", "vllm", "trl", "datasets"):
        return str(error)
    return (
        f"{name} is not installed: `make setup` installs the whole stack; without it `eval` and `search` work on a "
        "checkpoint with --engine.kind=paged (a model of ours) or local"
    )


def _parser() -> argparse.ArgumentParser:
    about = "Trains a language model to reason by learning from what it can verify."
    parser = argparse.ArgumentParser(prog="reasoner", description=about)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, call: Any, help_: str, *, config: str = "quickstart") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_, description=help_)
        sub.set_defaults(call=call)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")
        if config:
            sub.epilog = "Any key of the config can be overridden: --steps=10 --learner.lr=1e-4"
            many = "?" if name == "train" else None
            sub.add_argument("config", type=Path, nargs=many, help=f"a TOML file, e.g. configs/{config}.toml")
        return sub

    def on_engines(sub: argparse.ArgumentParser, *, checkpoint: bool) -> argparse.ArgumentParser:
        if checkpoint:
            about = "folder of a checkpoint (default: the config's base model)"
            sub.add_argument("--checkpoint", type=Path, metavar="DIR", help=about)
        where = "start Ray here, join the cluster of this machine, or name one (default: local)"
        sub.add_argument("--ray", default="local", metavar="local|auto|ADDRESS", help=where)
        return sub

    help_ = "train a model, by policy gradients or in rounds of STaR, and evaluate it before and after"
    sub = on_engines(command("train", _train, help_), checkpoint=False)
    sub.add_argument("--resume", type=Path, metavar="RUN", help="go on with an interrupted run, e.g. runs/quickstart")
    sub.add_argument("--dry-run", action="store_true", help="check and print the plan; load and write nothing")
    on_engines(command("eval", _eval, "evaluate a checkpoint on the held-out tasks"), checkpoint=True)
    help_ = "compare searches on the same held-out tasks, each with the same budget of generated tokens"
    sub = on_engines(command("search", _search, help_, config="search"), checkpoint=True)
    sub.epilog = "Any key of the config can be overridden: --budget=500 --export=99 (trees of 99 training tasks)"
    command("check", _check, "check a config without loading a model, and print what it will use")
    sub = command("report", _report, "write report.html of a run; works while the run goes on", config="")
    sub.add_argument("run", type=Path, help="folder of a run, e.g. runs/quickstart")
    sub = command("verify", verify.run, "judge one answer or a file of answers, or test a verifier", config="")
    verify.add_arguments(sub)
    sub = command("prm", prm_command.run, "process reward models: label steps, train, measure", config="")
    prm_command.add_arguments(sub)
    help_ = "turn a dense Llama-style checkpoint into one with latent attention (MLA) and experts"
    convert_command.add_convert_arguments(command("convert", convert_command.convert, help_, config=""))
    help_ = "train a converted checkpoint to match its original, by distillation"
    convert_command.add_distill_arguments(command("distill", convert_command.distill, help_, config=""))
    return parser


def _train(args: argparse.Namespace) -> None:
    if not args.resume and not args.config:
        raise ConfigError("train needs a config, e.g. configs/quickstart.toml, or --resume RUN")
    run = resume(args.resume, args.config, args.overrides) if args.resume else load(args.config, args.overrides)
    if args.dry_run:
        print(plan(run))
        return
    from rich.console import Console

    from reasoner.progress import Screen, comparison
    from reasoner.report import write_report
    from reasoner.train import train

    _quiet()
    screen = Screen()
    folder = train(run, ray=args.ray, screen=screen, resume=args.resume)
    summary = json.loads((folder / "summary.json").read_text())
    Console(highlight=False).print(comparison(summary))
    seconds = summary["seconds"]
    parts = ", ".join(f"{name} {s:.0f}" for name, s in seconds.items() if name not in ("total", "verify") and s >= 0.5)
    print(f"{seconds['total']:.0f} s in all: {parts}")
    print(f"report: {write_report(folder)}")


def _eval(args: argparse.Namespace) -> None:
    run = load(args.config, args.overrides)
    refuse_key(run.score)
    _require_checkpoint(args.checkpoint)
    from rich.console import Console

    from reasoner.progress import Screen, accuracies
    from reasoner.train import evaluate_checkpoint

    _quiet()
    folder, result = evaluate_checkpoint(run, args.checkpoint, ray=args.ray, screen=Screen())
    Console(highlight=False).print(accuracies(result))
    print(f"written: {folder / 'evaluation.json'}")


def _search(args: argparse.Namespace) -> None:
    comparison = load_comparison(args.config, args.overrides)
    _require_checkpoint(args.checkpoint)
    from rich.console import Console

    from reasoner.compare import compare
    from reasoner.progress import Screen, side_by_side

    _quiet()
    folder = compare(comparison, args.checkpoint, ray=args.ray, screen=Screen())
    Console(highlight=False).print(side_by_side(json.loads((folder / "summary.json").read_text())))
    print(f"report: {folder / 'report.html'}")


def _require_checkpoint(folder: Path | None) -> None:
    if folder is not None and not (folder / "config.json").is_file():
        raise ConfigError(f"--checkpoint {folder} has no config.json: give the folder of a checkpoint")


def _check(args: argparse.Namespace) -> None:
    print(plan(load_any(args.config, args.overrides)))


def _report(args: argparse.Namespace) -> None:
    from reasoner.report import write_report

    if not args.run.is_dir():
        raise ConfigError(f"{args.run} is not a folder: give the folder of a run, e.g. runs/quickstart")
    if not any((args.run / name).is_file() for name in ("config.json", "metrics.jsonl", "journal.jsonl", "trees.json")):
        raise ConfigError(f"{args.run} holds no run: give a folder that `reasoner train` or `search` wrote")
    if (args.run / "trees.json").is_file():
        from reasoner.compare_page import write_page as write_report
    print(write_report(args.run))


def plan(run: Run | Comparison) -> str:
    """What a run or a comparison will use, known without loading a model."""
    from reasoner.train import load_tasks

    if isinstance(run, Comparison):
        return _plan_of_searches(run)
    train_tasks, heldout = load_tasks(run)
    paths = run.tasks_per_step * getattr(run.search, "responses", getattr(run.search, "n", 1))
    star = run.learner if isinstance(run.learner, Star) else None
    return "\n".join(
        [
            f"{run.name}: {run.steps} {'rounds' if star else 'steps'}, seed {run.seed}",
            *_plan_of_both(run, train_tasks, heldout),
            f"{'round' if star else 'step':<9} {run.tasks_per_step} tasks, {paths} paths, "
            f"at most {paths * run.sampling.max_tokens} tokens",
            *_plan_of_rounds(run.steps, star),
            f"eval      {len(heldout)} tasks x (1 greedy + {run.evaluate.n} sampled), twice",
            f"writes    {run.out}/{run.name}/",
        ]
    )


def _plan_of_rounds(rounds: int, star: Star | None) -> list[str]:
    if star is None:
        return []
    updates = ", ".join(str(star.length(number)) for number in range(min(rounds, 5)))
    helped = f"{star.rationalise} paths with the answer as a hint where all fail; " if star.rationalise else ""
    return [f"learns    {helped}at most {star.keep} paths a problem, {updates}{' ...' if rounds > 5 else ''} updates"]


def _plan_of_searches(comparison: Comparison) -> str:
    from reasoner.compare import load_tasks

    ways = [f"{method.name} ({type(method.search).__name__})" for method in comparison.methods]
    where = f"sizes are found on {comparison.sizing} training tasks"
    return "\n".join(
        [
            f"{comparison.name}: {len(ways)} methods, seed {comparison.seed}",
            *_plan_of_both(comparison.run(), *load_tasks(comparison)),
            f"methods   {', '.join(ways)}",
            f"budget    {comparison.budget} generated tokens a task; {where}",
            f"writes    {comparison.out}/{comparison.name}/",
        ]
    )


def _plan_of_both(run: Run, train_tasks: list[Any], heldout: list[Any]) -> list[str]:
    where = f"{run.engine.kind} in this process"
    if run.engine.kind == "openai":
        where = f"{run.engine.model} at {run.engine.url}"
    if run.engine.kind == "vllm":
        each = f"{run.engine.gpus:g} GPU" if run.engine.gpus else f"{run.engine.kv_cache_gib:g} GiB KV cache"
        where = f"{run.engine.count} vLLM on Ray, {each} each"
    return [
        f"tasks     {len(train_tasks)} for training, {len(heldout)} held out, no question in both",
        f"engines   {where}, {run.engine.dtype}",
        f"verifier  {run.verifier_workers} worker processes, {run.verify_timeout:g} s a verdict",
    ]


def _overrides(parser: argparse.ArgumentParser, rest: list[str], *, takes: bool) -> list[str]:
    for word in rest:
        if not takes:
            parser.error(f"unknown argument {word!r}")
        if not word.startswith("--") or "=" not in word:
            parser.error(f"unknown argument {word!r}: overrides are written --key.path=value")
    return [word[2:] for word in rest]


def _mendable(error: Exception) -> bool:
    """Mistakes told to a person in one line. Once a run has begun, errors are ours and keep their traceback."""
    return isinstance(error, ValueError | ImportError | OSError) or type(error).__name__ == "ClusterError"


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _quiet() -> None:
    """Libraries that talk on the console say only what matters."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
