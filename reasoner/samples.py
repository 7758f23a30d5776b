"""Samples as tensors, and how likely a model finds them.

Knows no trainer: needs torch and transformers alone. Neighbours: `credit` makes samples, `learner` trains on what
`collate` makes of them, `logprobs` reads it with a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from reasoner.credit import Sample
from reasoner.logprobs import is_plain, recorded_experts, token_logprobs

# Shape suffixes: B samples, P prompt tokens (padded left), T completion tokens (padded right), V vocabulary.


def collate(samples: Sequence[Sample], pad: int, *, rows: int = 0, config: Any = None) -> dict[str, Tensor]:
    """Tensors of TRL's batch. The completion of a sample begins at its first sampled token.

    Args:
        rows: at least; those beyond the samples repeat the first one with nothing to learn from it.
        config: the model's, to read the samples' experts with; they come as (B, P + T, layers, K).
    """
    starts = [s.loss_mask.index(True) for s in samples]
    cut = list(zip(samples, starts, strict=True))

    def left(rows: list[tuple]) -> Tensor:
        return pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=pad, padding_side="left")

    def right(rows: list[tuple], value: float, dtype: torch.dtype) -> Tensor:
        return pad_sequence([torch.tensor(r, dtype=dtype) for r in rows], batch_first=True, padding_value=value)

    batch = {
        "prompt_ids": left([s.ids[:i] for s, i in cut]),
        "completion_ids": right([s.ids[i:] for s, i in cut], pad, torch.long),
        "completion_mask": right([(1,) * (len(s.ids) - i) for s, i in cut], 0, torch.long),
        "tool_mask": right([s.loss_mask[i:] for s, i in cut], 0, torch.long),
        "advantages": right([s.advantages[i:] for s, i in cut], 0.0, torch.float32),
        "sampling_per_token_logps": right([s.logprobs[i:] for s, i in cut], 0.0, torch.float32),
    }
    widest = batch["prompt_ids"].shape[1]
    batch["prompt_mask"] = torch.tensor([[0] * (widest - i) + [1] * i for i in starts])
    width = widest + batch["completion_ids"].shape[1]
    experts = recorded_experts([s.experts for s in samples], [widest - i for i in starts], width, config)
    if experts is not None:
        batch["experts"] = experts
    if (spare := rows - len(samples)) > 0:
        batch = {name: torch.cat([t, t[:1].expand(spare, *t.shape[1:])]) for name, t in batch.items()}
        batch["tool_mask"][-spare:] = 0
        batch["advantages"][-spare:] = 0.0
    return batch


def mismatch(model: PreTrainedModel, samples: Sequence[Sample], pad: int, *, rows: int = 32) -> float:
    """Mean absolute difference of the model's and the sampler's log-probabilities of the sampled tokens, in nats.

    The samples must have been drawn at temperature 1.
    """
    total = tokens = 0.0
    for logps_BT, batch in _scored(model, samples, pad, rows):
        learned_BT = batch["tool_mask"]
        total += ((logps_BT - batch["sampling_per_token_logps"]).abs() * learned_BT).sum().item()
        tokens += learned_BT.sum().item()
    return total / tokens


def logprobs(model: PreTrainedModel, samples: Sequence[Sample], pad: int, *, rows: int = 32) -> list[float]:
    """Log-probability of each path's sampled tokens under the model at temperature 1, in nats."""
    found: list[float] = []
    for logps_BT, batch in _scored(model, samples, pad, rows):
        found += (logps_BT * batch["tool_mask"]).sum(-1).tolist()
    return found


@torch.no_grad()
def _scored(model: PreTrainedModel, samples: Sequence[Sample], pad: int, rows: int) -> Iterator[tuple[Tensor, dict]]:
    """The samples in batches: the model's log-probabilities of the completions (B, T), and the collated batch."""
    model.eval()
    for start in range(0, len(samples), rows):
        batch = collate(samples[start : start + rows], pad, config=model.config)
        ids_BL = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1).to(model.device)
        mask_BL = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).to(model.device)
        kept = batch["completion_ids"].shape[1]
        if is_plain(model):
            logps_BT, _ = token_logprobs(model, ids_BL, mask_BL, kept, experts=batch.get("experts"))
        else:
            logits_BTV = model(input_ids=ids_BL, attention_mask=mask_BL, logits_to_keep=kept + 1).logits[:, :-1].float()
            logps_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BL[:, -kept:, None])[..., 0]
        yield logps_BT.cpu(), batch
