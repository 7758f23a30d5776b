"""Llama-style dense checkpoints as the converter reads them: which are supported, whether they are whole, and the
moments of their activations on a text.

Knows nothing of latent attention or experts. Neighbour: `convert.py` makes our model from what is read here.
Shapes: D model width, H query heads, G key heads of d numbers each, F neurons of the feed-forward layer, N tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "llama3", "yarn")
STALE = re.compile(r".*rotary_emb\.inv_freq")  # old Llama checkpoints hold it, nobody reads it


@dataclass(frozen=True)
class Dense:
    model: PreTrainedModel  # float32, in evaluation mode
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype  # of the checkpoint
    context: int  # tokens it may be used with: its own limit, or its sliding window


def read(folder: Path) -> Dense:
    """The checkpoint in `folder`. Raises ValueError for what the converter cannot turn into our format, and names
    missing, surplus and misshapen tensors."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint")
    config = AutoConfig.from_pretrained(folder)
    _require_supported(config)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    _require_whole(folder, config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    context = min(config.max_position_embeddings, window) if window and slides else config.max_position_embeddings
    return Dense(model, AutoTokenizer.from_pretrained(folder), dtype, context)


def _require_supported(config) -> None:
    if config.model_type not in FAMILIES:
        raise ValueError(f"{config.model_type!r} checkpoints cannot be converted: supported are {', '.join(FAMILIES)}")
    rope = config.rope_parameters
    wanted = {
        "hidden_act": (config.hidden_act, ("silu",)),
        "rope_type": (rope["rope_type"], ROPES),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), (1.0,)),
        "mlp_bias": (getattr(config, "mlp_bias", False), (False,)),
        "attention_bias": (getattr(config, "attention_bias", False), (False,)),  # includes o_proj's; Qwen2's do not
        "quantization_config": (getattr(config, "quantization_config", None), (None,)),
    }
    for key, (value, allowed) in wanted.items():
        if value not in allowed:
            shown = " or ".join(repr(a) for a in allowed)
            raise ValueError(f"{key}={value!r} has no counterpart in the deepseek_v3 format: it must be {shown}")


def _require_whole(folder: Path, config) -> None:
    with torch.device("meta"):
        wanted = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    found = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors file: save the checkpoint in that format")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}): it is damaged or cut short, copy it again") from error
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing = sorted(wanted.keys() - found.keys() - optional)
    surplus = sorted(name for name in found.keys() - wanted.keys() if not STALE.fullmatch(name))
    if missing or surplus:
        raise ValueError(
            f"{folder}: {len(missing)} tensors missing {missing[:8]}, {len(surplus)} surplus {surplus[:8]}: "
            "the weights do not belong to config.json, or the checkpoint is incomplete"
        )
    for name, shape in wanted.items():
        if name in found and found[name] != tuple(shape):
            raise ValueError(f"{folder}: {name} is {found[name]} but config.json makes it {tuple(shape)}")


@dataclass
class Moments:
    """Means over tokens of what one layer computes; float64. x is the normalised residual before the norm's weight."""

    x_DD: Tensor  # x x^T
    projections_YD: Tensor  # (queries, keys, values) x^T, as attention uses them, before the rotary embedding
    projections_Y: Tensor  # their squares
    neurons_F: Tensor  # activation^2
    mlp_D: Tensor  # input of the feed-forward layer
    mlp_square_D: Tensor
    keys_SRMM: dict[int, Tensor]  # by slot, complex: see `_add_keys`
    tokens: int = field(default=0)


