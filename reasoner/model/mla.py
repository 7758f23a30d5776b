"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one small latent per token stands for keys and values.

Training and prefill expand the latent into heads; decoding folds the expansion into the query and the output
("absorbed") and attends over the latent cache itself. Knows nothing of experts or batches: `layout.py` says which
tokens form a sequence. Neighbours: `transformer.py` calls it.

Shapes: T tokens, D model width, H heads; a head is n + r wide in queries and keys (n without position; r rotary, which
the heads share in keys) and v wide in values; C latent width, K = C + r; N sequences of at most
S tokens; B rows, L new columns, P cached and new columns, Q = L * H queries.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .. import kernels
from .config import ReasonerConfig
from .layout import Layout


def rotary_angles(config: ReasonerConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, r / 2) in float32. Computed per forward: a dtype or meta device would spoil a buffer."""
    kind = config.rope_parameters["rope_type"]
    size, device, scale = config.qk_rope_head_dim, positions_T.device, 1.0
    if kind == "default":
        frequencies = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, device=device).float() / size)
    elif kind == "yarn":
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, device)
    else:
        raise ValueError(f"rope_type={kind!r} is not supported: use 'default' or 'yarn'")
    angles = positions_T[:, None].float() * frequencies
    return angles.cos() * scale, angles.sin() * scale


def softmax_scale(config: ReasonerConfig) -> float:
    rope, scale = config.rope_parameters, (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim") and rope["factor"] > 1:
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2  # YaRN, arXiv 2309.00071
    return scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (0, 1), (2, 3), ...; stored as firsts, then seconds, which changes no query-key product."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1).to(x.dtype)


class LatentAttention(nn.Module):
    def __init__(self, config: ReasonerConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent = config.kv_lora_rank
        self.scale = softmax_scale(config)
        hidden, eps, query = config.hidden_size, config.rms_norm_eps, self.heads * (self.nope + self.rope)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(self.latent, eps)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)

    def forward(
        self, x_TD: Tensor, layout: Layout, angles: tuple[Tensor, Tensor], past_key_values: Cache | None = None
    ) -> Tensor:
        cos, sin = angles
        q_THn, q_THr = self.queries(x_TD).split((self.nope, self.rope), dim=-1)
        latent_TC, k_Tr = self.kv_a_proj_with_mqa(x_TD).split((self.latent, self.rope), dim=-1)
        latent_TC = self.kv_a_layernorm(latent_TC)
        q_THr, k_Tr = rotate(q_THr, cos[:, None], sin[:, None]), rotate(k_Tr, cos, sin)
        if past_key_values is not None:
            # Latent and rotary key side by side are the keys; the values are their first C columns, so none are stored.
            keys = layout.put(torch.cat((latent_TC, k_Tr), dim=-1))[:, None]
            keys_B1PK, _ = past_key_values.update(keys, keys[..., :0], self.layer)
            if layout.continues:
                return self.o_proj(self.absorbed(q_THn, q_THr, keys_B1PK, layout))
        return self.o_proj(self.expanded(q_THn, q_THr, latent_TC, k_Tr, layout))

    def queries(self, x_TD: Tensor) -> Tensor:
        q = self.q_proj(x_TD) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD)))
        return q.unflatten(-1, (self.heads, self.nope + self.rope))

    def expanded(self, q_THn: Tensor, q_THr: Tensor, latent_TC: Tensor, k_Tr: Tensor, layout: Layout) -> Tensor:
        """Attention with a key and a value per head, causal or along the branches of trees; (T, H * v)."""
        kv_THk = self.kv_b_proj(latent_TC).unflatten(-1, (self.heads, self.nope + self.value))
        k_THn, v_THv = kv_THk.split((self.nope, self.value), dim=-1)
        q = torch.cat((q_THn, q_THr), dim=-1)
        k = torch.cat((k_THn, k_Tr[:, None].expand(-1, self.heads, -1)), dim=-1)
        seen = None if layout.shared is None else layout.shared.seen_NSS
        return layout.unrow(kernels.attention(*map(layout.rows, (q, k, v_THv)), self.scale, seen)).flatten(1)

    def absorbed(self, q_THn: Tensor, q_THr: Tensor, keys_B1PK: Tensor, layout: Layout) -> Tensor:
        """Attention of all heads over the cache itself, which is key and value at once; (T, H * v)."""
        up_HnC, down_HvC = self.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split((self.nope, self.value), dim=1)
        q_THC = torch.einsum("thn,hnc->thc", q_THn, up_HnC)
        q_B1QK = torch.cat((q_THC, q_THr), dim=-1).view(layout.batch, 1, layout.length * self.heads, -1)
        mask = layout.mask_BLP
        if mask is not None:
            mask = mask.repeat_interleave(self.heads, dim=1)[:, None]
        out_B1QK = F.scaled_dot_product_attention(q_B1QK, keys_B1PK, keys_B1PK, mask, scale=self.scale)
        out_THC = out_B1QK[..., : self.latent].reshape(-1, self.heads, self.latent)
        return torch.einsum("thc,hvc->thv", out_THC, down_HvC).flatten(1)
