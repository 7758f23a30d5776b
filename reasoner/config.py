"""What there is to set in a run, as frozen dataclasses, and which values do not go together.

The fields of a dataclass are the keys of its table; a table with `kind` picks its dataclass from KINDS. Values that
contradict each other are both named, with the remedy. Loads no model and no Ray. Neighbour: `typed_toml` reads the
file.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from reasoner.base_model import BASES, Base, Warmup
from reasoner.credit import CREDITS, GRPO, Credit, MaxRL, Process, ReinforcePP
from reasoner.curriculum import Curriculum
from reasoner.length import Length
from reasoner.scratchpad import Scratchpad
from reasoner.star import STARS, Star
from reasoner.typed_toml import ConfigError, build, dotted, expect, flat, put, read
from rollouts.environment import INTERACTIVE
from rollouts.episode import POLICIES, Episode
from rollouts.request import Placement
from rollouts.score import SCORES, ScoreKind, refuse_key
from rollouts.tasks import SOURCES, ReasoningGym, Source, nearest
from search import SEARCHES, Adaptive, CotDecoding, Distinct, Force, find, marginal
from search.base import Sampling, Search
from search.sample import Sample
from verifiers import get


class Learning(Protocol):
    """How a model learns from its rollouts: `Learner` (policy gradients), or one of the kinds of `star.py`."""

    lr: float


@dataclass(frozen=True)
class Learner:
    """Policy updates by TRL."""

    lr: float = 1e-5  # at its peak: it falls linearly to 0 at the last step
    lr_warmup: int = 0  # steps over which it rises from 0 first: Adam's first steps are as large as its later ones
    loss: str = "dapo"  # one of LOSSES
    ratio: Literal["token", "sequence"] = "token"  # of the loss: sequence is GSPO's (with loss = "grpo") and LUSPO's
    kl: float = 0.0  # weight of the divergence from the base model, in nats per token
    lora: int = 0  # rank of LoRA adapters; 0 trains every weight
    mtp: float = 0.0  # weight of the loss of MTP modules, where the model has any
    importance: str = "token_truncate"  # token_truncate | token_mask | sequence_truncate | sequence_mask | none
    importance_max: float = 3.0  # cap on policy / sampler probability ratios
    micro_batches: int = 1  # pieces that a batch is cut into to save memory
    workers: int = 1  # of Ray Train, among which each batch is shared; 1: the driver itself
    max_grad_norm: float = 1.0
    router_replay: bool = (
        False  # the update uses the experts that the rollout used (engine.kind = "paged" records them)
    )
    balance_rate: float = 0.001  # step of the router bias towards equal load (models with our MoE)
    report_to: tuple[str, ...] = ()  # "tensorboard", "wandb": TRL's own


@dataclass(frozen=True)
class Evaluation:
    """Held-out accuracy before and after: one greedy path and n sampled ones per task."""

    tasks: int = 200
    n: int = 16  # sampled paths per task
    k: int = 8  # of pass@k, maj@k and marginal@k; at most n


@dataclass(frozen=True)
class Run:
    """The whole experiment."""

    name: str
    steps: int  # policy updates, or rounds of STaR
    tasks: Source = field(default_factory=ReasoningGym)
    base: Base = field(default_factory=Warmup)
    engine: Placement = field(default_factory=Placement)
    sampling: Sampling = field(default_factory=Sampling)
    search: Search = field(default_factory=Sample)
    score: ScoreKind | None = None  # guides the search in training; `verifier` is the answer key itself
    credit: Credit = field(default_factory=GRPO)
    length: Length = field(default_factory=Length)
    curriculum: Curriculum | None = None  # None: tasks in random order
    resample: int = 0  # how often a step may draw further tasks until tasks_per_step groups have contrast
    learner: Learning = field(default_factory=Learner)
    evaluate: Evaluation = field(default_factory=Evaluation)
    seed: int = 0
    tasks_per_step: int = 32
    max_lag: int = 0  # policy versions that rollouts may lag behind the learner; 0: synchronous and reproducible
    rollout_timeout: float = 1800.0  # seconds for a group: then it is dropped, or with max_lag = 0 the run stops
    token_budget: int = 0  # training ends with the step that has generated so many in all; 0: no limit
    policies: Mapping[str, Any] = field(default_factory=dict)  # of verifiers, by name
    verifier_workers: int = 2
    verify_timeout: float = 10.0  # seconds for one verdict
    checkpoint_every: int = 20  # steps
    out: str = "runs"
    cache: str = "cache"  # warmed-up and converted base models, by content hash


OPERATIONAL = (  # keys that a resumed run may change: none of them changes what is learned from what
    "cache",
    "checkpoint_every",
    "engine.kv_cache_gib",
    "name",
    "out",
    "rollout_timeout",
    "verifier_workers",
)


@dataclass(frozen=True)
class Method:
    """One way to answer a question, of several that are run side by side."""

    name: str
    search: Search = field(default_factory=Sample)
    score: ScoreKind | None = None  # default: the comparison's
    estimator: str = ""  # of `search.marginal`, that picks the answer among the paths; default: the search's own
    temperature: float | None = None  # default: sampling.temperature; 0 is greedy
    grow: bool = True  # to the budget; a search whose size is written (n, width ...) stays as it is


@dataclass(frozen=True)
class Comparison:
    """Searches side by side on the same held-out tasks: what `reasoner search` runs."""

    name: str
    methods: tuple[Method, ...]
    budget: int  # generated tokens a task, on average, that each method is grown to
    tasks: Source = field(default_factory=ReasoningGym)
    heldout: int = 200  # held-out tasks to answer
    sizing: int = 16  # training tasks on which the methods are grown to the budget
    export: int = 0  # training tasks that all methods search besides, whose trees are left as training data
    base: Base = field(default_factory=Warmup)
    engine: Placement = field(default_factory=Placement)
    sampling: Sampling = field(default_factory=Sampling)
    score: ScoreKind | None = None  # of every method that names none
    seed: int = 0
    policies: Mapping[str, Any] = field(default_factory=dict)
    verifier_workers: int = 2
    verify_timeout: float = 10.0
    out: str = "runs"
    cache: str = "cache"

    def run(self) -> Run:
        """The same as a run without a step: what loads tasks and opens engines."""
        names = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(Run)}
        same = {name: getattr(self, name) for name in names - {"score"}}
        return Run(steps=0, tasks_per_step=1, evaluate=Evaluation(tasks=self.heldout), **same)


LOSSES = ("dapo", "cispo", "grpo", "dr_grpo", "bnpo", "sapo", "luspo", "vespo")  # loss_type of TRL 1.16
BY_TOKEN = ("dapo", "cispo", "vespo")  # normalised by tokens: rows that only fill up a batch change nothing

UNGUIDED = (Sample, Adaptive, Distinct, CotDecoding, Force)  # searches that ask no score


class _Searches(dict[str, type]):
    """The searches by name; one that is not ours is looked for among installed packages."""

    def __missing__(self, name: str) -> type:
        return find(name)


KINDS: dict[Any, tuple[str, Mapping[str, type]]] = {
    Source: ("reasoning_gym", {**SOURCES, **INTERACTIVE}),
    Base: ("warmup", BASES | {"scratchpad": Scratchpad}),
    Search: ("sample", _Searches({**SEARCHES, **POLICIES})),
    ScoreKind: ("process", SCORES),
    Credit: ("grpo", CREDITS),
    Learning: ("policy", {"policy": Learner, **STARS}),
}


def load(path: Path, overrides: Sequence[str] = ()) -> Run:
    """The run described by a TOML file and `key.path=value` overrides (values in TOML's syntax, or bare strings)."""
    tree = read(path, overrides)
    if "methods" in tree:
        raise ConfigError(f"{path} compares searches ([[methods]]): use `reasoner search {path}`")
    run = build(Run, tree, KINDS)
    _cross_check(run)
    return run


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """As `load`, of a file with [[methods]]."""
    tree = read(path, overrides)
    if not tree.get("methods"):
        raise ConfigError(f"{path} has no [[methods]] to compare: see configs/search.toml, or use `reasoner eval`")
    for method in expect(tree["methods"], list, "methods"):
        table = method.get("search") if isinstance(method, dict) else None  # `_build` tells of wrong types
        if isinstance(table, dict) and getattr(SEARCHES.get(str(table.get("kind", "sample"))), "size", None) in table:
            method.setdefault("grow", False)
    comparison = build(Comparison, tree, KINDS)
    if comparison.sizing < 1 or comparison.heldout < 1:
        raise ConfigError(f"sizing = {comparison.sizing} and heldout = {comparison.heldout}: give at least 1 task each")
    _cross_check(comparison.run())
    _check_comparison(comparison)
    return comparison


def load_any(path: Path, overrides: Sequence[str] = ()) -> Run | Comparison:
    """Whichever the file describes."""
    kind = load_comparison if "methods" in read(path, overrides) else load
    return kind(path, overrides)


def resume(folder: Path, given: Path | None, overrides: Sequence[str] = ()) -> Run:
    """The run that `folder` holds, with overrides, which may change what OPERATIONAL names and nothing else.

    Args:
        given: a config file that is to describe the same run, or None.
    """
    try:
        tree = json.loads((folder / "config.json").read_text())
    except OSError:
        raise ConfigError(f"{folder} has no config.json: give the folder of a run, e.g. runs/quickstart") from None
    except ValueError as error:
        raise ConfigError(f"{folder}/config.json is damaged ({error}): restore it, or start the run anew") from None
    before = build(Run, tree, KINDS)
    if given is not None:
        now = load(given, overrides)
    else:
        for override in overrides:
            put(tree, override)
        now = build(Run, tree, KINDS)
        _cross_check(now)
    old, new = flat(to_dict(before)), flat(to_dict(now))
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    if refused := [key for key in changed if key not in OPERATIONAL]:
        told = ", ".join(f"{key} = {old.get(key)!r} in {folder}, now {new.get(key)!r}" for key in refused)
        raise ConfigError(
            f"a resumed run goes on as it was begun: {told}. Leave that out, or start a new run from its checkpoint "
            'with base.kind = "pretrained"'
        )
    return now


def _cross_check(run: Run) -> None:
    """Values that are each fine and cannot both be meant. Messages give both, and the remedy."""
    _check_least(run)
    sampling, engine, evaluate, learner = run.sampling, run.engine, run.evaluate, run.learner
    if run.length.overlong >= sampling.max_tokens:
        raise ConfigError(
            f"length.overlong = {run.length.overlong} leaves nothing unpunished of sampling.max_tokens = "
            f"{sampling.max_tokens}: lower it"
        )
    if evaluate.k > evaluate.n:
        raise ConfigError(f"evaluate.k = {evaluate.k} exceeds evaluate.n = {evaluate.n}: raise n or lower k")
    if sampling.max_tokens >= engine.max_model_len:
        raise ConfigError(
            f"sampling.max_tokens = {sampling.max_tokens} leaves no room for a prompt in engine.max_model_len = "
            f"{engine.max_model_len}: raise max_model_len or lower max_tokens"
        )
    if not 0 < sampling.temperature <= 2:
        raise ConfigError(
            f"sampling.temperature = {sampling.temperature} must be above 0, where all paths of a group are equal and "
            "none teaches anything, and at most 2: 1.0 is the model itself (evaluation runs its greedy pass by itself)"
        )
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"sampling.top_p = {sampling.top_p} must lie in (0, 1]: 1.0 is the model itself")
    if (engine.kind == "openai") != bool(engine.url) or bool(engine.url) != bool(engine.model):
        raise ConfigError(
            f"engine.kind = {engine.kind!r} with engine.url = {engine.url!r} and engine.model = {engine.model!r}: "
            "a server is named by all three, e.g. kind = 'openai', url = 'http://localhost:8000/v1', model = 'NAME'"
        )
    for offer in ("arithmetic", "top"):
        if getattr(sampling, offer) and offer not in engine.offers:
            raise ConfigError(
                f"sampling.{offer} = {getattr(sampling, offer)} with engine.kind = {engine.kind!r} and engine.gpus = "
                f"{engine.gpus:g}: it offers no such thing, use engine.kind = 'paged' or leave it out"
            )
    if run.score is not None and isinstance(run.search, UNGUIDED):
        raise ConfigError(
            f"score: {type(run.search).__name__} asks for no score: leave it out, or use search.kind = 'best_of', "
            "'beam' or another search that it guides"
        )
    check_search(run.search, run.score, Offered(sampling, engine.offers))
    if type(run.tasks) in INTERACTIVE.values() and not isinstance(run.search, Episode):
        raise ConfigError("the tasks answer back and the search does not listen: set search.kind = 'episode'")
    if isinstance(run.search, Episode) and run.search.context > engine.max_model_len:
        raise ConfigError(
            f"search.context = {run.search.context} exceeds engine.max_model_len = {engine.max_model_len}: lower it or "
            "raise max_model_len"
        )
    (_check_rounds if isinstance(learner, Star) else _check_policy)(run, learner)
    if not run.name or "/" in run.name or run.name.startswith("."):
        raise ConfigError(f"name = {run.name!r} names a folder under {run.out}/: use letters, digits, - and _")
    _check_policies(run.policies)


