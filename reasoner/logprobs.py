"""Log-probabilities of given tokens under a model, without its logits: hidden states, then the RL head's kernel.

Knows nothing of losses or of who sampled the tokens. Neighbours: `learner` trains and measures through it,
`kernels.token_logprob` walks the vocabulary.

Shapes: B rows, L columns, T kept columns at the end of each row, D model width, K experts chosen per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reasoner.kernels import token_logprob
from reasoner.model import ReasonerForCausalLM
from reasoner.model.layout import Layout, tree

# What some architectures do to their logits: such a head is more than one matrix.
SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")

# Architectures of transformers that take any attention mask: whom each token sees, in four dimensions.
TREES = ("llama", "mistral", "qwen2", "qwen3")
CELLS = 1 << 26  # rows x columns x columns of a batch at most: building its trees takes ten bytes of each


def is_plain(model: Any) -> bool:
    """Whether the logits of `model` are its last hidden states times one matrix."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return False
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in SCALED)
    return head is not None and getattr(head, "bias", None) is None and not scaled


def token_logprobs(
    model: PreTrainedModel,
    ids_BL: Tensor,
    mask_BL: Tensor,
    kept: int,
    *,
    temperature: float = 1.0,
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) in nats of the last `kept` = T tokens of each row, and the entropies of their laws.

    0 in both where the mask is. Differentiable. Columns before the last T are read and cost no head at all. What
    several rows begin with is read once where the model can (`TREES`): the samples of a question share its prompt.

    experts: (B, L, layers, K) recorded ids for our own model to use instead of choosing, negative: choose.
    """
    if experts is None and _reads_trees(model) and ids_BL.numel() * ids_BL.shape[1] <= CELLS:
        layout = tree(ids_BL, mask_BL, ids_BL.shape[1] - kept)
        if layout is not None and _pays(layout, ids_BL, mask_BL):
            return _of_trees(model, ids_BL, mask_BL, kept, temperature, layout)
    return _by_length(model, ids_BL, mask_BL, kept, temperature, experts)


def _reads_trees(model: Any) -> bool:
    config = model.config
    plain = config.model_type in TREES and config._attn_implementation == "sdpa"
    return isinstance(model, ReasonerForCausalLM) or (plain and not getattr(config, "sliding_window", None))


def _pays(layout: Layout, ids_BL: Tensor, mask_BL: Tensor) -> bool:
    """Whether a tenth of the tokens is saved: trees need a mask, without one attention is faster."""
    return 10 * len(layout.slots_T) <= 9 * int(mask_BL.sum()) and layout.sequences * layout.width < ids_BL.numel()


def _of_trees(
    model: Any, ids_BL: Tensor, mask_BL: Tensor, kept: int, temperature: float, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Every distinct beginning read once, every distinct continuation of it scored once.

    Shapes: M kept tokens, N nodes that they stand for; for other models than ours N rows of S nodes, too.
    """
    ids_T, shared = layout.take(ids_BL), layout.shared
    if isinstance(model, ReasonerForCausalLM):
        out = model.base_model(input_ids=ids_BL, layout=layout, use_cache=False)
        hidden_TD = layout.take(out.last_hidden_state)
    else:
        ids_NS, positions_NS = layout.rows(ids_T), layout.rows(layout.positions_T)
        seen_N1SS = shared.seen_NSS[:, None]
        out = model.base_model(input_ids=ids_NS, attention_mask=seen_N1SS, position_ids=positions_NS, use_cache=False)
        hidden_TD = layout.unrow(out.last_hidden_state)
    real_BT = mask_BL[:, -kept:].bool()
    node_N, back_M = shared.nodes_BL[:, -kept:][real_BT].unique(return_inverse=True)
    weight_VD = model.get_output_embeddings().weight
    found = token_logprob(hidden_TD[shared.parent_T[node_N]], weight_VD, ids_T[node_N], temperature)
    return tuple(x_N.new_zeros(real_BT.shape).masked_scatter(real_BT, x_N[back_M]) for x_N in found)


def _by_length(
    model: Any, ids_BL: Tensor, mask_BL: Tensor, kept: int, temperature: float, experts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows of like lengths together: attention is as wide as the longest sequence beside it."""
    order_B = mask_BL.sum(1).argsort(stable=True)
    parts = [
        _of_rows(model, ids_BL[rows], mask_BL[rows], kept, temperature, None if experts is None else experts[rows])
        for rows in order_B.chunk(max(1, min(4, len(ids_BL) // 32)))
    ]
    back_B = order_B.argsort()
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps)[back_B], torch.cat(entropies)[back_B]


def _of_rows(
    model: Any, ids_BL: Tensor, mask_BL: Tensor, kept: int, temperature: float, experts: Tensor | None
) -> tuple[Tensor, Tensor]:
    more = {} if experts is None else {"experts": experts}
    out = model.base_model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False, **more)
    real_BT = mask_BL[:, -kept:].bool()
    hidden_ND = out.last_hidden_state[:, -kept - 1 : -1][real_BT]
    logp_N, entropy_N = token_logprob(
        hidden_ND, model.get_output_embeddings().weight, ids_BL[:, -kept:][real_BT], temperature
    )
    blank_BT = logp_N.new_zeros(real_BT.shape)
    return blank_BT.masked_scatter(real_BT, logp_N), blank_BT.masked_scatter(real_BT, entropy_N)


def recorded_experts(rows: list[bytes], starts: list[int], width: int, config: Any) -> Tensor | None:
    """The rows' records (`search.base.Step.experts`) as (B, width, layers, K) int16; row b begins at column starts[b].

    None where no row has one. Raises ValueError for a record of a model of another shape.
    """
    if not any(rows):
        return None
    shape = (config.num_hidden_layers, config.num_experts_per_tok)
    out = torch.full((len(rows), width, *shape), -1, dtype=torch.int16)
    for row, record, start in zip(out, rows, starts, strict=True):
        count, rest = divmod(len(record), 2 * shape[0] * shape[1])
        if rest or count > width - start:
            raise ValueError(
                f"a record of {len(record)} bytes is not that of at most {width - start} tokens in {shape[0]} layers "
                f"with {shape[1]} experts each: it was made by another model"
            )
        if count:
            row[start : start + count] = torch.frombuffer(bytearray(record), dtype=torch.int16).view(count, *shape)
    return out
