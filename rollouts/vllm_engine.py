"""vLLM behind plain calls: paths in, token ids and log-probabilities out, new weights in flight.

Lives inside one Ray actor (`cluster.py`) but knows nothing of Ray, tasks, verifiers or search beyond the noun Step.
The only file that imports vllm, next to its worker half `shm_transfer.py`.

vLLM's engine core runs in this process, one step at a time, in a thread of its own: what arrives during a step joins
at the next one. So nothing is serialised between a front end and a core, text is made once per path instead of once
per token, and an update of the weights is simply what happens between two steps.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from vllm import EngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from rollouts.kv_tails import KVTails
from rollouts.noise import Noise, draw
from rollouts.request import KV_BLOCK, Placement, Reply, Request
from search.base import Alternative, Sampling, Step

HEARTBEAT = 20.0  # seconds after which a caller with work here hears that the engine still turns
CONTEXT = 8  # tokens before a step that decide how its own are spelt: a character is at most four


class VLLMEngine:
    """One vLLM engine on one checkpoint folder."""

    def __init__(self, checkpoint: str, placement: Placement, seed: int) -> None:
        on_cpu = not placement.gpus
        self._llm = LLMEngine.from_engine_args(
            EngineArgs(
                model=checkpoint,
                dtype=placement.dtype,
                seed=seed % 2**31,
                max_model_len=placement.max_model_len,
                max_num_seqs=placement.max_num_seqs,
                kv_cache_memory_bytes=int(placement.kv_cache_gib * 2**30) if on_cpu else None,
                block_size=KV_BLOCK if on_cpu else None,
                enforce_eager=on_cpu,
                max_num_batched_tokens=max(8192, placement.max_model_len) if on_cpu else None,
                # vLLM 0.32's CPU rotary op is wrong for the 3-D tensors of MLA (log-probabilities off by 2.5 nats).
                compilation_config={"custom_ops": ["all", "-rotary_embedding"]} if on_cpu else {},
                logprobs_mode="processed_logprobs",  # of the law that is sampled from: what importance ratios need
                max_logprobs=-1,  # a search may ask for the whole vocabulary
                worker_extension_cls="rollouts.shm_transfer.ShmWorker",
                weight_transfer_config={"backend": "shm"},
                generation_config="vllm",  # a checkpoint's own sampling defaults must not leak in
                disable_log_stats=True,
            )
        )
        self._core = self._llm.engine_core
        self._spelling = _Spelling(AutoTokenizer.from_pretrained(checkpoint), Path(checkpoint))
        self._version = 0
        self._names = map(str, itertools.count())
        self._rows: dict[str, _Row] = {}  # by vLLM's name for them
        self._inbox: list[_Job] = []
        self._unwanted: set[int] = set()  # numbers of requests that nobody waits for
        self._usage = {"steps": 0, "rows": 0, "prefilled": 0, "seconds": 0.0}
        self._own_noise = False
        self._broken: Exception | None = None
        self._tails: KVTails | None = None
        if on_cpu:  # neither was tried with vLLM's asynchronous scheduling
            self._draw_by_own_noise()
            scheduler = self._core.engine_core.scheduler
            self._tails = KVTails(scheduler) if KVTails.fits(scheduler) else None
        self._thread = ThreadPoolExecutor(1, "vllm")
        self._worker: asyncio.Task[None] | None = None
        self._gate = asyncio.Lock()  # held for one step, and from the start of an update to its end
        gc.freeze()  # what is loaded stays: the collector need not look at it again

    async def ready(self) -> int:
        """The version of the weights being served, told between two steps of the model: a hung engine does not."""
        loop = asyncio.get_running_loop()
        label = await loop.run_in_executor(self._thread, self._core.get_weight_version)
        return 0 if label == "default" else int(label)  # vLLM calls the weights it started with "default"

    async def usage(self) -> dict[str, Any]:
        """What this engine did so far, and what it has room for.

        room: tokens that the KV cache holds, None when it has them for every sequence at once in full length. steps;
        rows: tokens sampled in them; prefilled: prompt tokens computed; seconds: that it stepped; preempted: sequences
        whose KV was thrown away to make room for others (None: not counted).
        """
        config = self._llm.vllm_config
        room = config.cache_config.num_gpu_blocks * config.cache_config.block_size
        enough = config.scheduler_config.max_num_seqs * config.model_config.max_model_len
        preempted = self._tails.preempted if self._tails else None
        return {**self._usage, "preempted": preempted, "room": None if room >= enough else room}

    @property
    def dead(self) -> bool:
        """Whether a step of the model broke: nothing that comes after it can be trusted."""
        return self._broken is not None

    async def extend(self, requests: list[Request]) -> AsyncIterator[list[tuple[int, list[Reply]]]]:
        """Sample every request; yields (index, its replies) of those that are complete, after each step with any.

        An empty list says that the engine still works. Requests of one call enter the same step: when the engine was
        idle, the composition of every batch, and with it every rounding error, depends on the requests alone.
        """
        if self._broken is not None:
            raise RuntimeError(f"this engine broke before: {self._broken}") from self._broken
        done: asyncio.Queue[_Job | Exception] = asyncio.Queue()
        self._inbox += [_Job(index, request, done) for index, request in enumerate(requests)]
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._work())
        left = len(requests)
        while left:
            try:
                async with asyncio.timeout(HEARTBEAT):
                    complete = [await done.get()]
            except TimeoutError:
                yield []
                continue
            while not done.empty():
                complete.append(done.get_nowait())
            for job in complete:
                if isinstance(job, Exception):
                    raise job
            left -= len(complete)
            yield [(job.index, job.replies) for job in complete]

    async def drop(self, numbers: list[int]) -> None:
        """Stop the requests of these numbers before the next token. They answer with what was sampled of them so far.

        One that is not here has ended.
        """
        self._unwanted.update(numbers)

    async def _work(self) -> None:
        """Turn the engine while it has work. An error ends it and reaches everyone who waits."""
        loop = asyncio.get_running_loop()
        try:
            while self._inbox or self._rows:
                async with self._gate:
                    jobs, self._inbox = self._inbox, []
                    unwanted, self._unwanted = self._unwanted, set()
                    complete = await loop.run_in_executor(self._thread, self._turn, jobs, unwanted)
                for job in complete:
                    job.done.put_nowait(job)
        except Exception as error:
            self._broken = error
            waiting = {id(row.job): row.job for row in self._rows.values()}
            for job in {id(job): job for job in [*jobs, *waiting.values(), *self._inbox]}.values():
                job.done.put_nowait(error)
            self._inbox, self._rows = [], {}

    def _turn(self, jobs: list[_Job], unwanted: set[int]) -> list[_Job]:
        """One step of the engine, with new jobs in it and without the unwanted ones. Returns the jobs that ended."""
        for job in jobs:
            self._admit(job)
        complete = self._drop(unwanted) if unwanted else []
        if not self._rows:
            return complete
        begun = time.perf_counter()
        outputs = self._core.get_output().outputs
        self._usage["seconds"] += time.perf_counter() - begun
        self._usage["steps"] += 1
        self._usage["rows"] += len(outputs)
        for output in outputs:
            row = self._rows.get(output.request_id)
            if row is None:  # ended by us before vLLM knew
                continue
            row.note(output, self._version, self._spelling)
            if output.prefill_stats is not None:
                self._usage["prefilled"] += row.prefilled
            cut = output.finish_reason is None and self._spelling.ends_step(row)
            if cut:
                self._core.abort_requests([output.request_id])
            if cut or output.finish_reason is not None:
                del self._rows[output.request_id]
                row.job.left -= 1
                if not row.job.left:
                    row.job.replies = [each.reply(self._spelling) for each in row.job.rows]
                    complete.append(row.job)
        return complete

    def _drop(self, unwanted: set[int]) -> list[_Job]:
        """The jobs that nobody waits for, ended."""
        names = [name for name, row in self._rows.items() if row.job.request.number in unwanted]
        self._core.abort_requests(names)
        jobs = list({id(job): job for job in (self._rows.pop(name).job for name in names)}.values())
        for job in jobs:
            job.replies = [row.reply(self._spelling) for row in job.rows if row.ids]
        return jobs

    def _admit(self, job: _Job) -> None:
        params = self._params(job.request.sampling, job.request.until.kind)
        codes = job.request.codes or [None] * len(job.request.seeds)
        for seed, code in zip(job.request.seeds, codes, strict=True):
            name = next(self._names)
            own = params.clone()
            own.max_tokens = job.request.most
            own.seed = None if self._own_noise else seed
            ids = list(job.request.ids)
            self._core.add_request(EngineCoreRequest(name, ids, None, own, None, time.time(), None, None, None))
            job.rows.append(_Row(job, Noise(seed, code)))
            self._rows[name] = job.rows[-1]

    def _drawn_here(self, sampling: Sampling) -> bool:
        """Whether our draw tells all log-probabilities that are wanted."""
        return self._own_noise and sampling.temperature > 0 and not sampling.top

    def _draw_by_own_noise(self) -> None:
        """Put our draw where vLLM's is.

        vLLM keeps a torch.Generator per seeded request, draws a number per row one by one, and rewinds a generator
        when a prompt is cut into chunks, which those of the CPU cannot do: the engine dies. Its log-probabilities, with
        ranks and a list per row, are asked for only where alternatives are wanted too, or where nothing is drawn.
        """
        runner = self._core.engine_core.model_executor.driver_worker.worker.model_runner
        sampler = runner.sampler.topk_topp_sampler

        def draw_rows(logits_BV, generators, k, p):
            law_BV = apply_top_k_top_p(logits_BV, k, p).log_softmax(-1, dtype=torch.float32)
            discarded = runner.discard_request_mask.np  # rows of which only a chunk of the prompt was read
            names = runner.input_batch.req_ids[: len(law_BV)]
            rows = [None if discarded[i] else self._rows.get(name) for i, name in enumerate(names)]
            tokens_B = draw(law_BV, [row and row.noise for row in rows])
            logprobs_B = law_BV.gather(1, tokens_B[:, None])[:, 0]
            for row, *drawn in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
                if row is not None:
                    row.drawn = drawn
            return tokens_B, law_BV

        sampler.forward = draw_rows
        self._own_noise = True

    @lru_cache(maxsize=64)  # noqa: B019 (one engine per process)
    def _params(self, sampling: Sampling, kind: str) -> SamplingParams:
        """All of a request but its seed and its limit."""
        enders = self._spelling.enders(sampling.step) if kind == "step" else frozenset()
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_token_ids=sorted(self._spelling.stops | enders),
            ignore_eos=True,  # the stops say it
            detokenize=False,
            logprobs=None if self._drawn_here(sampling) else min(sampling.top, self._llm.model_config.get_vocab_size()),
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # `clone` is a shallow copy
        )

    # The four phases of vLLM's weight-transfer protocol, under the names its clients call.

    async def init_weight_transfer_engine(self, info: dict) -> None:
        await self._on_workers("init_weight_transfer_engine", init_info=info)

    async def start_weight_update(self) -> None:
        """Hold running requests (they go on under the new weights, their prefixes read anew) and open the update."""
        await self._gate.acquire()
        if self._tails is not None:
            self._tails.reset_cache()
        self._core.reset_prefix_cache(reset_running_requests=True)
        await self._on_workers("start_weight_update")

    async def update_weights(self, info: dict) -> None:
        await self._on_workers("update_weights", update_info=info)

    async def finish_weight_update(self, version: int) -> int:
        """Close the update and set the version; requests go on only if the engine reports it. Returns that report."""
        await self._on_workers("finish_weight_update")
        self._core.set_weight_version(str(version))
        self._version = int(self._core.get_weight_version())
        if self._version == version:
            self._gate.release()
        return self._version

    async def checksums(self) -> dict[str, str]:
        """A checksum per loaded tensor, as vLLM computes them: equal on every engine that holds the same weights."""
        return (await self._on_workers("compute_weight_checksums"))[0]

    async def _on_workers(self, method: str, **arguments: Any) -> list[Any]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: self._core.collective_rpc(method, kwargs=arguments))


@dataclass(eq=False)
class _Job:
    """A request on its way through the engine."""

    index: int  # in the call it came with
    request: Request
    done: asyncio.Queue[_Job | Exception]
    rows: list[_Row] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)  # when all rows have ended

    def __post_init__(self) -> None:
        self.left = len(self.request.seeds)


@dataclass(eq=False, slots=True)
class _Row:
    """One continuation while it is sampled."""

    job: _Job
    noise: Noise
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[Alternative, ...]] = field(default_factory=list)
    changes: list[tuple[int, int]] = field(default_factory=list)  # (version, first token under it)
    drawn: Sequence[float] = ()  # the last token and its log-probability, where they are drawn here
    prefilled: int = 0
    cached: int = 0

    def note(self, output: EngineCoreOutput, version: int, spelling: _Spelling) -> None:
        """Take in what one step of the engine sampled."""
        if output.prefill_stats is not None:
            self.cached = output.prefill_stats.num_cached_tokens
            self.prefilled = output.prefill_stats.num_computed_tokens
        if not output.new_token_ids:
            return
        if not self.changes or self.changes[-1][0] != version:
            self.changes.append((version, len(self.ids)))
        self.ids += output.new_token_ids
        if output.new_logprobs is None:
            token, logprob = self.drawn
            assert output.new_token_ids == [token], f"{output.new_token_ids} came where {token} was drawn"
            self.logprobs.append(logprob)
            return
        found = output.new_logprobs  # (tokens, 1 + most alternatives in the batch): the sampled one first
        assert found.logprob_token_ids[:, 0].tolist() == output.new_token_ids, "the sampled token's logprob comes first"
        self.logprobs += found.logprobs[:, 0].tolist()
        if most := self.job.request.sampling.top:
            for ids, logprobs in zip(found.logprob_token_ids, found.logprobs, strict=True):
                self.top.append(spelling.alternatives(ids[: most + 1].tolist(), logprobs[: most + 1].tolist()))

    def reply(self, spelling: _Spelling) -> Reply:
        """All that was sampled, as a step."""
        stopped = self.ids[-1] in spelling.stops
        ends = [start for _, start in self.changes[1:]] + [len(self.ids)]
        step = Step(
            ids=tuple(self.ids),
            logprobs=tuple(self.logprobs),
            text=spelling.text(self.job.request.ids, self.ids, whole=stopped),
            versions=tuple((version, start, end) for (version, start), end in zip(self.changes, ends, strict=True)),
            top=tuple(self.top),
            cached=self.cached,
        )
        return Reply(step, stopped, self.prefilled)


class _Spelling:
    """What token ids mean: their text, which of them end an answer, which a step."""

    def __init__(self, tokenizer: Any, checkpoint: Path) -> None:
        self._tokenizer = tokenizer
        plain = not tokenizer.clean_up_tokenization_spaces and getattr(tokenizer, "backend_tokenizer", None)
        self._backend = plain or tokenizer  # the same text, with less around it
        self.stops = frozenset(_stops(tokenizer, checkpoint))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    @lru_cache(maxsize=4096)  # noqa: B019 (siblings share what came before them)
    def _known(self, context: tuple[int, ...]) -> str:
        return self._decode(context).rstrip("\ufffd")

    @lru_cache(maxsize=100_000)  # noqa: B019 (one engine per process)
    def word(self, token: int) -> str:
        return self._decode([token])

    def text(self, before: tuple[int, ...], ids: list[int], *, whole: bool) -> str:
        """What `ids` add to the text after `before`. A character cut in half is left to the step that completes it."""
        context = before[-CONTEXT:]
        known = self._known(context)
        text = self._decode([*context, *ids])
        if not whole:
            text = text.rstrip("\ufffd")
        return text[len(known) :] if text.startswith(known) else self._decode(ids)

    def alternatives(self, ids: list[int], logprobs: list[float]) -> tuple[Alternative, ...]:
        """The likeliest tokens of a position, the sampled one (which comes first) among them."""
        own, *others = zip(ids, logprobs, strict=True)
        listed = others if own[0] in ids[1:] else [*others, own]
        return tuple(Alternative(t, lp, self.word(t), t in self.stops) for t, lp in listed if lp > -math.inf)

    @lru_cache(maxsize=16)  # noqa: B019
    def enders(self, delimiter: str) -> frozenset[int]:
        """The tokens that contain a delimiter of one byte. A longer one can lie across tokens: see `ends_step`."""
        if len(delimiter.encode()) > 1:
            return frozenset()
        words = self._tokenizer.batch_decode([[token] for token in range(len(self._tokenizer))])
        return frozenset(token for token, word in enumerate(words) if delimiter in word) - self.stops

    def ends_step(self, row: _Row) -> bool:
        """Whether the row has reached a step delimiter that no single token stands for."""
        request = row.job.request
        delimiter = request.sampling.step
        if request.until.kind != "step" or len(delimiter.encode()) == 1:
            return False
        tail = 4 * len(delimiter) + 4
        return delimiter in self._decode(row.ids[-tail:])


def _stops(tokenizer: Any, checkpoint: Path) -> set[int]:
    """Ids that end an answer: the tokenizer's, and those of the checkpoint's own settings (an id, a list, or none)."""
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (file := checkpoint / name).is_file():
            ids = json.loads(file.read_text()).get("eos_token_id")
            found.update(ids if isinstance(ids, list) else [ids])
            break
    return found - {None}
