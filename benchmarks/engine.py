"""The in-process engines and vLLM side by side, and the learner's head against its alternatives: engine.json.

engines  tokens per second of the paged engine, the padded one (`local`) and vLLM on one checkpoint of our model, whole
         answers and step by step; one thread each, in turns within one run. vLLM needs Ray and is left out without it.
head     seconds and peak memory of one loss and its gradient at SmolLM2-135M's size: through logits, through TRL's
         fused head, through `reasoner.logprobs`; each in a process of its own.

    python -m benchmarks.engine [engines] [head] [--checkpoint runs/quickstart/checkpoint] [--turns 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from search.base import END, STEP, Sampling, Trajectory, derive  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "engine.json"
QUESTIONS, CHILDREN, LONGEST, FEW = 32, 8, 72, 48
ROWS, PROMPT, COMPLETION = 4, 192, 64  # of the head's batch
WAYS = ("logits", "trl", "ours")


# -- engines ---------------------------------------------------------------------------------------------------------


def engines(checkpoint: Path, turns: int) -> dict:
    from transformers import AutoTokenizer

    from reasoner.model import load
    from reasoner.paged_engine import paged_engine
    from rollouts.local_engine import LocalEngine

    torch.set_num_threads(1)
    tokenizer, sampling = AutoTokenizer.from_pretrained(checkpoint), Sampling(max_tokens=LONGEST)

    def in_process(rows: int) -> dict:
        paged = paged_engine(load(checkpoint, torch.float32), tokenizer, sampling, context=128, rows=rows)
        return {"paged": paged, "local": LocalEngine(load(checkpoint, torch.float32), tokenizer, sampling, rows=rows)}

    made, few = in_process(QUESTIONS * CHILDREN), in_process(FEW)
    jobs = {
        "whole answers": (made, END),
        "step by step": (made, STEP),
        f"whole answers, {FEW} rows at once": (few, END),
    }
    times = {job: {name: [] for name in ("paged", "local", "vllm")} for job in jobs}
    with ExitStack() as stack, asyncio.Runner() as runner:
        if find_spec("ray") and find_spec("vllm"):
            made["vllm"] = _vllm(checkpoint, sampling, stack)
        for turn in range(turns + 1):  # the first one warms up
            for job, (served, until) in jobs.items():
                for name, engine in served.items():
                    rate = runner.run(_rate(engine, tokenizer, until, seed=turn))
                    if turn:
                        times[job][name].append(rate)
    return {
        "checkpoint": f"{sum(p.numel() for p in load(checkpoint).parameters()) / 1e6:.1f}M parameters",
        "questions": QUESTIONS,
        "children": CHILDREN,
        "tokens_per_second": {
            job: {name: round(statistics.median(rates)) for name, rates in by.items() if rates}
            for job, by in times.items()
        },
        "paged_over": {
            job: {
                name: round(statistics.median(a / b for a, b in zip(by["paged"], by[name], strict=True)), 2)
                for name in ("local", "vllm")
                if by[name]
            }
            for job, by in times.items()
        },
    }


def _vllm(checkpoint: Path, sampling: Sampling, stack: ExitStack):
    from rollouts.cluster import Engines, cluster
    from rollouts.request import Placement

    stack.enter_context(cluster("local"))
    served = Engines.start(checkpoint, Placement(max_model_len=128), sampling, 0)
    stack.callback(served.stop)
    return served


async def _rate(engine, tokenizer, until, *, seed: int) -> float:
    """Tokens per second of all questions at once; step by step, every child goes on alone to its end."""
    before, begin = engine.ledger.generated, time.perf_counter()

    async def answer(root: Trajectory) -> None:
        paths = await engine.extend(root, n=CHILDREN, until=until)
        while paths := [path for path in paths if path.end is None]:
            grown = await asyncio.gather(*(engine.extend(path, until=until) for path in paths))
            paths = [path for group in grown for path in group]

    await asyncio.gather(*(answer(root) for root in _roots(tokenizer, seed)))
    return (engine.ledger.generated - before) / (time.perf_counter() - begin)


def _roots(tokenizer, seed: int) -> list[Trajectory]:
    roots = []
    for i in range(QUESTIONS):
        terms = [derive(seed, i, k) % 9 + 1 for k in range(4)]
        chat = [{"role": "user", "content": " + ".join(map(str, terms)) + " ="}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        roots.append(Trajectory(tuple(ids), seed=derive(seed, i)))
    return roots


# -- head ------------------------------------------------------------------------------------------------------------


def head(turns: int) -> dict:
    """Each way in a process of its own, so that one's peak is not another's; in turns."""
    found = {way: [] for way in WAYS}
    for _ in range(turns):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.engine", "--way", way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    seconds, cpu, extra = (
        {way: statistics.median(r[what] for r in rows) for way, rows in found.items()}
        for what in ("seconds", "cpu_seconds", "extra_mib")
    )
    losses = [rows[0]["loss"] for rows in found.values()]
    norms = [rows[0]["gradient_norm"] for rows in found.values()]
    return {
        "model": "SmolLM2-135M's shape, random weights, float32, one thread",
        "batch": f"{ROWS} rows of {PROMPT} prompt and {COMPLETION} completion tokens",
        "seconds": {way: round(s, 2) for way, s in seconds.items()},
        "cpu_seconds": {way: round(s, 2) for way, s in cpu.items()},
        "extra_mib": {way: round(m) for way, m in extra.items()},
        "cpu_seconds_over_ours": {way: round(cpu[way] / cpu["ours"], 2) for way in ("logits", "trl")},
        "loss_spread": max(losses) - min(losses),
        "gradient_norm_spread": (max(norms) - min(norms)) / max(norms),
    }


def one_way(way: str) -> dict:
    """Loss and gradient of a batch: seconds by the clock and of processor time, which is steadier, and MiB at the
    height beyond what the first forward pass needed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config)
    ids = torch.randint(49152, (ROWS, PROMPT + COMPLETION))
    mask, weights = torch.ones_like(ids), torch.randn(ROWS, COMPLETION)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if way == "trl":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, outputs=("log_probs", "entropy"))

    def loss() -> torch.Tensor:
        if way == "ours":
            from reasoner.logprobs import token_logprobs

            logp, entropy = token_logprobs(model, ids, mask, COMPLETION)
        elif way == "trl":
            labels = ids.clone()
            labels[:, :PROMPT] = -100
            out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            logp, entropy = out.log_probs[:, -COMPLETION:], out.entropy[:, -COMPLETION:]
        else:
            out = model(input_ids=ids, attention_mask=mask, logits_to_keep=COMPLETION + 1)
            law = out.logits[:, :-1].log_softmax(-1)
            logp = law.gather(-1, ids[:, -COMPLETION:, None])[..., 0]
            entropy = -(law.exp() * law).sum(-1)
        return (logp * weights).sum() + 0.01 * entropy.sum()

    with torch.no_grad():
        model.base_model(input_ids=ids[:1, :8])
    before = _peak_mib()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    value = loss()
    value.backward()
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - begin_cpu,
        "extra_mib": _peak_mib() - before,
        "loss": value.item(),
        "gradient_norm": torch.stack([p.grad.norm() for p in model.parameters()]).norm().item(),
    }


def _peak_mib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["engines", "head"])
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/quickstart/checkpoint"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(one_way(args.way)))
        return
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    record["machine"] = f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread"
    if "engines" in args.parts:
        record["engines"] = engines(args.checkpoint, args.turns)
    if "head" in args.parts:
        record["head"] = head(args.turns)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
