"""RMSNorm, and the write of the latent cache that a decode step does before attention.

Kernels in `csrc/norm.cu`. Knows nothing of attention (`decode.py`) or of who owns the cache.
Shapes: T tokens or rows, H width, R latent numbers and P rotary ones of a cached row, N heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference

WIDEST = 16384  # the backward keeps one row of sums in shared memory


def rms_norm(x: Tensor, weight_H: Tensor, eps: float = 1e-6) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in the type of `x`; differentiable in both."""
    if x.shape[-1:] != weight_H.shape:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight_H.shape)}: the last dimension must be the weight's"
        )
    return _norm(x.reshape(-1, x.shape[-1]), weight_H, eps)[0].view(x.shape)


def write_latent(
    kv_TD: Tensor,
    weight_R: Tensor,
    q_TNP: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots_T: Tensor,
    cache: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """Write [RMSNorm(latent) | rotated key] of each token into `cache` and return the rotated queries (T, N, P).

    kv_TD: (T, R + P) as projected. cos, sin: (T, P / 2) float32. slots_T: int64 row of the cache seen as (rows, R + P),
    negative to write nothing. The pairs (0, 1), (2, 3), ... are rotated and stored as firsts, then seconds. For
    decoding: no gradient.
    """
    latent, rotary = weight_R.shape[0], q_TNP.shape[-1]
    if kv_TD.shape[1] != latent + rotary or cache.shape[-1] != latent + rotary or rotary % 2:
        raise ValueError(
            f"kv {tuple(kv_TD.shape)} and cache {tuple(cache.shape)}: "
            f"rows must be {latent} latent + {rotary} rotary (even) wide"
        )
    return _write(kv_TD, weight_R, q_TNP, cos.float(), sin.float(), slots_T.long(), cache, eps)


def _is_half(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def _same_type(*tensors: Tensor) -> str | None:
    types = {t.dtype for t in tensors}
    return None if len(types) == 1 else f"mixed types {sorted(map(str, types))}"


def _run(x_TH, weight_H, eps):
    rows, width = x_TH.shape
    library = dispatch.library("norm", x_TH, dispatch.dtype_misfit(x_TH), _same_type(x_TH, weight_H))
    if library is None or not rows:
        return reference.rms_norm(x_TH, weight_H, eps)
    y_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
    rstd_T = torch.empty(rows, dtype=torch.float32, device=x_TH.device)
    dispatch.call(
        library,
        "norm_forward",
        x_TH,
        dispatch.packed(x_TH),
        dispatch.packed(weight_H),
        y_TH,
        rstd_T,
        rows,
        width,
        _is_half(x_TH),
        float(eps),
    )
    return y_TH, rstd_T


def _run_backward(x_TH, weight_H, rstd_T, by_y_TH):
    rows, width = x_TH.shape
    library = dispatch.library(
        "norm",
        x_TH,
        dispatch.dtype_misfit(x_TH),
        _same_type(x_TH, weight_H, by_y_TH),
        f"width {width} in the backward: at most {WIDEST}" if width > WIDEST else None,
    )
    if library is None or not rows:
        return reference.rms_norm_backward(x_TH, weight_H, rstd_T, by_y_TH)
    blocks = min(rows, 264)  # two per multiprocessor: few enough that summing their rows is cheap
    d_x_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
    d_weight = torch.empty(blocks, width, dtype=torch.float32, device=x_TH.device)
    dispatch.call(
        library, "norm_backward", x_TH, dispatch.packed(x_TH), dispatch.packed(weight_H), rstd_T,
        dispatch.packed(by_y_TH), d_x_TH, d_weight, rows, width, blocks, _is_half(x_TH),
    )  # fmt: skip
    return d_x_TH, d_weight.sum(0).to(weight_H.dtype)


def _run_write(kv_TD, weight_R, q_TNP, cos, sin, slots_T, cache, eps):
    tokens, heads, rotary = q_TNP.shape
    library = dispatch.library(
        "norm",
        kv_TD,
        dispatch.dtype_misfit(kv_TD),
        _same_type(kv_TD, weight_R, q_TNP, cache),
        None if q_TNP.stride(2) == 1 and cache.is_contiguous() else "queries or cache with gaps inside their rows",
    )
    if library is None or not tokens:
        return reference.write_latent(kv_TD, weight_R, q_TNP, cos, sin, slots_T, cache, eps)
    turned_TNP = torch.empty(q_TNP.shape, dtype=q_TNP.dtype, device=q_TNP.device)
    dispatch.call(
        library, "norm_write_latent", kv_TD, dispatch.packed(kv_TD), dispatch.packed(weight_R), dispatch.packed(cos),
        dispatch.packed(sin), dispatch.packed(slots_T), cache, dispatch.Strided(q_TNP), turned_TNP, tokens,
        weight_R.shape[0], rotary, heads, q_TNP.stride(0), q_TNP.stride(1), _is_half(kv_TD), float(eps),
    )  # fmt: skip
    return turned_TNP


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


_norm = dispatch.define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _run,
    lambda x_TH, *_: (
        torch.empty_like(x_TH, memory_format=torch.contiguous_format),
        x_TH.new_empty(x_TH.shape[0], dtype=torch.float64 if x_TH.dtype == torch.float64 else torch.float32),
    ),
)
_norm_backward = dispatch.define(
    "rms_norm_backward(Tensor x, Tensor weight, Tensor rstd, Tensor by_y) -> (Tensor, Tensor)",
    _run_backward,
    lambda x_TH, weight_H, *_: (
        torch.empty_like(x_TH, memory_format=torch.contiguous_format),
        torch.empty_like(weight_H),
    ),
)
_write = dispatch.define(
    "write_latent(Tensor kv, Tensor weight, Tensor q, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) cache, "
    "float eps) -> Tensor",
    _run_write,
    lambda kv_TD, weight_R, q_TNP, *_: q_TNP.new_empty(q_TNP.shape),
)
dispatch.differentiate(_norm, lambda ctx, by_y, _: (*_norm_backward(*ctx.saved_tensors, by_y), None), _save)
