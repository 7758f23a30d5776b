"""Gathers comparisons of searches into benchmarks/results/search_methods.json and prints their tables.

    reasoner search configs/search.toml --name=search-base
    reasoner search configs/search.toml --name=search-trained --budget=1400 --checkpoint=runs/quickstart/checkpoint
    reasoner search configs/search_deep.toml --name=search-deep
    reasoner search configs/search_smollm2.toml --name=search-smollm2
    python -m benchmarks.search_methods runs/search-base runs/search-trained runs/search-deep runs/search-smollm2

Reads what `reasoner search` wrote and computes one thing more: the fewest samples whose max-marginal answer is as
accurate as the majority of 40.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "search_methods.json"


def gathered(folder: Path) -> dict[str, Any]:
    """A run without its single tasks, with the machine and the commit that it is gathered at."""
    summary = json.loads((folder / "summary.json").read_text())
    methods = {name: {k: v for k, v in m.items() if k != "by_task"} for name, m in summary["methods"].items()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        **summary,
        "checkpoint": "/".join(Path(summary["checkpoint"]).parts[-3:]),  # where on a machine it lay is nobody's matter
        "methods": methods,
        "samples_for_majority_40": fewest(methods),
        "commit": commit,
        "machine": machine,
    }


def fewest(methods: dict[str, Any], k: int = 40) -> dict[str, Any] | None:
    """The smallest sample of the curve whose max-marginal accuracy reaches that of the majority of k (or of all)."""
    if not {"majority", "marginal"} <= set(methods):
        return None
    votes = max((p for p in methods["majority"]["curve"] if p["k"] <= k), key=lambda p: p["k"])
    enough = [p for p in methods["marginal"]["curve"] if p["accuracy"] >= votes["accuracy"]]
    least = min(enough, key=lambda p: p["k"], default=None)
    return {"majority": votes, "marginal": least}


def table(run: dict[str, Any]) -> str:
    head = "| method | size | accuracy | 95% | generated | prefilled | judged | unfinished |\n" + "|---" * 8 + "|"
    rows = [head]
    for name, m in run["methods"].items():
        size, ends = ", ".join(f"{k} {v}" for k, v in m["size"].items()), "–".join(f"{100 * e:.1f}" for e in m["ci"])
        tokens = " | ".join(f"{m['tokens'][kind]:.0f}" for kind in ("generated", "prefilled", "judged"))
        accuracy, cut = f"{100 * m['accuracy']:.1f}%", f"{100 * m['unfinished']:.1f}%"
        rows.append(f"| {name} | {size} | {accuracy} | {ends} | {tokens} | {cut} |")
    return "\n".join(rows)


def main() -> None:
    if not sys.argv[1:]:
        sys.exit(__doc__)
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # those that are not named stay as they are
    for folder in map(Path, sys.argv[1:]):
        run = runs[folder.name] = gathered(folder)
        print(f"\n{folder.name}: {run['tasks']} tasks, budget {run['budget']}\n{table(run)}")
        print(f"samples that reach the majority of 40: {run['samples_for_majority_40']}")
    RESULTS.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
