"""An engine in this process: any Hugging Face causal language model, without Ray or vLLM.

For debugging and fast tests: the Engine interface on one model and one thread. Calls of `extend` that wait at the same
time are decoded as one left-padded batch with a KV cache, in a worker thread, so that the event loop goes on. Knows
nothing of tasks, verifiers or chat templates: token ids in, token ids and log-probabilities out.
Neighbours: `search.base` has the interface; `cluster` and `vllm_engine` are the same at scale.

Letters of shapes: B rows, P distinct prefixes, T tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from rollouts.noise import Noise
from rollouts.request import Request
from rollouts.row import Row, Words, draw_all, law, note_top
from rollouts.threads import threads_for
from rollouts.writing import write
from search.base import END, Offer, Sampling, Step, Trajectory, Until
from search.tree import Ledger


class LocalEngine:
    """Extends paths with a model in this process.

    How a seed decides the tokens: `noise`. Log-probabilities are of the distribution that was sampled from, after
    temperature and top-p; a greedy token (temperature 0) has its log-probability at temperature 1.

    Args:
        model: a causal language model for this engine alone (it is put into eval mode; `load` writes into it).
        tokenizer: its `decode` and `eos_token_id` are used; by `write` also `encode` and the chat template.
        version: of the weights that `model` has now.
        rows: sequences decoded at once.
        decoder: another way to run the model; padded batches when None.

    Example:
        engine = LocalEngine(model, tokenizer, Sampling(max_tokens=64))
        paths = await engine.extend(Trajectory(prompt=(5, 3, 9), seed=1), n=8)
    """

    offers: frozenset[Offer] = frozenset({"logprobs", "top", "arithmetic", "write"})

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling | None = None,
        *,
        version: int = 0,
        rows: int = 256,
        decoder: Decoder | None = None,
    ) -> None:
        self.sampling = sampling or Sampling()
        self._words = Words(model, tokenizer)
        # shared by all that `at` makes
        self._decoder = decoder or PaddedDecoder(model.eval(), self._words, version, rows)

    @property
    def version(self) -> int:
        return self._decoder.version

    @property
    def ledger(self) -> Ledger:
        """Tokens sampled and read so far. Equal prefixes in one batch are read once, the others count as cached."""
        return self._decoder.ledger

    def at(self, **changes: float | int | str) -> LocalEngine:
        """The same model, queue and counters with other sampling settings."""
        other = copy.copy(self)
        other.sampling = replace(self.sampling, **changes)
        return other

    def load(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights, named as in the model's `state_dict`.

        What is being decoded goes on under the new ones, and the version spans of its step tell from which token.
        """
        self._decoder.load(dict(tensors), version)

    def write(self, path: Trajectory, text: str, *, turn: bool = False) -> Trajectory:
        """See `search.base.Engine`. Raises ValueError for text that the vocabulary cannot spell."""
        return write(self._words.tokenizer, path, text, turn=turn)

    def decode(self, ids: Sequence[int]) -> str:
        return self._words.text(ids)

    async def extend(self, path: Trajectory, *, n: int = 1, until: Until = END) -> list[Trajectory]:
        """See `search.base.Engine`. The limit is `max_tokens` or what the model can still read, whichever is nearer."""
        if path.end is not None:
            raise ValueError(f"the path has ended (end={path.end!r}): extend only paths whose end is None")
        if not 0 < len(path.prompt) < self._decoder.context:
            raise ValueError(
                f"the prompt has {len(path.prompt)} tokens: give 1 to {self._decoder.context - 1} for this model"
            )
        room = min(self.sampling.max_tokens - path.length, self._decoder.context - len(path.ids))
        request = Request.children(path, n, until, self.sampling, room)
        if room <= 0:  # the search wrote the rest, or `at` lowered the limit
            return [replace(path, end="length", seed=seed) for seed in request.seeds]
        recorded = sum(len(step.experts) for step in path.steps)
        noises = map(Noise, request.seeds, request.codes or [None] * n)
        rows = [Row(request, seed, noise, recorded) for seed, noise in zip(request.seeds, noises, strict=True)]
        try:
            await self._decoder.decode(rows)
        except asyncio.CancelledError:
            for row in rows:
                row.wanted = False
            raise
        return [self._grown(path, row) for row in rows]

    def _grown(self, path: Trajectory, row: Row) -> Trajectory:
        """The path with the row's tokens. A character cut in half is left to the step that completes it."""
        whole = self._words.text([*path.ids[len(path.prompt) :], *row.ids])
        if row.end is None:
            whole = whole.rstrip("\ufffd")
        text = whole[len(path.text) :] if whole.startswith(path.text) else self._words.text(row.ids)
        spans = _spans(row.versions)
        rest = dict(top=tuple(row.top), cached=row.cached, experts=row.experts)
        step = Step(tuple(row.ids), tuple(row.logprobs), text, versions=spans, **rest)
        return path.grow(step, end=row.end, seed=row.seed)


class Decoder(Protocol):
    """What turns rows into tokens: a model, its weights' version, and a way to batch."""

    version: int
    ledger: Ledger
    context: int  # tokens that a sequence can have

    def load(self, tensors: Mapping[str, Tensor], version: int) -> None: ...

    async def decode(self, rows: list[Row]) -> None:
        """Returns when every row is complete."""
        ...