def moments(model: PreTrainedModel, rows: Tensor, slots_J: Tensor) -> list[Moments]:
    """Of every layer, over the token ids (rows, columns). `slots_J`: the rotary slot that each frequency goes to."""
    c = model.config
    found, handles = [], []
    new = lambda *shape, dtype=torch.float64: torch.zeros(*shape, dtype=dtype)  # noqa: E731
    for layer in model.model.layers:
        total = layer.self_attn.q_proj.out_features + 2 * layer.self_attn.k_proj.out_features
        size = c.hidden_size
        keys = {}
        for slot, count in zip(*(t.tolist() for t in slots_J.unique(return_counts=True)), strict=True):
            members = c.num_key_value_heads * count
            keys[slot] = new(members, members, members, dtype=torch.complex128)
        moment = Moments(
            new(size, size), new(total, size), new(total), new(c.intermediate_size), new(size), new(size), keys
        )
        found.append(moment)
        handles += _watch(layer, moment, model.model.rotary_emb, slots_J)
    try:
        with torch.no_grad():
            for row in rows.split(4):
                model.model(row, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for m in found:
        for tensor in (m.x_DD, m.projections_YD, m.projections_Y, m.neurons_F, m.mlp_D, m.mlp_square_D):
            tensor.div_(m.tokens)
        for tensor in m.keys_SRMM.values():
            tensor.div_(m.tokens)
    return found


def _watch(layer: nn.Module, moment: Moments, rotary: nn.Module, slots_J: Tensor) -> list:
    """Adds up what passes through a layer while the hooks are in place."""
    attention, norm = layer.self_attn, layer.input_layernorm
    queries, keys = attention.q_proj.out_features, attention.k_proj.out_features
    starts = {"q": 0, "k": queries, "v": queries + keys}
    seen: dict[str, Tensor] = {}

    def take_x(_, given, __):
        h_ND = given[0].flatten(0, 1)
        seen["x"] = (h_ND * (h_ND.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()).double()
        moment.x_DD.addmm_(seen["x"].T, seen["x"])
        moment.tokens += len(h_ND)

    def take(name: str):
        def add(_, __, output):
            seen[name] = output.reshape(*output.shape[:2], -1, attention.head_dim)
            if _linear(attention):
                return
            y_NY = output.reshape(len(seen["x"]), -1).double()
            part = slice(starts[name], starts[name] + y_NY.shape[1])
            moment.projections_YD[part].addmm_(y_NY.T, seen["x"])
            moment.projections_Y[part].add_(y_NY.square().sum(0))

        return add

    def take_attention(*_):
        _add_keys(seen["q"], seen["k"], attention.scaling, rotary, slots_J, moment.keys_SRMM)

    def take_mlp(_, given, __):
        y_ND = given[0].flatten(0, 1).double()
        moment.mlp_D.add_(y_ND.sum(0))
        moment.mlp_square_D.add_(y_ND.square().sum(0))

    def take_neurons(_, given, __):
        moment.neurons_F.add_(given[0].flatten(0, 1).double().square().sum(0))

    last = {"q": getattr(attention, "q_norm", attention.q_proj), "k": getattr(attention, "k_norm", attention.k_proj)}
    return [
        norm.register_forward_hook(take_x),
        *(module.register_forward_hook(take(name)) for name, module in (last | {"v": attention.v_proj}).items()),
        attention.register_forward_hook(take_attention),
        layer.mlp.register_forward_hook(take_mlp),
        layer.mlp.down_proj.register_forward_hook(take_neurons),
    ]


def _add_keys(
    q_BLHd: Tensor, k_BLGd: Tensor, scale: float, rotary: nn.Module, slots_J: Tensor, keys_SRMM: dict[int, Tensor]
) -> None:
    """Second moments of keys, weighted by what an error in them would do.

    As complex numbers, one per frequency j, a query head's score is the sum of Re(conj(q_j) k_j e^(i f_j t)), t tokens
    apart. Where the rotation of a part of k_j is lost, the score moves by that part times q_j (e^(i f_j t) - 1); and
    attention feels it as much as it looks there. So for every row (key head g, frequency j) of a slot: the M = (key
    heads x frequencies) keys of that slot, weighted by the sum over queries of attention |q_j|^2 |e^(i f_j t) - 1|^2.
    """
    groups, length = k_BLGd.shape[2], k_BLGd.shape[1]
    angles_LJ = torch.arange(length)[:, None] * rotary.inv_freq.float()
    q_BHLJ, k_BGLJ = (
        torch.complex(*x.transpose(1, 2).float().unflatten(-1, (2, -1)).unbind(-2)) for x in (q_BLHd, k_BLGd)
    )
    turn_LJ = torch.polar(torch.full_like(angles_LJ, rotary.attention_scaling), angles_LJ)
    shared = q_BHLJ.shape[1] // groups
    q_BHLd, k_BHLd = (
        torch.view_as_real(x * turn_LJ).flatten(-2) for x in (q_BHLJ, k_BGLJ.repeat_interleave(shared, 1))
    )
    future_LL = torch.full((length, length), -torch.inf).triu(1)
    looks_BHNL = (q_BHLd @ k_BHLd.mT * scale + future_LL).softmax(-1).mT  # how much key N is looked at by query L
    size_BHLJ = q_BHLJ.abs().square()
    cos_LJ, sin_LJ = angles_LJ.cos(), angles_LJ.sin()
    turned = cos_LJ * (looks_BHNL @ (size_BHLJ * cos_LJ)) + sin_LJ * (looks_BHNL @ (size_BHLJ * sin_LJ))
    weight_BHNJ = 2 * (looks_BHNL @ size_BHLJ - turned)  # |e^(ia) - 1|^2 = 2 - 2 cos a
    weight_BGNJ = weight_BHNJ.clamp(min=0).unflatten(1, (groups, shared)).sum(2)
    for slot, moment_RMM in keys_SRMM.items():
        mine = slots_J == slot
        weight_TR = weight_BGNJ[..., mine].transpose(1, 2).flatten(2).flatten(0, 1)
        k_TM = k_BGLJ[..., mine].transpose(1, 2).flatten(2).flatten(0, 1)
        moment_RMM += torch.einsum("tr,tm,tn->rmn", weight_TR.to(k_TM.dtype), k_TM, k_TM.conj())


def _linear(attention: nn.Module) -> bool:
    """Whether queries, keys and values are linear in the normalised residual: no biases and no norms of heads."""
    return attention.q_proj.bias is None and not hasattr(attention, "q_norm")


def projections(layer: nn.Module, moment: Moments, head: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Linear maps from x to queries (H, d, D), keys and values (G, d, D) in float64, and the share they leave out.

    Our format has neither biases nor norms of heads. Where the checkpoint has them, the map is the least-squares fit
    on the calibration text: a constant is well predicted from the residual, a head's norm less so.
    """
    attention = layer.self_attn
    modules = (attention.q_proj, attention.k_proj, attention.v_proj)
    if _linear(attention):
        scale_D = layer.input_layernorm.weight.double()
        maps = [module.weight.double() * scale_D for module in modules]
        missed = 0.0
    else:
        ridge = 1e-6 * moment.x_DD.diagonal().mean()
        inverse_DD = torch.linalg.inv(moment.x_DD + ridge * torch.eye(len(moment.x_DD), dtype=torch.float64))
        whole = moment.projections_YD @ inverse_DD
        maps = list(whole.split([module.out_features for module in modules]))
        missed = 1 - ((whole @ moment.x_DD) * whole).sum().item() / moment.projections_Y.sum().item()
    return (*(m.unflatten(0, (-1, head)) for m in maps), missed)
