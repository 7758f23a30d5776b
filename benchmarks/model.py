"""A training step on the CPU against transformers' DeepseekV3ForCausalLM with the same weights and batch.

    python -m benchmarks.model            # writes benchmarks/results/model.json; about 3 minutes on two quiet cores

Per size and number of threads: tokens a second of both, their ratio (goal: 1.2), both losses, and the most memory a
process of each ever held (goal: not more). Speeds alternate in one process; memory is that of processes of their own.
Needs torch and transformers alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "model.json"
SIZES = {  # changes of ReasonerConfig.small, rows, columns
    "quickstart": (dict(vocab_size=32), 128, 64),
    "wider": (dict(vocab_size=4096, hidden_size=256, moe_intermediate_size=64, num_hidden_layers=6), 16, 256),
}
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=4, metavar=("SIZE", "THREADS", "FOLDER", "WHAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        size, threads, folder, what = args.child
        print(json.dumps(_child(size, int(threads), Path(folder), what)))
        return
    figures = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            _run(size, 1, folder, "write")
            for threads in (1, 2):
                found = _run(size, threads, folder, "speed")
                for name in ("ours", "theirs"):
                    found[f"peak_mib_{name}"] = _run(size, threads, folder, name)["peak_mib"]
                found["memory_over_transformers"] = round(found["peak_mib_ours"] / found["peak_mib_theirs"], 3)
                figures.append({"size": size, "threads": threads, **found})
                print(
                    f"{size:10s} {threads} threads: {found['tokens_s_ours']:7.0f} tokens/s, "
                    f"{found['faster']:.2f} times transformers', loss {found['loss_ours']:.5f} and "
                    f"{found['loss_theirs']:.5f}, memory {found['memory_over_transformers']:.2f} of its"
                )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"commit": commit, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    RESULTS.write_text(json.dumps(about | {"training_step": figures}, indent=2) + "\n")
    print(f"written: {RESULTS}")


def _run(size: str, threads: int, folder: str, what: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.model", "--child", size, str(threads), folder, what]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _child(size: str, threads: int, folder: Path, what: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer, load, save

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    changes, rows, columns = SIZES[size]
    if what == "write":
        save(ReasonerForCausalLM(ReasonerConfig.small(**changes)), char_tokenizer("0123456789"), folder / "model")
        return {}
    ids_BL = torch.randint(3, changes["vocab_size"], (rows, columns))
    readers = {"ours": load, "theirs": AutoModelForCausalLM.from_pretrained}
    steps = {name: _step(read(folder / "model"), ids_BL) for name, read in readers.items() if what in ("speed", name)}
    losses = {name: step() for name, step in steps.items()}  # of the same weights; also warms up
    if what != "speed":
        for _ in range(2):
            steps[what]()
        return {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    seconds = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "faster": round(median["theirs"] / median["ours"], 3),
        "tokens_s_ours": round(ids_BL.numel() / median["ours"], 1),
        "tokens_s_theirs": round(ids_BL.numel() / median["theirs"], 1),
        "loss_ours": round(losses["ours"], 6),
        "loss_theirs": round(losses["theirs"], 6),
    }


def _step(model, ids_BL):
    """One forward, backward and AdamW step; the loss before it."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        loss = model(ids_BL, labels=ids_BL, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
