"""The model stands on torch and transformers alone."""

import subprocess
import sys
from pathlib import Path

import reasoner.model

SCRIPT = """
import sys
for absent in ("accelerate", "trl", "ray", "vllm", "datasets", "peft"):
    sys.modules[absent] = None  # importing it raises
import torch
from reasoner.model import *
tokenizer = char_tokenizer("0123456789+=")
model = ReasonerForCausalLM(ReasonerConfig.small(vocab_size=len(tokenizer), num_hidden_layers=2))
ids = torch.tensor([tokenizer("1+2=3").input_ids])
model(ids, labels=ids).loss.backward()
balance(model)
save(model, tokenizer, sys.argv[1])
print(load(sys.argv[1]).generate(ids, max_new_tokens=2, do_sample=False).shape)
"""


def test_model_trains_saves_and_generates_with_torch_and_transformers_alone(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "checkpoint")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("torch.Size([1, 6])", "torch.Size([1, 7])")  # 6: the first new token was <eos>


def test_every_public_name_exists():
    assert all(callable(getattr(reasoner.model, name)) for name in reasoner.model.__all__)