class PaddedDecoder:
    """The model, the version of its weights, and the rows that wait for it."""

    def __init__(self, model: Any, words: Words, version: int, rows: int) -> None:
        self.version = version
        self.ledger = Ledger()
        self.context = getattr(model.config, "max_position_embeddings", None) or 2**31
        self._model, self._words = model, words
        self._rows = rows
        self._lock = threading.Lock()  # held for one forward pass, or while weights are written
        self._queue: list[tuple[Row, asyncio.Future[None]]] = []
        self._worker: asyncio.Task[None] | None = None

    def load(self, tensors: Mapping[str, Tensor], version: int) -> None:
        own = self._model.state_dict().keys()
        assert own == tensors.keys(), f"load: these names are on one side only: {sorted(own ^ tensors.keys())[:5]}"
        with self._lock:
            self._model.load_state_dict(tensors)
            self.version = version

    async def decode(self, rows: list[Row]) -> None:
        """Returns when every row is complete."""
        loop = asyncio.get_running_loop()
        asked = [(row, loop.create_future()) for row in rows]
        self._queue += asked
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        await asyncio.gather(*(future for _, future in asked))

    async def _work(self) -> None:
        while self._queue:
            await asyncio.sleep(0)  # one turn of the loop: whoever is ready to ask joins this batch
            waiting = [pair for pair in self._queue if not pair[1].done()]  # the others were cancelled
            batch, self._queue = waiting[: self._rows], waiting[self._rows :]
            error = None
            try:
                await asyncio.to_thread(self._run, [row for row, _ in batch])
            except Exception as caught:  # belongs to those who asked, not to this task
                error = caught
            for future in (future for _, future in batch if not future.done()):
                future.set_exception(error) if error else future.set_result(None)

    def _run(self, rows: list[Row]) -> None:
        with threads_for(self._model):
            self._batch(rows)

    @torch.inference_mode()
    def _batch(self, rows: list[Row]) -> None:
        """Decode rows to their ends. A row that is complete leaves the batch."""
        if not rows:
            return
        logits_BV, mask_BT, version, cache = self._prefill(rows)
        while True:
            law_BV = law(logits_BV, [row.request.sampling for row in rows])
            tokens_B = draw_all(law_BV, rows)
            logprobs_B = law_BV.gather(1, tokens_B[:, None])[:, 0]
            note_top(rows, law_BV, tokens_B.tolist(), self._words)
            keep = self._append(rows, tokens_B.tolist(), logprobs_B.tolist(), version)
            if not keep:
                return
            if len(keep) < len(rows):
                rows, tokens_B, mask_BT = [rows[i] for i in keep], tokens_B[keep], mask_BT[keep]
                cache.batch_select_indices(torch.tensor(keep, device=mask_BT.device))
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
            logits_BV, version, cache = self._forward(tokens_B[:, None], mask_BT, cache)

    def _prefill(self, rows: list[Row]) -> tuple[Tensor, Tensor, int, Any]:
        """Read each distinct prefix once and hand its cache to every row that begins with it."""
        prefixes = {ids: i for i, ids in enumerate(dict.fromkeys(row.request.ids for row in rows))}
        ids_PT, mask_PT = _left_padded(list(prefixes), self._model.device)
        logits_PV, version, cache = self._forward(ids_PT, mask_PT, None)
        owner = [prefixes[row.request.ids] for row in rows]
        cache.batch_select_indices(torch.tensor(owner, device=ids_PT.device))
        for i, row in enumerate(rows):
            row.cached = len(row.request.ids) if owner[i] in owner[:i] else 0
        self.ledger += Ledger(prefilled=int(mask_PT.sum()), cached=sum(row.cached for row in rows))
        return logits_PV[owner], mask_PT[owner], version, cache

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor, cache: Any) -> tuple[Tensor, int, Any]:
        """Logits after the last token, the version of the weights that made them, the cache."""
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        with self._lock:
            out = self._model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return out.logits[:, -1].float(), self.version, out.past_key_values

    def _append(self, rows: list[Row], tokens: list[int], logprobs: list[float], version: int) -> list[int]:
        """Give each row its token. Returns the indices of the rows that go on: unfinished, and wanted."""
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            row.append(token, logprob, version)
        self.ledger += Ledger(generated=len(rows))
        return [i for i, row in enumerate(rows) if not row.complete(self._words) and row.wanted]


def _left_padded(prefixes: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask. The padding is token 0, which the mask hides."""
    width = max(map(len, prefixes))
    ids_PT = torch.tensor([(0,) * (width - len(ids)) + ids for ids in prefixes], device=device)
    mask_PT = torch.tensor([(0,) * (width - len(ids)) + (1,) * len(ids) for ids in prefixes], device=device)
    return ids_PT, mask_PT


def _spans(versions: list[int]) -> tuple[tuple[int, int, int], ...]:
    """Runs of equal versions as (version, start, end)."""
    spans, start = [], 0
    for version, run in groupby(versions):
        end = start + len(list(run))
        spans.append((version, start, end))
        start = end
    return tuple(spans)
