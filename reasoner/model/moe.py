"""Fine-grained mixture of experts with a shared expert (DeepSeekMoE, arXiv 2401.06066; DeepSeek-V3, arXiv 2412.19437).

The router scores every expert by a sigmoid in float32; a bias that no gradient touches decides who is chosen, never how
much the chosen count, and `balance` moves it towards equal load. Knows nothing of attention or batches.
Neighbours: `transformer.py` calls it and gathers the loads; on a GPU `reasoner.kernels` routes and runs the experts.

Shapes: T tokens, D model width, E experts, G groups of them, K chosen per token, I width of an expert, A = T * K
assignments in the order of experts, N sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels.dispatch import target_of
from .config import ReasonerConfig


class Mlp(nn.Module):
    """SwiGLU: the dense layers and the shared expert."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Router(nn.Module):
    """Chooses K of E experts for each token and says how much each counts."""

    def __init__(self, config: ReasonerConfig):
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.groups, self.open_groups = config.n_group, config.topk_group
        self.normalise, self.scale = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        """Moves the bias between devices and keeps it in float32: `balance` takes steps that vanish in bfloat16."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x_TD: Tensor, replay_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (T, K) in float32, expert ids (T, K) and all scores (T, E).

        Recorded ids are used instead of choosing, where they are not negative; they are weighted by the scores of now.
        """
        with torch.autocast(x_TD.device.type, enabled=False):  # a rounded score can choose another expert
            logits_TE = F.linear(x_TD.float(), self.weight.float())
        scores_TE, bias_E = logits_TE.sigmoid(), self.e_score_correction_bias
        if replay_TK is None and target_of(logits_TE):
            limits = (self.chosen, self.groups, self.open_groups, self.normalise, self.scale)
            weights_TK, experts_TK, _ = kernels.route(logits_TE, bias_E, *limits)
            return weights_TK, experts_TK, scores_TE
        experts_TK = self.choose(scores_TE.detach() + bias_E)
        if replay_TK is not None:
            experts_TK = torch.where(replay_TK < 0, experts_TK, replay_TK.long())
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return weights_TK * self.scale, experts_TK, scores_TE

    def choose(self, scores_TE: Tensor) -> Tensor:
        """The K best experts, out of the groups whose two best experts sum highest."""
        if self.groups > 1:
            grouped_TGe = scores_TE.unflatten(1, (self.groups, -1))
            best_TG = grouped_TGe.topk(2, dim=-1).values.sum(-1).topk(self.open_groups, dim=-1, sorted=False).indices
            closed_TG = torch.ones_like(grouped_TGe[..., 0], dtype=torch.bool).scatter(1, best_TG, False)
            scores_TE = grouped_TGe.masked_fill(closed_TG[..., None], float("-inf")).flatten(1)
        return scores_TE.topk(self.chosen, dim=-1, sorted=False).indices


