"""The base model: latent attention (MLA) and fine-grained experts (MoE) in DeepSeek-V3's public format.

Imports with torch and transformers alone.
"""

from .checkpoint import export, load, save
from .config import ReasonerConfig, check_serving
from .moe import balance
from .tokenizer import char_tokenizer
from .transformer import ReasonerForCausalLM

__all__ = [
    "ReasonerConfig",
    "ReasonerForCausalLM",
    "balance",
    "char_tokenizer",
    "check_serving",
    "export",
    "load",
    "save",
]
