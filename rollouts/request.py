"""What crosses the wire between `cluster.Engines` and the `VLLMEngine` in an actor. Imports neither Ray nor vLLM."""

from __future__ import annotations

from dataclasses import dataclass

from search.base import Sampling, Step, Until


@dataclass(frozen=True, slots=True)
class Request:
    """One continuation to sample."""

    ids: tuple[int, ...]  # prompt and steps so far
    seed: int
    room: int  # tokens left before the response hits its limit
    until: Until
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Reply:
    """The step sampled for a request, and what its prompt cost."""

    step: Step
    stopped: bool  # by the end-of-sequence token, not by a limit or a step delimiter
    prefilled: int  # prompt tokens computed
    cached: int  # prompt tokens found in the prefix cache
