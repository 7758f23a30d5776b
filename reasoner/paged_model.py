"""The model read through a paged latent cache, on the kernels' ops: new sequences and next tokens in one pass.

A page holds the latents of some tokens of one sequence; a sequence's table names its pages in order. Knows nothing of
who owns the pages or which token is drawn. Neighbours: `paged_engine` calls it, `reasoner.model` holds the weights.

Shapes: B sequences, T tokens, H heads, n + r a query (without position, rotary), C the latent, D = C + r a cached row,
X pages of a table, N sequences of a prefill with at most S new tokens each, P tokens of a whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reasoner import kernels
from reasoner.model import ReasonerForCausalLM
from reasoner.model.mla import LatentAttention, rotary_angles
from reasoner.model.moe import MoE

Attend = Callable[[LatentAttention, Tensor, Tensor, Tensor], Tensor]  # q_THn, rotated q_THr, cache -> (T, H * v)


class PagedCache:
    """Latents of `pages` pages of `size` tokens for every layer, and which experts read each token, if `record`."""

    def __init__(self, model: ReasonerForCausalLM, pages: int, size: int, *, record: bool = False) -> None:
        config = model.config
        width, layers = config.kv_lora_rank + config.qk_rope_head_dim, config.num_hidden_layers
        self.size = size
        self.latents = [torch.zeros(pages, size, width, dtype=model.dtype, device=model.device) for _ in range(layers)]
        shape = (pages * size + 1, layers, config.num_experts_per_tok)  # the last row takes what belongs nowhere
        self.experts = torch.full(shape, -1, dtype=torch.int16, device=model.device) if record else None

    @staticmethod
    def token_bytes(model: ReasonerForCausalLM) -> int:
        """What one token of a sequence takes."""
        config = model.config
        return (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers * model.dtype.itemsize

    def note(self, layer: int, slots_T: Tensor, experts_TK: Tensor | None) -> None:
        if self.experts is not None and experts_TK is not None:
            self.experts[slots_T, layer] = experts_TK.to(torch.int16)  # slot -1 is the last row

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """The content of whole pages into others."""
        device = self.latents[0].device
        source, target = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for latents in self.latents:
            latents[target] = latents[source]
        if self.experts is not None:
            of_page = self.experts[:-1].unflatten(0, (-1, self.size))
            of_page[target] = of_page[source]

    def experts_at(self, slots: list[int]) -> bytes:
        """The ids recorded for these tokens, as `search.base.Step` keeps them."""
        return b"" if self.experts is None else self.experts[slots].cpu().numpy().astype("<i2").tobytes()


@dataclass(frozen=True)
class Part:
    """Some of the tokens of one forward pass, how they attend, and which of them logits are wanted after."""

    ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor  # of the cache, where their latents go; negative: nowhere
    attend: Attend
    last_N: Tensor | slice


def read(model: ReasonerForCausalLM, cache: PagedCache, *parts: Part) -> Tensor:
    """Logits (N, V) in float32 after the last tokens of all parts, read in one pass."""
    sizes = [len(part.ids_T) for part in parts]

    def attend(layer: LatentAttention, q_THn: Tensor, q_THr: Tensor, latents: Tensor) -> Tensor:
        pieces = zip(parts, q_THn.split(sizes), q_THr.split(sizes), strict=True)
        return torch.cat([part.attend(layer, n, r, latents) for part, n, r in pieces])

    given = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids_T", "positions_T", "slots_T"))
    x_TD = _blocks(model, cache, *given, attend)
    last_ND = torch.cat([x[part.last_N] for part, x in zip(parts, x_TD.split(sizes), strict=True)])
    return model.lm_head(model.model.norm(last_ND)).float()


def decode(model: ReasonerForCausalLM, cache: PagedCache, *given: Tensor) -> Tensor:
    """Logits (B, V) in float32 after one more token of each sequence; `given` as for `one_more`."""
    return read(model, cache, one_more(*given))


def one_more(ids_B: Tensor, positions_B: Tensor, slots_B: Tensor, table_BX: Tensor, lengths_B: Tensor) -> Part:
    """One more token of each sequence, in the absorbed form over the cache itself.

    lengths_B: int32, tokens of each sequence with the new one; 0 for a row that only fills the batch.
    """

    def attend(layer: LatentAttention, q_BHn: Tensor, q_BHr: Tensor, latents: Tensor) -> Tensor:
        up_HnC, down_HvC = layer.kv_b_proj.weight.unflatten(0, (layer.heads, -1)).split((layer.nope, layer.value), 1)
        q_BHC = torch.einsum("bhn,hnc->bhc", q_BHn, up_HnC)
        q_B1HD = torch.cat((q_BHC, q_BHr), dim=-1)[:, None]
        out_B1HC = kernels.latent_decode(q_B1HD, latents, table_BX, lengths_B, layer.latent, layer.scale)
        return torch.einsum("bhc,hvc->bhv", out_B1HC[:, 0], down_HvC).flatten(1)

    return Part(ids_B, positions_B, slots_B, attend, slice(None))


def whole(cache: PagedCache, ids: list[tuple[int, ...]], tables: list[list[int]], past: list[int]) -> Part:
    """Whole sequences, of which the first `past` tokens are in the cache already."""
    device = cache.latents[0].device
    new = [len(i) - p for i, p in zip(ids, past, strict=True)]
    widest, longest, count = max(new), max(map(len, ids)), len(ids)
    table_NX = _rectangle(tables, device)
    past_N, new_N = torch.tensor(past, device=device), torch.tensor(new, device=device)
    row_T = torch.arange(count, device=device).repeat_interleave(new_N)
    column_T = torch.cat([torch.arange(n, device=device) for n in new])
    positions_T = past_N[row_T] + column_T
    slots_T = table_NX[row_T, positions_T // cache.size] * cache.size + positions_T % cache.size
    place_T = row_T * widest + column_T
    ids_T = torch.tensor([i for each, p in zip(ids, past, strict=True) for i in each[p:]], device=device)
    keys = torch.arange(longest, device=device)
    real_NP = keys < (past_N + new_N)[:, None]
    seen_NSP = None
    if any(past):
        seen_NSP = keys <= past_N[:, None, None] + torch.arange(widest, device=device)[:, None]

    def attend(layer: LatentAttention, q_THn: Tensor, q_THr: Tensor, latents: Tensor) -> Tensor:
        """Keys and values of every head from the latents: the training path's way, over cached tokens too."""
        rows_NPD = latents[table_NX].flatten(1, 2)[:, :longest]
        rows_NPD = torch.where(real_NP[..., None], rows_NPD, 0.0)  # an unused page may hold anything
        latent_NPC, k_NPr = rows_NPD.split((layer.latent, layer.rope), dim=-1)
        kv_NPHk = layer.kv_b_proj(latent_NPC).unflatten(-1, (layer.heads, layer.nope + layer.value))
        k_NPHn, v_NPHv = kv_NPHk.split((layer.nope, layer.value), dim=-1)
        k = torch.cat((k_NPHn, k_NPr[:, :, None].expand(-1, -1, layer.heads, -1)), dim=-1)
        q_THk = torch.cat((q_THn, q_THr), dim=-1)
        q = q_THk.new_zeros(count * widest, *q_THk.shape[1:]).index_copy(0, place_T, q_THk).unflatten(0, (count, -1))
        out_NSHv = kernels.attention(q, k, v_NPHv, layer.scale, seen_NSP)
        return out_NSHv.flatten(0, 1)[place_T].flatten(1)

    return Part(ids_T, positions_T, slots_T, attend, new_N.cumsum(0) - 1)


