"""The policy's own confidence as a process score: no other model, no further token.

Of each step the probability of its least probable token, read from the log-probabilities that the path was drawn with.
A model that works a sum out step by step is hardly ever in doubt; where it guesses, or slips, some token was a gamble.
Knows no engine. Neighbour: `self_score` asks the model in words; both are a `Score`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from search.base import Decode, Trajectory, step_ends
from search.sample import AGGREGATES


@dataclass(frozen=True)
class StepConfidence:
    """exp(min log p) of each step, joined: "min" (of the whole path then), "mean", "product" or "last" (step).

    A function of the tokens and their log-probabilities alone: a path drawn in one piece has the steps that its
    delimiters cut it into, the same as if it had been drawn step by step. Of a path that a search wrote into, what
    follows the last written part counts; where nothing was sampled yet it is worth 1.
    The probabilities are those of the law that was sampled from: they say less the lower its temperature.
    Raises ValueError for a path whose log-probabilities the engine did not tell (NaN).

    Args:
        delimiter: that ends a step. decode: the engine's; not needed for "min".
    """

    join: str
    delimiter: str
    decode: Decode | None

    def __post_init__(self) -> None:
        if self.join not in AGGREGATES:
            raise ValueError(f"join={self.join!r} is none of {', '.join(AGGREGATES)}")

    async def __call__(self, path: Trajectory) -> float:
        logprobs = [logprob for step in path.steps for logprob in step.logprobs]
        if any(map(math.isnan, logprobs)):
            raise ValueError(
                f"the engine told no log-probability of a token of {path.text[-80:]!r} and score.kind = 'confidence' "
                "needs them all: use another score, or an engine that tells them"
            )
        reach = accumulate(len(step.ids) for step in path.steps)
        begin = max((end for end, step in zip(reach, path.steps, strict=True) if not step.sampled), default=0)
        ends = [len(logprobs)] if self.join == "min" else step_ends(path, self.delimiter, self.decode)
        starts = [begin, *(max(begin, end) for end in ends[:-1])]
        steps = [math.exp(min(logprobs[a:b])) for a, b in zip(starts, ends, strict=True) if a < b]
        return AGGREGATES[self.join](steps) if steps else 1.0
