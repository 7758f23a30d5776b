"""An engine in this process for our own model: continuous batching over the paged latent cache, on the kernels.

Needs torch and transformers alone. Rows join and leave between two tokens. Rows with the same tokens so far sit in one
seat and are computed once, until they draw different ones; then they share their full pages. What is given back is
found again by whoever begins with the same tokens; where pages run out, the youngest rows give way and are read again
later. On a GPU one decode step is one CUDA graph per batch size.
Knows nothing of tasks, searches or learning. Neighbours: `rollouts.local_engine` is the front (extend, at, write) and
the same for any other model; `paged_model` runs the model; `paged_books` says who has which page.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reasoner import kernels
from reasoner.kernels.dispatch import target_of
from reasoner.model import ReasonerForCausalLM
from reasoner.paged_books import Pages
from reasoner.paged_model import PagedCache, decode, one_more, read, whole
from rollouts.local_engine import LocalEngine
from rollouts.row import Row, Words, draw_all, law, note_top
from rollouts.threads import threads_for
from search.base import Sampling
from search.tree import Ledger

PREFILL = 8192  # tokens of prompts read in one go, padding included
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

_log = logging.getLogger("reasoner.paged_engine")


def paged_engine(
    model: ReasonerForCausalLM,
    tokenizer: Any,
    sampling: Sampling | None = None,
    *,
    version: int = 0,
    rows: int = 256,
    context: int | None = None,
    cache_gib: float = 0.5,
    page: int = 16,
    record: bool = False,
) -> LocalEngine:
    """The engine of `model`, which is then for it alone.

    A token is drawn from nothing but the row's logits and its seed, so that a path is the same in any batch but for the
    rounding of its logits: on the CPU by `rollouts.noise`, so that it is the same on every engine; on a GPU, where all
    rows have one temperature and no top-p, alternatives or codes, by `kernels.sample`, which has a noise of its own.

    Args:
        rows: sequences decoded at once. context: tokens of prompt and response together; default: all the model reads.
        cache_gib: size of the latent cache. Raises ValueError where it does not hold one sequence of `context`.
        page: tokens of a page. Small ones share more, large ones need shorter tables.
        record: put the experts that read each token into `Step.experts`.
    """
    if not isinstance(model, ReasonerForCausalLM):
        raise ValueError(
            f"the paged engine runs checkpoints of the deepseek_v3 format, not {type(model).__name__}: use kind 'local'"
        )
    words = Words(model, tokenizer)
    decoder = PagedDecoder(
        model.eval(), words, version=version, rows=rows, context=context, cache_gib=cache_gib, page=page, record=record
    )
    return LocalEngine(model, tokenizer, sampling, decoder=decoder)


@dataclass(eq=False)
class _Asked:
    """A row, and whom to tell when it is complete."""

    row: Row
    done: asyncio.Future[None]

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.row.request.ids, *self.row.ids)


@dataclass(eq=False)
class _Seat:
    """Rows whose tokens are the same so far, and their pages."""

    asked: list[_Asked]
    pages: list[int]
    written: int  # tokens whose latents are in the cache
    pure: bool = True  # all of them under the weights of now


@dataclass(eq=False)
class _New:
    """A seat whose tokens are to be read, and how many were found in the cache."""

    seat: _Seat
    ids: tuple[int, ...]
    past: int


class PagedDecoder:
    """The model, its cache, the rows in it and those that wait. One thread at a time runs `_drain`."""

    def __init__(
        self,
        model: ReasonerForCausalLM,
        words: Words,
        *,
        version: int,
        rows: int,
        context: int | None,
        cache_gib: float,
        page: int,
        record: bool,
    ) -> None:
        self.version, self.ledger = version, Ledger()
        self.context = min(context or 2**31, model.config.max_position_embeddings)
        table = -(-self.context // page)
        bytes_each = page * PagedCache.token_bytes(model)
        count = int(cache_gib * 2**30) // bytes_each
        if count < table:
            raise ValueError(
                f"a latent cache of {cache_gib} GiB holds {count * page} tokens, not one sequence of {self.context}: "
                f"give at least {table * bytes_each / 2**30:.2g} GiB, or a shorter context"
            )
        count = min(count, rows * table)
        self._model, self._words, self._rows, self._table = model, words, rows, table
        self._pages, self._cache = Pages(count, page), PagedCache(model, count, page, record=record)
        self._seats: list[_Seat] = []  # the oldest first
        self._queue: deque[_Asked] = deque()
        self._lock = threading.Lock()  # held for one token of every row, or while weights are written
        self._worker: asyncio.Task[None] | None = None
        self._graphs = StepGraphs(model, self._cache, table) if model.device.type == "cuda" else None

    def load(self, tensors: Mapping[str, Tensor], version: int) -> None:
        own = self._model.state_dict().keys()
        assert own == tensors.keys(), f"load: these names are on one side only: {sorted(own ^ tensors.keys())[:5]}"
        with self._lock:
            self._model.load_state_dict(tensors)
            self.version = version
            self._pages.forget()
            for seat in self._seats:
                seat.pure = False

    async def decode(self, rows: list[Row]) -> None:
        """Returns when every row is complete. Raises ValueError for a token that the model does not have."""
        vocabulary = self._model.config.vocab_size
        for ids in {row.request.ids for row in rows}:
            if not 0 <= min(ids) <= max(ids) < vocabulary:
                raise ValueError(f"a path has token {max(ids)} (or {min(ids)}): this model knows 0 to {vocabulary - 1}")
        loop = asyncio.get_running_loop()
        asked = [_Asked(row, loop.create_future()) for row in rows]
        self._queue.extend(asked)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work(loop))
        await asyncio.gather(*(each.done for each in asked))

    async def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._queue:
            await asyncio.sleep(0)  # one turn of the loop: whoever is ready to ask joins the first prefill
            try:
                await asyncio.to_thread(self._drain, loop)
            except BaseException as error:  # a mistake of ours: nobody may wait for ever
                _settle([*(each for seat in self._seats for each in seat.asked), *self._queue], error)
                raise

    @torch.inference_mode()
    def _drain(self, loop: asyncio.AbstractEventLoop) -> None:
        """Decode until nobody waits. Rows that join meanwhile are let in between two tokens."""
        with threads_for(self._model):
            while self._queue or self._seats:
                with self._lock:
                    complete, error = self._turn()
                if complete:
                    loop.call_soon_threadsafe(_settle, complete, error)

    # --- one turn

    def _turn(self) -> tuple[list[_Asked], Exception | None]:
        """One more token for every row, and the first of those let in. Returns rows that are done, or that failed."""
        for seat in list(self._seats):
            self._leave(seat, [each for each in seat.asked if each.done.done()], recorded=False)  # cancelled
        self._grow()
        old, new = list(self._seats), self._admit()
        self._seats += [each.seat for each in new]
        seats, everybody = list(self._seats), [each for seat in self._seats for each in seat.asked]
        if not seats:
            return [], None
        try:
            logits_BV = self._read(old, new)
            for seat in old:
                seat.written += 1
            for each in new:
                self._pages.remember(each.ids, each.seat.pages)
            return self._append(seats, logits_BV), None
        except Exception as error:  # belongs to those who asked, not to this thread
            for seat in list(self._seats):
                seat.pure = False  # what its pages hold is not to be found
                self._leave(seat, seat.asked, recorded=False)
            return everybody, error

    def _read(self, old: list[_Seat], new: list[_New]) -> Tensor:
        """Logits after one more token of each old seat, and after the beginning of each new one."""
        next_tokens, device = self._next_tokens(old), self._model.device
        if not new:
            if self._graphs:
                return self._graphs(*next_tokens)
            return decode(self._model, self._cache, *next_tokens)
        parts = [one_more(*(t.to(device) for t in next_tokens))] if old else []
        begun = whole(
            self._cache,
            [each.ids for each in new],
            [each.seat.pages for each in new],
            [each.past for each in new],
        )
        return read(self._model, self._cache, *parts, begun)

    def _next_tokens(self, seats: list[_Seat]) -> tuple[Tensor, ...]:
        """What `paged_model.one_more` takes, on the CPU."""
        size, written = self._pages.size, [seat.written for seat in seats]
        width = self._table if self._graphs else max((len(seat.pages) for seat in seats), default=0)
        table_BX = np.zeros((len(seats), width), dtype=np.int32)
        for row, seat in zip(table_BX, seats, strict=True):
            row[: len(seat.pages)] = seat.pages
        slots = [seat.pages[w // size] * size + w % size for seat, w in zip(seats, written, strict=True)]
        return (
            torch.tensor([seat.asked[0].row.ids[-1] for seat in seats]),
            torch.tensor(written),
            torch.tensor(slots),
            torch.from_numpy(table_BX),
            torch.tensor(written, dtype=torch.int32) + 1,
        )

    def _append(self, seats: list[_Seat], logits_BV: Tensor) -> list[_Asked]:
        """Draw a token for each row. Returns the rows that are complete, which have left."""
        rows = [each.row for seat in seats for each in seat.asked]
        owners = [i for i, seat in enumerate(seats) for _ in seat.asked]
        tokens, logprobs = draw(logits_BV, rows, self._words, owners)
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            row.append(token, logprob, self.version)
        self.ledger += Ledger(generated=len(rows))
        complete, forks = [], []
        for seat in seats:
            ended = [each for each in seat.asked if each.row.complete(self._words)]
            self._leave(seat, ended)
            complete += ended
            forks += self._part(seat)
        if forks:
            self._cache.copy(*map(list, zip(*forks, strict=True)))
        return complete

    # --- who sits where

    def _admit(self) -> list[_New]:
        """Seats for those who wait, as many as rows, pages and one prefill take. Their pages are theirs already.

        One page for every row is left alone, so that those who sit can go on for a while. Nobody is let in before an
        eighth of the rows, or room for all who wait, is free: a pass that reads prompts costs more than one that does
        not.
        """
        new: dict[tuple[int, ...], _New] = {}
        seated, size = sum(len(seat.asked) for seat in self._seats), self._pages.size
        if seated and self._rows - seated < min(len(self._queue), self._rows // 8):
            return []
        longest = 0
        while self._queue and seated < self._rows:
            asked = self._queue[0]
            if asked.done.done():  # cancelled
                self._queue.popleft()
                continue
            ids = asked.ids
            known = ids in new
            if not known:
                shared = self._pages.find(ids[:-1])  # the last token is read in any case: its logits are needed
                longest, count = max(longest, len(ids)), -(-len(ids) // size)
                wanted = count - len(shared) + self._pages.idle(shared)
                fits = (len(new) + 1) * longest <= PREFILL or not new
                if not fits or self._pages.available < wanted + (seated + 1 if seated else 0):
                    break
                for page in shared:
                    self._pages.share(page)
                pages = shared + [self._pages.take() for _ in range(count - len(shared))]
                new[ids] = _New(_Seat([], pages, written=len(ids)), ids, past=len(shared) * size)
                self.ledger += Ledger(prefilled=len(ids) - new[ids].past)
            elif self._pages.available < seated + 1:
                break
            self._queue.popleft()
            new[ids].seat.asked.append(asked)
            if not asked.row.ids:  # not one that had to give way
                asked.row.cached = len(ids) if known else new[ids].past
                self.ledger += Ledger(cached=asked.row.cached)
            seated += 1
        return list(new.values())

    def _part(self, seat: _Seat) -> list[tuple[int, int]]:
        """A seat of its own for the rows that drew another token than the first one. Returns pages to copy: from, to.

        The page that is not full becomes each one's own. Where there is none, the rows wait.
        """
        if len(seat.asked) < 2:
            return []
        branches: dict[int, list[_Asked]] = {}
        for asked in seat.asked:
            branches.setdefault(asked.row.ids[-1], []).append(asked)
        (seat.asked, *others), forks = branches.values(), []
        full, rest = divmod(seat.written, self._pages.size)
        for asked in others:
            if rest and not self._pages.available:
                self._wait(asked)
                continue
            pages = seat.pages[:full]
            for page in pages:
                self._pages.share(page)
            if rest:
                pages.append(self._pages.take())
                forks.append((seat.pages[full], pages[full]))
            self._seats.append(_Seat(asked, pages, seat.written, seat.pure))
        return forks

    def _grow(self) -> None:
        """A page for every seat whose last one is full. Where there is none, the youngest gives way."""
        for seat in list(self._seats):
            if seat.written < len(seat.pages) * self._pages.size or seat not in self._seats:
                continue
            while not self._pages.available:
                youngest = self._seats[-1]
                self._wait(youngest.asked)
                self._leave(youngest, youngest.asked, recorded=False)
                if youngest is seat:
                    break
            else:
                seat.pages.append(self._pages.take())

    def _wait(self, asked: list[_Asked]) -> None:
        """They are the first to be let in again, and read again."""
        self._queue.extendleft(reversed(asked))

    def _leave(self, seat: _Seat, gone: list[_Asked], *, recorded: bool = True) -> None:
        """Some of a seat's rows leave, with what was recorded of their experts. Nobody's seat is given back."""
        if not gone:
            return
        size, ids = self._pages.size, gone[0].ids[: seat.written]
        for row in (each.row for each in gone if recorded):
            start = row.recorded // self._record_bytes
            slots = [seat.pages[i // size] * size + i % size for i in range(start, seat.written)]
            row.experts = self._cache.experts_at(slots)
        left = set(gone)
        seat.asked = [each for each in seat.asked if each not in left]
        if not seat.asked:
            if seat.pure:
                self._pages.remember(ids, seat.pages)
            self._pages.give_back(seat.pages)
            self._seats.remove(seat)

    @property
    def _record_bytes(self) -> int:
        """Of the expert ids of one token."""
        return 2 * self._model.config.num_hidden_layers * self._model.config.num_experts_per_tok


def draw(
    logits_BV: Tensor, rows: list[Row], words: Words, owners: list[int] | None = None
) -> tuple[list[int], list[float]]:
    """A token of each row and its log-probability under the law it was drawn from.

    owners: which logits are whose, where rows share them.
    """
    if len(logits_BV) < len(rows):
        logits_BV = logits_BV[owners]
    settings = [row.request.sampling for row in rows]
    heats = {each.temperature for each in settings}
    if target_of(logits_BV) and len(heats) == 1 and all(map(_plain, rows)):
        seeds_B = _seeds([row.seed for row in rows], [len(row.ids) for row in rows]).to(logits_BV.device)
        tokens_B, logprobs_B = kernels.sample(logits_BV, seeds_B, heats.pop())
    else:
        law_BV = law(logits_BV, settings)
        tokens_B = draw_all(law_BV, rows).clamp(max=law_BV.shape[1] - 1)  # past it where nothing is a number
        logprobs_B = law_BV.gather(1, tokens_B[:, None])[:, 0]
        note_top(rows, law_BV, tokens_B.tolist(), words)
    tokens, logprobs = tokens_B.tolist(), logprobs_B.tolist()
    if any(map(math.isnan, logprobs)):
        raise FloatingPointError("the model's logits are not numbers: its weights are spoiled, load good ones")
    return tokens, logprobs


def _plain(row: Row) -> bool:
    sampling = row.request.sampling
    return not row.noise.coded and not sampling.top and (sampling.top_p == 1 or sampling.temperature == 0)


def _seeds(paths: list[int], counts: list[int]) -> Tensor:
    """One seed per draw, (B,) int64, hashed from the path's and the token's number (SplitMix64, Steele et al. 2014)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    z = np.array(paths, dtype=np.uint64) + (np.array(counts, dtype=np.uint64) + np.uint64(1)) * golden
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((z ^ (z >> np.uint64(31))).view(np.int64))


