"""The causal language model: embedding, blocks of latent attention and experts, head; a Hugging Face PreTrainedModel.

Trains under transformers and TRL trainers and decodes under `generate`. Parameter names and stacked experts are those of
transformers' DeepseekV3ForCausalLM. Knows nothing of files (`checkpoint.py`) and of learning.

Shapes: B rows, L columns of the input; T real tokens; D model width; V vocabulary; K experts chosen per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .config import ReasonerConfig
from .layout import Layout, continued, fresh
from .mla import LatentAttention, rotary_angles
from .moe import Experts, MoE, Mlp, Router


class Block(GradientCheckpointingLayer):
    def __init__(self, config: ReasonerConfig, layer: int):
        super().__init__()
        self.self_attn = LatentAttention(config, layer)
        dense = layer < config.first_k_dense_replace
        self.mlp = Mlp(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_TD: Tensor, layout: Layout, angles: tuple[Tensor, Tensor], past_key_values: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens after this block and the experts they used, None in a dense block."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), layout, angles, past_key_values)
        y_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.mlp, Mlp):
            return x_TD + self.mlp(y_TD), None
        y_TD, experts_TK = self.mlp(y_TD)
        return x_TD + y_TD, experts_TK


class ReasonerPreTrainedModel(PreTrainedModel):
    config_class = ReasonerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
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
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
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
        **_: object,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, L, D) after the last norm, zero at padding. See `ReasonerForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        x_BLD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if cached:
            layout = continued(x_BLD, cached, attention_mask, position_ids)
        else:
            layout = fresh(x_BLD, attention_mask, position_ids)

        x_TD, angles = layout.take(x_BLD), rotary_angles(self.config, layout.positions_T)
        for block in self.layers:
            x_TD, experts_TK = block(x_TD, layout, angles, past_key_values=past_key_values)
            if experts_TK is not None and self.training and torch.is_grad_enabled():
                block.mlp.count(experts_TK)  # here, because a checkpointed block runs twice
        hidden_BLD = layout.put(self.norm(x_TD))
        return BaseModelOutputWithPast(last_hidden_state=hidden_BLD, past_key_values=past_key_values)


class ReasonerForCausalLM(ReasonerPreTrainedModel, GenerationMixin):
    """The model with its head.

    Example:
        model = ReasonerForCausalLM(ReasonerConfig.small(vocab_size=64))
        model(input_ids, attention_mask=mask).logits
    """

    def __init__(self, config: ReasonerConfig):
        super().__init__(config)
        if config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True is not supported: servers of this format never tie; set it to False")
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
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V), or of the last `logits_to_keep` columns.

        `attention_mask` (B, L), or (B, cached + L): rows padded on either side; hidden states of padding are zero. Without a
        mask, `position_ids` that restart within a row mark packed sequences, which do not see each other.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
