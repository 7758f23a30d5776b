"""SwiGLU: silu(gate) * up, forward and backward. Kernels in `csrc/swiglu.cu`. Shapes: T rows, I width."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for (..., 2 I) that holds [gate | up]: (..., I), float32 inside, rounded once."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up {tuple(gate_up.shape)}: the last dimension holds gate and up, so it must be even")
    return _swiglu(gate_up.reshape(-1, gate_up.shape[-1])).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _run(gate_up):
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    library = dispatch.library("swiglu", gate_up, dispatch.dtype_misfit(gate_up))
    if library is None or not gate_up.numel():
        return reference.swiglu(gate_up)
    y = gate_up.new_empty(rows, width)
    dispatch.call(
        library,
        "swiglu_forward",
        gate_up,
        dispatch.packed(gate_up),
        y,
        rows,
        width,
        int(gate_up.dtype == torch.bfloat16),
    )
    return y


def _run_backward(gate_up, by_y):
    rows, width = by_y.shape
    library = dispatch.library("swiglu", gate_up, dispatch.dtype_misfit(gate_up, by_y))
    if library is None or not gate_up.numel():
        return reference.swiglu_backward(gate_up, by_y)
    d_gate_up = gate_up.new_empty(gate_up.shape)
    dispatch.call(
        library, "swiglu_backward", gate_up, dispatch.packed(gate_up), dispatch.packed(by_y), d_gate_up, rows, width,
        int(gate_up.dtype == torch.bfloat16),
    )  # fmt: skip
    return d_gate_up


_swiglu = dispatch.define(
    "swiglu(Tensor gate_up) -> Tensor", _run, lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
)
_swiglu_backward = dispatch.define(
    "swiglu_backward(Tensor gate_up, Tensor by_y) -> Tensor",
    _run_backward,
    lambda gate_up, by_y: gate_up.new_empty(gate_up.shape),
)
dispatch.differentiate(
    _swiglu,
    lambda ctx, by_y: _swiglu_backward(*ctx.saved_tensors, by_y),
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
