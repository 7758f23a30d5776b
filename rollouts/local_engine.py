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
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from rollouts.noise import Noise, draw
from rollouts.request import Request
from rollouts.writing import write
from search.base import END, Alternative, Ending, Offer, Sampling, Step, Trajectory, Until
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

    Example:
        engine = LocalEngine(model, tokenizer, Sampling(max_tokens=64))
        paths = await engine.extend(Trajectory(prompt=(5, 3, 9), seed=1), n=8)
    """

    offers: frozenset[Offer] = frozenset({"logprobs", "top", "arithmetic", "write"})

    def __init__(
        self, model: Any, tokenizer: Any, sampling: Sampling | None = None, *, version: int = 0, rows: int = 256
    ) -> None:
        self.sampling = sampling or Sampling()
        self._context = getattr(model.config, "max_position_embeddings", None) or 2**31
        self._decoder = _Decoder(model.eval(), tokenizer, version, rows)  # shared by all that `at` makes

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
        return write(self._decoder.tokenizer, path, text, turn=turn)

    async def extend(self, path: Trajectory, *, n: int = 1, until: Until = END) -> list[Trajectory]:
        """See `search.base.Engine`. The limit is `max_tokens` or what the model can still read, whichever is nearer."""
        if path.end is not None:
            raise ValueError(f"the path has ended (end={path.end!r}): extend only paths whose end is None")
        if not 0 < len(path.prompt) < self._context:
            raise ValueError(f"the prompt has {len(path.prompt)} tokens: give 1 to {self._context - 1} for this model")
        room = min(self.sampling.max_tokens - path.length, self._context - len(path.ids))
        request = Request.children(path, n, until, self.sampling, room)
        if room <= 0:  # the search wrote the rest, or `at` lowered the limit
            return [replace(path, end="length", seed=seed) for seed in request.seeds]
        noises = map(Noise, request.seeds, request.codes or [None] * n)
        rows = [_Row(request, seed, noise) for seed, noise in zip(request.seeds, noises, strict=True)]
        await self._decoder.decode(rows)
        return [self._grown(path, row) for row in rows]

    def _grown(self, path: Trajectory, row: _Row) -> Trajectory:
        """The path with the row's tokens. A character cut in half is left to the step that completes it."""
        whole = self._decoder.text([*path.ids[len(path.prompt) :], *row.ids])
        if row.end is None:
            whole = whole.rstrip("\ufffd")
        text = whole[len(path.text) :] if whole.startswith(path.text) else self._decoder.text(row.ids)
        spans = _spans(row.versions)
        step = Step(tuple(row.ids), tuple(row.logprobs), text, versions=spans, top=tuple(row.top), cached=row.cached)
        return path.grow(step, end=row.end, seed=row.seed)


@dataclass(eq=False)
class _Row:
    """One sequence while it is decoded."""

    request: Request
    seed: int
    noise: Noise
    cached: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # of the weights, per token
    top: list[tuple[Alternative, ...]] = field(default_factory=list)
    end: Ending | None = None


