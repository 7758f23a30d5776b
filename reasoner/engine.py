"""Opens the engine that a config asks for, and the one that serves a score's own model.

Neighbours: `rollouts.cluster` (vLLM on Ray), `paged_engine`, `rollouts.local_engine`. Heavy libraries are imported
where they are first needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from reasoner.config import ConfigError, Run
from rollouts.roll_out import encode
from rollouts.score import ScoreKind
from verifiers.base import Task


@contextmanager
def open_engine(run: Run, checkpoint: Path, tokenizer: Any, ray: str) -> Iterator[Any]:
    if run.engine.kind == "local":
        from reasoner.model import load
        from rollouts.local_engine import LocalEngine

        yield LocalEngine(load(checkpoint, _dtype(run)), tokenizer, run.sampling, rows=run.engine.max_num_seqs)
        return
    if run.engine.kind == "openai":
        from rollouts.openai_engine import OpenAIEngine

        place = run.engine
        key = Path(place.key_file).read_text().strip() if place.key_file else ""
        options = {"context": place.max_model_len, "key": key, "at_once": place.max_num_seqs}
        yield OpenAIEngine(place.url, place.model, tokenizer, run.sampling, **options)
        return
    if run.engine.kind == "paged":
        yield _paged(run, checkpoint, tokenizer)
        return
    from rollouts.cluster import Engines, cluster

    with cluster(ray):
        engines = Engines.start(checkpoint, run.engine, run.sampling, run.seed)
        try:
            yield engines
        finally:
            engines.stop()


def _paged(run: Run, checkpoint: Path, tokenizer: Any) -> Any:
    from reasoner.model import load
    from reasoner.paged_engine import paged_engine

    model = load(checkpoint, _dtype(run)).to("cuda" if run.engine.gpus else "cpu")
    return paged_engine(
        model,
        tokenizer,
        run.sampling,
        rows=run.engine.max_num_seqs,
        context=run.engine.max_model_len,
        cache_gib=run.engine.kv_cache_gib,
        record=getattr(run.learner, "router_replay", False),
    )


def _dtype(run: Run) -> Any:
    import torch

    return getattr(torch, run.engine.dtype)


def require_room(run: Run, tokenizer: Any, tasks: Sequence[Task]) -> None:
    try:
        longest = max(len(encode(tokenizer, task)) for task in tasks)
    except Exception as error:  # what the tokenizers library raises has no class of its own
        raise ConfigError(
            f"the base model's tokenizer cannot spell a question or learner.hint ({error}): word them otherwise"
        ) from None
    if longest + run.sampling.max_tokens > run.engine.max_model_len:
        raise ConfigError(
            f"the longest prompt has {longest} tokens and sampling.max_tokens = {run.sampling.max_tokens}, more than "
            f"engine.max_model_len = {run.engine.max_model_len}: raise it to {longest + run.sampling.max_tokens}"
        )


@contextmanager
def scoring_engine(run: Run, score: ScoreKind | None, searched: Any, tokenizer: Any, ray: str) -> Iterator[Any]:
    """The engine that a score reads: the one that is searched, or one more for a score with a model of its own.

    That model reads the searched one's token ids, so both must have the same vocabulary.
    """
    checkpoint = Path(score.checkpoint) if score is not None and score.checkpoint else None
    if checkpoint is None:
        yield searched
        return
    if not (checkpoint / "config.json").is_file():
        raise ConfigError(f"score.checkpoint = {str(checkpoint)!r} has no config.json: give a checkpoint's folder")
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(checkpoint)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"score.checkpoint = {str(checkpoint)!r} has another vocabulary than the model that is searched: train it "
            "from that model (`reasoner prm train`)"
        )
    kind = "local" if run.engine.kind == "openai" else run.engine.kind  # a server serves its own model
    placement = replace(run.engine, count=1, kind=kind)
    with open_engine(replace(run, engine=placement), checkpoint, own, ray) as engine:
        yield engine
