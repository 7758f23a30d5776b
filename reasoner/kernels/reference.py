"""Each op in plain PyTorch: the specification the kernels are tested against, and what runs where there is no GPU.

Written for exactness and for the CPU; every function is differentiable by autograd unless it returns indices.
Float32 inside for lower precisions, float64 for float64. Knows nothing of kernels. Neighbours: the op files.
Shapes: T tokens, H hidden, V vocabulary, E experts, K chosen experts, I expert width, B sequences, S queries of one
sequence, N heads, D = R + P a cached row (R latent numbers, P rotary ones).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def token_logprob(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of `target_T` and entropy of the distribution, (T,) each, in nats. Holds all logits: for tests.

    A negative target marks a row to leave out: 0 in both, no gradient.
    """
    logp_TV = F.log_softmax(wide(hidden_TH) @ wide(weight_VH).T / temperature, dim=-1)
    entropy_T = -torch.where(logp_TV == -torch.inf, 0.0, logp_TV.exp() * logp_TV).sum(-1)
    logprob_T = logp_TV.gather(-1, target_T.clamp(min=0)[:, None])[:, 0]
    return torch.where(target_T < 0, 0.0, logprob_T), torch.where(target_T < 0, 0.0, entropy_T)


def head_statistics(z_TC: Tensor, target_T: Tensor, state_4T: Tensor, start: int, temperature: float) -> None:
    """Fold the logits of the vocabulary entries start .. start+C into `state_4T`, with x = z / temperature: the max m,
    the sum of e^(x-m), the sum of (x-m) e^(x-m), and x[target]."""
    x_TC = z_TC / temperature
    max_T, sum_T, weighted_T, picked_T = state_4T
    new_T = torch.maximum(max_T, x_TC.amax(-1))
    shift_TC = x_TC - new_T[:, None]
    e_TC = shift_TC.exp()
    shift_T = torch.where(max_T == -torch.inf, 0.0, max_T - new_T)
    factor_T = shift_T.exp()
    weighted_T.copy_((weighted_T + shift_T * sum_T) * factor_T + torch.where(e_TC == 0, 0.0, e_TC * shift_TC).sum(-1))
    sum_T.copy_(sum_T * factor_T + e_TC.sum(-1))
    max_T.copy_(new_T)
    column_T = target_T - start
    inside_T = (target_T >= 0) & (column_T >= 0) & (column_T < x_TC.shape[1])
    chosen_T = x_TC.gather(-1, column_T.clamp(0, x_TC.shape[1] - 1)[:, None])[:, 0]
    picked_T.copy_(torch.where(inside_T, chosen_T, picked_T))


