"""The routed experts of an MoE layer, forward and backward, without a cached activation.

Kernels in `csrc/experts.cu`. Knows nothing of how experts were chosen: `router.py`.
Shapes: T tokens, H hidden, E experts, K chosen per token, I width of an expert, A = T * K assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from .router import sort_by_expert


def moe_experts(x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sum over the chosen experts e of weight * down[e] @ (silu(gate[e] @ x) * (up[e] @ x)): (T, H), the type of `x`.

    weights_TK: float32. experts_TK: int64 ids in [0, E). gate_up: (E, 2 I, H), gate first. down: (E, H, I).
    Differentiable in all but the ids. Where the kernel runs, the backward computes gate and up again instead of keeping
    them.
    """
    experts, hidden, inner = down.shape
    if gate_up.shape != (experts, 2 * inner, hidden) or x_TH.shape[1] != hidden or weights_TK.shape != experts_TK.shape:
        raise ValueError(
            f"x {tuple(x_TH.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}: "
            "give (T, H), (E, 2 I, H), (E, H, I)"
        )
    order_A, _, ends_E = sort_by_expert(experts_TK, experts)
    if (
        _library(x_TH, weights_TK, gate_up, down) is None
    ):  # autograd's own backward keeps what the op would compute again
        return reference.moe_experts(x_TH, weights_TK, order_A, ends_E, gate_up, down)
    return _experts(x_TH, weights_TK.float(), order_A, ends_E, gate_up, down)


def _library(x_TH: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor):
    _, hidden, inner = down.shape
    bf16 = x_TH.dtype == gate_up.dtype == down.dtype == torch.bfloat16
    return dispatch.library(
        "experts",
        x_TH,
        None if bf16 else f"x {x_TH.dtype}, gate_up {gate_up.dtype}, down {down.dtype}: all must be bfloat16",
        f"hidden {hidden}, inner {inner}: both must be multiples of 8" if hidden % 8 or inner % 8 else None,
        f"{weights_TK.numel()} assignments: at most 8 million" if weights_TK.numel() > 8_000_000 else None,
    )


def _run(x_TH, weights_TK, order_A, ends_E, gate_up, down):
    (tokens, chosen), (experts, hidden, inner) = weights_TK.shape, down.shape
    library = _library(x_TH, weights_TK, gate_up, down)
    if library is None or not tokens:
        return reference.moe_experts(x_TH, weights_TK, order_A, ends_E, gate_up, down)
    activation, rows = x_TH.new_empty(tokens * chosen, inner), x_TH.new_empty(tokens * chosen, hidden)
    y_TH = x_TH.new_empty(tokens, hidden)
    given = (dispatch.packed(t) for t in (x_TH, weights_TK, order_A, ends_E, gate_up, down))
    dispatch.call(
        library, "experts_forward", x_TH, *given, activation, rows, y_TH, tokens, chosen, experts, hidden, inner
    )
    return y_TH


def _run_backward(x_TH, weights_TK, order_A, ends_E, gate_up, down, by_y_TH):
    (tokens, chosen), (experts, hidden, inner) = weights_TK.shape, down.shape
    library = _library(x_TH, weights_TK, gate_up, down)
    if library is None or not tokens:
        return reference.moe_experts_backward(x_TH, weights_TK, order_A, ends_E, gate_up, down, by_y_TH)
    new = lambda *shape: x_TH.new_empty(*shape)  # noqa: E731
    assignments = tokens * chosen
    d_pre, weighted, rows, d_x_TH = (
        new(assignments, 2 * inner),
        new(assignments, inner),
        new(assignments, hidden),
        new(tokens, hidden),
    )
    by_weight = x_TH.new_empty(assignments, -(-inner // 64), dtype=torch.float32)
    d_gate_up, d_down = new(experts, 2 * inner, hidden), new(experts, hidden, inner)
    given = (dispatch.packed(t) for t in (x_TH, weights_TK, order_A, ends_E, gate_up, down, by_y_TH))
    dispatch.call(
        library, "experts_backward", x_TH, *given, d_pre, weighted, rows, d_x_TH, by_weight, d_gate_up, d_down,
        tokens, chosen, experts, hidden, inner,
    )  # fmt: skip
    return d_x_TH, by_weight.sum(1).view(tokens, chosen), d_gate_up, d_down


def _gradients(ctx, by_y_TH):
    d_x_TH, d_weights_TK, d_gate_up, d_down = _experts_backward(*ctx.saved_tensors, by_y_TH)
    return d_x_TH, d_weights_TK, None, None, d_gate_up, d_down


_experts = dispatch.define(
    "moe_experts(Tensor x, Tensor weights, Tensor order, Tensor ends, Tensor gate_up, Tensor down) -> Tensor",
    _run,
    lambda x_TH, *_: x_TH.new_empty(x_TH.shape),
)
_experts_backward = dispatch.define(
    "moe_experts_backward(Tensor x, Tensor weights, Tensor order, Tensor ends, Tensor gate_up, Tensor down, "
    "Tensor by_y) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    lambda x_TH, weights_TK, order_A, ends_E, gate_up, down, by_y: tuple(
        t.new_empty(t.shape) for t in (x_TH, weights_TK, gate_up, down)
    ),
)
dispatch.differentiate(_experts, _gradients, lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
