"""What engines are told and what they answer: the wire between `cluster.Engines` and the `VLLMEngine` in an actor.

Imports neither Ray nor vLLM, so that a config can be read without them.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Literal

from search.base import Offer, Sampling, Step, Trajectory, Until, derive

_numbers = itertools.count()
KV_BLOCK = 32  # tokens; the smallest that vLLM's CPU attention takes


@dataclass(frozen=True, slots=True)
class Placement:
    """Where engines live and what each may use: the `[engine]` table of a config."""

    # In this process, without Ray: "paged" runs our own model on its kernels, "local" any transformers model.
    # "openai": on a server of the completions API, for evaluation and search; the base is then its tokenizer's.
    kind: Literal["vllm", "paged", "local", "openai"] = "vllm"
    count: int = 1
    gpus: float = 0  # per engine; 0 runs vLLM on the CPU
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the engine; the learner is always float32
    max_model_len: int = 1024  # tokens of prompt and response together
    max_num_seqs: int = 256
    kv_cache_gib: float = 0.5  # a vLLM engine on a GPU sizes its own
    url: str = ""  # of the server's API, with its version: "http://localhost:8000/v1"
    model: str = ""  # its name there
    key_file: str = ""  # holds what is sent as a bearer token; the token itself belongs in no config

    @property
    def offers(self) -> frozenset[Offer]:
        """What such an engine gives a search. A server, and vLLM on a GPU, draw by own noise, which knows no codes."""
        own_noise = self.kind in ("local", "paged") or self.kind == "vllm" and not self.gpus
        return frozenset({"logprobs", "top", "write"} | ({"arithmetic"} if own_noise else set()))

    @property
    def independent(self) -> bool:
        """Whether every bit of a path depends on its request alone, not on what is sampled beside it.

        Measured of vLLM on a CPU. In this process not: a product of less than four rows is rounded otherwise than the
        same rows among more. vLLM on a GPU counts as such, though nothing was measured there.
        """
        return self.kind == "vllm"


@dataclass(frozen=True, slots=True)
class Request:
    """Continuations of one path to sample."""

    ids: tuple[int, ...]  # prompt and steps so far
    seeds: tuple[int, ...]  # one per continuation
    room: int  # tokens left before the response hits its limit
    until: Until
    sampling: Sampling
    codes: tuple[float, ...] = ()  # one per continuation, when they share arithmetic codes: see `noise`
    number: int = field(default_factory=_numbers.__next__, compare=False)  # what `drop` names it by, unique in a driver

    @classmethod
    def children(cls, path: Trajectory, n: int, until: Until, sampling: Sampling, room: int) -> Request:
        """Child i is drawn with `derive(path.seed, i)`, in any engine."""
        codes = ()
        if sampling.arithmetic and sampling.temperature > 0:
            shift = random.Random(derive(path.seed, "codes")).random()
            codes = tuple((i / n + shift) % 1 for i in range(n))
        return cls(path.ids, tuple(derive(path.seed, i) for i in range(n)), room, until, sampling, codes)

    @property
    def most(self) -> int:
        """Tokens that a continuation may have."""
        return min(self.until.tokens, self.room) if self.until.kind == "tokens" else self.room


@dataclass(frozen=True, slots=True)
class Reply:
    """One step sampled for a request, and what its prompt cost."""

    step: Step
    stopped: bool  # by the end-of-sequence token, not by a limit or a step delimiter
    prefilled: int  # prompt tokens computed


Replies = list[tuple[int, list[Reply]]]  # of the requests of one call that are complete: (index in the call, replies)
