"""The quickstart on three seeds, and the control whose rewards are shuffled: does it learn, and from the verdicts?

    python -m benchmarks.quickstart [FOLDER]

Runs what is not there yet in FOLDER (default: runs), one after the other, and writes their summaries to
benchmarks/results/quickstart.json with commit and machine, and the tables as Markdown to the screen. About 25 minutes.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUNS = {
    "seed 0": ("quickstart.toml", "quickstart", 0),
    "seed 1": ("quickstart.toml", "quickstart-seed1", 1),
    "seed 2": ("quickstart.toml", "quickstart-seed2", 2),
    "control": ("control.toml", "control", 0),
}
METRICS = {"mean": "mean_at_k", "maj@8": "maj_at_k", "marginal@8": "marginal_at_k", "pass@8": "pass_at_k"}
PHASES = ("total", "warmup", "start", "eval", "rollouts", "learn", "sync")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    found = {}
    for name, (config, run, seed) in RUNS.items():
        if not (folder / run / "summary.json").is_file():
            command = [sys.executable, "-m", "reasoner", "train", str(ROOT / "configs" / config)]
            subprocess.run([*command, f"--name={run}", f"--seed={seed}", f"--out={folder}"], check=True)
        found[name] = json.loads((folder / run / "summary.json").read_text())
    result = {**machine(), "runs": found}
    (ROOT / "benchmarks/results/quickstart.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join([*accuracies(found), "", *costs(found)]))


def accuracies(found: dict[str, Any]) -> list[str]:
    lines = [f"| run | greedy before | greedy after | gain, points | {' | '.join(METRICS)} |", "|---" * 8 + "|"]
    for name, run in found.items():
        base, final = run["base"], run["final"]
        gain = 100 * (final["greedy"] - base["greedy"])
        pairs = [f"{100 * base[m]:.1f} → {100 * final[m]:.1f}" for m in METRICS.values()]
        lines.append(f"| {name} | {_interval(base)} | {_interval(final)} | **{gain:+.1f}** | {' | '.join(pairs)} |")
    return lines


def costs(found: dict[str, Any]) -> list[str]:
    names = ["seconds in all", *PHASES[1:], "peak memory, GB", "tokens generated", "mismatch first / last, nats"]
    lines = [f"| run | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, run in found.items():
        seconds = [f"{run['seconds'].get(phase, 0):.0f}" for phase in PHASES]
        apart = f"{run['mismatch']['first']:.1e} / {run['mismatch']['last']:.1e}"
        more = [f"{run['peak_rss_bytes'] / 1e9:.1f}", f"{run['tokens']['generated']:,}", apart]
        lines.append(f"| {name} | {' | '.join([*seconds, *more])} |")
    return lines


def _interval(table: dict[str, Any]) -> str:
    low, high = table["ci"]["greedy"]
    return f"{100 * table['greedy']:.1f} ({100 * low:.1f} – {100 * high:.1f})"


def machine() -> dict[str, Any]:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(
        (line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), platform.machine()
    )
    cores = sum(line.startswith("processor") for line in cpuinfo)
    kernel = platform.release()
    about = {"cpu": cpu, "cores": cores, "python": platform.python_version(), "kernel": kernel}
    return {"commit": git("rev-parse", "HEAD") + changed, "machine": about}


if __name__ == "__main__":
    main()
