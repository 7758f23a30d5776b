"""A saved checkpoint served by vLLM on the CPU, unchanged: the same log-probabilities in prefill and decoding."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# vLLM 0.32 rotates MLA's 3-D tensors wrongly on the CPU; its own PyTorch path is right.
SCRIPT = """
import os, sys
os.environ.update(VLLM_MLA_DISABLE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")
import torch
torch.set_num_threads(1)
from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer, load, save
from vllm import LLM, SamplingParams

folder = sys.argv[1]
torch.manual_seed(0)
tokenizer = char_tokenizer("0123456789+-= ans:")
model = ReasonerForCausalLM(ReasonerConfig.small(vocab_size=len(tokenizer)))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.copy_(1 + 0.2 * torch.randn_like(parameter) if parameter.ndim == 1 else parameter * 4)
    for buffer in model.buffers():
        buffer.normal_(std=0.1)
save(model, tokenizer, folder)
model = load(folder)
engine = LLM(
    folder, dtype="float32", enforce_eager=True, max_model_len=128, block_size=32,
    compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
)
prompts = [torch.randint(3, len(tokenizer), (length,)).tolist() for length in (5, 40, 17)]
sampling = SamplingParams(temperature=1.0, max_tokens=24, logprobs=0, prompt_logprobs=0, seed=1, ignore_eos=True)
worst = {"prefill": 0.0, "decode": 0.0}
for prompt, request in zip(prompts, engine.generate([{"prompt_token_ids": p} for p in prompts], sampling)):
    sampled = list(request.outputs[0].token_ids)
    ids = torch.tensor([prompt + sampled])
    with torch.no_grad():
        logits = model(ids).logits
    ours = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    theirs = [entry[token].logprob for entry, token in zip(request.prompt_logprobs[1:], prompt[1:])]
    theirs += [entry[token].logprob for entry, token in zip(request.outputs[0].logprobs, sampled)]
    difference = (ours - torch.tensor(theirs)).abs()
    worst["prefill"] = max(worst["prefill"], difference[: len(prompt) - 1].max().item())
    worst["decode"] = max(worst["decode"], difference[len(prompt) - 1 :].max().item())
    assert ours.std() > 0.3, "the model says nothing, so agreement shows nothing"
print("worst", worst)
assert max(worst.values()) < 1e-4, worst
"""


def test_vllm_gives_the_same_logprobs(tmp_path):
    pytest.importorskip("vllm")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "checkpoint")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "worst" in done.stdout
