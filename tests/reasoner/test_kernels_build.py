"""Compiling, choosing between kernel and reference, and whether the emulator catches what it promises to catch."""

import ctypes
import importlib.util
import logging
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from reasoner import kernels
from reasoner.kernels import build, dispatch, token_logprob, using

REVERSE = """
#include "device.cuh"
// Reverses 64 numbers through shared memory; what stands at HERE keeps the halves of the block in step.
KERNEL(64) reverse(const float* x, float* y) {
    float* tile = reinterpret_cast<float*>(shared_memory());
    tile[thread()] = x[thread()];
    HERE
    y[thread()] = tile[63 - thread()];
}
extern "C" int run(const float* x, float* y, void* stream) { return launch(reverse, {1}, 64, BYTES, stream, x, y); }
"""


def reverse(tmp_path, here, size=256, seed=0):
    source = tmp_path / "reverse.cu"
    source.write_text(REVERSE.replace("HERE", here).replace("BYTES", str(size)))
    library = ctypes.CDLL(str(build.compile(source, build.EMULATOR, tmp_path)))
    library.set_thread_order(seed)
    x, y = torch.arange(64.0), torch.zeros(64)
    dispatch.call(library, "run", x, x, y)
    return torch.equal(y, x.flip(0))


def test_missing_barrier_is_caught_under_every_thread_order(tmp_path):
    for seed in range(4):
        assert not reverse(tmp_path, "", seed=seed)
    for seed in range(4):
        assert reverse(tmp_path, "barrier();", seed=seed)


def test_barrier_that_not_every_thread_reaches_is_reported_as_deadlock(tmp_path):
    with pytest.raises(RuntimeError, match="deadlock in block .* of 64 threads wait"):
        reverse(tmp_path, "if (thread() < 32) barrier(); else from_lane(thread() < 40 ? barrier(), 1 : 2, 0);")


def test_write_past_shared_memory_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match="past the 252 bytes"):
        reverse(tmp_path, "barrier();", size=252)


def test_misaligned_vector_access_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match="misaligned vector load"):
        reverse(tmp_path, "barrier(); load_vector<Four>(tile + 1);")


def test_asynchronous_copy_may_be_missing_until_it_was_waited_for(tmp_path):
    copy = "barrier(); if (thread() < 16) copy_async(tile + 4 * thread(), x + 4 * (15 - thread())); copies_commit();"
    copy += "{} barrier();"
    check = 'if (thread() < 16 && tile[4 * thread()] != x[4 * (15 - thread())]) emulator::fail("early");'
    for seed in range(4):
        with pytest.raises(RuntimeError, match="early"):
            reverse(tmp_path, copy.format("") + check, seed=seed)
        reverse(tmp_path, copy.format("copies_wait<0>();") + check, seed=seed)


def test_asynchronous_copy_may_land_before_it_is_waited_for(tmp_path):
    copy = "barrier(); if (thread() < 16) copy_async(tile + 4 * thread(), x + 4 * (15 - thread()));"
    check = 'if (thread() < 16 && tile[4 * thread()] == x[4 * (15 - thread())]) emulator::fail("landed");'
    with pytest.raises(RuntimeError, match="landed"):
        reverse(tmp_path, copy + "barrier();" + check)


def test_other_processors_switch_fibers_without_assembly(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "EMULATOR_FLAGS", (*build.EMULATOR_FLAGS, "-DPORTABLE_FIBERS"))
    assert reverse(tmp_path, "barrier();")


def test_same_source_is_compiled_once_and_a_changed_one_again(tmp_path):
    source = tmp_path / "small.cu"
    source.write_text('extern "C" int one() { return 1; }')
    first = build.compile(source, build.EMULATOR, tmp_path)
    stamp = first.stat().st_mtime_ns
    assert build.compile(source, build.EMULATOR, tmp_path) == first and first.stat().st_mtime_ns == stamp
    source.write_text('extern "C" int one() { return 2; }')
    assert build.compile(source, build.EMULATOR, tmp_path) != first
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_compiler_of_a_wheel_is_found_without_a_toolkit(tmp_path, monkeypatch):
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh")
    nvcc.chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: which(name) if str(tmp_path) in name else None)
    assert build.compiler("sm_90a") == str(nvcc)


def test_source_that_does_not_compile_gives_the_compilers_words(tmp_path):
    source = tmp_path / "bad.cu"
    source.write_text("int f() { return missing; }")
    with pytest.raises(RuntimeError, match="missing"):
        build.compile(source, build.EMULATOR, tmp_path)


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="'fast'.*auto, reference, require, emulate"):
        dispatch.set_mode("fast")


