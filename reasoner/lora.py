"""LoRA (Hu et al. 2021, arXiv:2106.09685) through PEFT: the learner trains adapters, all others see a plain model.

The caller's model stays as it is and holds base + adapters after every `fold`; so checkpoints, engine pushes and
evaluation know nothing of adapters. It costs a second copy of the weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel


def adapt(model: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    """A copy of the model, frozen, with trainable adapters of this rank on every linear layer but the head.

    In models of the deepseek_v3 kind PEFT puts those of the feed-forward layers on the stacked experts instead.
    """
    torch.manual_seed(seed)
    head = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(model), settings)


def inside(model: Any) -> PreTrainedModel:
    """The model itself, with its adapters at work, without the wrapper that holds them."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapters(model: Any) -> dict[str, torch.Tensor]:
    """What has to be kept of `adapt`'s model to go on with it, besides the plain one; {} for any other model."""
    if not isinstance(model, PeftModel):
        return {}
    kept = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return kept | {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}


@torch.no_grad()
def fold(adapted: PeftModel, model: nn.Module) -> None:
    """Write base + adapters, and the buffers (router biases), of `adapted` into the plain `model` it was made from."""
    trained = inside(adapted)
    for name, layer in trained.named_modules():
        if isinstance(layer, LoraLayer):  # of one weight; those of stacked experts are nested, one for each parameter
            plain = model.get_submodule(name.split(".base_layer")[0])
            which = getattr(layer, "parameter_name", "weight")
            base = getattr(layer.get_base_layer(), which)
            getattr(plain, which).copy_(base + layer.get_delta_weight("default"))
    buffers = dict(model.named_buffers())
    for name, buffer in trained.named_buffers():
        if name in buffers:
            buffers[name].copy_(buffer)
