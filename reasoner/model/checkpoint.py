"""Reads and writes checkpoints in the public `deepseek_v3` format, and names tensors as servers want them.

In memory the experts of a layer are two stacked tensors; in a file each expert has its own three. Knows nothing of
training. Neighbours: `config.py` for config.json; weight pushes send what `export` yields.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .config import ReasonerConfig
from .transformer import ReasonerForCausalLM

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
SHARED = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")


def export(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name in the checkpoint, tensor) for every weight: views of the model's own memory, nothing is copied.

    Models that are not ours are named as in their state_dict.
    """
    ours = isinstance(model, ReasonerForCausalLM)
    for name, tensor in model.state_dict().items():
        if ours and name.endswith(GATE_UP):
            prefix, inner = name.removesuffix("gate_up_proj"), tensor.shape[1] // 2
            for expert, weight in enumerate(tensor):
                yield f"{prefix}{expert}.gate_proj.weight", weight[:inner]
                yield f"{prefix}{expert}.up_proj.weight", weight[inner:]
        elif ours and name.endswith(DOWN):
            for expert, weight in enumerate(tensor):
                yield f"{name.removesuffix('down_proj')}{expert}.down_proj.weight", weight
        else:
            yield name, tensor
    if ours:
        trunk = model.config.num_hidden_layers
        for layer in range(trunk, trunk + model.config.num_mtp_layers):  # the format repeats what MTP modules share
            yield f"model.layers.{layer}.embed_tokens.weight", model.model.embed_tokens.weight.detach()
            yield f"model.layers.{layer}.shared_head.head.weight", model.lm_head.weight.detach()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes model and tokenizer to `folder`, replacing what is there; a failure leaves the old, never a half.

    A process killed between the last two renames leaves the old checkpoint beside it, as `.NAME-old-*`.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    with _served(model):
        try:
            _write(model, tokenizer, fresh)
            if folder.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
                os.replace(folder, old)
                os.replace(fresh, folder)
                shutil.rmtree(old)
            else:
                os.replace(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def _served(model: PreTrainedModel) -> Iterator[None]:
    """Trainers switch the cache off in the config; who loads the checkpoint would decode without one."""
    configs = [config for config in (model.config, model.generation_config) if config is not None]
    before = [config.use_cache for config in configs]
    try:
        for config in configs:
            config.use_cache = True
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.use_cache = value


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    if isinstance(model, ReasonerForCausalLM):
        weights = {name: t.clone() if SHARED.fullmatch(name) else t.contiguous() for name, t in export(model)}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        _write_config(model, folder)
        model.generation_config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    folder.chmod(0o755)


def _write_config(model: ReasonerForCausalLM, folder: Path) -> None:
    content = model.config.to_dict()
    content["architectures"] = ["DeepseekV3ForCausalLM"]
    content["dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def load(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in `folder`, in evaluation mode: ours for `deepseek_v3`, any other Hugging Face causal model otherwise.

    `dtype` defaults to the checkpoint's own. Raises ValueError naming missing, surplus and misshapen tensors.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "deepseek_v3":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()
    files = _names_in(folder)
    config = ReasonerConfig.from_pretrained(folder)
    config.dtype = dtype or config.dtype or torch.float32
    if not any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in files):
        config.num_mtp_layers = 0  # transformers drops these layers when it saves, and does not say so in config.json
    with torch.device("meta"):
        model = ReasonerForCausalLM._from_config(config, dtype=config.dtype)
    model.to_empty(device="cpu")
    _fill(model, folder, files)
    return model.eval()


def _names_in(folder: Path) -> dict[str, Path]:
    """Every tensor's name and its file, without the copies of what MTP modules share with the trunk."""
    names = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                names |= {name: file for name in tensors.keys() if not SHARED.fullmatch(name)}
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}): it is damaged or cut short, copy it again") from error
    return names


@torch.no_grad()
def _fill(model: ReasonerForCausalLM, folder: Path, files: dict[str, Path]) -> None:
    if any(name.endswith(GATE_UP) for name in files):  # a trainer's own save, by `save_pretrained`
        wanted = model.state_dict()
    else:
        wanted = {name: tensor for name, tensor in export(model) if not SHARED.fullmatch(name)}
    missing, surplus = wanted.keys() - files.keys(), files.keys() - wanted.keys()
    if missing or surplus:
        raise ValueError(
            f"{folder}: {_names('missing', missing)}, {_names('surplus', surplus)}: "
            "the weights do not belong to config.json, or the checkpoint is incomplete"
        )
    for file in set(files.values()):
        with safe_open(file, framework="pt") as tensors:
            for name in (name for name, where in files.items() if where == file):
                target, source = wanted[name], tensors.get_tensor(name)
                if target.shape != source.shape:
                    raise ValueError(
                        f"{folder}: {name} is {tuple(source.shape)} but config.json makes it {tuple(target.shape)}: "
                        "the weights belong to another configuration"
                    )
                target.copy_(source)


def _names(kind: str, names) -> str:
    names = sorted(names)
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{len(names)} tensors {kind}" + (f" ({shown})" if names else "")
