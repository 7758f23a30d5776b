"""`reasoner convert`: a Llama-style dense checkpoint as one of ours, latent attention and experts, without training.

Grouped-query attention becomes MLA: its keys and values are linear in the normalised residual, so the latent holds the
residual itself (kv_lora_rank >= hidden_size) or the part that keys and values read. Only one thing has no room: a
single rotary key serves all heads. Per frequency the key heads are complex numbers that turn together; one combination
of them keeps its rotation, the rest is attended to without position (the idea is TransMLA's, arXiv 2502.07864). Here
the combination is the one whose loss moves attention least, as measured on a text.
A dense feed-forward layer becomes 8 of 32 experts and a shared one exactly: its neurons are dealt to one shared and 8
routed experts, of which there are four copies, and the router picks a copy.
Knows nothing of training: `distill.py` heals. Neighbour: `dense.py` reads and measures what is converted.

Shapes: D model width; H query heads, G key heads of d numbers; R latent width; S rotary slots of 2 numbers; F neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reasoner import corpus, dense
from reasoner.model import ReasonerConfig, ReasonerForCausalLM, check_serving
from reasoner.model.mla import rotary_angles, softmax_scale

EXPERTS, CHOSEN, SHARED = 32, 8, 4  # SHARED: the shared expert's width in routed ones
EPS = 1e-6  # transformers fixes the latent norms at it, servers use it everywhere
HELDOUT = 12  # rows to measure on

State = dict[str, Tensor]


@torch.no_grad()
def convert(
    folder: Path,
    *,
    latent: int = 512,
    rope: int = 64,
    experts: bool = True,
    texts: list[str],
    tokens: int = 8192,
    say: Callable[[str], Any] = lambda line: None,
) -> tuple[ReasonerForCausalLM, Any, dict[str, Any]]:
    """Our model, its tokenizer, and what the conversion cost on held-out text (nats per token; see `compare`)."""
    for name, value in (("kv-lora-rank", latent), ("rope-dim", rope), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"--{name} {value} must be positive")
    given = dense.read(folder)
    config = shape(given, latent, rope)
    length = min(256, given.context)
    learned, heldout = corpus.rows(given.tokenizer, texts, length)
    learned, heldout = learned[: max(1, tokens // length)], heldout[:HELDOUT]
    say(f"calibrating on {learned.numel()} tokens, measuring on {heldout.numel()}")
    slots_J, moved = assign_slots(given, config)
    found = dense.moments(given.model, learned, slots_J)

    middle = build(config, attention_state(given, config, found, slots_J, report := {"frequencies_moved": moved}))
    report["attention"] = compare(given.model, middle, heldout)
    say(_told("attention", report["attention"]))
    model = middle
    if experts:
        model = with_experts(middle, found)
        report["experts"] = compare(middle, model, heldout)
        say(_told("experts", report["experts"]))
    report["serving"] = check_serving(model.config)
    for line in report["serving"]:
        say(f"serving: {line}")
    model.generation_config = given.model.generation_config
    return model.to(given.dtype), given.tokenizer, report


def _told(step: str, cost: dict[str, float]) -> str:
    return (
        f"{step:9s}: KL {cost['kl']:.4f} nats on held-out text, the same likeliest token {100 * cost['top1']:.1f} %, "
        f"log-probabilities at most {cost['largest']:.2g} apart"
    )


def shape(given: dense.Dense, latent: int, rope: int) -> ReasonerConfig:
    """Our configuration with the same sizes, every feed-forward layer still dense."""
    c = given.model.config
    head, heads = given.model.model.layers[0].self_attn.head_dim, c.num_attention_heads
    value = 128 if head == 64 and (latent, rope) == (512, 64) else head  # prefill kernels know (64, 128), not (64, 64)
    return ReasonerConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        first_k_dense_replace=c.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=None,
        kv_lora_rank=latent,
        qk_nope_head_dim=head,
        qk_rope_head_dim=rope,
        v_head_dim=value,
        num_mtp_layers=0,
        rms_norm_eps=EPS,
        rope_parameters=_rope(c.rope_parameters),
        max_position_embeddings=given.context,
        tie_word_embeddings=False,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        n_shared_experts=SHARED,
        n_group=EXPERTS // CHOSEN,
        topk_group=1,
        routed_scaling_factor=float(CHOSEN),
        moe_intermediate_size=8,
        pad_token_id=c.pad_token_id,
        bos_token_id=c.bos_token_id,
        eos_token_id=c.eos_token_id,
    )


def _rope(given: dict[str, Any]) -> dict[str, Any]:
    """Servers of this format know the plain embedding and YaRN. Llama 3's scaling is nearly YaRN: between the same two
    wavelengths it passes from kept to slowed frequencies along another curve."""
    if given["rope_type"] == "default":
        return {"rope_type": "default", "rope_theta": given["rope_theta"]}
    fast, slow = (
        ("high_freq_factor", "low_freq_factor") if given["rope_type"] == "llama3" else ("beta_fast", "beta_slow")
    )
    return {
        "rope_type": "yarn",
        "rope_theta": given["rope_theta"],
        "factor": given["factor"],
        "original_max_position_embeddings": given["original_max_position_embeddings"],
        "beta_fast": given.get(fast) or 32,
        "beta_slow": given.get(slow) or 1,
        "mscale": 1.0,  # equal to mscale_all_dim: cosines keep their size, and the softmax scale is folded into queries
        "mscale_all_dim": 1.0,
    }


def build(config: ReasonerConfig, state: State) -> ReasonerForCausalLM:
    with torch.device("meta"):
        model = ReasonerForCausalLM._from_config(config, dtype=torch.float32)
    model.load_state_dict(state, assign=True)
    return model.eval()


def attention_state(
    given: dense.Dense,
    config: ReasonerConfig,
    found: list[dense.Moments],
    slots_J: Tensor,
    report: dict[str, Any],
) -> State:
    """Weights of our model for the dense one's, with its feed-forward layers as they are."""
    theirs = given.model
    # The residual is scaled so that a norm with our eps does what theirs does with its own.
    residual = math.sqrt(EPS / theirs.config.rms_norm_eps)
    scale = (
        theirs.model.layers[0].self_attn.scaling * theirs.model.rotary_emb.attention_scaling**2 / softmax_scale(config)
    )
    state = {
        "model.embed_tokens.weight": theirs.model.embed_tokens.weight * residual,
        "model.norm.weight": theirs.model.norm.weight.clone(),
        "lm_head.weight": theirs.lm_head.weight.clone(),
    }
    report |= {"projections_missed": [], "rotary_kept": [], "latent_missed": []}
    for index, (layer, moment) in enumerate(zip(theirs.model.layers, found, strict=True)):
        name = f"model.layers.{index}."
        head = layer.self_attn.head_dim
        q_HdD, k_GdD, v_GdD, missed = dense.projections(layer, moment, head)
        parts, kept, lost = latent_attention(q_HdD * scale, k_GdD, v_GdD, moment, slots_J, config)
        o_DHd = layer.self_attn.o_proj.weight.unflatten(1, (-1, head)) * residual
        o_DHv = nn.functional.pad(o_DHd, (0, config.v_head_dim - head))
        state |= {f"{name}self_attn.{key}.weight": t.float().contiguous() for key, t in parts.items()}
        state[f"{name}self_attn.o_proj.weight"] = o_DHv.flatten(1).contiguous()
        state[f"{name}input_layernorm.weight"] = torch.ones(config.hidden_size)  # folded into the projections
        state[f"{name}post_attention_layernorm.weight"] = layer.post_attention_layernorm.weight.clone()
        for kind in ("gate", "up"):
            state[f"{name}mlp.{kind}_proj.weight"] = getattr(layer.mlp, f"{kind}_proj").weight.clone()
        state[f"{name}mlp.down_proj.weight"] = layer.mlp.down_proj.weight * residual
        for key, value in (("projections_missed", missed), ("rotary_kept", kept), ("latent_missed", lost)):
            report[key].append(round(value, 6))
    return state


