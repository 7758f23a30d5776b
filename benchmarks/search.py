"""What search costs and what its estimators are worth, measured; writes benchmarks/results/search.json.

estimators  error of each estimator on the toy chain at equal numbers of paths, against exact values (half a minute)
searches    accuracy and tokens of every search on the toy chain, with an exact process reward (half a minute)
judge       what a process judge of its own on vLLM reads and says for each token of a beam, by the length of a step
driver      CPU time of the driver for 1,000 tokens of a beam, on an engine in an actor that computes nothing and gives
            every row a token 40 times a second: the cost of trees, of the fleet and of Ray, on a busy machine too
engine      64 questions in flight on one vLLM engine. Steady: tokens a second while 64 searches are always under way,
            beam against plain sampling, in alternating windows. Whole: 64 questions from the first call to the last
            answer, by self-consistency, best-of-n and beam; its_hub on the same engine and questions if it is found
pretrained  the steady windows on SmolLM2-135M-Instruct in bfloat16, 64 rows, a minute or more each

    python -m benchmarks.search [part ...] [--tasks 64] [--seconds 10]

The engine part serves a Markov chain that writes about 100 tokens in steps of about 16, on a llama of 8 layers that
compute zeros: answers and lengths are the chain's, the time is that of a small real model. its_hub (see
`benchmarks.search_peer` for how to add it) runs twice: in this process on the very engine object, which spares it what
it is usually used with, and through its own client on vLLM's server with the same settings.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.search_peer import its_hub
from search import SEARCHES, bind, estimate, explore
from search.base import Sampling, Step, Trajectory, derive
from search.beam import Beam
from search.distinct import Distinct
from search.metrics import interval
from search.sample import BestOf, Sample
from search.toy import Chain, ChainEngine, same_number, trap
from search.toy_checkpoint import write_checkpoint
from search.tree import Ledger, nodes

RESULTS = Path(__file__).parent / "results" / "search.json"
CHAIN = trap()
TRUE_MASS = 0.5893
N = 16  # paths per question


# -- estimators -----------------------------------------------------------------------------------------------------


def p_weights(paths):
    return {"weights": [math.exp(path.logprob) for path in paths]}


def target(paths):
    def logprob(path):
        return math.fsum(math.log(CHAIN.transition[a, b]) for a, b in zip(path.ids, path.ids[1:], strict=False))

    return {"target": [logprob(path) for path in paths]}


ESTIMATORS = {  # name: (search, sampling, method, normalise, further arguments made from the paths)
    "majority": (Sample, {}, "vote", False, None),
    "distinct HT": (Sample, {}, "horvitz_thompson", False, None),
    "distinct HT, normalised": (Sample, {}, "horvitz_thompson", True, None),
    "Gumbel top-n": (Distinct, {}, "gumbel", False, None),
    "Gumbel top-n, normalised": (Distinct, {}, "gumbel", True, None),
    "arithmetic": (Sample, {"arithmetic": True}, "vote", False, None),
    "Rao-Blackwell": (Sample, {"top": 64}, "rao_blackwell", False, None),
    "Rao-Blackwell, arithmetic": (Sample, {"top": 64, "arithmetic": True}, "rao_blackwell", False, None),
    "T=0.7 vote": (Sample, {"temperature": 0.7}, "vote", False, None),
    "T=0.7 importance, normalised": (Sample, {"temperature": 0.7}, "importance", True, target),
    "wrong: distinct sum": (Sample, {}, "distinct_sum", False, None),
    "wrong: votes x p": (Sample, {}, "weighted", True, p_weights),
}


def estimators(repeats: int = 300) -> list[dict]:
    rows = []
    for name, (search, sampling, method, normalise, extra) in ESTIMATORS.items():
        engine = ChainEngine(CHAIN, Sampling(**sampling))
        for n in (4, 16, 64):
            if search is Distinct and n == 64:
                continue  # slow on the toy and nothing new
            masses, right = [], []
            for seed in range(repeats):
                paths = asyncio.run(search(n=n).run(CHAIN.root(seed), engine, None))
                more = extra(paths) if extra else {}
                how = {"equal": same_number, "answer": CHAIN.answer, "method": method, "normalise": normalise}
                got = estimate(paths, **how, **more)
                masses.append(sum(m for answer, m in got.masses.items() if same_number(answer, "18")))
                right.append(sum(same_number(a, "18") for a in got.leaders) / max(1, len(got.leaders)))
            rmse = float(np.sqrt(np.mean((np.array(masses) - TRUE_MASS) ** 2)))
            bias = float(np.mean(masses) - TRUE_MASS)
            error = float(np.std(masses, ddof=1) / math.sqrt(repeats))
            rows.append({"estimator": name, "n": n, "rmse": rmse, "right": np.mean(right), "bias": bias, "se": error})
            print(f"{name:30} N={n:<3} rmse {rmse:.3f}  P(right) {np.mean(right):.3f}  bias {bias:+.3f} +- {error:.3f}")
    return rows


# -- searches -------------------------------------------------------------------------------------------------------


def searches(repeats: int = 100, noise: float = 0.3) -> list[dict]:
    """Every search that needs no writing, with the exact chance of a right answer, blurred, as its process reward."""
    chance = CHAIN.chance(lambda answer: float(same_number(answer, "18")))

    async def score(path: Trajectory) -> float:
        last = path.ids[-2] if path.end == "stop" else path.ids[-1]
        blur = random.Random(derive(*path.ids)).gauss(0, noise)
        return min(1.0, max(0.01, float(chance[last]) + blur))

    rows = []
    for kind, search in SEARCHES.items():
        if kind in ("revise", "refine", "force"):
            continue
        right, tokens, judged = [], [], []
        for seed in range(repeats):
            bound = bind(search(), CHAIN.answer, same_number)
            outcome = asyncio.run(explore(bound, CHAIN.root(seed), ChainEngine(CHAIN), score))
            got = estimate(outcome.paths, equal=same_number, answer=CHAIN.answer, method=bound.method)
            right.append(sum(same_number(a, "18") for a in got.leaders) / max(1, len(got.leaders)))
            tokens.append(outcome.tree.ledger.generated)
            judged.append(outcome.tree.ledger.judged)
        row = {"search": kind, "right": interval(right).mean, "low": interval(right).low, "high": interval(right).high}
        rows.append(row | {"generated": statistics.mean(tokens), "judged": statistics.mean(judged)})
        cost = f"generated {rows[-1]['generated']:7.1f}  judged {rows[-1]['judged']:7.1f}"
        print(f"{kind:12} right {interval(right)}  {cost}")
    return rows


# -- judge ----------------------------------------------------------------------------------------------------------


def judge(tasks: int = 16) -> list[dict]:
    """Beams of different children, guided by + or - behind each step. The chain stands for both models."""
    from rollouts.cluster import Engines, cluster
    from rollouts.request import Placement

    rows = []
    placement = Placement(max_model_len=512, max_num_seqs=256, kv_cache_gib=0.1)
    for length in (6, 8, 16):
        chain = prose(step=1 / (length - 1))
        with tempfile.TemporaryDirectory() as folder, cluster("local"):
            write_checkpoint(chain, Path(folder))
            made = [Engines.start(Path(folder), placement, Sampling(max_tokens=256), seed=s) for s in (1, 2)]
            try:
                rows.append({"step": length} | asyncio.run(judged(chain, *made, tasks)))
            finally:
                for engine in made:
                    engine.stop()
        print("judge:", ", ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()))
    return rows


async def judged(chain: Chain, writer, reader, tasks: int) -> dict:
    from rollouts.score import ProcessModel, Question

    class Letters(ProcessModel):
        yes, no = "a", "b"  # the chain has no + and -

    draw, before = random.Random(0), reader.usage()[0]
    prompts = [(chain.start, *(draw.randrange(3, 29) for _ in range(24))) for _ in range(tasks)]
    scores = [Letters("").open(Question(str(i), (), ""), reader, None) for i in range(tasks)]
    runs = (explore(Beam(), Trajectory(p, seed=i), writer, scores[i]) for i, p in enumerate(prompts))
    found = await asyncio.gather(*runs)
    ledger, now = sum((each.tree.ledger for each in found), Ledger()), reader.usage()[0]
    read, said = now["prefilled"] - before["prefilled"], now["rows"] - before["rows"]
    return {
        "generated": ledger.generated,
        "read/generated": read / ledger.generated,
        "said/generated": said / ledger.generated,
        "prompts/generated": sum(map(len, prompts)) / ledger.generated,
    }


# -- driver ---------------------------------------------------------------------------------------------------------


class Paced:
    """Takes the place of `VLLMEngine` in an actor: steps of about 16 tokens that were made in advance, in due time."""

    RATE, ROWS = 40, 256

    def __init__(self, checkpoint: str, placement, seed: int) -> None:
        from rollouts.request import Reply

        draw = random.Random(0)
        self._replies = []
        for _ in range(1009):
            count, stopped = max(1, int(draw.expovariate(1 / 16))), draw.random() < 1 / 6
            ids = tuple(draw.randrange(3, 29) for _ in range(count - 1)) + (1 if stopped else 2,)
            text = "".join(chr(94 + i) for i in ids[:-1]) + ("" if stopped else "\n")
            step = Step(ids, tuple(-draw.random() for _ in ids), text, versions=((0, 0, count),), cached=30)
            self._replies.append(Reply(step, stopped, 1))
        self._waiting, self._running, self._worker, self.dead = [], [], None, False

    async def ready(self) -> int:
        return 0

    async def init_weight_transfer_engine(self, info: dict) -> None:
        pass

    async def checksums(self) -> dict[str, str]:
        return {}

    async def usage(self) -> dict:
        return {"room": None}

    async def drop(self, numbers: list[int]) -> None:
        pass

    async def extend(self, requests):
        done = asyncio.Queue()
        for i, request in enumerate(requests):
            self._waiting.append([i, [self._replies[seed % 1009] for seed in request.seeds], 0, done])
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._work())
        left = len(requests)
        while left:
            complete = [await done.get()]
            while not done.empty():
                complete.append(done.get_nowait())
            left -= len(complete)
            yield complete

    async def _work(self) -> None:
        rows = 0
        while self._waiting or self._running:
            while self._waiting and rows + len(self._waiting[0][1]) <= self.ROWS:
                rows += len(self._waiting[0][1])
                self._running.append(self._waiting.pop(0))
            await asyncio.sleep(1 / self.RATE)
            for job in list(self._running):
                index, replies, _, done = job
                job[2] += 1
                rows -= sum(len(reply.step.ids) == job[2] for reply in replies)
                if job[2] >= max(len(reply.step.ids) for reply in replies):
                    self._running.remove(job)
                    done.put_nowait((index, replies))


def driver(tasks: int, seconds: float) -> list[dict]:
    from rollouts.cluster import Engines, cluster
    from rollouts.request import Placement

    draw = random.Random(0)
    prompts = [(0, *(draw.randrange(3, 29) for _ in range(24))) for _ in range(tasks)]
    with tempfile.TemporaryDirectory() as folder, cluster("local"):
        (Path(folder) / "config.json").write_text("{}")
        place, sampling = Placement(max_model_len=512), Sampling(max_tokens=256)
        served = Engines.start(Path(folder), place, sampling, seed=1, engine="benchmarks.search:Paced")
        try:
            with asyncio.Runner() as runner:
                rows = [runner.run(_cpu(served, prompts, seconds, turn)) for turn in range(2)]
        finally:
            served.stop()
    for row in rows:
        print("driver:", ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    return rows


async def _cpu(engine, prompts, seconds: float, turn: int) -> dict:
    run = _explored(Beam(width=4, branch=4))
    async with _lanes(prompts, lambda root: run(engine, root), "driver", turn):
        await asyncio.sleep(2)
        before, tokens, cpu = time.perf_counter(), engine.ledger.generated, time.process_time()
        await asyncio.sleep(seconds)
        took, cpu = time.perf_counter() - before, time.process_time() - cpu
        tokens = engine.ledger.generated - tokens
    return {"tokens/s": tokens / took, "cpu ms/1000 tokens": 1e6 * cpu / tokens, "driver's CPU share": cpu / took}


@asynccontextmanager
async def _lanes(prompts, run: Callable, name: str, turn: int):
    """As many searches as there are prompts are under way at any moment inside; those begun are ended after."""
    stop = asyncio.Event()

    async def lane(number: int) -> None:
        round_ = 0
        while not stop.is_set():
            await run(Trajectory(prompts[(number + round_) % len(prompts)], seed=derive(name, turn, number, round_)))
            round_ += 1

    lanes = [asyncio.create_task(lane(number)) for number in range(len(prompts))]
    yield
    stop.set()
    await asyncio.gather(*lanes)


# -- engine ---------------------------------------------------------------------------------------------------------


def prose(step: float = 1 / 16, stop: float = 1 / 6) -> Chain:
    """Letters in lines of about 1/step tokens; after a line an answer with chance `stop`."""
    letters, answers = [chr(97 + i) for i in range(26)], [str(i) for i in range(5)]
    tokens = ["?", "", "\n", *letters, *answers]
    first, last = 3, 3 + len(letters)
    p = np.zeros((len(tokens), len(tokens)))
    shape = np.random.default_rng(0)
    p[1, 1] = 1
    p[last:, 1] = 1
    for here in [0, 2, *range(first, last)]:
        p[here, first:last] = shape.dirichlet([0.5] * len(letters)) * (1 - (step if here >= first else 0))
    p[first:last, 2] = step
    p[2, first:last] *= 1 - stop
    p[2, last:] = stop * np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    return Chain(tuple(tokens), p / p.sum(axis=1, keepdims=True), {last + i: a for i, a in enumerate(answers)})


async def reward(path: Trajectory) -> float:
    """A stand-in for a process reward model that costs nothing: hashed from the text."""
    return derive(path.text) % 1000 / 1000


def engine(tasks: int, seconds: float, turns: int) -> dict:
    from rollouts.cluster import Engines, cluster
    from rollouts.request import Placement

    chain = prose()
    draw = random.Random(0)
    prompts = [(chain.start, *(draw.randrange(3, 29) for _ in range(24))) for _ in range(tasks)]
    with tempfile.TemporaryDirectory() as folder, cluster("local"):
        write_checkpoint(chain, Path(folder), layers=8, inner=768)
        placement = Placement(max_model_len=512, max_num_seqs=256, kv_cache_gib=0.5)
        served = Engines.start(Path(folder), placement, Sampling(max_tokens=256), seed=1)
        try:
            with asyncio.Runner() as runner:
                runner.run(_sampled(served, Trajectory(prompts[0], seed=0)))  # warm up
                steady = runner.run(_steady(served, prompts, seconds))
                with its_hub(served, chain, prompts, Path(folder), N) as theirs:
                    whole = runner.run(_whole(served, theirs, prompts, turns))
        finally:
            served.stop()
    return {"tasks": tasks, "n": N, "steady": steady, "whole": whole, "load": os.getloadavg()}


def pretrained(tasks: int, seconds: float) -> list[dict]:
    from transformers import AutoTokenizer

    from reasoner.base_model import Gguf
    from rollouts.cluster import Engines, cluster
    from rollouts.request import Placement
    from rollouts.roll_out import encode
    from rollouts.tasks import ReasoningGym

    checkpoint = Gguf().prepare([], Path("cache"), 0, lambda *_: None)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ask = "Solve this step by step, and say the answer at the end: {expression}"
    sums = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    questions, _ = ReasoningGym("chain_sum", sums, train=tasks, heldout=1, prompt=ask).load()
    prompts = [encode(tokenizer, question) for question in questions]
    placement = Placement(max_model_len=512, max_num_seqs=64, kv_cache_gib=2.0, dtype="bfloat16")
    with cluster("local"):
        served = Engines.start(checkpoint, placement, Sampling(max_tokens=96, temperature=0.5), seed=1)
        try:
            with asyncio.Runner() as runner:
                runner.run(_sampled(served, Trajectory(prompts[0], seed=0)))  # warm up
                return runner.run(_steady(served, prompts, max(seconds, 60.0)))
        finally:
            served.stop()


async def _sampled(engine, root: Trajectory) -> Ledger:
    """Plain sampling: N paths from one engine call, no search around it."""
    paths = await engine.extend(root, n=N)
    return Ledger(generated=sum(path.sampled_tokens for path in paths))


def _explored(search) -> Callable:
    async def run(engine, root: Trajectory) -> Ledger:
        outcome = await explore(search, root, engine, reward)
        minimum = sum(node["tokens"] for node in nodes(outcome.tree.record.rows) if node["parent"] is not None)
        assert outcome.tree.ledger.generated == minimum, "a token was generated twice, or for nothing"
        return outcome.tree.ledger

    return run


async def _steady(engine, prompts, seconds: float) -> list[dict]:
    """Tokens a second while as many searches as there are prompts are under way at any moment.

    Windows of the two alternate; a window is counted from when the engine has been full for a while.
    """
    runs = {"plain sampling": _sampled, "beam 4x4": _explored(Beam(width=4, branch=4))}
    rows = [await _window(engine, prompts, name, runs[name], seconds, turn) for turn in range(2) for name in runs]
    for name in runs:
        mine = [row for row in rows if row["run"] == name]
        print(f"steady: {name:24} {statistics.mean(row['tokens/s'] for row in mine):7.0f} tok/s")
        for fact in ("rows per engine step", "engine stepping", "driver's CPU share", "prefilled per generated"):
            print(f"{'':34}{fact}: {statistics.mean(row[fact] for row in mine):.3f}")
    plain, beam = (statistics.mean(row["tokens/s"] for row in rows if row["run"] == name) for name in runs)
    print(f"{'':34}beam / plain: {beam / plain:.3f}")
    return rows


async def _window(engine, prompts, name: str, run: Callable, seconds: float, turn: int) -> dict:
    async with _lanes(prompts, lambda root: run(engine, root), name, turn):
        await asyncio.sleep(0.4 * seconds)
        before, used, cpu = time.perf_counter(), engine.usage()[0], time.process_time()
        await asyncio.sleep(seconds)
        took, now, cpu = time.perf_counter() - before, engine.usage()[0], time.process_time() - cpu
    generated = now["rows"] - used["rows"]  # the engine's own count: replies come in pieces of unequal size
    return {
        "run": name,
        "tokens/s": generated / took,
        "rows per engine step": generated / max(1, now["steps"] - used["steps"]),
        "engine stepping": (now["seconds"] - used["seconds"]) / took,
        "driver's CPU share": cpu / took,
        "prefilled per generated": (now["prefilled"] - used["prefilled"]) / max(1, generated),
    }


async def _whole(engine, theirs: dict[str, Callable], prompts, turns: int) -> list[dict]:
    """All questions at once, from the first call to the last answer."""

    def all_by(run: Callable) -> Callable:
        async def runs(turn: int) -> tuple[int, dict]:
            roots = [Trajectory(prompt, seed=derive(i, turn)) for i, prompt in enumerate(prompts)]
            ledgers = await asyncio.gather(*(run(engine, root) for root in roots))
            total = sum(ledgers[1:], ledgers[0])
            facts = {
                "generated / tree minimum": 1.0,  # asserted of every search
                "prefilled per generated": total.prefilled / total.generated,
                "judged per generated": total.judged / total.generated,
            }
            return total.generated, facts if total.calls else {}

        return runs

    runs = {
        "plain engine calls": all_by(_sampled),
        "ours: self-consistency": all_by(_explored(Sample(n=N))),
        "ours: best-of-n": all_by(_explored(BestOf(n=N))),
        "ours: beam 4x4": all_by(_explored(Beam(width=4, branch=4))),
        **theirs,
    }
    rows = []
    for name, run in runs.items():
        seconds, tokens, facts = [], [], {}
        for turn in range(turns):
            begun, busy = time.perf_counter(), time.process_time()
            generated, facts = await run(turn)
            seconds.append(time.perf_counter() - begun)
            tokens.append(generated / seconds[-1])
            facts["driver's CPU share"] = (time.process_time() - busy) / seconds[-1]
        rows.append({"run": name, "seconds": seconds, "tokens": generated, "tokens/s": tokens, **facts})
        middle = statistics.median
        print(f"{name:32} {middle(seconds):6.2f} s  {generated:7d} tokens  {middle(tokens):7.0f} tok/s")
        for fact, value in facts.items():
            print(f"{'':34}{fact}: {value:.3f}")
    _compare(rows)
    return rows


def _compare(rows: list[dict]) -> None:
    """its_hub in its fastest setting against ours on the same questions: seconds, and tokens where it drew others."""
    found = {row["run"]: (statistics.median(row["seconds"]), row["tokens"]) for row in rows}
    for where, method in product(("its_hub", "its_hub over HTTP"), ("self-consistency", "best-of-n", "beam 4x4")):
        theirs = [value for run, value in found.items() if run.startswith(f"{where}: {method}")]
        if theirs:
            seconds, tokens = min(theirs)
            ours, drawn = found[f"ours: {method}"]
            rate = (drawn / ours) / (tokens / seconds)
            print(f"{method}: {where} takes {seconds / ours:.2f} of our seconds, {tokens / drawn:.2f} of our tokens")
            print(f"{'':34}our tokens a second / its: {rate:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="part", help="estimators, searches, judge, driver, engine, pretrained; default: all"
    )
    parser.add_argument("--tasks", type=int, default=64, help="questions in flight on the engine")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a steady window")
    parser.add_argument("--turns", type=int, default=1, help="repeats of each whole run; the median is shown")
    args = parser.parse_args()
    parts = {
        "estimators": estimators,
        "searches": searches,
        "judge": judge,
        "driver": lambda: driver(args.tasks, args.seconds),
        "engine": lambda: engine(args.tasks, args.seconds, args.turns),
        "pretrained": lambda: pretrained(args.tasks, args.seconds),
    }
    if unknown := set(args.parts) - set(parts):
        parser.error(f"unknown part {', '.join(unknown)}: choose among {', '.join(parts)}")
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    for name in args.parts or parts:
        print(f"-- {name}")
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        found[name] = {"rows": parts[name](), "machine": machine, "commit": commit.stdout.strip()}
        RESULTS.write_text(json.dumps(found, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
