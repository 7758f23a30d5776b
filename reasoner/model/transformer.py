"""The causal language model: embedding, blocks of latent attention and experts, head; a Hugging Face PreTrainedModel.

Trains under transformers and TRL trainers and decodes under `generate`. Parameters are named and stacked as in
transformers' DeepseekV3ForCausalLM. Knows nothing of files (`checkpoint.py`) and of learning.

Shapes: B rows, L columns of the input; T real tokens; D model width; V vocabulary; K experts chosen per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .config import ReasonerConfig
from .layout import Layout, continued, fresh
from .mla import LatentAttention, rotary_angles
from .moe import Experts, Mlp, MoE, Router, sequence_loss


class Block(GradientCheckpointingLayer):
    def __init__(self, config: ReasonerConfig, layer: int):
        super().__init__()
        self.self_attn = LatentAttention(config, layer)
        dense = layer < min(config.first_k_dense_replace, config.num_hidden_layers)  # MTP modules never are
        self.mlp = Mlp(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_TD: Tensor,
        layout: Layout,
        angles: tuple[Tensor, Tensor],
        replay_TK: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The tokens after this block; the experts they used and the router's scores, None in a dense block."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), layout, angles, past_key_values)
        y_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.mlp, Mlp):
            return x_TD + self.mlp(y_TD), None, None
        y_TD, experts_TK, scores_TE = self.mlp(y_TD, replay_TK)
        return x_TD + y_TD, experts_TK, scores_TE


class MtpBlock(Block):
    """A multi-token prediction module (DeepSeek-V3, section 2.2): joins what is known with one more token."""

    def __init__(self, config: ReasonerConfig, layer: int):
        super().__init__(config, layer)
        self.enorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(
        self, x_TD: Tensor, token_TD: Tensor, layout: Layout, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        joined_TD = self.eh_proj(torch.cat((self.enorm(token_TD), self.hnorm(x_TD)), dim=-1))
        x_TD, experts_TK, scores_TE = super().forward(joined_TD, layout, angles)
        return self.shared_head["norm"](x_TD), experts_TK, scores_TE


@dataclass
class ReasonerModelOutput(BaseModelOutputWithPast):
    experts: Tensor | None = None  # (B, L, layers, K) ids used, as in vLLM; -1 in dense layers and padding
    aux_loss: Tensor | None = None  # sequence-wise balance, summed over layers


@dataclass
class ReasonerOutput(CausalLMOutputWithPast):
    experts: Tensor | None = None
    aux_loss: Tensor | None = None
    mtp_loss: Tensor | None = None


class ReasonerPreTrainedModel(PreTrainedModel):
    config_class = ReasonerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "MtpBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | Router):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        if isinstance(module, Router):
            nn.init.zeros_(module.e_score_correction_bias)


class ReasonerModel(ReasonerPreTrainedModel):
    def __init__(self, config: ReasonerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        trunk, total = config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers
        self.layers = nn.ModuleList((Block if layer < trunk else MtpBlock)(config, layer) for layer in range(total))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        experts: Tensor | None = None,
        output_experts: bool = False,
        output_aux_loss: bool = False,
        layout: Layout | None = None,
        **_: object,
    ) -> ReasonerModelOutput:
        """Hidden states (B, L, D) after the last norm, zero at padding. See `ReasonerForCausalLM.forward`.

        layout: `layout.tree` of ids and mask, to read what rows have in common once: hidden states are then zero at all
            but one of a token's places. Without cache, recorded experts and auxiliary loss only.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        given_BL = input_ids if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if past_key_values is not None and not isinstance(past_key_values, DynamicCache):
            raise ValueError(f"{type(past_key_values).__name__} is not supported: use a DynamicCache")
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if layout is not None:
            assert past_key_values is None and experts is None and not output_aux_loss, "a layout is given: see above"
        elif cached:
            layout = continued(given_BL, cached, attention_mask, position_ids)
        else:
            layout = fresh(given_BL, attention_mask, position_ids)
        trunk = self.layers[: self.config.num_hidden_layers]
        wanted = (*given_BL.shape[:2], len(trunk), self.config.num_experts_per_tok)
        if experts is not None and experts.shape != wanted:
            raise ValueError(
                f"experts is {tuple(experts.shape)} but (rows, columns, layers, experts per token) is {wanted}"
            )
        replay = None if experts is None else layout.take(experts)

        x_TD, angles = layout.take(given_BL), rotary_angles(self.config, layout.positions_T)
        if inputs_embeds is None:
            x_TD = self.embed_tokens(x_TD)
        used = x_TD.new_full((len(x_TD), *wanted[2:]), -1, dtype=torch.long) if output_experts else None
        aux_losses = []
        for layer, block in enumerate(trunk):
            recorded = None if replay is None else replay[:, layer]
            x_TD, experts_TK, scores_TE = block(x_TD, layout, angles, recorded, past_key_values=past_key_values)
            if experts_TK is None:
                continue
            self.count(block, experts_TK, layout)
            if output_experts:
                used[:, layer] = experts_TK
            if output_aux_loss:
                aux_losses.append(sequence_loss(scores_TE, experts_TK, layout.sequence_T))
        return ReasonerModelOutput(
            last_hidden_state=layout.put(self.norm(x_TD)),
            past_key_values=past_key_values,
            experts=layout.put(used, fill=-1) if output_experts else None,
            aux_loss=torch.stack(aux_losses).sum() if aux_losses else None,
        )

    def count(self, block: Block, experts_TK: Tensor, layout: Layout) -> None:
        """Tells `balance` of the load. Not done in the block itself, because a checkpointed block runs twice."""
        if self.training and torch.is_grad_enabled():
            block.mlp.count(experts_TK, None if layout.shared is None else layout.shared.copies_T)


