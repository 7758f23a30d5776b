"""A toy chain as a checkpoint folder that real engines load: transformers, vLLM, and our own.

A llama whose attention and feed-forward write zeros knows only its last token. With one-hot embeddings and log P as
output weights it is the chain itself, so logprobs, stop tokens, deduplication and answer classes of a whole serving
stack can be held against dynamic programming. Written with the standard library and numpy alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from search.toy import Chain

WIDTH = 64  # also the one attention head's size, which vLLM takes on every device
NEVER = -60.0  # stands for log 0: 1e-26 of the mass


def write_checkpoint(chain: Chain, folder: Path, *, layers: int = 1, inner: int = WIDTH) -> None:
    """config.json, model.safetensors, and a tokenizer whose tokens are the chain's, joined without spaces.

    layers, inner (width of the feed-forward): more of them change nothing but the time that serving takes.
    """
    size = len(chain.vocabulary)
    if size > WIDTH:
        raise ValueError(f"the chain has {size} tokens and this llama room for {WIDTH}: use a smaller chain")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": WIDTH,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-12,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": chain.start,
        "eos_token_id": chain.end,
        "dtype": "float32",
    }
    special = {"eos_token": _word(chain, chain.end), "bos_token": _word(chain, chain.start)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(chain)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    _write_safetensors(_weights(chain, layers, inner), folder / "model.safetensors")


def _weights(chain: Chain, layers: int, inner: int) -> dict[str, np.ndarray]:
    size = len(chain.vocabulary)
    with np.errstate(divide="ignore"):
        table = np.maximum(np.log(chain.transition), NEVER)
    embedding, head = np.zeros((size, WIDTH)), np.zeros((size, WIDTH))
    embedding[:, :size] = np.eye(size)
    head[:, :size] = table.T / math.sqrt(WIDTH)  # the last norm makes a one-hot row sqrt(WIDTH) high
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": np.ones(WIDTH)}
    shapes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, WIDTH), "mlp.up_proj": (inner, WIDTH), "mlp.down_proj": (WIDTH, inner)}
    for layer in (f"model.layers.{i}." for i in range(layers)):
        weights |= {f"{layer}{name}.weight": np.zeros(shape) for name, shape in shapes.items()}
        weights |= {f"{layer}{name}.weight": np.ones(WIDTH) for name in ("input_layernorm", "post_attention_layernorm")}
    return weights


def _write_safetensors(tensors: dict[str, np.ndarray], file: Path) -> None:
    """The format: length of the header (8 bytes), the header as JSON, the raw little-endian numbers."""
    header, chunks, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, values in tensors.items():
        chunks.append(values.astype("<f4").tobytes())
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [at, at + len(chunks[-1])]}
        at += len(chunks[-1])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def _word(chain: Chain, token: int) -> str:
    return chain.vocabulary[token] or f"<{token}>"


def _tokenizer(chain: Chain) -> dict:
    words = {_word(chain, i): i for i in range(len(chain.vocabulary))}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ends = sorted((chain.start, chain.end))
    special = [{"id": i, "content": _word(chain, i), "special": True, **plain} for i in ends]
    # Any text that the chain can say splits into its tokens, the longest first.
    pattern = "|".join(_escaped(word) for word in sorted(words, key=len, reverse=True))
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": _word(chain, chain.start)},
    }


def _escaped(word: str) -> str:
    return "".join(f"\\{c}" if c in r"\.^$*+?()[]{}|" else c for c in word)