def _check_least(run: Run) -> None:
    """Each number for itself. No key of ours has a meaning below 0; tasks and verifiers read their own."""
    least = {"steps": 0, "max_lag": 0}  # 0 steps evaluates the base alone
    for key in (
        *least, "tasks_per_step", "verifier_workers", "checkpoint_every", "engine.count", "engine.max_num_seqs",
        "sampling.max_tokens", "evaluate.tasks", "evaluate.k", "base.batch", "base.hidden", "base.layers",
        "base.expert_width",
    ):  # fmt: skip
        table, _, name = key.rpartition(".")
        value = getattr(getattr(run, table) if table else run, name, 1)
        if value < least.get(key, 1):
            raise ConfigError(f"{key} = {value} is too small: give at least {least.get(key, 1)}")
    for key in ("verify_timeout", "rollout_timeout"):
        if getattr(run, key) <= 0:
            raise ConfigError(f"{key} = {getattr(run, key)} must be positive seconds")
    for name in ("blurt", "haste", "hinted", "longer", "guess", "slip"):
        if not 0 <= getattr(run.base, name, 0) <= 1:
            raise ConfigError(f"base.{name} = {getattr(run.base, name)} is a share: give a number between 0 and 1")
    signed = ("tasks.", "policies.", "sampling.temperature", "sampling.top_p")  # these have words of their own
    for key, value in flat(to_dict(run)).items():
        if isinstance(value, int | float) and value < 0 and not key.startswith(signed):
            raise ConfigError(f"{key} = {value} must not be negative")
    if run.seed >= 2**32:  # numpy's bound, which it tells only when the learner starts
        raise ConfigError(f"seed = {run.seed} is too large: give a number below {2**32}")


