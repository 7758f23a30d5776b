"""The shape of the model, in the keys of the public `deepseek_v3` format, and what its servers cannot run.

Knows no tensors. Neighbours: `transformer.py` builds what this describes; `checkpoint.py` writes it as config.json.
"""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from transformers import DeepseekV3Config

HOPPER_HEADS = ((128, 128), (64, 128), (192, 256))  # (nope, v) of the prefill kernels vLLM has for an H100 or H200
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # attention head sizes of vLLM on the CPU


class ReasonerConfig(DeepseekV3Config):
    """DeepSeek-V3's configuration with the keys that servers read and transformers does not write.

    Without them vLLM routes by softmax and drops the router's bias, and SGLang stops at `moe_layer_freq`.

    Example:
        ReasonerConfig.small(vocab_size=64)
    """

    model_type = "deepseek_v3"

    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    moe_layer_freq: int = 1
    moe_router_dtype: str = "float32"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        required = {
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "moe_layer_freq": 1,
            "hidden_act": "silu",
            "rope_interleave": True,
            "attention_bias": False,
            "attention_dropout": 0.0,
        }
        for key, value in required.items():
            if getattr(self, key) != value:
                raise ValueError(f"{key}={getattr(self, key)!r} is not supported: set it to {value!r}")
        if self.num_experts_per_tok > self.n_routed_experts // self.n_group * self.topk_group:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} cannot be chosen from topk_group={self.topk_group} of "
                f"n_group={self.n_group} groups of {self.n_routed_experts // self.n_group} experts: raise topk_group"
            )
        for key, step in (("hidden_size", 8), ("moe_intermediate_size", 8), ("qk_rope_head_dim", 2)):
            if getattr(self, key) % step or getattr(self, key) <= 0:
                raise ValueError(f"{key}={getattr(self, key)} must be a positive multiple of {step}")
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_group={self.n_group} does not divide n_routed_experts={self.n_routed_experts}")

    @classmethod
    def small(cls, vocab_size: int, **changes: Any) -> ReasonerConfig:
        """1.7 million parameters, 8 of 32 experts and a shared one: trains in minutes on two CPU cores.

        Query and key heads are 32 + 32 wide, so that vLLM serves it on the CPU with VLLM_MLA_DISABLE=1. With
        moe_intermediate_size=64 it has 2.9 million and a training step takes 1.3 times as long.
        """
        known = sorted({field.name for field in fields(cls)} | cls.attribute_map.keys())
        for key in changes.keys() - set(known):  # transformers would keep it and nobody would read it
            nearest = get_close_matches(key, known, n=1)
            raise ValueError(f"unknown key {key!r}" + (f": did you mean {nearest[0]!r}?" if nearest else ""))
        sizes: dict[str, Any] = dict(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=384,
            moe_intermediate_size=32,
            num_hidden_layers=4,
            first_k_dense_replace=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_routed_experts=32,
            num_experts_per_tok=8,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            num_mtp_layers=0,
            routed_scaling_factor=1.0,
            q_lora_rank=None,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
            max_position_embeddings=1024,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return cls(**(sizes | changes))


def check_serving(config: Any) -> list[str]:
    """What would go wrong when this configuration is served, one line each with its remedy; [] when nothing is known.

    Covers vLLM 0.32 and SGLang 0.5 on `deepseek_v3`. Other model types have no known traps.
    """
    if config.model_type != "deepseek_v3":
        return []
    found = []
    for key, value, otherwise in (
        ("topk_method", "noaux_tc", "vLLM has no place for e_score_correction_bias"),
        ("scoring_func", "sigmoid", "vLLM scores experts by softmax"),
        ("moe_layer_freq", 1, "SGLang reads it and has no default"),
        ("moe_router_dtype", "float32", "vLLM computes the router in bfloat16 on a GPU"),
        ("rope_interleave", True, "vLLM always interleaves"),
        ("rms_norm_eps", 1e-6, "transformers fixes the latent norms at 1e-6 while vLLM uses this value there too"),
        ("tie_word_embeddings", False, "vLLM never ties the head of this model and answers uniform log-probabilities"),
    ):
        if getattr(config, key, None) != value:
            found.append(f"{key}={getattr(config, key, None)!r}: {otherwise}; set it to {value!r}")
    heads = (config.qk_nope_head_dim, config.v_head_dim)
    if config.kv_lora_rank != 512 or config.qk_rope_head_dim != 64 or heads not in HOPPER_HEADS:
        found.append(
            f"kv_lora_rank={config.kv_lora_rank}, qk_rope_head_dim={config.qk_rope_head_dim}, (qk_nope_head_dim, "
            f"v_head_dim)={heads}: vLLM on a Hopper GPU takes only 512, 64 and one of {HOPPER_HEADS}; "
            "on the CPU set VLLM_MLA_DISABLE=1"
        )
        width = config.qk_nope_head_dim + config.qk_rope_head_dim
        if config.v_head_dim > width:
            found.append(f"v_head_dim={config.v_head_dim}: without its MLA kernels vLLM cuts values down to {width}")
        if width not in CPU_HEADS:
            found.append(f"qk_nope_head_dim + qk_rope_head_dim = {width}: vLLM on the CPU takes only {CPU_HEADS}")
    return found