def assign_slots(given: dense.Dense, config: ReasonerConfig) -> tuple[Tensor, float]:
    """The rotary slot nearest in log frequency for each of their d/2 frequencies, and how far off the worst one is."""
    theirs_J = given.model.model.rotary_emb.inv_freq.double()
    cos_1S, sin_1S = rotary_angles(config, torch.ones(1))
    ours_S = torch.atan2(sin_1S[0], cos_1S[0]).double()
    distance_JS = (theirs_J.log()[:, None] - ours_S.log()).abs()
    worst = distance_JS.min(1).values.max().exp().item() - 1
    return distance_JS.argmin(1), round(worst, 6)


def latent_attention(
    q_HdD: Tensor, k_GdD: Tensor, v_GdD: Tensor, moment: dense.Moments, slots_J: Tensor, config: ReasonerConfig
) -> tuple[State, float, float]:
    """Projections of an MLA layer that attends nearly like these; the share of what the rotations do that it keeps; the
    share of keys and values that the latent misses. Maps are linear in the normalised residual; float64."""
    (heads, head, width), groups = q_HdD.shape, len(k_GdD)
    # A text without some tokens leaves directions unseen: they are served too, only last.
    x_DD = moment.x_DD + 1e-6 * moment.x_DD.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    q_HJD, k_GJD = (torch.complex(*m.unflatten(1, (2, -1)).unbind(1)) for m in (q_HdD, k_GdD))
    slots, shared = config.qk_rope_head_dim // 2, heads // groups
    rotary_q_HSD = torch.zeros(heads, slots, width, dtype=q_HJD.dtype)
    rotary_k_SD = torch.zeros(slots, width, dtype=q_HJD.dtype)
    rest_GJD = k_GJD.clone()
    lost = total = 0.0
    for slot, keys_RMM in moment.keys_SRMM.items():
        mine = (slots_J == slot).nonzero()[:, 0]
        a_M, b_M, errors = rotary_component(keys_RMM)
        lost, total = lost + errors[0], total + errors[1]
        rotary_k_SD[slot] = b_M.conj() @ k_GJD[:, mine].flatten(0, 1)
        a_Gj = a_M.unflatten(0, (groups, -1))
        q_GhjD = q_HJD[:, mine].unflatten(0, (groups, shared))
        rotary_q_HSD[:, slot] = torch.einsum("gj,ghjd->ghd", a_Gj.conj(), q_GhjD).flatten(0, 1)
        rest_GJD[:, mine] -= a_Gj[..., None] * rotary_k_SD[slot]
    kept = 1 - lost / max(total, 1e-30)
    rest_GdD = torch.cat((rest_GJD.real, rest_GJD.imag), dim=1)

    needed_YD = torch.cat((rest_GdD.flatten(0, 1), v_GdD.flatten(0, 1)))
    basis_DR = latent_basis(needed_YD, x_DD, config.kv_lora_rank)
    moment_RR = basis_DR.T @ x_DD @ basis_DR
    moment_RR += 1e-12 * moment_RR.trace() * torch.eye(len(moment_RR), dtype=torch.float64)  # wider than the residual
    read_YR = torch.linalg.solve(moment_RR, needed_YD @ x_DD @ basis_DR, left=False)  # needed = read basis^T
    missing_YD = needed_YD - read_YR @ basis_DR.T
    missed = _energy(missing_YD, x_DD) / max(_energy(needed_YD, x_DD), 1e-30)
    size = math.sqrt(moment_RR.trace().item() / config.kv_lora_rank)  # of the latent before its norm

    rest_HdR, value_HdR = (m.repeat_interleave(shared, 0) for m in read_YR.unflatten(0, (2, groups, head)).unbind())
    up_HkR = torch.cat((rest_HdR, nn.functional.pad(value_HdR, (0, 0, 0, config.v_head_dim - head))), dim=1)
    q_HkD = torch.cat((q_HdD, _interleaved(rotary_q_HSD)), dim=1)
    parts = {
        "q_proj": q_HkD.flatten(0, 1),
        "kv_a_proj_with_mqa": torch.cat((basis_DR.T, _interleaved(rotary_k_SD))),
        "kv_a_layernorm": torch.full((config.kv_lora_rank,), size),
        "kv_b_proj": up_HkR.flatten(0, 1),
    }
    return parts, kept, missed