def _check_policy(run: Run, learner: Learner) -> None:
    sampling = run.sampling
    if learner.micro_batches < 1:
        raise ConfigError(f"learner.micro_batches = {learner.micro_batches} is too small: give at least 1")
    if learner.workers < 1:
        raise ConfigError(f"learner.workers = {learner.workers} is too small: give at least 1")
    if learner.lr_warmup >= run.steps > 0:
        raise ConfigError(
            f"learner.lr_warmup = {learner.lr_warmup} leaves none of steps = {run.steps} at the full rate: lower it"
        )
    if learner.micro_batches > 1 and learner.loss not in BY_TOKEN:
        raise ConfigError(
            f"learner.loss = {learner.loss!r} averages rows; learner.micro_batches = {learner.micro_batches} would "
            f"change that: use micro_batches = 1, or one of {', '.join(BY_TOKEN)}"
        )
    for reporter in learner.report_to:
        if reporter not in ("tensorboard", "wandb") or importlib.util.find_spec(reporter) is None:
            raise ConfigError(
                f"learner.report_to: {reporter!r} must be 'tensorboard' or 'wandb', and be installed (pip)"
            )
    if sampling.top_p < 1 and learner.importance.startswith("sequence"):
        raise ConfigError(
            f"sampling.top_p = {sampling.top_p} with learner.importance = {learner.importance!r}: sequence ratios "
            "against a truncated law are far from 1, use a token_ mode or top_p = 1"
        )
    if learner.importance not in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"):
        raise ConfigError(
            f"learner.importance = {learner.importance!r} must be token_truncate, token_mask, sequence_truncate, "
            "sequence_mask or none"
        )
    if learner.workers > 1:
        _check_workers(learner, run.engine)
    if learner.router_replay and run.engine.kind != "paged":
        raise ConfigError(
            f"learner.router_replay = true with engine.kind = {run.engine.kind!r}, which records no experts: use "
            "engine.kind = 'paged', or leave it out"
        )
    needs = {"luspo": "sequence", "grpo": learner.ratio, "sapo": learner.ratio}.get(learner.loss, "token")
    if learner.loss in LOSSES and learner.ratio != needs:
        raise ConfigError(
            f"learner.loss = {learner.loss!r} weighs tokens in a way that learner.ratio = {learner.ratio!r} does not "
            f"fit: set learner.ratio = {needs!r}, or take loss = 'grpo' (GSPO) or 'luspo' for ratio = 'sequence'"
        )
    if learner.loss not in LOSSES:
        raise ConfigError(f"learner.loss = {learner.loss!r} is not a loss of TRL 1.16{nearest(learner.loss, LOSSES)}")
    if isinstance(run.credit, MaxRL) and run.length.overlong:
        raise ConfigError(
            f"credit.kind = 'maxrl' divides by the mean reward, which length.overlong = {run.length.overlong} may turn "
            "negative: set overlong = 0"
        )
    alone = isinstance(run.credit, Process) or run.credit == ReinforcePP(group_baseline=False)
    if not alone and getattr(run.search, "n", 2) < 2:
        raise ConfigError(f"search.n = {run.search.n}: one path has no contrast to learn from, raise n")


