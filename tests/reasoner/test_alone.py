"""A machine with torch and transformers alone evaluates and searches, and is told what training wants."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reasoner.demonstrations import ALPHABET
from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer, save

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys
for name in ("ray", "vllm", "trl", "datasets", "peft"):
    sys.modules[name] = None  # importing it fails as if it were not installed
from reasoner.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    tokenizer = char_tokenizer(ALPHABET)
    sizes = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2)
    config = ReasonerConfig.small(len(tokenizer), n_routed_experts=8, num_experts_per_tok=2, **sizes)
    save(ReasonerForCausalLM(config), tokenizer, folder / "base")
    return folder


def reasoner(*words):
    command = [sys.executable, "-c", WITHOUT, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def settings(folder):
    base = f'{{kind="pretrained", path="{folder / "base"}"}}'
    return ["--tasks.heldout=4", f"--base={base}", f"--out={folder}", "--sampling.max_tokens=8"]


def test_eval_runs(folder):
    words = ["--engine.kind=paged", "--evaluate.tasks=4", "--evaluate.n=8"]
    done = reasoner("eval", "configs/quickstart.toml", *settings(folder), *words)
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads((folder / "quickstart-eval" / "evaluation.json").read_text())["greedy"] <= 1


def test_search_runs(folder):
    config = (ROOT / "configs" / "search.toml").read_text()
    (folder / "search.toml").write_text(config[: config.index('[[methods]]\nname = "marginal"')])
    words = ["--engine.kind=paged", "--heldout=4", "--sizing=4", "--budget=40"]
    done = reasoner("search", folder / "search.toml", *settings(folder), *words)
    assert done.returncode == 0, done.stderr
    assert (folder / "search" / "report.html").is_file()


def test_train_says_what_it_wants_before_it_computes_anything(folder):
    done = reasoner("train", "configs/quickstart.toml", *settings(folder), "--engine.kind=paged", "--evaluate.tasks=4")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(("reasoner: trl is not installed", "reasoner: datasets is not installed"))
    assert "make setup" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_engine_that_is_not_installed_is_named_with_those_that_are(folder):
    done = reasoner("eval", "configs/quickstart.toml", *settings(folder), "--evaluate.tasks=4", "--evaluate.n=8")
    assert done.returncode == 2
    assert "ray is not installed" in done.stderr and "--engine.kind=paged" in done.stderr


def test_the_benchmark_of_the_kernels_needs_neither():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.split("from reasoner")[0] + "import benchmarks.gpu, benchmarks.model"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
