"""Times the kernels on a GPU against ceilings and baselines measured in the same run: `python benchmarks/gpu.py`.

Needs torch and transformers alone. Writes benchmarks/results/gpu.json: per figure the value, the goal, and whether it
was reached; what could not be measured is named with the reason. Without a CUDA device it says so, writes nothing and
exits 2. Every figure is a ratio within one run (to the copy bandwidth, the bf16 product rate, or a baseline), on random
data, the median of CUDA events. `--quick` runs tiny sizes on any device, to see that nothing is broken; it writes
nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).parents[1]))  # a GPU machine may have the sources without an installation

from reasoner import kernels  # noqa: E402
from reasoner.kernels import reference  # noqa: E402
from reasoner.paged_engine import StepGraphs  # noqa: E402
from reasoner.paged_model import PagedCache  # noqa: E402
from reasoner.paged_model import decode as decode_step  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "gpu.json"


@dataclass(frozen=True)
class Figure:
    """One measured ratio. `goal` is what to reach, `at_most` says from which side."""

    name: str
    value: float
    goal: float
    at_most: bool = False
    note: str = ""

    @property
    def reached(self) -> bool:
        return self.value <= self.goal if self.at_most else self.value >= self.goal


@dataclass(frozen=True)
class Ceilings:
    copy: float  # bytes read and written per second
    product: float  # bf16 floating-point operations per second


def seconds(run: Callable[[], object], repeats: int = 15) -> float:
    """Median seconds of one call, after three to warm up, with the cache of the device flushed before each."""
    for _ in range(3):
        run()
    if not torch.cuda.is_available():
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes allocated at the height of `run` beyond what was there before."""
    if not torch.cuda.is_available():
        run()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(device: str, quick: bool) -> Ceilings:
    size, side = (1 << 20, 256) if quick else (1 << 30, 8192)
    source, target = (torch.empty(size, dtype=torch.int8, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return Ceilings(copy=2 * size / seconds(lambda: target.copy_(source)), product=2 * side**3 / seconds(lambda: a @ b))


def with_backward(forward: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
    def run():
        loss = forward()
        return torch.autograd.grad(loss, leaves)

    return run


def chunked_logprob(hidden: Tensor, weight: Tensor, target: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """The usual PyTorch way: chunks of rows, float32 log-softmax, each chunk computed again in the backward."""

    def part(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logp = F.log_softmax((h @ weight.T).float(), dim=-1)
        return logp.gather(-1, t[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    parts = [
        torch.utils.checkpoint.checkpoint(part, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(rows), target.split(rows), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def head(device: str, quick: bool, limit: Ceilings) -> list[Figure]:
    tokens, width, vocabulary = (64, 32, 200) if quick else (16384, 2048, 49152)
    hidden = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) * width**-0.5).bfloat16().requires_grad_()
    target = torch.randint(vocabulary, (tokens,), device=device)
    flops = 2 * tokens * width * vocabulary

    def loss(function: Callable) -> Tensor:
        logprob, entropy = function(hidden, weight, target)
        return logprob.mean() + 0.01 * entropy.mean()

    def forward() -> None:
        with torch.no_grad():
            kernels.token_logprob(hidden, weight, target)

    few = slice(0, min(tokens, 512))
    with torch.no_grad():
        got = kernels.token_logprob(hidden[few], weight, target[few])[0]
        want = reference.token_logprob(hidden[few].double(), weight.double(), target[few])[0]
    ours = with_backward(lambda: loss(kernels.token_logprob), hidden, weight)
    both = seconds(ours)
    gradients = hidden.numel() * 2 + weight.numel() * 2
    return [
        Figure("head_forward_over_product", flops / seconds(forward) / limit.product, 0.75),
        Figure(
            "head_both_over_product",
            3 * flops / both / limit.product,
            0.65,
            note="counts three products; four are done",
        ),
        Figure(
            "head_over_chunked_torch", seconds(with_backward(lambda: loss(chunked_logprob), hidden, weight)) / both, 2.5
        ),
        Figure(
            "head_logprob_error",
            (got.double() - want).abs().max().item(),
            1e-4,
            at_most=True,
            note="nats, against float64",
        ),
        Figure(
            "head_extra_gib", (peak_bytes(ours) - gradients) / 2**30, 0.5, at_most=True, note="beyond the two gradients"
        ),
    ]


def decode(device: str, quick: bool, limit: Ceilings) -> list[Figure]:
    latent, width, page = 512, 576, 64

    def time_of(batch: int, tokens: int, heads: int, queries: int) -> float:
        pages = batch * tokens // page
        cache = torch.randn(pages, page, width, device=device).bfloat16()
        table = torch.randperm(pages, device=device).int().view(batch, -1)
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        q = torch.randn(batch, queries, heads, width, device=device).bfloat16()
        return seconds(lambda: kernels.latent_decode(q, cache, table, lengths, latent, width**-0.5))

    def over_copy(taken: float, batch: int, tokens: int, heads: int) -> float:
        return batch * (tokens + heads) * width * 2 / taken / limit.copy

    batch, tokens, heads = (2, 128, 4) if quick else (128, 4096, 16)
    one, two = (time_of(batch, tokens, heads, queries) for queries in (1, 2))
    small = (2, 64, 4) if quick else (16, 1024, 16)
    return [
        Figure(
            "decode_over_copy", over_copy(one, batch, tokens, heads), 0.85, note="128 sequences, 4096 tokens, 16 heads"
        ),
        Figure("decode_two_queries_over_one", two / one, 1.05, at_most=True),
        Figure("decode_small_over_copy", over_copy(time_of(*small, 1), *small), 0.5, note="16 sequences, 1024 tokens"),
    ]


def grouped_experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The usual PyTorch pipeline: sort, gather, two grouped products with SwiGLU between, scatter-add."""
    order = ids.flatten().argsort()
    ends = torch.bincount(ids.flatten(), minlength=len(down)).cumsum(0).int()
    token = order // ids.shape[1]
    gate, up = F.grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    rows = rows * weights.flatten()[order, None].to(rows.dtype)
    return torch.zeros_like(x).index_add(0, token, rows)


def experts(device: str, quick: bool, limit: Ceilings) -> list[Figure]:
    def times(tokens: int, hidden: int, inner: int, experts: int, chosen: int) -> tuple[float, float, float]:
        x = torch.randn(tokens, hidden, device=device).bfloat16().requires_grad_()
        gate_up = (torch.randn(experts, 2 * inner, hidden, device=device) * hidden**-0.5).bfloat16().requires_grad_()
        down = (torch.randn(experts, hidden, inner, device=device) * inner**-0.5).bfloat16().requires_grad_()
        ids = torch.randn(tokens, experts, device=device).topk(chosen).indices
        weights = torch.rand(tokens, chosen, device=device).requires_grad_()
        by_y = torch.randn(tokens, hidden, device=device).bfloat16()

        def of(function: Callable) -> float:
            return seconds(
                lambda: torch.autograd.grad(function(x, weights, ids, gate_up, down), (x, weights, gate_up, down), by_y)
            )

        return of(kernels.moe_experts), of(grouped_experts), 18 * tokens * chosen * hidden * inner

    ours, torch_way, flops = times(*((64, 32, 16, 4, 2) if quick else (16384, 2048, 768, 32, 8)))
    ours_small, torch_small, _ = times(*((64, 16, 8, 4, 2) if quick else (16384, 576, 128, 32, 8)))
    return [
        Figure("experts_over_grouped_mm", torch_way / ours, 1.3, note="width 2048, experts of 768"),
        Figure("experts_small_over_grouped_mm", torch_small / ours_small, 2.0, note="width 576, experts of 128"),
        Figure(
            "experts_over_product", flops / ours / limit.product, 0.5, note="width 2048; recomputation is not counted"
        ),
    ]


def pointwise(device: str, quick: bool, limit: Ceilings) -> list[Figure]:
    rows, width = (64, 64) if quick else (32768, 2048)
    x, weight = torch.randn(rows, width, device=device).bfloat16(), torch.ones(width, device=device).bfloat16()
    logits, bias = torch.randn(rows // 2, 32, device=device), torch.zeros(32, device=device)
    norm, gate = seconds(lambda: kernels.rms_norm(x, weight)), seconds(lambda: kernels.swiglu(x))
    ours = seconds(lambda: kernels.route(logits, bias, 8))
    with kernels.using("reference"):
        torch_way = seconds(lambda: kernels.route(logits, bias, 8))
    return [
        Figure("norm_over_copy", 2 * x.numel() * 2 / norm / limit.copy, 0.85),
        Figure("swiglu_over_copy", 1.5 * x.numel() * 2 / gate / limit.copy, 0.85),
        Figure("router_over_torch", torch_way / ours, 5.0, note="16384 tokens, 8 of 32 experts, with loads"),
    ]


def models(device: str, quick: bool):
    """Our model and transformers' with the same weights."""
    from transformers import DeepseekV3ForCausalLM

    from reasoner.model import ReasonerConfig, ReasonerForCausalLM

    sizes = dict(
        hidden_size=1024, intermediate_size=4096, moe_intermediate_size=256, num_hidden_layers=12,
        num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=512, qk_nope_head_dim=64, qk_rope_head_dim=64,
        v_head_dim=128, max_position_embeddings=4096,
    )  # fmt: skip
    few = dict(hidden_size=64, num_hidden_layers=2, n_routed_experts=8, num_experts_per_tok=2)
    config = ReasonerConfig.small(vocab_size=256 if quick else 49152, **(few if quick else sizes))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ours = ReasonerForCausalLM(config).to(device, dtype)
    theirs = DeepseekV3ForCausalLM(config).to(device, dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def training(device: str, quick: bool, _: Ceilings) -> list[Figure]:
    ours, theirs = (model.train() for model in models(device, quick))
    ids = torch.randint(3, 256, (2, 32) if quick else (8, 2048), device=device)

    def our_step() -> float:
        hidden = ours.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
        logprob, _ = kernels.token_logprob(hidden, ours.lm_head.weight, ids[:, 1:].flatten())
        loss = -logprob.mean()
        loss.backward()
        ours.zero_grad()
        return loss.item()

    def their_step() -> float:
        loss = theirs(ids, labels=ids).loss
        loss.backward()
        theirs.zero_grad()
        return loss.item()

    ours_loss, their_loss = our_step(), their_step()
    note = f"losses {ours_loss:.4f} and {their_loss:.4f}"
    return [
        Figure("training_over_transformers", seconds(their_step, 5) / seconds(our_step, 5), 2.0, note=note),
        Figure(
            "training_memory_over_transformers",
            peak_bytes(our_step) / max(1, peak_bytes(their_step)),
            0.5,
            at_most=True,
        ),
    ]


@torch.inference_mode()
def generation(device: str, quick: bool, _: Ceilings) -> list[Figure]:
    """One more token for every sequence: ours as the paged engine does it (on a GPU a CUDA graph), theirs as it is."""
    batch, cached, page = (2, 16, 16) if quick else (64, 2048, 64)
    ours, theirs = (model.eval() for model in models(device, quick))
    ids = torch.randint(3, 256, (batch,))
    each = cached // page + 1
    cache = PagedCache(ours, batch * each, page)
    for latents in cache.latents:
        latents.normal_()
    table = torch.randperm(batch * each).int().view(batch, each)
    at, lengths = torch.full((batch,), cached), torch.full((batch,), cached + 1, dtype=torch.int32)
    given = (ids, at, table[:, -1].long() * page, table, lengths)
    step = StepGraphs(ours, cache, each) if device == "cuda" else lambda *given: decode_step(ours, cache, *given)
    our_seconds = seconds(lambda: step(*given), 7)

    past = theirs(torch.randint(3, 256, (batch, cached), device=device), use_cache=True, logits_to_keep=1)

    def their_step() -> None:
        theirs(ids[:, None].to(device), past_key_values=past.past_key_values, use_cache=True)
        past.past_key_values.crop(-1)

    note = "64 sequences, 2048 cached; our token ids and tables travel to the device in every step"
    return [Figure("decode_step_over_transformers", seconds(their_step, 7) / our_seconds, 10.0, note=note)]


def training_attention(device: str, quick: bool, limit: Ceilings) -> list[Figure]:
    """Padded fused attention against FlexAttention, whole and packed: which of the two the model should use."""
    on_gpu = device == "cuda"
    flex = torch.compile(flex_attention, dynamic=False) if on_gpu else flex_attention
    figures = []
    for key, value in ((32, 16),) if quick else ((192, 128), (128, 128)):
        rows, length, heads = (2, 32, 2) if quick else (2, 4096, 16)
        q, k, v = (
            torch.randn(rows, length, heads, width, device=device, dtype=torch.bfloat16).requires_grad_(on_gpu)
            for width in (key, key, value)
        )  # FlexAttention has no backward on the CPU
        by = torch.randn(rows, length, heads, value, device=device, dtype=torch.bfloat16)

        def times(run: Callable[[], Tensor], leaves: tuple[Tensor, ...], by: Tensor) -> tuple[float, float]:
            with torch.no_grad():
                forward = seconds(run)
            return forward, seconds(lambda: torch.autograd.grad(run(), leaves, by)) if on_gpu else forward

        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
        leaves = (q, k, v)
        ours = times(lambda q=q, k=k, v=v, s=key**-0.5: kernels.attention(q, k, v, s), leaves, by)
        theirs = times(
            lambda q=q, k=k, v=v, m=mask: flex(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=m).transpose(1, 2),
            leaves,
            by,
        )
        flops = rows * heads * length * length * (key + value)  # of the causal half
        name = f"attention_{key}"
        figures += [
            Figure(f"{name}_forward_over_product", flops / ours[0] / limit.product, 0.5),
            Figure(f"{name}_both_over_product", 3.5 * flops / ours[1] / limit.product, 0.4),
            Figure(f"{name}_over_flex", theirs[1] / ours[1], 1.0, note="forward and backward"),
        ]

    lengths = (5, 32, 9) if quick else (512, 4096, 1024, 2048, 700, 3000, 256, 1600)
    total, document = sum(lengths), torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    document = document.to(device)
    q, k, v = (torch.randn(1, total, heads, width, device=device, dtype=torch.bfloat16) for width in (key, key, value))
    place = torch.cat([row * max(lengths) + torch.arange(n) for row, n in enumerate(lengths)]).to(device)

    def rectangle(x: Tensor) -> Tensor:
        rows = x.new_zeros(len(lengths) * max(lengths), *x.shape[2:])
        return rows.index_copy(0, place, x[0]).unflatten(0, (len(lengths), -1))

    mask = create_block_mask(
        lambda b, h, i, j: (i >= j) & (document[i] == document[j]), None, None, total, total, device=device
    )
    with torch.no_grad():
        ours = seconds(lambda: kernels.attention(*map(rectangle, (q, k, v)), key**-0.5).flatten(0, 1)[place])
        theirs = seconds(lambda: flex(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask))
    note = "forward; sequences of 256 to 4096 tokens: a rectangle against a document mask"
    return [*figures, Figure("attention_packed_over_flex", theirs / ours, 1.0, note=note)]


PARTS = (head, decode, experts, pointwise, training_attention, training, generation)


def measure(device: str, quick: bool) -> tuple[Ceilings, list[Figure], dict[str, str]]:
    """All figures, and the reason for every part that could not be measured."""
    limit, figures, missing = ceilings(device, quick), [], {}
    for part in PARTS:
        torch.manual_seed(0)
        try:
            figures += part(device, quick, limit)
        except Exception as error:  # one broken part must not cost the figures of the others
            missing[part.__name__] = f"{type(error).__name__}: {error}"[:400]
        if device == "cuda":
            torch.cuda.empty_cache()
    return limit, figures, missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes on any device; writes nothing")
    quick = parser.parse_args().quick
    if not quick and not torch.cuda.is_available():
        print("no CUDA device: nothing measured, nothing written (--quick runs tiny sizes on the CPU)", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with kernels.using("require" if device == "cuda" else "auto"):
        limit, figures, missing = measure(device, quick)
    for figure in figures:
        if quick:  # sizes too small for the ratio to mean anything
            print(f"{figure.name:36} ran")
            continue
        mark, side = "reached" if figure.reached else "below the goal", "<=" if figure.at_most else ">="
        print(f"{figure.name:36} {figure.value:10.4g}  goal {side} {figure.goal:<6g} {mark}  {figure.note}")
    for part, why in missing.items():
        print(f"{part}: not measured: {why}")
    if not quick:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "device": torch.cuda.get_device_name(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "ceilings": {"copy_tb_s": limit.copy / 1e12, "product_tflop_s": limit.product / 1e12},
            "figures": [{**asdict(figure), "reached": figure.reached} for figure in figures],
            "not_measured": missing,
        }
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {RESULTS}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