class Experts(nn.Module):
    """E small SwiGLU layers as two stacks of matrices, run as grouped matrix products over tokens sorted by expert."""

    def __init__(self, config: ReasonerConfig):
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        gate_up, down, kind = self.gate_up_proj, self.down_proj, x_TD.device.type
        if torch.is_autocast_enabled(kind):  # which does not know grouped products
            x_TD, gate_up, down = (t.to(torch.get_autocast_dtype(kind)) for t in (x_TD, gate_up, down))
        if target_of(x_TD):
            return kernels.moe_experts(x_TD, weights_TK, experts_TK, gate_up, down)
        order_A = experts_TK.flatten().argsort(stable=True)
        tokens_A = order_A // experts_TK.shape[1]
        places_TK = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=order_A.device))
        places_TK = places_TK.view_as(experts_TK)
        ends_E = torch.bincount(experts_TK.flatten(), minlength=len(down)).cumsum(0).int()
        x_AD = Spread.apply(x_TD, tokens_A, places_TK)
        gate_AI, up_AI = F.grouped_mm(x_AD, gate_up.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
        # Weighted before the last product: I columns instead of D, and the result is not kept for the backward pass.
        inner_AI = F.silu(gate_AI) * up_AI * weights_TK.flatten()[order_A, None]
        y_AD = F.grouped_mm(inner_AI.to(x_TD.dtype), down.transpose(1, 2), offs=ends_E)
        return Gather.apply(y_AD, tokens_A, places_TK)


class Spread(torch.autograd.Function):
    """Copies each token to its K places: the transpose of `Gather`, which spares autograd's slow scatter."""

    @staticmethod
    def forward(ctx, x_TD, tokens_A, places_TK):
        ctx.save_for_backward(places_TK)
        return x_TD.index_select(0, tokens_A)

    @staticmethod
    def backward(ctx, grad_AD):
        return F.embedding_bag(ctx.saved_tensors[0], grad_AD, mode="sum"), None, None


class Gather(torch.autograd.Function):
    """Sums what the K experts of each token answered, without a (T, K, D) tensor."""

    @staticmethod
    def forward(ctx, y_AD, tokens_A, places_TK):
        ctx.save_for_backward(tokens_A)
        return F.embedding_bag(places_TK, y_AD, mode="sum")

    @staticmethod
    def backward(ctx, grad_TD):
        return grad_TD.index_select(0, ctx.saved_tensors[0]), None, None


class MoE(nn.Module):
    def __init__(self, config: ReasonerConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = Mlp(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        self.load_E: Tensor | None = None  # tokens sent to each expert in training since `balance` last looked

    def forward(self, x_TD: Tensor, replay_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Output (T, D), the expert ids used (T, K) and the router's scores (T, E)."""
        weights_TK, experts_TK, scores_TE = self.gate(x_TD, replay_TK)
        return self.experts(x_TD, weights_TK, experts_TK) + self.shared_experts(x_TD), experts_TK, scores_TE

    def count(self, experts_TK: Tensor, copies_T: Tensor | None = None) -> None:
        """copies_T: how often each token counts."""
        weights_A = None if copies_T is None else copies_T.repeat_interleave(experts_TK.shape[1])
        load_E = torch.bincount(experts_TK.flatten(), weights_A, minlength=len(self.gate.weight))
        self.load_E = load_E if self.load_E is None else self.load_E + load_E


def sequence_loss(scores_TE: Tensor, experts_TK: Tensor, sequence_T: Tensor) -> Tensor:
    """How uneven the load is within single sequences, averaged over them: 1 when even, more when not.

    The sequence-wise auxiliary loss of DeepSeek-V3 (arXiv 2412.19437, equations 17-20) before its weight alpha.
    """
    experts, chosen = scores_TE.shape[1], experts_TK.shape[1]
    count = int(sequence_T.max()) + 1
    length_N1 = torch.bincount(sequence_T, minlength=count)[:, None]
    cell_TK = sequence_T[:, None] * experts + experts_TK
    used_NE = torch.bincount(cell_TK.flatten(), minlength=count * experts).view(count, experts)
    share_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    share_NE = share_TE.new_zeros(count, experts).index_add(0, sequence_T, share_TE) / length_N1
    return (used_NE * experts / (chosen * length_N1) * share_NE).sum(1).mean()


@torch.no_grad()
def balance(model: nn.Module, rate: float = 1e-3) -> None:
    """Moves each router's bias one step towards equal load: up for experts below the mean load, down for those above.

    Auxiliary-loss-free balancing (arXiv 2408.15664), with the step's mean removed so that biases do not drift together.
    Call it after an optimizer step; biases stand still otherwise, which keeps a rollout and its update on the same
    experts. Counts are summed over processes when torch.distributed runs.
    """
    for layer in model.modules():
        if isinstance(layer, MoE):
            bias_E = layer.gate.e_score_correction_bias
            load_E = torch.zeros_like(bias_E) if layer.load_E is None else layer.load_E.float()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(load_E)
            step_E = rate * (load_E.mean() - load_E).sign()
            bias_E += step_E - step_E.mean()
            layer.load_E = None
