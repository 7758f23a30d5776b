"""`reasoner distill`: heals a converted checkpoint by soft labels from the original it was made from.

Attention inputs first: every layer's attention is fitted to the original's on the original's own activations, all
layers at once and each by itself. Then the whole model's next-token law is drawn to the original's. Only the attention
inputs (queries, latent, its norm and its expansion) are trained: nothing else was approximated.
Knows nothing of how the checkpoint was made (`convert.py`), of rewards or of engines; `corpus.py` gives the text.
Sampling from the student and judging by the teacher is `learner.imitate`.

Shapes: B rows of L tokens; N of these tokens; V vocabulary; D model width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reasoner.convert import compare
from reasoner.model import ReasonerForCausalLM
from reasoner.model.layout import fresh
from reasoner.model.mla import rotary_angles

INPUTS = ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")


@dataclass(frozen=True)
class Healing:
    """How to heal. `minutes` and `steps`: whichever ends first."""

    minutes: float = 10.0
    steps: int = 1_000_000
    layerwise: float = 0.3  # share of the time for attention layer by layer
    lr: float = 1e-4  # of Adam, times each tensor's root mean square; falls to a tenth over each part
    batch: int = 4
    length: int = 256
    reverse: float = 0.0  # share of KL(student || teacher) beside KL(teacher || student)
    temperature: float = 1.0
    smoothing: float = 0.0  # share of the soft labels that is spread evenly over the vocabulary
    evaluate_every: float = 60.0  # seconds

    def __post_init__(self) -> None:
        for name, low, high in (("layerwise", 0, 1), ("reverse", 0, 1), ("smoothing", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [{low}, {high}]")
        for name in ("minutes", "steps", "lr", "batch", "length", "temperature", "evaluate_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


def require_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Raises ValueError when `teacher` cannot be what `student` was converted from."""
    if not isinstance(student, ReasonerForCausalLM):
        raise ValueError(
            f"--student is a {student.config.model_type} checkpoint: give one that `reasoner convert` wrote"
        )
    for key in ("vocab_size", "num_hidden_layers", "hidden_size"):
        mine, its = getattr(student.config, key), getattr(teacher.config, key)
        if mine != its:
            raise ValueError(f"{key} is {mine} in --student and {its} in --teacher: give the original it was made from")