def _blocks(
    model: ReasonerForCausalLM, cache: PagedCache, ids_T: Tensor, positions_T: Tensor, slots_T: Tensor, attend: Attend
) -> Tensor:
    """The tokens after the last block, (T, width); their latents and experts are in the cache."""
    config = model.config
    x_TD, (cos, sin) = model.model.embed_tokens(ids_T), rotary_angles(config, positions_T)
    for number, block in enumerate(model.model.layers[: config.num_hidden_layers]):
        layer, latents = block.self_attn, cache.latents[number]
        y_TD = block.input_layernorm(x_TD)
        q_THn, q_THr = layer.queries(y_TD).split((layer.nope, layer.rope), dim=-1)
        kv_TD, norm = layer.kv_a_proj_with_mqa(y_TD), layer.kv_a_layernorm
        q_THr = kernels.write_latent(kv_TD, norm.weight, q_THr, cos, sin, slots_T, latents, norm.eps)
        x_TD = x_TD + layer.o_proj(attend(layer, q_THn, q_THr, latents))
        y_TD = block.post_attention_layernorm(x_TD)
        if isinstance(block.mlp, MoE):
            y_TD, experts_TK, _ = block.mlp(y_TD)
            cache.note(number, slots_T, experts_TK)
        else:
            y_TD = block.mlp(y_TD)
        x_TD = x_TD + y_TD
    return x_TD


def _rectangle(rows: list[list[int]], device: torch.device) -> Tensor:
    """Lists of unequal length as (len(rows), longest) int64; what is missing is 0."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