def head_gradient(
    z_TC: Tensor, target_T: Tensor, lse_T: Tensor, entropy_T: Tensor, by_logprob_T: Tensor, by_entropy_T: Tensor,
    start: int, temperature: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The gradient with respect to the logits, in `dtype`. Overwrites `z_TC`."""
    logp_TC = z_TC.div_(temperature).sub_(lse_T[:, None])
    p_TC = logp_TC.exp()
    spread_TC = torch.where(p_TC == 0, 0.0, logp_TC.add_(entropy_T[:, None]).mul_(p_TC))
    d_TC = p_TC.mul_(-by_logprob_T[:, None]).addcmul_(spread_TC, by_entropy_T[:, None], value=-1.0)
    column_T = target_T - start
    inside_T = (target_T >= 0) & (column_T >= 0) & (column_T < z_TC.shape[1])
    d_TC.scatter_add_(
        1, column_T.clamp(0, z_TC.shape[1] - 1)[:, None], torch.where(inside_T, by_logprob_T, 0.0)[:, None]
    )
    return torch.where(target_T[:, None] < 0, 0.0, d_TC.div_(temperature)).to(dtype)


def route(
    logits_TE: Tensor, bias_E: Tensor, chosen: int, groups: int, open_groups: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router (arXiv:2412.19437, 2.1.2): weights and ids (T, K), best first, ties to the lower id."""
    scores_TE = logits_TE.sigmoid()
    rank_TE = (scores_TE.detach() + bias_E).nan_to_num(nan=-torch.inf)
    if groups > 1:
        rank_TGe = rank_TE.unflatten(1, (groups, -1))
        best_TG = rank_TGe.topk(min(2, rank_TGe.shape[2]), dim=-1).values.sum(-1)
        opened_TG = best_TG.sort(dim=-1, descending=True, stable=True).indices[:, :open_groups]
        closed_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(1, opened_TG, False)
        rank_TE = rank_TGe.masked_fill(closed_TG[..., None], -torch.inf).flatten(1)
    experts_TK = rank_TE.sort(dim=-1, descending=True, stable=True).indices[:, :chosen].contiguous()
    weights_TK = scores_TE.gather(1, experts_TK)
    if normalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * scale, experts_TK


def route_backward(
    logits_TE: Tensor, experts_TK: Tensor, by_weights_TK: Tensor, normalise: bool, scale: float
) -> Tensor:
    s_TK = logits_TE.gather(1, experts_TK).sigmoid()
    g_TK = by_weights_TK * scale
    if normalise:
        total_T1 = s_TK.sum(-1, keepdim=True) + 1e-20
        g_TK = (g_TK - (g_TK * s_TK).sum(-1, keepdim=True) / total_T1) / total_T1
    return torch.zeros_like(logits_TE).scatter(1, experts_TK, g_TK * s_TK * (1 - s_TK))


def sort_by_expert(experts_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat_A = experts_TK.flatten()
    order_A = flat_A.argsort(stable=True)
    place_A = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=order_A.device))
    return order_A.int(), place_A.int(), torch.bincount(flat_A, minlength=experts).cumsum(0).int()


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and 1 / rms; rounded to the type of x before the weight, as transformers does."""
    rstd_T1 = (wide(x_TH).square().mean(-1, keepdim=True) + eps).rsqrt()
    return weight_H * (wide(x_TH) * rstd_T1).to(x_TH.dtype), rstd_T1[:, 0]


def rms_norm_backward(x_TH: Tensor, weight_H: Tensor, rstd_T: Tensor, by_y_TH: Tensor) -> tuple[Tensor, Tensor]:
    normal_TH, by_TH = wide(x_TH) * rstd_T[:, None], wide(by_y_TH)
    by_normal_TH = by_TH * weight_H
    d_x_TH = rstd_T[:, None] * (by_normal_TH - normal_TH * (by_normal_TH * normal_TH).mean(-1, keepdim=True))
    return d_x_TH.to(x_TH.dtype), (by_TH * normal_TH).sum(0).to(weight_H.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ...; stored as firsts, then seconds."""
    even, odd = wide(x[..., 0::2]), wide(x[..., 1::2])
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1).to(x.dtype)


def write_latent(
    kv_TD: Tensor, weight_R: Tensor, q_TNP: Tensor, cos: Tensor, sin: Tensor, slots_T: Tensor, cache: Tensor, eps: float
) -> Tensor:
    latent = weight_R.shape[0]
    row_TD = torch.cat((rms_norm(kv_TD[:, :latent], weight_R, eps)[0], rotate(kv_TD[:, latent:], cos, sin)), dim=-1)
    kept = (slots_T >= 0).nonzero()[:, 0]
    if len(kept) < len(slots_T):
        slots_T, row_TD = slots_T[kept], row_TD[kept]
    cache.view(-1, cache.shape[-1]).index_copy_(0, slots_T, row_TD.to(cache.dtype))
    return rotate(q_TNP, cos[:, None], sin[:, None])


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward(gate_up: Tensor, by_y: Tensor) -> Tensor:
    gate, up = wide(gate_up).chunk(2, dim=-1)
    s, by = gate.sigmoid(), wide(by_y)
    return torch.cat((by * up * s * (1 + gate * (1 - s)), by * gate * s), dim=-1).to(gate_up.dtype)


def attention(q_NSHk: Tensor, k_NPHk: Tensor, v_NPHv: Tensor, scale: float, seen_NSP: Tensor | None = None) -> Tensor:
    """Causal where `seen_NSP` does not say otherwise."""
    scores_NHSP = torch.einsum("nshk,nphk->nhsp", wide(q_NSHk), wide(k_NPHk)) * scale
    if seen_NSP is None:
        seen_NSP = torch.ones(scores_NHSP.shape[2:], dtype=torch.bool, device=q_NSHk.device).tril()[None]
    p_NHSP = scores_NHSP.masked_fill(~seen_NSP[:, None], -torch.inf).softmax(-1)
    return torch.einsum("nhsp,nphv->nshv", p_NHSP, wide(v_NPHv)).to(v_NPHv.dtype)


