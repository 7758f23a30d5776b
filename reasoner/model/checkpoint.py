"""Reads and writes checkpoints in the public `deepseek_v3` format, and names tensors as servers want them.

In memory the experts of a layer are two stacked tensors; in a file each expert has its own three. Knows nothing of training.
Neighbours: `config.py` for config.json; weight pushes send what `export` yields.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .config import ReasonerConfig
from .transformer import ReasonerForCausalLM

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


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


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes model and tokenizer to `folder`, replacing what is there; a crash leaves the old or the new, never a half."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if isinstance(model, ReasonerForCausalLM):
            save_file({name: t.contiguous() for name, t in export(model)}, fresh / "model.safetensors", {"format": "pt"})
            _write_config(model, fresh)
            model.generation_config.save_pretrained(fresh)
        else:
            model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        fresh.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old)
            os.replace(fresh, folder)
            shutil.rmtree(old)
        else:
            os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_config(model: ReasonerForCausalLM, folder: Path) -> None:
    content = model.config.to_dict()
    content["architectures"] = ["DeepseekV3ForCausalLM"]
    content["num_nextn_predict_layers"] = 0  # servers look for as many layers as this says
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
    config = ReasonerConfig.from_pretrained(folder)
    config.dtype = dtype or config.dtype or torch.float32
    with torch.device("meta"):
        model = ReasonerForCausalLM._from_config(config, dtype=config.dtype)
    model.to_empty(device="cpu")
    _fill(model, folder)
    return model.eval()


@torch.no_grad()
def _fill(model: ReasonerForCausalLM, folder: Path) -> None:
    wanted = dict(export(model))
    surplus = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if name not in wanted:
                    surplus.append(name)
                    continue
                target, source = wanted.pop(name), tensors.get_tensor(name)
                if target.shape != source.shape:
                    raise ValueError(
                        f"{folder}: {name} is {tuple(source.shape)} but config.json makes it {tuple(target.shape)}: "
                        "the weights belong to another configuration"
                    )
                target.copy_(source)
    if wanted or surplus:
        raise ValueError(
            f"{folder}: {_names('missing', wanted)}, {_names('surplus', surplus)}: "
            "the weights do not belong to config.json, or the checkpoint is incomplete"
        )


def _names(kind: str, names) -> str:
    names = sorted(names)
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{len(names)} tensors {kind}" + (f" ({shown})" if names else "")