def _settle(asked: list[_Asked], error: BaseException | None) -> None:
    for future in (each.done for each in asked):
        if not future.done():
            future.set_exception(error) if error else future.set_result(None)


class StepGraphs:
    """Decode steps captured as CUDA graphs, one per batch size; smaller batches are filled up with rows of no length.

    Weights are written in place, so a graph outlives them. A model whose step cannot be captured (a kernel that does
    not fit falls back to a reference that waits for the device) runs without, said once.
    """

    def __init__(self, model: ReasonerForCausalLM, cache: PagedCache, table: int) -> None:
        self._model, self._cache, self._table = model, cache, table
        self._pool = None
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._works = True

    def __call__(self, *given: Tensor) -> Tensor:
        """`decode` on tensors that lie on the CPU."""
        count = len(given[0])
        size = next((s for s in GRAPH_SIZES if s >= count), None)
        if size is not None and self._works and size not in self._captured:
            self._capture(size)
        if size is None or not self._works:
            return decode(self._model, self._cache, *(t.to(self._model.device) for t in given))
        graph, inputs, logits_BV = self._captured[size]
        for held, tensor, blank in zip(inputs, given, self._blanks, strict=True):
            held[:count].copy_(tensor)
            held[count:].fill_(blank)
        graph.replay()
        return logits_BV[:count]

    _blanks = (0, 0, -1, 0, 0)  # ids, positions, slots, table, lengths

    def _capture(self, size: int) -> None:
        device = self._model.device
        row = lambda dtype, *shape: torch.zeros(size, *shape, dtype=dtype, device=device)  # noqa: E731
        inputs = [*(row(torch.int64) for _ in range(3)), row(torch.int32, self._table), row(torch.int32)]
        inputs[2].fill_(-1)
        try:
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(2):  # compile kernels and choose algorithms before the capture
                    decode(self._model, self._cache, *inputs)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # a learner in another thread may go on meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits_BV = decode(self._model, self._cache, *inputs)
        except RuntimeError as error:
            self._works = False
            _log.warning("decode steps run without CUDA graphs: %s", str(error).splitlines()[0])
            return
        self._pool = graph.pool()
        self._captured[size] = (graph, inputs, logits_BV)
