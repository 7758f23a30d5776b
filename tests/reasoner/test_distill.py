"""Healing a converted checkpoint: what the loss is, what is trained, that it heals, and what it leaves when stopped."""

import json

import pytest
import torch

from reasoner import distill
from reasoner.__main__ import main
from reasoner.convert import convert
from reasoner.distill import Healing, attention_loss, divergence, heal, soft_label_loss
from reasoner.model import load

from test_convert import TEXTS, write


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A dense model of two key heads, and what conversion made of it."""
    folder = tmp_path_factory.mktemp("pair")
    teacher = write(folder / "dense", num_key_value_heads=2, rms_norm_eps=1e-5)
    student, tokenizer, _ = convert(folder / "dense", latent=64, rope=16, texts=TEXTS, tokens=2048)
    return folder, student, teacher


def tokens(rows=16, seed=0):
    return torch.randint(5, 22, (rows, 32), generator=torch.Generator().manual_seed(seed))