def rotary_component(keys_RMM: Tensor, rounds: int = 50) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The one combination of M keys that keeps its rotation: a and b, so that the score's rotating part is
    conj(a^H q) (b^H k) and the rest, q^H (1 - a b^H) k, is attended to without position.

    Row r of 1 - a b^H is what key r loses; its cost is by `keys_RMM[r]`, the moments of all keys as that row's queries
    see them (`dense._add_keys`). Least squares for a and for b by turns. Also the cost that is left, and without any.
    """
    members = len(keys_RMM)
    identity = torch.eye(members, dtype=keys_RMM.dtype)
    total = keys_RMM.diagonal(dim1=1, dim2=2).real.sum().item()
    keys_RMM = keys_RMM / max(total, 1e-300) + 1e-9 * identity
    b_M = torch.linalg.eigh(keys_RMM.sum(0)).eigenvectors[:, -1]
    own_RM = keys_RMM.diagonal(dim1=0, dim2=2).mT  # row r: column r of its own moment
    for _ in range(rounds):
        seen_RM = keys_RMM @ b_M
        a_M = seen_RM.diagonal() / (seen_RM @ b_M.conj()).real
        b_M = torch.linalg.solve((a_M.abs().square()[:, None, None] * keys_RMM).sum(0), a_M @ own_RM)
    size = b_M.norm()
    a_M, b_M = a_M * size, b_M / size
    rest_RM = identity - torch.outer(a_M, b_M.conj())
    costs = [torch.einsum("rm,rmn,rn->", m, keys_RMM, m.conj()).real.item() * total for m in (rest_RM, identity)]
    return a_M, b_M, (costs[0], costs[1])


def latent_basis(needed_YD: Tensor, x_DD: Tensor, rank: int) -> Tensor:
    """Orthonormal columns (D, rank): what keys and values need most, then what else the residual holds most of.

    The whole residual has a constant length, so the more of it the latent keeps, the less its norm disturbs.
    """
    width = len(x_DD)
    if rank >= width:
        return torch.eye(width, rank, dtype=x_DD.dtype)
    root_DD = torch.linalg.cholesky(x_DD)
    u, s, _ = torch.linalg.svd(needed_YD @ root_DD, full_matrices=False)
    count = min(rank, int((s > 1e-6 * s[0]).sum()))
    need_DR = torch.linalg.qr((u[:, :count].T @ needed_YD).T).Q
    left_DD = torch.eye(width, dtype=x_DD.dtype) - need_DR @ need_DR.T
    _, vectors = torch.linalg.eigh(left_DD @ x_DD @ left_DD)
    return torch.linalg.qr(torch.cat((need_DR, vectors.flip(1)[:, : rank - count]), dim=1)).Q


def _energy(map_YD: Tensor, x_DD: Tensor) -> float:
    return ((map_YD @ x_DD) * map_YD).sum().item()


def _interleaved(map_SD: Tensor) -> Tensor:
    """Complex rows (..., S, D) as real ones (..., 2 S, D): each slot's real part, then its imaginary part."""
    return torch.stack((map_SD.real, map_SD.imag), dim=-2).flatten(-3, -2)


