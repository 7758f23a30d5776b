"""Plain text to calibrate and heal a model with, without a network: what the installed packages say of themselves.

Every Python package carries its long description, mostly English with Markdown and code: about 2 MB in the pinned
environment. Or a person's own files. Every eighth document is held out. Knows nothing of models.
"""

from __future__ import annotations

from importlib.metadata import distributions
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PIECE = 8192  # characters: longer texts count as several documents, so that one file too has held-out parts
KEPT = 8  # one document in so many is held out


def documents(where: Path | None = None) -> list[str]:
    """The texts of a file or of a folder's .txt, .md and .rst files; of the installed packages when None."""
    if where is None:
        described = {d.name: d.metadata.get_payload() or d.metadata.get("Description") or "" for d in distributions()}
        texts = [described[name] for name in sorted(described)]
    else:
        files = (
            [where] if where.is_file() else sorted(f for f in where.rglob("*") if f.suffix in (".txt", ".md", ".rst"))
        )
        texts = [file.read_text(errors="replace") for file in files]
        if not any(texts):
            raise ValueError(f"{where} holds no text: give a text file, or a folder with .txt, .md or .rst files")
    texts = [text.strip() for text in texts if text.strip()]
    return [text[start : start + PIECE] for text in texts for start in range(0, len(text), PIECE)]


def rows(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids (rows, length) to learn from and held out, in a fixed order; no document is in both."""
    parts = ([t for i, t in enumerate(texts) if i % KEPT], texts[::KEPT])
    learned, heldout = (_cut(tokenizer, part, length) for part in parts)
    if not len(learned) or not len(heldout):
        raise ValueError(f"{len(texts)} documents make no row of {length} tokens on either side: give more text")
    return learned, heldout


def _cut(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> Tensor:
    """Documents one after the other, the end token between them, cut into rows in a shuffled order."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False).input_ids + end]
    cut = torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).view(-1, length)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))]
