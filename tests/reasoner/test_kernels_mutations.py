"""Takes every barrier and every wait out of the kernels, one at a time, and sees the emulator tests notice."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "reasoner" / "kernels" / "csrc"
SYNCHRONISES = re.compile(r"\b(barrier\(\);|warp_barrier\(\);|copies_wait<[^>]*>\(\);)")
TESTS = {
    "head": "head",
    "router": "router",
    "norm": "pointwise",
    "decode": "decode",
    "experts": "experts",
    "sample": "sample",
}
HARMLESS = {("decode", "// the queries' of a split without tokens")}  # nothing reads what was copied


def places():
    for source in TESTS:
        text = (SOURCES / f"{source}.cu").read_text()
        for match in SYNCHRONISES.finditer(text):
            line = text[: match.start()].count("\n")
            if not any(s == source and words in text.splitlines()[line] for s, words in HARMLESS):
                yield pytest.param(source, match.span(), id=f"{source}:{line + 1}")


@pytest.mark.slow
@pytest.mark.parametrize(("source", "span"), list(places()))
def test_kernel_without_one_synchronisation_is_caught(source, span, tmp_path):
    for room in ("reasoner", "rollouts", "search", "verifiers", "tests/reasoner"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    mutant = tmp_path / "reasoner" / "kernels" / "csrc" / f"{source}.cu"
    text = mutant.read_text()
    mutant.write_text(text[: span[0]] + ";" + text[span[1] :])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", f"tests/reasoner/test_kernels_{TESTS[source]}.py"],
        cwd=tmp_path,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    # A failed test, or a crash: without its barrier a kernel may compute with addresses nobody wrote.
    assert done.returncode == 1 or done.returncode < 0, done.stdout[-2000:]