def _check_rounds(run: Run, star: Star) -> None:
    try:
        star.check(run.steps)
    except ValueError as error:
        raise ConfigError(f"learner: {error}") from None
    unread = {"credit": GRPO(), "length": Length(), "curriculum": None, "resample": 0, "max_lag": 0}
    for key, default in unread.items():
        if getattr(run, key) != default:
            raise ConfigError(
                f"{key} shapes policy gradients and learner.kind = {to_dict(run)['learner']['kind']!r} has none: "
                "leave it out, or use learner.kind = 'policy'"
            )
    if star.rationalise and isinstance(run.search, Episode):
        raise ConfigError("the tasks answer back, a hint does not help to play them: set learner.rationalise = 0")
    rows = run.tasks_per_step * min(star.keep, max(getattr(run.search, "n", star.keep), star.rationalise))
    if rows < star.batch:
        raise ConfigError(
            f"learner.batch = {star.batch} cannot be filled: tasks_per_step = {run.tasks_per_step} problems keep at "
            f"most {rows} paths a round; raise tasks_per_step, search.n or learner.keep, or lower learner.batch"
        )


@dataclass(frozen=True)
class Offered:
    """What a search or a score asks of an engine before it starts."""

    sampling: Sampling
    offers: frozenset[str]


def check_search(search: Search, score: ScoreKind | None, engine: Offered, where: str = "") -> None:
    """ConfigError when the search lacks a score or the engine, or the score the engine, that it needs."""
    for key, check in (("score", score and score.check), ("search", lambda e: search.check(e, score))):
        try:
            if check:
                check(engine)
        except ValueError as error:
            raise ConfigError(f"{dotted(where, key)}: {error}") from None


