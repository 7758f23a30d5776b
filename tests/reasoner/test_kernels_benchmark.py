"""The GPU benchmark: it refuses to run without a GPU, and everything it would run works and compares like with like."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reasoner import kernels

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_gpu_nothing_is_written_and_the_exit_code_is_2():
    results = FILE.parent / "results" / "gpu.json"
    before = results.read_bytes() if results.exists() else None
    done = subprocess.run([sys.executable, str(FILE)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert (results.read_bytes() if results.exists() else None) == before


def test_every_part_runs_and_gives_every_figure(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "seconds", lambda run, repeats=0: (run(), 1.0)[1])
    _, figures, missing = benchmark.measure("cuda" if torch.cuda.is_available() else "cpu", quick=True)
    assert missing == {}
    assert len({f.name for f in figures}) == len(figures) == 21
    assert next(f for f in figures if f.name == "head_logprob_error").reached


def test_part_that_fails_is_named_and_costs_the_others_nothing(benchmark, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(benchmark, "PARTS", (broken, benchmark.pointwise))
    _, figures, missing = benchmark.measure("cpu", quick=True)
    assert missing == {"broken": "RuntimeError: out of memory"} and len(figures) == 3


def test_baselines_compute_the_same_as_the_ops(benchmark):
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(9, 8), torch.randn(30, 8), torch.randint(30, (9,))
    for got, want in zip(
        benchmark.chunked_logprob(hidden, weight, target, 4), kernels.token_logprob(hidden, weight, target), strict=True
    ):
        torch.testing.assert_close(got, want)
    x, gate_up, down = torch.randn(9, 16), torch.randn(4, 16, 16), torch.randn(4, 16, 8)
    ids, weights = torch.rand(9, 4).topk(2).indices, torch.rand(9, 2)
    torch.testing.assert_close(
        benchmark.grouped_experts(x, weights, ids, gate_up, down), kernels.moe_experts(x, weights, ids, gate_up, down)
    )


def test_figure_is_reached_from_its_own_side(benchmark):
    assert benchmark.Figure("x", 1.2, 1.0).reached
    assert not benchmark.Figure("x", 1.2, 1.0, at_most=True).reached
    assert not benchmark.Figure("x", float("nan"), 1.0).reached