class ReasonerForCausalLM(ReasonerPreTrainedModel, GenerationMixin):
    """The model with its head.

    Example:
        model = ReasonerForCausalLM(ReasonerConfig.small(vocab_size=64))
        model(input_ids, attention_mask=mask).logits
    """

    def __init__(self, config: ReasonerConfig):
        super().__init__(config)
        if config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True is not supported, servers of this format never tie: set False")
        self.model = ReasonerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        experts: Tensor | None = None,
        output_experts: bool = False,
        aux_weight: float = 0.0,
        mtp_weight: float = 0.0,
        mtp_detached: bool = False,
        **kwargs: object,
    ) -> ReasonerOutput:
        """Logits (B, L, V), or of the last `logits_to_keep` columns.

        attention_mask: (B, L), or (B, cached + L). Rows padded on either side; padding costs nothing and its hidden
            states are zero. Without a mask, `position_ids` that restart within a row mark packed sequences, which do
            not see each other.
        experts: (B, L, layers, K) recorded expert ids to use instead of choosing (router replay); negative: choose.
            `output_experts` returns those used, in the same form.
        aux_weight, mtp_weight: when there are labels, the sequence-wise balance of the experts and `mtp_loss` are added
            to the loss with these weights.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            experts,
            output_experts,
            output_aux_loss=aux_weight != 0,
        )
        hidden_BLD = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_BLD[:, kept])
        loss = mtp_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if outputs.aux_loss is not None:
                loss = loss + aux_weight * outputs.aux_loss
            if mtp_weight:
                mtp_loss = self.mtp_loss(hidden_BLD, input_ids, labels, attention_mask, position_ids, mtp_detached)
                loss = loss + mtp_weight * mtp_loss
        return ReasonerOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            experts=outputs.experts,
            aux_loss=outputs.aux_loss,
            mtp_loss=mtp_loss,
        )

    def look_ahead(
        self,
        hidden_BLD: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        detached: bool = False,
    ) -> list[Tensor]:
        """Logits (B, L, V) of each MTP module: at column i, module k >= 1 knows token i + k and predicts the next.

        `hidden_BLD` is the trunk's last hidden state. Where a sequence has no token i + k the logits mean nothing.
        `detached`: neither the trunk nor the embedding and head it shares with the modules get gradients.
        """
        layout = fresh(hidden_BLD, attention_mask, position_ids)
        embedding, head = self.model.embed_tokens.weight, self.lm_head.weight
        if detached:
            hidden_BLD, embedding, head = hidden_BLD.detach(), embedding.detach(), head.detach()
        x_TD, ids_T = layout.take(hidden_BLD), layout.take(input_ids)
        angles = rotary_angles(self.config, layout.positions_T)
        logits = []
        for distance, block in enumerate(self.model.layers[self.config.num_hidden_layers :], start=1):
            token_TD = F.embedding(layout.ahead(ids_T, distance, fill=0), embedding)
            x_TD, experts_TK, _ = block(x_TD, token_TD, layout, angles)
            self.model.count(block, experts_TK, layout)
            logits.append(layout.put(F.linear(x_TD, head)))
        return logits

    def mtp_loss(
        self,
        hidden_BLD: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        detached: bool = False,
    ) -> Tensor:
        """Cross-entropy of the MTP modules in nats, the mean over their tokens and then over the modules."""
        if not self.config.num_mtp_layers:
            raise ValueError("no MTP module to train, num_mtp_layers=0: set it to 1 or mtp_weight to 0")
        layout = fresh(hidden_BLD, attention_mask, position_ids)
        ahead = self.look_ahead(hidden_BLD, input_ids, attention_mask, position_ids, detached)
        losses = []
        for distance, logits in enumerate(ahead, start=2):
            target_T = layout.ahead(layout.take(labels), distance, fill=-100)
            total = F.cross_entropy(layout.take(logits).float(), target_T, reduction="sum")
            losses.append(total / (target_T != -100).sum().clamp(min=1))
        return torch.stack(losses).mean()