def _check_comparison(comparison: Comparison) -> None:
    names = [method.name for method in comparison.methods]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"methods: two are called {twice!r}: give each its own name")
    most, budget = comparison.sampling.max_tokens, comparison.budget
    if budget < most:
        raise ConfigError(
            f"budget = {budget} is smaller than one path (sampling.max_tokens = {most}): raise it, or lower max_tokens"
        )
    if comparison.export < 0:
        raise ConfigError(f"export = {comparison.export}: give a number of training tasks, or 0 for none")
    if type(comparison.tasks) in INTERACTIVE.values():
        raise ConfigError("tasks: these answer back, and a search cannot take back what was said: use `reasoner eval`")
    offers = frozenset(comparison.engine.offers)
    for method in comparison.methods:
        where, search = f"methods.{method.name}", method.search
        if not method.name or "/" in method.name or method.name.startswith("."):
            raise ConfigError(f"methods: the name {method.name!r} names a file: use letters, digits, - and _")
        score = method.score or comparison.score
        sampling = at_temperature(comparison.sampling, method)
        if not 0 <= sampling.temperature <= 2:
            raise ConfigError(f"{where}.temperature = {sampling.temperature} must lie in 0 (greedy) to 2")
        try:
            refuse_key(score)
            marginal.require(method.estimator or search.method, search, offers)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        check_search(search, score, Offered(sampling, offers), where)
        smallest = dataclasses.replace(search, **{search.size: 1}) if hasattr(search, "size") else search
        if method.grow and (least := getattr(smallest, "responses", 1) * most) > budget:
            raise ConfigError(
                f"{where}: its smallest form ({smallest}) may generate {least} tokens a task (sampling.max_tokens = "
                f"{most} a path), budget = {budget}: raise the budget, or lower max_tokens or a knob of the search"
            )