def test_misfit_is_an_error_where_the_kernel_is_required():
    x = torch.zeros(2, 8, dtype=torch.float64)
    with using("emulate"), pytest.raises(ValueError, match='float64.*kernels="emulate"'):
        token_logprob(x, torch.zeros(3, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.long))


@pytest.fixture
def as_if_on_hopper(monkeypatch, caplog):
    """CPU tensors ask for the GPU's kernels, as GPU tensors would; nothing of it is remembered."""
    caches = (build.load, dispatch._load, dispatch._say_once)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(dispatch, "target_of", lambda x: "sm_90a")
    with caplog.at_level(logging.WARNING, "reasoner.kernels"):
        yield caplog
    for cache in caches:
        cache.cache_clear()


def call_three_times(dtype=torch.float32):
    for _ in range(3):
        token_logprob(torch.zeros(2, 8, dtype=dtype), torch.zeros(3, 8, dtype=dtype), torch.zeros(2, dtype=torch.long))


def test_misfit_is_said_once_and_the_reference_runs(as_if_on_hopper):
    call_three_times(torch.float64)
    assert len(as_if_on_hopper.records) == 1
    assert "float64" in as_if_on_hopper.text and "reference runs" in as_if_on_hopper.text


def test_machine_without_compiler_says_so_once_and_uses_the_reference(as_if_on_hopper, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    call_three_times()
    assert [r.message for r in as_if_on_hopper.records] == [
        "head: no nvcc on the PATH; `pip install nvidia-cuda-nvcc` brings one; the PyTorch reference runs instead"
    ]


def test_compiler_that_fails_is_run_once(as_if_on_hopper, monkeypatch):
    tries = []

    def fails(source, target):
        tries.append(source)
        raise RuntimeError("head.cu does not compile")

    monkeypatch.setattr(build, "compile", fails)
    call_three_times()
    assert len(tries) == 1 and len(as_if_on_hopper.records) == 1


def test_older_gpu_uses_the_reference(as_if_on_hopper, monkeypatch):
    monkeypatch.setattr(dispatch, "target_of", lambda x: "sm_75")
    call_three_times()
    assert "sm_75 is older than sm_80" in as_if_on_hopper.text


def test_narrower_integers_are_read_as_the_same_numbers():
    hidden, weight, ids = torch.randn(5, 8), torch.randn(6, 8), torch.tensor([3, 0, 5, 5, 1])
    logits, cache = torch.randn(5, 6), torch.zeros(7, 8)
    kv, norm, q, angles = torch.randn(5, 8), torch.ones(4), torch.randn(5, 2, 4), torch.randn(5, 2)
    with using("emulate"):
        for run in (
            lambda i: token_logprob(hidden, weight, i),
            lambda i: kernels.sort_by_expert(i[:, None], 6),
            lambda i: kernels.sample(logits, i),
            lambda i: (kernels.write_latent(kv, norm, q, angles.cos(), angles.sin(), i, cache.clone()),),
        ):
            for got, want in zip(run(ids.int()), run(ids), strict=True):
                assert torch.equal(got, want)


def test_tensor_at_an_odd_address_is_moved_before_vector_loads():
    with using("emulate"):
        assert torch.equal(kernels.swiglu(torch.ones(33)[1:].view(2, 16)), kernels.swiglu(torch.ones(2, 16)))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", sorted(p.stem for p in build.SOURCES.glob("*.cu")))
def test_nvcc_compiles_for_hopper_without_spills(source):
    library = build.compile(build.SOURCES / f"{source}.cu", "sm_90a")
    said = library.with_suffix(".log").read_text()
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    assert registers and max(registers) <= 255
    assert spills and max(spills) == 0, said


def disassembler() -> str | None:
    """cuobjdump, from a toolkit or from triton's wheel."""
    triton = importlib.util.find_spec("triton")
    inside = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return shutil.which("cuobjdump") or (str(inside) if inside and inside.exists() else None)


@pytest.mark.skipif(shutil.which("nvcc") is None or disassembler() is None, reason="no nvcc or no cuobjdump")
@pytest.mark.parametrize("source", ["decode", "experts"])
def test_tensor_cores_and_asynchronous_copies_are_in_the_machine_code(source):
    library = build.compile(build.SOURCES / f"{source}.cu", "sm_90a")
    code = subprocess.run([disassembler(), "-sass", str(library)], capture_output=True, text=True, check=True).stdout
    assert "HMMA.16816.F32.BF16" in code and "LDSM.16.M88.4" in code and "LDGSTS" in code
