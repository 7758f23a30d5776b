"""MoE router: which experts each token goes to, how much each counts, and the tokens sorted by expert.

Kernels in `csrc/router.cu`. Knows nothing of the experts themselves (`experts.py`).
Shapes: T tokens, E experts, K chosen per token, A = T * K assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference


def route(
    logits_TE: Tensor,
    bias_E: Tensor,
    chosen: int,
    groups: int = 1,
    open_groups: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (T, K) float32, expert ids (T, K) int64 with the best first, and the load (E,) int32 of each expert.

    Sigmoid scores; score + bias chooses, within the `open_groups` groups whose two best experts sum highest; the
    weights are the scores of the chosen, normalised to sum to `scale`. Equal ranks: the lower id. Differentiable in the
    logits.
    """
    experts = logits_TE.shape[1]
    if not 1 <= chosen <= experts // groups * open_groups or experts % groups or not 1 <= open_groups <= groups:
        raise ValueError(
            f"{chosen} of {experts} experts in {open_groups} of {groups} groups: "
            "groups must divide the experts, and the open ones must hold at least the chosen"
        )
    return _route(logits_TE.float(), bias_E.float(), chosen, groups, open_groups, normalise, float(scale))


def sort_by_expert(experts_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order (A,), place (A,), ends (E,)), int32: assignments sorted by expert, the inverse, where each expert's end.

    Stable. Assignment a belongs to token a // K. Ids must lie in [0, experts).
    """
    return _sort(experts_TK.long(), experts)


def _misfit(experts: int, chosen: int, groups: int) -> str | None:
    if experts <= 512 and chosen <= 32 and groups <= 32:
        return None
    return f"{experts} experts, {chosen} chosen, {groups} groups: at most 512, 32 and 32"


def _run(logits_TE, bias_E, chosen, groups, open_groups, normalise, scale):
    tokens, experts = logits_TE.shape
    library = dispatch.library("router", logits_TE, _misfit(experts, chosen, groups))
    if library is None or not tokens:
        weights_TK, experts_TK = reference.route(logits_TE, bias_E, chosen, groups, open_groups, normalise, scale)
        return weights_TK, experts_TK, torch.bincount(experts_TK.flatten(), minlength=experts).int()
    experts_TK = torch.empty(tokens, chosen, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(tokens, chosen, dtype=torch.float32, device=logits_TE.device)
    load_E = torch.zeros(experts, dtype=torch.int32, device=logits_TE.device)
    dispatch.call(
        library, "router_route", logits_TE, dispatch.packed(logits_TE), dispatch.packed(bias_E), experts_TK,
        weights_TK, load_E, tokens, experts, chosen, groups, open_groups, int(normalise), scale,
    )  # fmt: skip
    return weights_TK, experts_TK, load_E


def _run_backward(logits_TE, experts_TK, by_weights_TK, normalise, scale):
    (tokens, experts), chosen = logits_TE.shape, experts_TK.shape[1]
    library = dispatch.library("router", logits_TE, _misfit(experts, chosen, 1))
    if library is None or not tokens:
        return reference.route_backward(logits_TE, experts_TK, by_weights_TK, normalise, scale)
    d_logits_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    dispatch.call(
        library, "router_gradient", logits_TE, dispatch.packed(logits_TE), experts_TK, dispatch.packed(by_weights_TK),
        d_logits_TE, tokens, experts, chosen, int(normalise), scale,
    )  # fmt: skip
    return d_logits_TE


def _run_sort(experts_TK, experts):
    library = dispatch.library("router", experts_TK)
    if library is None or not experts_TK.numel():
        return reference.sort_by_expert(experts_TK, experts)
    order_A, place_A = (torch.empty(experts_TK.numel(), dtype=torch.int32, device=experts_TK.device) for _ in range(2))
    ends_E = torch.empty(experts, dtype=torch.int32, device=experts_TK.device)
    dispatch.call(
        library,
        "router_sort",
        experts_TK,
        dispatch.packed(experts_TK),
        order_A,
        place_A,
        ends_E,
        experts_TK.numel(),
        experts,
    )
    return order_A, place_A, ends_E


def _fake(logits_TE, bias_E, chosen, *_):
    shape = (logits_TE.shape[0], chosen)
    return (
        logits_TE.new_empty(shape),
        logits_TE.new_empty(shape, dtype=torch.int64),
        logits_TE.new_empty(logits_TE.shape[1], dtype=torch.int32),
    )


def _fake_sort(experts_TK, experts):
    row = experts_TK.new_empty(experts_TK.numel(), dtype=torch.int32)
    return row, torch.empty_like(row), row.new_empty(experts)


def _save(ctx, inputs, output):
    logits_TE, _, _, _, _, ctx.normalise, ctx.scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits_TE, output[1])


def _gradients(ctx, by_weights_TK, *_):
    d_logits_TE = _route_backward(*ctx.saved_tensors, by_weights_TK, ctx.normalise, ctx.scale)
    return d_logits_TE, None, None, None, None, None, None


_route = dispatch.define(
    "route(Tensor logits, Tensor bias, int chosen, int groups, int open_groups, bool normalise, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
_route_backward = dispatch.define(
    "route_backward(Tensor logits, Tensor experts, Tensor by_weights, bool normalise, float scale) -> Tensor",
    _run_backward,
    lambda logits_TE, *_: torch.empty_like(logits_TE),
)
_sort = dispatch.define("sort_by_expert(Tensor chosen, int experts) -> (Tensor, Tensor, Tensor)", _run_sort, _fake_sort)
dispatch.differentiate(_route, _gradients, _save)
