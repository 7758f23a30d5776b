"""Compiles one `.cu` file at its first use: nvcc for a GPU, g++ against `csrc/emulator.h` for tests on a CPU.

The result lies in the user's cache folder under the hash of everything it was made from, so it is made once per machine
and never stale. Knows nothing of torch or of what the kernels compute. Neighbour: `dispatch` loads and calls what is
built here.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
EMULATOR = "emulator"  # the target that is no GPU architecture

GPU_FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "-diag-suppress", "177")
# Without -fno-gnu-unique loaded libraries would share one emulator; without contraction results are equal on every CPU.
EMULATOR_FLAGS = ("-x", "c++", "-std=c++20", "-O2", "-shared", "-fPIC", "-fno-gnu-unique", "-ffp-contract=off", "-w")


class NoCompiler(RuntimeError):
    """Neither found on the PATH nor in the usual place."""


def compiler(target: str) -> str:
    """The path of nvcc, or of g++ for the emulator. Raises NoCompiler.

    nvcc comes with a CUDA toolkit or as a wheel (`pip install nvidia-cuda-nvcc`, 50 MB), and wants g++ beside it.
    """
    if target == EMULATOR:
        names, places, remedy = ("g++", "c++"), (), ""
    else:
        names, places = ("nvcc",), ("/usr/local/cuda/bin/nvcc", *_wheels("nvcc"))
        remedy = "; `pip install nvidia-cuda-nvcc` brings one"
    found = next(filter(None, map(shutil.which, (*names, *places))), None)
    if found is None:
        raise NoCompiler(f"no {' or '.join(names)} on the PATH{remedy}")
    return found


def _wheels(program: str) -> list[str]:
    """Where NVIDIA's wheels put a program."""
    nvidia = importlib.util.find_spec("nvidia")
    roots = nvidia.submodule_search_locations if nvidia else ()
    return [str(path) for root in roots or () for path in sorted(Path(root).glob(f"cu*/bin/{program}"), reverse=True)]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reasoner" / "kernels"


def command(target: str) -> list[str]:
    flags = EMULATOR_FLAGS if target == EMULATOR else (*GPU_FLAGS, f"-arch={target}")
    return [compiler(target), *flags]


def compile(source: Path, target: str, folder: Path | None = None) -> Path:
    """The shared library of `source` for `target` ("emulator" or e.g. "sm_90a").

    Beside it, `.log` keeps what the compiler said. Raises NoCompiler, or RuntimeError with the compiler's words.
    """
    folder = folder or cache_folder()
    line = command(target)
    parts = [
        *line,
        *(path.read_text() for path in (source, *sorted(SOURCES.glob("*.cuh")), *sorted(SOURCES.glob("*.h")))),
    ]
    library = folder / f"{source.stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # whole or absent: processes may compile at the same time
        made = Path(scratch) / library.name
        done = subprocess.run(
            [*line, "-I", str(SOURCES), str(source), "-o", str(made)], capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for {target}:\n{done.stderr[-4000:]}")
        log = made.with_suffix(".log")
        log.write_text(done.stdout + done.stderr)
        log.replace(library.with_suffix(".log"))
        made.replace(library)
    return library


def compile_all(target: str, folder: Path | None = None) -> list[Path]:
    """Every kernel for `target`, ahead of its first use: `python -m reasoner.kernels.build sm_90a`."""
    return [compile(source, target, folder) for source in sorted(SOURCES.glob("*.cu"))]


@functools.cache
def load(source: Path, target: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile(source, target)))


if __name__ == "__main__":
    print(*compile_all(*sys.argv[1:] or ["sm_90a"]), sep="\n")