def latent_decode(
    q_BSND: Tensor, cache: Tensor, table_BX: Tensor, lengths_B: Tensor, latent: int, scale: float
) -> Tensor:
    """Absorbed MLA attention (DeepSeek-V2, arXiv:2405.04434) over each sequence's pages."""
    (batch, queries, heads, width), tokens = q_BSND.shape, table_BX.shape[1] * cache.shape[1]
    pages = table_BX.clamp(0, cache.shape[0] - 1).flatten()
    rows_BLD = wide(cache.index_select(0, pages)).view(batch, tokens, width)
    place_L = torch.arange(tokens, device=cache.device)
    used_BL = place_L < lengths_B[:, None]
    behind = (~used_BL).flatten().nonzero()[:, 0]
    rows_BLD.flatten(0, 1).index_fill_(0, behind, 0.0)  # what lies there may be anything
    seen_BQL = used_BL[:, None].expand(-1, heads, -1)
    if queries > 1:
        limit_BS = lengths_B[:, None] - queries + 1 + torch.arange(queries, device=cache.device)
        seen_BQL = (place_L < limit_BS[..., None]).repeat_interleave(heads, dim=1)
    q_BQD = wide(q_BSND).flatten(1, 2)
    q, k, seen = (x[:, None] for x in (q_BQD, rows_BLD, seen_BQL))  # one head, which all queries share
    out_BQD = F.scaled_dot_product_attention(q, k, k, seen, scale=scale)[:, 0]
    if batch and int(lengths_B.min()) < queries:  # a query that sees nothing
        out_BQD = torch.where(seen_BQL.any(-1, keepdim=True), out_BQD, 0.0)
    return out_BQD[..., :latent].unflatten(1, (queries, heads)).to(q_BSND.dtype)


def moe_experts(
    x_TH: Tensor, weights_TK: Tensor, order_A: Tensor, ends_E: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Tokens sorted by expert, two grouped products with SwiGLU between them, and each token's weighted sum."""
    chosen = weights_TK.shape[1]
    place_A = torch.empty_like(order_A, dtype=torch.int64)
    place_A[order_A.long()] = torch.arange(len(order_A), device=order_A.device)
    pre_A2I = grouped(x_TH[(order_A // chosen).long()], gate_up, ends_E)
    y_AH = grouped(swiglu(pre_A2I), down, ends_E)[place_A]
    return torch.einsum("tk,tkh->th", wide(weights_TK), wide(y_AH).unflatten(0, (-1, chosen))).to(x_TH.dtype)


def grouped(x_AK: Tensor, matrices_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """Row a times the matrix of its expert."""
    if x_AK.shape[0] and x_AK.dtype != torch.float64 and x_AK.shape[1] % 8 == 0 and matrices_ENK.shape[1] % 8 == 0:
        return F.grouped_mm(x_AK, matrices_ENK.transpose(1, 2), offs=ends_E)
    parts = x_AK.tensor_split(ends_E[:-1].tolist())
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, matrices_ENK, strict=True)])


def moe_experts_backward(
    x_TH: Tensor, weights_TK: Tensor, order_A: Tensor, ends_E: Tensor, gate_up: Tensor, down: Tensor, by_y_TH: Tensor
) -> tuple[Tensor, ...]:
    inputs = [t.detach().requires_grad_() for t in (x_TH, weights_TK, gate_up, down)]
    with torch.enable_grad():
        y_TH = moe_experts(inputs[0], inputs[1], order_A, ends_E, *inputs[2:])
    return torch.autograd.grad(y_TH, inputs, by_y_TH)


def gumbel(seeds_T: Tensor, columns: int) -> Tensor:
    """Gumbel noise (T, columns) that depends on nothing but seed and column."""
    low_T1, high_T1 = seeds_T[:, None] & 0xFFFFFFFF, seeds_T[:, None] >> 32 & 0xFFFFFFFF

    def mix(h: Tensor) -> Tensor:  # 32 bits inside int64: products wrap, their low half stays right
        h = ((h ^ h >> 16) * 0x7FEB352D) & 0xFFFFFFFF
        h = ((h ^ h >> 15) * 0x846CA68B) & 0xFFFFFFFF
        return h ^ h >> 16

    place = torch.arange(columns, device=seeds_T.device)
    h_TV = mix(mix((place + low_T1 * 0x9E3779B9) & 0xFFFFFFFF) ^ high_T1)
    return -torch.log(-torch.log(((h_TV >> 8).float() + 0.5) * 2.0**-24))


def sample(logits_TV: Tensor, seeds_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The argmax of logit + Gumbel noise is a draw from the softmax."""
    x_TV = logits_TV.float() / (temperature or 1.0)
    rank_TV = x_TV if temperature == 0 else x_TV + gumbel(seeds_T, x_TV.shape[1])
    token_T = rank_TV.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(-1)
    return token_T, x_TV.log_softmax(-1).gather(-1, token_T[:, None])[:, 0]
