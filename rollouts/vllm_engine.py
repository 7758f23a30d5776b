"""vLLM behind plain calls: paths in, token ids and log-probabilities out, new weights in flight.

Lives inside one Ray actor (`cluster.py`) but knows nothing of Ray, tasks, verifiers or search beyond the noun Step.
The only file that imports vllm, next to its worker half `shm_transfer.py`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

from vllm import SamplingParams, TokensPrompt
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector

from rollouts.request import Placement, Reply, Request
from search.base import Step


class VLLMEngine:
    """One AsyncLLM on one checkpoint folder."""

    def __init__(self, checkpoint: str, placement: Placement, seed: int) -> None:
        on_cpu = not placement.gpus
        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=checkpoint,
                dtype=placement.dtype,
                seed=seed % 2**31,
                max_model_len=placement.max_model_len,
                max_num_seqs=placement.max_num_seqs,
                kv_cache_memory_bytes=int(placement.kv_cache_gib * 2**30) if on_cpu else None,
                enforce_eager=on_cpu,
                # A prompt cut into chunks makes vLLM rewind the request's generator, which the CPU's cannot: it dies.
                enable_chunked_prefill=False if on_cpu else None,
                max_num_batched_tokens=max(8192, placement.max_model_len) if on_cpu else None,
                # vLLM 0.32's CPU rotary op is wrong for the 3-D tensors of MLA (log-probabilities off by 2.5 nats).
                compilation_config={"custom_ops": ["all", "-rotary_embedding"]} if on_cpu else {},
                logprobs_mode="processed_logprobs",  # of the law that is sampled from: what importance ratios need
                worker_extension_cls="rollouts.shm_transfer.ShmWorker",
                weight_transfer_config={"backend": "shm"},
                generation_config="vllm",  # a checkpoint's own sampling defaults must not leak in
                disable_log_stats=True,
            )
        )
        self._names = map(str, itertools.count())
        self._running = 0
        self._gate = asyncio.Lock()  # held while requests are queued, and from the start of an update to its end

    async def ready(self) -> str:
        """The version label of the weights being served; returns once the engine can work."""
        return await self._llm.get_weight_version()

    async def extend(self, requests: list[Request]) -> AsyncIterator[tuple[int, Reply]]:
        """Sample every request; yields (index, reply) as each ends.

        When the engine is idle the whole list is queued before the first token is sampled, so that the composition
        of every batch, and with it every rounding error, depends on the requests alone and not on their timing.
        """
        async with self._gate:
            idle = self._running == 0
            self._running += len(requests)
            try:
                if idle:
                    await self._llm.pause_generation(mode="keep", clear_cache=False)
                streams = [await self._queue(request) for request in requests]
            except BaseException:
                self._running -= len(requests)
                raise
            finally:
                if idle:
                    await self._llm.resume_generation()
        try:
            waiting = [asyncio.ensure_future(_last(i, stream)) for i, stream in enumerate(streams)]
            try:
                for done in asyncio.as_completed(waiting):
                    index, output = await done
                    yield index, _reply(output)
            finally:
                for task in waiting:
                    task.cancel()
        finally:
            self._running -= len(requests)

    async def _queue(self, request: Request) -> RequestOutputCollector:
        prompt = TokensPrompt(prompt_token_ids=list(request.ids))
        return await self._llm.add_request(next(self._names), prompt, _params(request))

    # The four phases of vLLM's weight-transfer protocol, under the names its clients call.

    async def init_weight_transfer_engine(self, info: dict) -> None:
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    async def start_weight_update(self) -> None:
        """Freeze running requests (they resume under the new weights) and open the update."""
        await self._gate.acquire()
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        await self._llm.start_weight_update()

    async def update_weights(self, info: dict) -> None:
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=info))

    async def finish_weight_update(self, version: int) -> int:
        """Close the update and set the version; requests go on only if the engine reports it. Returns that report."""
        await self._llm.finish_weight_update(str(version))
        reported = int(await self._llm.get_weight_version())
        if reported == version:
            await self._llm.resume_generation()
            self._gate.release()
        return reported

    async def checksums(self) -> dict[str, str]:
        """A checksum per loaded tensor, as vLLM computes them: equal on every engine that holds the same weights."""
        return (await self._llm.compute_weight_checksums())[0]


def _params(request: Request) -> SamplingParams:
    """Seeds come hashed; vLLM's own n > 1 would use seed, seed + 1, ..., which collide across requests."""
    until, sampling = request.until, request.sampling
    return SamplingParams(
        n=1,
        seed=request.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=min(until.tokens, request.room) if until.kind == "tokens" else request.room,
        stop=[sampling.step] if until.kind == "step" else None,
        include_stop_str_in_output=True,
        detokenize=True,
        logprobs=0,  # the sampled token's alone
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


async def _last(index: int, stream: RequestOutputCollector) -> tuple[int, RequestOutput]:
    output = stream.get_nowait() or await stream.get()
    assert output.finished, "FINAL_ONLY output arrives once"
    return index, output


def _reply(output: RequestOutput) -> Reply:
    completion = output.outputs[0]
    ids = tuple(completion.token_ids)
    logprobs = completion.logprobs
    cached = output.num_cached_tokens or 0
    step = Step(
        ids=ids,
        logprobs=tuple(_sampled_logprobs(ids, logprobs)),
        text=completion.text,
        versions=tuple((_version(s.version), s.start, s.end) for s in completion.weight_versions or ()),
        cached=cached,
    )
    stopped = completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)
    return Reply(step, stopped, prefilled=len(output.prompt_token_ids) - cached)


def _sampled_logprobs(ids, logprobs):
    """vLLM puts the sampled token first at each position; the flat form keeps one list for all of them."""
    starts = logprobs.start_indices
    assert len(starts) == len(ids), f"{len(ids)} ids but logprobs for {len(starts)}"
    for token, start in zip(ids, starts, strict=True):
        assert logprobs.token_ids[start] == token, "the first logprob of a position is the sampled token's"
        yield logprobs.logprobs[start]


def _version(label: str) -> int:
    return 0 if label == "default" else int(label)  # vLLM calls the weights it started with "default"
