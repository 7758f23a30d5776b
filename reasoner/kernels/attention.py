"""Attention of training and prefill: causal, a key and a value per head, heads (192, 128), (128, 128) or any other.

No kernel of its own: PyTorch's fused attention with the values padded to the width of the keys, which its fast paths
demand. The padding costs (2 k) / (k + v) of the products, 1.2 for (192, 128) and nothing for (128, 128): that is all a
kernel of our own could save, and less than separates one fused kernel from another (docs/kernels.md).
`benchmarks/gpu.py` times it beside FlexAttention. Neighbours: `decode.py` is the absorbed form over a cache.

Shapes: N sequences, S queries, P keys, H heads, k and v the widths of a query and of a value.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q_NSHk: Tensor, k_NPHk: Tensor, v_NPHv: Tensor, scale: float, seen_NSP: Tensor | None = None) -> Tensor:
    """softmax(scale * q . k) @ v per head, (N, S, H, v); differentiable in all three.

    Causal with S = P; or, with `seen_NSP` (bool), of queries that go on from earlier keys. Sequences of unequal length
    fill their rows from the left: what follows one never reaches it, as long as it is finite. A query must see a key.
    """
    if k_NPHk.shape[:3] != v_NPHv.shape[:3] or q_NSHk.shape[2:] != k_NPHk.shape[2:]:
        raise ValueError(
            f"q {tuple(q_NSHk.shape)}, k {tuple(k_NPHk.shape)}, v {tuple(v_NPHv.shape)}: "
            "give (N, S, H, k), (N, P, H, k), (N, P, H, v)"
        )
    if seen_NSP is None and q_NSHk.shape[1] != k_NPHk.shape[1]:
        raise ValueError(
            f"{q_NSHk.shape[1]} queries of {k_NPHk.shape[1]} keys: without `seen_NSP` each query has its own key"
        )
    width = max(q_NSHk.shape[-1], v_NPHv.shape[-1])
    q, k, v = (_widened(x, width).transpose(1, 2) for x in (q_NSHk, k_NPHk, v_NPHv))
    seen = None if seen_NSP is None else seen_NSP[:, None]
    out_NHSk = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scale)
    return out_NHSk[..., : v_NPHv.shape[-1]].transpose(1, 2)


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