def with_experts(middle: ReasonerForCausalLM, found: list[dense.Moments]) -> ReasonerForCausalLM:
    """The same function with experts; shares the weights of all other layers with `middle`."""
    settings = middle.config.to_dict()
    inner = expert_width(middle.config.intermediate_size)
    config = ReasonerConfig(**settings | {"first_k_dense_replace": 0, "moe_intermediate_size": inner})
    state = {name: t for name, t in middle.state_dict().items() if ".mlp." not in name}
    generator = torch.Generator().manual_seed(0)
    for index, (layer, moment) in enumerate(zip(middle.model.layers, found, strict=True)):
        parts = expert_state(layer.mlp, moment, inner, generator)
        state |= {f"model.layers.{index}.mlp.{key}": t for key, t in parts.items()}
    return build(config, state)


def expert_width(neurons: int) -> int:
    """The least width that lets 8 routed experts and the shared one hold all neurons: a multiple of 64, or of 8 when
    small; the places left over are zeros."""
    inner = -(-neurons // (CHOSEN + SHARED))
    step = 64 if inner >= 64 else 8
    return -(-inner // step) * step


def expert_state(mlp: nn.Module, moment: dense.Moments, inner: int, generator: torch.Generator) -> State:
    """An MoE layer that computes exactly what `mlp` does, whichever copy the router picks.

    The neurons that are most active go to the shared expert, which every token uses; the next ones to the routed
    experts. The experts of a copy share one row of the router, so each counts 1/8, times the scaling factor 8.
    """
    weight_F = moment.neurons_F * mlp.down_proj.weight.double().square().sum(0)
    order_F = weight_F.argsort(descending=True)
    spare = inner * (CHOSEN + SHARED) - len(order_F)
    gate_FD, up_FD, down_FD = (
        nn.functional.pad(m[order_F], (0, 0, 0, spare))
        for m in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T)
    )
    start, copies = SHARED * inner, EXPERTS // CHOSEN
    gate, up, down = (m[start:].unflatten(0, (CHOSEN, inner)) for m in (gate_FD, up_FD, down_FD))
    return {
        "experts.gate_up_proj": torch.cat((gate, up), dim=1).repeat(copies, 1, 1),
        "experts.down_proj": down.transpose(1, 2).repeat(copies, 1, 1),
        "shared_experts.gate_proj.weight": gate_FD[:start].clone(),
        "shared_experts.up_proj.weight": up_FD[:start].clone(),
        "shared_experts.down_proj.weight": down_FD[:start].T.contiguous(),
        "gate.weight": _router(moment, copies, generator).repeat_interleave(CHOSEN, 0),
        "gate.e_score_correction_bias": torch.zeros(EXPERTS),
    }


def _router(moment: dense.Moments, copies: int, generator: torch.Generator) -> Tensor:
    """A random direction per copy, with logits of mean 0 and about variance 1: every copy gets its share."""
    mean_D = moment.mlp_D
    row_CD = torch.randn(copies, len(mean_D), generator=generator, dtype=torch.float64)
    row_CD -= (row_CD @ mean_D / mean_D.square().sum().clamp(min=1e-30))[:, None] * mean_D
    spread_D = (moment.mlp_square_D - mean_D.square()).clamp(min=0)
    return (row_CD / (row_CD.square() @ spread_D).sqrt()[:, None]).float()


@torch.no_grad()
def compare(original: nn.Module, other: nn.Module, rows: Tensor) -> dict[str, float]:
    """How far `other`'s next-token law is from `original`'s on token ids (rows, length), in nats a token.

    kl: KL(original || other). top1: how often they name the same likeliest token. nll: of the text under each.
    largest: the largest absolute difference of two log-probabilities, of every token above e^-20 at every place.
    """
    kl = top = nll = other_nll = largest = 0.0
    for row in rows.split(1):
        p, q = (model(row, use_cache=False).logits[0].float().log_softmax(-1) for model in (original, other))
        kl += (p.exp() * (p - q)).sum(-1).mean().item()
        top += (p.argmax(-1) == q.argmax(-1)).float().mean().item()
        mine, its = (law[:-1].gather(1, row[0, 1:, None]) for law in (p, q))
        nll, other_nll = nll - mine.mean().item(), other_nll - its.mean().item()
        largest = max(largest, (p - q)[p > -20].abs().max().item())
    names = {"kl": kl, "top1": top, "nll": nll, "nll_converted": other_nll}
    return {name: round(v / len(rows), 5) for name, v in names.items()} | {"largest": round(largest, 7)}