class _Decoder:
    """The model, the version of its weights, and the rows that wait for it."""

    def __init__(self, model: Any, tokenizer: Any, version: int, rows: int) -> None:
        self.version = version
        self.ledger = Ledger()
        self._model, self.tokenizer = model, tokenizer
        self._stops = _stops(model, tokenizer)
        self._rows = rows
        self._lock = threading.Lock()  # held for one forward pass, or while weights are written
        self._queue: list[tuple[_Row, asyncio.Future[None]]] = []
        self._worker: asyncio.Task[None] | None = None

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def load(self, tensors: Mapping[str, Tensor], version: int) -> None:
        own = self._model.state_dict().keys()
        assert own == tensors.keys(), f"load: these names are on one side only: {sorted(own ^ tensors.keys())[:5]}"
        with self._lock:
            self._model.load_state_dict(tensors)
            self.version = version

    async def decode(self, rows: list[_Row]) -> None:
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
                await asyncio.to_thread(self._batch, [row for row, _ in batch])
            except Exception as caught:  # belongs to those who asked, not to this task
                error = caught
            for future in (future for _, future in batch if not future.done()):
                future.set_exception(error) if error else future.set_result(None)

    @torch.inference_mode()
    def _batch(self, rows: list[_Row]) -> None:
        """Decode rows to their ends. A row that is complete leaves the batch."""
        if not rows:
            return
        logits_BV, mask_BT, version, cache = self._prefill(rows)
        while True:
            law_BV = _law(logits_BV, [row.request.sampling for row in rows])
            tokens_B = _draw(law_BV, rows)
            logprobs_B = law_BV.gather(1, tokens_B[:, None])[:, 0]
            self._note_top(rows, law_BV, tokens_B.tolist())
            keep = self._append(rows, tokens_B.tolist(), logprobs_B.tolist(), version)
            if not keep:
                return
            if len(keep) < len(rows):
                rows, tokens_B, mask_BT = [rows[i] for i in keep], tokens_B[keep], mask_BT[keep]
                cache.batch_select_indices(torch.tensor(keep, device=mask_BT.device))
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
            logits_BV, version, cache = self._forward(tokens_B[:, None], mask_BT, cache)

    def _prefill(self, rows: list[_Row]) -> tuple[Tensor, Tensor, int, Any]:
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

    def _append(self, rows: list[_Row], tokens: list[int], logprobs: list[float], version: int) -> list[int]:
        """Give each row its token. Returns the indices of the rows that go on."""
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.versions.append(version)
        self.ledger += Ledger(generated=len(rows))
        return [i for i, row in enumerate(rows) if not self._complete(row)]

    def _note_top(self, rows: list[_Row], law_BV: Tensor, tokens: list[int]) -> None:
        """Record the likeliest tokens for the rows that asked, the sampled one among them."""
        most = max(row.request.sampling.top for row in rows)
        if not most:
            return
        top_BK, ids_BK = law_BV.topk(min(most, law_BV.shape[1]))
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            wanted = row.request.sampling.top
            pairs = list(zip(ids_BK[i, :wanted].tolist(), top_BK[i, :wanted].tolist(), strict=True))
            if wanted and token not in ids_BK[i, :wanted]:
                pairs.append((token, law_BV[i, token].item()))
            row.top.append(
                tuple(Alternative(t, lp, self.text([t]), t in self._stops) for t, lp in pairs if lp > -math.inf)
            )

    def _complete(self, row: _Row) -> bool:
        """Whether the row's extension is done. Sets `end` when the answer is done, too."""
        request = row.request
        if row.ids[-1] in self._stops:
            row.end = "stop"
        elif len(row.ids) == request.room:
            row.end = "length"
        elif request.until.kind == "tokens":
            return len(row.ids) == request.until.tokens
        elif request.until.kind == "step":
            tail = 4 * len(request.sampling.step) + 4  # a character is at most four tokens (its bytes)
            return request.sampling.step in self.text(row.ids[-tail:])
        return row.end is not None


def _law(logits_BV: Tensor, sampling: list[Sampling]) -> Tensor:
    """Log-probabilities that each row samples from; those at temperature 1 for a greedy row."""
    heat_B = logits_BV.new_tensor([each.temperature or 1.0 for each in sampling])
    law_BV = (logits_BV / heat_B[:, None]).log_softmax(-1)
    cut_B = torch.tensor([each.top_p < 1 and each.temperature > 0 for each in sampling], device=law_BV.device)
    if cut_B.any():
        top_p_B = law_BV.new_tensor([each.top_p for each in sampling])
        law_BV = torch.where(cut_B[:, None], _nucleus(law_BV, top_p_B), law_BV)
    return law_BV


def _draw(law_BV: Tensor, rows: list[_Row]) -> Tensor:
    """One token per row."""
    drawn_B = draw(law_BV, [row.noise for row in rows])
    greedy_B = torch.tensor([row.request.sampling.temperature == 0 for row in rows], device=law_BV.device)
    return torch.where(greedy_B, law_BV.argmax(-1), drawn_B)


def _nucleus(logprobs_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Keep the fewest tokens that reach top_p together, and renormalise (Holtzman et al. 2020, arXiv:1904.09751)."""
    sorted_BV, order_BV = logprobs_BV.sort(-1, descending=True)
    before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
    dropped_BV = torch.empty_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= top_p_B[:, None])
    return logprobs_BV.masked_fill(dropped_BV, -torch.inf).log_softmax(-1)


def _left_padded(prefixes: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask. The padding is token 0, which the mask hides."""
    width = max(map(len, prefixes))
    ids_PT = torch.tensor([(0,) * (width - len(ids)) + ids for ids in prefixes], device=device)
    mask_PT = torch.tensor([(0,) * (width - len(ids)) + (1,) * len(ids) for ids in prefixes], device=device)
    return ids_PT, mask_PT


def _stops(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer: the tokenizer's and those of the model's generation config (an id, a list, or none)."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


def _spans(versions: list[int]) -> tuple[tuple[int, int, int], ...]:
    """Runs of equal versions as (version, start, end)."""
    spans, start = [], 0
    for version, run in groupby(versions):
        end = start + len(list(run))
        spans.append((version, start, end))
        start = end
    return tuple(spans)
