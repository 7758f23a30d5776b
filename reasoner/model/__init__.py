"""The base model: latent attention (MLA) and fine-grained experts (MoE) in DeepSeek-V3's public format.

Needs torch and transformers alone. Each name is loaded at its first use, because transformers takes seconds to import
and brings accelerate along where it is installed.
"""

import importlib
from typing import Any

_FILES = {
    "ReasonerConfig": "config",
    "ReasonerForCausalLM": "transformer",
    "balance": "moe",
    "char_tokenizer": "tokenizer",
    "check_serving": "config",
    "export": "checkpoint",
    "load": "checkpoint",
    "save": "checkpoint",
}
__all__ = list(_FILES)


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)