def at_temperature(sampling: Sampling, method: Method) -> Sampling:
    """How a method draws tokens."""
    return sampling if method.temperature is None else dataclasses.replace(sampling, temperature=method.temperature)


def _check_workers(learner: Learner, engine: Placement) -> None:
    """A batch must mean the same however it is shared."""
    many = f"learner.workers = {learner.workers}"
    if learner.loss not in BY_TOKEN:
        raise ConfigError(
            f"learner.loss = {learner.loss!r} averages rows; {many} would change that: use 1, or one of "
            f"{', '.join(BY_TOKEN)}"
        )
    for key in ("lora", "mtp"):
        if getattr(learner, key):
            raise ConfigError(
                f"learner.{key} = {getattr(learner, key)} is for one worker: set it to 0, or workers to 1 ({many})"
            )
    if engine.kind != "vllm":
        raise ConfigError(f"{many} with engine.kind = {engine.kind!r}, which starts no Ray: use 'vllm', or one worker")


def _check_policies(policies: Mapping[str, Any]) -> None:
    for name, policy in policies.items():
        expect(policy, Mapping, f"policies.{name}")
        try:
            get(name, **policy)
        except ValueError as error:
            raise ConfigError(f"policies.{name}: {error}") from None


def to_dict(run: Run | Comparison) -> dict[str, Any]:
    """The resolved run with the `kind` of every strategy: what is written beside its results."""
    names = {cls: name for _, registry in KINDS.values() for name, cls in registry.items()}

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return {"kind": names[type(value)], **fields} if type(value) in names else fields
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(run)