def heal(
    student: ReasonerForCausalLM,
    teacher: nn.Module,
    learned: Tensor,
    heldout: Tensor,
    healing: Healing,
    record: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> dict[str, Any]:
    """Trains `student` in place; what `compare` says before and after, and how many tokens were seen.

    `learned`, `heldout`: token ids (rows, L). `record` gets one entry a step, and after evaluations one with `kl`; the
    student is whole then.
    """
    weights = attention_inputs(student)
    start, step, tokens = time.monotonic(), 0, 0
    batches = _batches(learned, healing.batch)

    def evaluated() -> dict[str, float]:
        found = compare(teacher, student, heldout)
        record({"step": step, "seconds": round(time.monotonic() - start, 1), **found})
        return found

    before = last = evaluated()
    looked = time.monotonic()
    for loss, begin, end in ((attention_loss, 0.0, healing.layerwise), (soft_label_loss, healing.layerwise, 1.0)):
        # The norms' weights are folded in, so layers differ much in the size of theirs (8-fold in SmolLM2).
        sizes = [weight.detach().square().mean().sqrt().item() for weight in weights]
        optimizer = torch.optim.Adam([{"params": [weight]} for weight in weights], betas=(0.9, 0.95))
        while (done := _done(healing, step, start)) < end:
            rate = healing.lr * (1 - 0.9 * (done - begin) / (end - begin))
            for group, size in zip(optimizer.param_groups, sizes, strict=True):
                group["lr"] = rate * size
            ids_BL = next(batches)
            value = loss(student, teacher, ids_BL, healing)
            optimizer.step()
            optimizer.zero_grad()
            step, tokens = step + 1, tokens + ids_BL.numel()
            seconds = round(time.monotonic() - start, 1)
            record({"step": step, "seconds": seconds, "part": loss.__name__, "loss": round(value, 5), "lr": rate})
            if time.monotonic() - looked > healing.evaluate_every:
                last, looked = evaluated(), time.monotonic()
    last = evaluated()
    return {"before": before, "after": last, "steps": step, "tokens": tokens, "seconds": time.monotonic() - start}


def attention_inputs(student: nn.Module) -> list[nn.Parameter]:
    """What is trained; everything else is frozen."""
    student.requires_grad_(False).eval()
    attention = [layer.self_attn for layer in student.model.layers[: student.config.num_hidden_layers]]
    parts = [module for layer in attention for name, module in layer.named_children() if name in INPUTS]
    return [p for part in parts for p in part.requires_grad_(True).parameters()]


def _done(healing: Healing, step: int, start: float) -> float:
    return max(step / healing.steps, (time.monotonic() - start) / (60 * healing.minutes))


def _batches(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Without end; every row once in each pass."""
    while True:
        yield from (rows[start : start + size] for start in range(0, len(rows) - len(rows) % size or size, size))


def attention_loss(student: ReasonerForCausalLM, teacher: nn.Module, ids_BL: Tensor, healing: Healing) -> float:
    """Relative squared error of every layer's attention output on the teacher's own residual, mean over layers.

    Leaves the gradient in the student. Each layer goes backward by itself, while the teacher runs.
    """
    # The converter scales the residual so that equal norms with unequal eps agree.
    residual = math.sqrt(student.config.rms_norm_eps / teacher.config.rms_norm_eps)
    layers = teacher.model.layers
    seen: dict[str, Any] = {"loss": 0.0}

    def take(_, given, __):
        seen["h"] = given[0]

    def fit(index: int):
        def hook(_, __, output):
            with torch.enable_grad():
                block, layout = student.model.layers[index], fresh(ids_BL[..., None], None, None)
                x_ND = block.input_layernorm(layout.take(seen["h"]) * residual)
                mine_ND = block.self_attn(x_ND, layout, rotary_angles(student.config, layout.positions_T))
                wanted_ND = layout.take(output[0]) * residual
                loss = (mine_ND - wanted_ND).square().sum() / wanted_ND.square().sum() / len(layers)
                loss.backward()
            seen["loss"] += loss.item()

        return hook

    handles = [layer.input_layernorm.register_forward_hook(take) for layer in layers]
    handles += [layer.self_attn.register_forward_hook(fit(index)) for index, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            teacher.model(ids_BL, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen["loss"]


def soft_label_loss(student: ReasonerForCausalLM, teacher: nn.Module, ids_BL: Tensor, healing: Healing) -> float:
    """`divergence` of the next-token laws, mean over tokens in nats. Leaves the gradient in the student.

    The logits of one row exist at a time: the gradient is gathered at the last hidden states.
    """
    with torch.no_grad():
        theirs_BLD = teacher.model(ids_BL, use_cache=False).last_hidden_state
    mine_BLD = student.model(ids_BL, use_cache=False).last_hidden_state
    leaf_BLD = mine_BLD.detach().requires_grad_()
    total = 0.0
    for mine_LD, theirs_LD in zip(leaf_BLD, theirs_BLD, strict=True):
        with torch.no_grad():
            label_LV = teacher.lm_head(theirs_LD)
        loss = divergence(
            student.lm_head(mine_LD), label_LV, healing.temperature, healing.reverse, healing.smoothing
        ).mean() / len(ids_BL)
        loss.backward()
        total += loss.item()
    mine_BLD.backward(leaf_BLD.grad)
    return total


def divergence(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, reverse: float = 0.0, smoothing: float = 0.0
) -> Tensor:
    """(1 - reverse) KL(p || q) + reverse KL(q || p) of the tempered laws of two logits, times temperature^2: (N,).

    p is the teacher's, (1 - smoothing) of it and the rest evenly over the vocabulary. The square keeps the gradient's
    size (Hinton et al., arXiv 1503.02531).
    """
    logq_NV = F.log_softmax(student_NV / temperature, dim=-1)
    logp_NV = F.log_softmax(teacher_NV / temperature, dim=-1)
    if smoothing:
        even = math.log(smoothing / logp_NV.shape[-1])
        logp_NV = torch.logaddexp(logp_NV + math.log1p(-smoothing), torch.full_like(logp_NV, even))
    found_N = 0.0
    if reverse < 1:
        found_N = (1 - reverse) * F.kl_div(logq_NV, logp_NV, reduction="none", log_target=True).sum(-1)
    if reverse:
        found_N = found_N + reverse * F.kl_div(logp_NV, logq_NV, reduction="none", log_target=True).sum(-1)
    return found_N * temperature**2
