"""RL head: log-probability and entropy of given tokens over a large vocabulary, and their gradient.

The vocabulary is walked in chunks: a BLAS product gives the logits of one chunk, one kernel (`csrc/head.cu`) folds them
into four numbers per token. The gradient computes each chunk again, overwrites it by dZ, and multiplies: all logits are
never held, and a chunk's rows of dW are finished in one go. Knows nothing of models or losses.
Shapes: T tokens, H hidden, V vocabulary, C entries of one chunk.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import dispatch, reference

# Logits held at once. On a GPU large enough for full-rate products; on a CPU small enough for the last-level cache.
CHUNK_ELEMENTS = {"cuda": 48 << 20, "cpu": 4 << 20}


def token_logprob(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of `target_T` (int64) under softmax(hidden @ weight.T / temperature), and the entropy of that
    distribution: (T,) each, in nats, float32 (float64 for float64 input). Differentiable in hidden and weight, through
    both.

    A negative target marks a row to leave out: 0 in both, no gradient. A target past the vocabulary gives NaN.
    Memory beyond the gradients: one chunk of logits, 192 MiB on a GPU and 16 MiB on a CPU while T is below 48 Ki (4
    Ki).
    """
    if hidden_TH.ndim != 2 or weight_VH.ndim != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
        raise ValueError(f"hidden {tuple(hidden_TH.shape)} and weight {tuple(weight_VH.shape)}: give (T, H) and (V, H)")
    if target_T.shape != hidden_TH.shape[:1]:
        raise ValueError(f"target {tuple(target_T.shape)} for hidden {tuple(hidden_TH.shape)}: give one target per row")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: give a positive one (greedy has no log-probability)")
    logprob_T, entropy_T, _ = _op(hidden_TH, weight_VH, target_T.long(), float(temperature))
    return logprob_T, entropy_T


def _chunks(hidden_TH: Tensor, vocabulary: int) -> range:
    tokens = max(1, hidden_TH.shape[0])
    size = max(1024, CHUNK_ELEMENTS.get(hidden_TH.device.type, 4 << 20) // tokens // 128 * 128)
    return range(0, vocabulary, size)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 at least: on a GPU the tensor cores' own accumulator, elsewhere the inputs are widened."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return reference.wide(a) @ reference.wide(b)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the epilogue of the product where this torch can: `total` is then read and written once."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16 and _adds_in_float32(a.device):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += _matmul(a, b)


@functools.cache
def _adds_in_float32(device: torch.device) -> bool:
    total, a = torch.zeros(8, 8, device=device), torch.zeros(8, 8, device=device, dtype=torch.bfloat16)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # older releases want all three in one type
        return False
    return True


def _put_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, rounded once."""
    if a.is_cuda and out.dtype == a.dtype == b.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(_matmul(a, b))


def _library(hidden_TH: Tensor, weight_VH: Tensor):
    return dispatch.library(
        "head",
        hidden_TH,
        dispatch.dtype_misfit(hidden_TH, weight_VH),
        None if hidden_TH.dtype == weight_VH.dtype else f"hidden is {hidden_TH.dtype}, weight {weight_VH.dtype}",
    )


def _forward(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    library = _library(hidden_TH, weight_VH)
    tokens, dtype = hidden_TH.shape[0], reference.wide(hidden_TH[:0]).dtype
    state_4T = torch.zeros(4, tokens, dtype=dtype, device=hidden_TH.device)
    state_4T[0] = -torch.inf
    state_4T[3] = torch.nan  # stays if no chunk holds the target
    target_T = dispatch.packed(target_T)
    chunks = _chunks(hidden_TH, weight_VH.shape[0])
    for start in chunks if tokens else ():
        z_TC = _matmul(hidden_TH, weight_VH[start : start + chunks.step].T)
        if library is None:
            reference.head_statistics(z_TC, target_T, state_4T, start, temperature)
        else:
            dispatch.call(
                library,
                "head_statistics",
                z_TC,
                z_TC,
                target_T,
                state_4T,
                tokens,
                z_TC.shape[1],
                start,
                1.0 / temperature,
            )
    max_T, sum_T, weighted_T, picked_T = state_4T
    log_sum_T = sum_T.log()
    lse_T = max_T + log_sum_T
    entropy_T = torch.where(target_T < 0, 0.0, log_sum_T - weighted_T / sum_T)
    # picked - max first: both are near each other, the sum's logarithm is small
    logprob_T = torch.where(target_T < 0, 0.0, picked_T - max_T - log_sum_T)
    return logprob_T, entropy_T, lse_T


def _backward(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, lse_T: Tensor, entropy_T: Tensor, by_logprob_T: Tensor,
    by_entropy_T: Tensor, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    library = _library(hidden_TH, weight_VH)
    tokens = hidden_TH.shape[0]
    d_hidden_TH = torch.zeros_like(reference.wide(hidden_TH))
    d_weight_VH = torch.zeros_like(weight_VH) if not tokens else torch.empty_like(weight_VH)
    target_T, by_logprob_T, by_entropy_T = (
        dispatch.packed(target_T),
        dispatch.packed(by_logprob_T),
        dispatch.packed(by_entropy_T),
    )
    chunks = _chunks(hidden_TH, weight_VH.shape[0])
    for start in chunks if tokens else ():
        weight_CH = weight_VH[start : start + chunks.step]
        z_TC = _matmul(hidden_TH, weight_CH.T)
        if library is None:
            d_TC = reference.head_gradient(
                z_TC, target_T, lse_T, entropy_T, by_logprob_T, by_entropy_T, start, temperature, hidden_TH.dtype
            )
        else:
            half = hidden_TH.dtype == torch.bfloat16
            dispatch.call(
                library, "head_gradient", z_TC, z_TC, target_T, lse_T, entropy_T, by_logprob_T, by_entropy_T, tokens,
                z_TC.shape[1], start, int(half), 1.0 / temperature,
            )  # fmt: skip
            d_TC = z_TC.view(torch.bfloat16)[:, : z_TC.shape[1]] if half else z_TC
        _add_product(d_hidden_TH, d_TC, weight_CH)
        _put_product(d_weight_VH[start : start + chunks.step], d_TC.T, hidden_TH)
    return d_hidden_TH.to(hidden_TH.dtype), d_weight_VH


def _fake_forward(hidden_TH, weight_VH, target_T, temperature):
    row = lambda: hidden_TH.new_empty(  # noqa: E731
        hidden_TH.shape[0], dtype=torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
    )
    return row(), row(), row()


def _fake_backward(hidden_TH, weight_VH, *_):
    return torch.empty_like(hidden_TH), torch.empty_like(weight_VH)


def _save(ctx, inputs, output):
    hidden_TH, weight_VH, target_T, temperature = inputs
    _, entropy_T, lse_T = output
    ctx.mark_non_differentiable(lse_T)
    ctx.save_for_backward(hidden_TH, weight_VH, target_T, lse_T, entropy_T)
    ctx.temperature = temperature


def _gradients(ctx, by_logprob_T, by_entropy_T, _):
    saved = ctx.saved_tensors
    return (*_op_backward(*saved, by_logprob_T, by_entropy_T, ctx.temperature), None, None)


_op = dispatch.define(
    "token_logprob(Tensor hidden, Tensor weight, Tensor target, float temperature) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_op_backward = dispatch.define(
    "token_logprob_backward(Tensor hidden, Tensor weight, Tensor target, Tensor lse, Tensor entropy, "
    "Tensor by_logprob, Tensor by_entropy, float temperature) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
dispatch.differentiate(_op, _gradients, _save)
