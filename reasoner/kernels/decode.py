"""MLA decode: attention of a few new queries over the paged latent cache, in the absorbed form.

Kernel in `csrc/decode.cu`. Knows nothing of how queries are absorbed or who owns the pages; `norm.write_latent` fills
them.
Shapes: B sequences, S queries of each (1-4), N heads, D = R + P a cached row, R latent numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference

MULTIPROCESSORS = 132  # of a Hopper GPU: what the splits are to fill


def latent_decode(
    q_BSND: Tensor, cache: Tensor, table_BX: Tensor, lengths_B: Tensor, latent: int, scale: float
) -> Tensor:
    """softmax(scale * q . rows) @ rows[:, :latent] over each sequence's cached rows: (B, S, N, latent).

    cache: (pages, page, D). table_BX: int32, the pages of each sequence in order. lengths_B: int32, cached tokens with
    the new ones, already written: query s sees those before lengths - S + s + 1. A sequence of length 0 gives zeros.
    For decoding: no gradient.
    """
    if q_BSND.shape[-1] != cache.shape[-1] or not latent <= cache.shape[-1]:
        raise ValueError(
            f"queries {tuple(q_BSND.shape)}, cache {tuple(cache.shape)}, latent {latent}: rows must be equally wide"
        )
    return _decode(q_BSND, cache, table_BX, lengths_B, latent, float(scale))


def splits_for(batch: int, tokens: int, tile: int = 64) -> int:
    """The fewest splits of the tokens that keep nine in ten multiprocessors busy (a block fills one), else the best."""
    most = max(1, min(64, -(-tokens // tile)))

    def busy(splits: int) -> float:
        return batch * splits / (-(-batch * splits // MULTIPROCESSORS) * MULTIPROCESSORS)

    return next((s for s in range(1, most + 1) if busy(s) >= 0.9), max(range(1, most + 1), key=busy))


def _misfit(q_BSND: Tensor, cache: Tensor, latent: int) -> str | None:
    _, queries, heads, width = q_BSND.shape
    if q_BSND.dtype != torch.bfloat16 or cache.dtype != torch.bfloat16:
        return f"queries {q_BSND.dtype}, cache {cache.dtype}: both must be bfloat16"
    if latent not in (128, 256, 512) or (width - latent) % 32:
        return f"latent {latent} + rotary {width - latent}: latent 128, 256 or 512, rotary a multiple of 32"
    if queries * heads > 64:
        return f"{queries} queries x {heads} heads: at most 64 together"
    return None if cache.is_contiguous() and width <= 576 else "a cache with gaps, or rows wider than 576"


def _run(q_BSND, cache, table_BX, lengths_B, latent, scale):
    batch, queries, heads, width = q_BSND.shape
    library = dispatch.library("decode", q_BSND, _misfit(q_BSND, cache, latent))
    if library is None or not q_BSND.numel():
        return reference.latent_decode(q_BSND, cache, table_BX, lengths_B, latent, scale)
    splits, rows = splits_for(batch, table_BX.shape[1] * cache.shape[1]), batch * queries * heads
    out = q_BSND.new_empty(batch, queries, heads, latent)
    partial = q_BSND.new_empty(splits, rows, latent, dtype=torch.float32) if splits > 1 else None
    partial_lse = q_BSND.new_empty(splits, rows, dtype=torch.float32) if splits > 1 else None
    dispatch.call(
        library, "decode_attend", q_BSND, dispatch.packed(q_BSND), cache, dispatch.packed(table_BX.int()),
        dispatch.packed(lengths_B.int()), out, partial, partial_lse, batch, queries, heads, width, latent,
        cache.shape[1], table_BX.shape[1], splits, scale,
    )  # fmt: skip
    return out


_decode = dispatch.define(
    "latent_decode(Tensor q, Tensor cache, Tensor table, Tensor lengths, int latent, float scale) -> Tensor",
    _run,
    lambda q_BSND, cache, table_BX, lengths_B, latent, scale: q_BSND.new_empty(*q_BSND.shape[:3], latent),
)
