"""One sequence while an engine in this process decodes it: the law it is drawn from, and when it is complete.

Knows no model. Neighbours: `local_engine` decodes rows in padded batches, `reasoner.paged_engine` over a paged cache.

Letters of shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rollouts.noise import Noise, draw
from rollouts.request import Request
from search.base import Alternative, Ending, Sampling


@dataclass(eq=False)
class Row:
    """What one extension has become so far."""

    request: Request
    seed: int
    noise: Noise
    recorded: int = 0  # bytes of expert ids that the path's earlier steps hold
    cached: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # of the weights, per token
    top: list[tuple[Alternative, ...]] = field(default_factory=list)
    experts: bytes = b""  # see `search.base.Step`
    end: Ending | None = None
    wanted: bool = True  # False: whoever asked for it was cancelled

    def append(self, token: int, logprob: float, version: int) -> None:
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)

    def complete(self, words: Words) -> bool:
        """Whether the extension is done. Sets `end` when the answer is done, too."""
        request = self.request
        if self.ids[-1] in words.stops:
            self.end = "stop"
        elif len(self.ids) == request.room:
            self.end = "length"
        elif request.until.kind == "tokens":
            return len(self.ids) == request.until.tokens
        elif request.until.kind == "step":
            tail = 4 * len(request.sampling.step) + 4  # a character is at most four tokens (its bytes)
            return request.sampling.step in words.text(self.ids[-tail:])
        return self.end is not None


class Words:
    """A model's tokenizer, and the ids that end an answer: the tokenizer's and those of the generation config."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        self.stops = {i for i in (*ids, tokenizer.eos_token_id) if i is not None}

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def note_top(rows: list[Row], law_BV: Tensor, tokens: list[int], words: Words) -> None:
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
            tuple(Alternative(t, lp, words.text([t]), t in words.stops) for t, lp in pairs if lp > -math.inf)
        )


def law(logits_BV: Tensor, sampling: list[Sampling]) -> Tensor:
    """Log-probabilities that each row samples from; those at temperature 1 for a greedy row."""
    heat_B = logits_BV.new_tensor([each.temperature or 1.0 for each in sampling])
    law_BV = (logits_BV / heat_B[:, None]).log_softmax(-1)
    cut_B = torch.tensor([each.top_p < 1 and each.temperature > 0 for each in sampling], device=law_BV.device)
    if cut_B.any():
        top_p_B = law_BV.new_tensor([each.top_p for each in sampling])
        law_BV = torch.where(cut_B[:, None], _nucleus(law_BV, top_p_B), law_BV)
    return law_BV


def draw_all(law_BV: Tensor, rows: list[Row]) -> Tensor:
    """One token per row, (B,): by its noise, or the best."""
    drawn_B = draw(law_BV, [row.noise for row in rows])
    greedy_B = torch.tensor([row.request.sampling.temperature == 0 for row in rows], device=law_BV.device)
    return torch.where(greedy_B, law_BV.argmax(-1), drawn_B)


def _nucleus(logprobs_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Keep the fewest tokens that reach top_p together, and renormalise (Holtzman et al. 2020, arXiv:1904.09751)."""
    sorted_BV, order_BV = logprobs_BV.sort(-1, descending=True)
    before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
    dropped_BV = torch.empty_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= top_p_B[:, None])
    return logprobs_BV.masked_fill(dropped_BV, -torch.inf).log_softmax(-1)
