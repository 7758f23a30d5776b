"""Draws tokens: one per row, from nothing but the row and its seed.

Kernel in `csrc/sample.cu`. Shapes: T rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference


def sample(logits_TV: Tensor, seeds_T: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """A token (T,) int64 from softmax(logits / temperature) for each row, and its log-probability there, (T,) float32.

    seeds_T: int64, one per draw; equal row and seed give the equal token on every device (but for ranks that differ in
    the last bit). Temperature 0 is greedy: the best token (the lower id of equals) with its log-probability at
    temperature 1. To leave entries out, set them to -inf.
    """
    if seeds_T.shape != logits_TV.shape[:1]:
        raise ValueError(f"seeds {tuple(seeds_T.shape)} for logits {tuple(logits_TV.shape)}: give one seed per row")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: give a positive one, or 0 for greedy")
    return _sample(logits_TV, seeds_T.long(), float(temperature))


def _run(logits_TV, seeds_T, temperature):
    rows, columns = logits_TV.shape
    library = dispatch.library("sample", logits_TV, dispatch.dtype_misfit(logits_TV))
    if library is None or not rows:
        return reference.sample(logits_TV, seeds_T, temperature)
    token_T = torch.empty(rows, dtype=torch.int64, device=logits_TV.device)
    logprob_T = torch.empty(rows, dtype=torch.float32, device=logits_TV.device)
    dispatch.call(
        library, "sample_draw", logits_TV, dispatch.packed(logits_TV), dispatch.packed(seeds_T), token_T, logprob_T,
        rows, columns, int(temperature == 0), int(logits_TV.dtype == torch.bfloat16), 1.0 / (temperature or 1.0),
    )  # fmt: skip
    return token_T, logprob_T


_sample = dispatch.define(
    "sample(Tensor logits, Tensor seeds, float temperature) -> (Tensor, Tensor)",
    _run,
    lambda logits_TV, seeds_T, _: (
        torch.empty_like(seeds_T),
        logits_TV.new_empty(logits_TV.shape[0], dtype=torch.float32),
    ),
)
