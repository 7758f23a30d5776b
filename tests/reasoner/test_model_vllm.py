"""A saved checkpoint served by vLLM on the CPU, unchanged: the same log-probabilities and speculated tokens."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PREPARE = """
import os, sys
os.environ.update(VLLM_MLA_DISABLE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")
import torch
torch.set_num_threads(1)
from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer, load, save
from vllm import LLM, SamplingParams

def build(**changes):
    torch.manual_seed(0)
    tokenizer = char_tokenizer("0123456789+-= ans:")
    model = ReasonerForCausalLM(ReasonerConfig.small(vocab_size=len(tokenizer), **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter) if parameter.ndim == 1 else parameter * 4)
        for buffer in model.buffers():
            buffer.normal_(std=0.1)
    save(model, tokenizer, sys.argv[1])
    return load(sys.argv[1])

def serve(**options):
    cure = {"custom_ops": ["all", "-rotary_embedding"]}  # vLLM 0.32 rotates MLA's 3-D tensors wrongly on the CPU
    return LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, block_size=32,
               compilation_config=cure, **options)

prompts = [torch.randint(3, 22, (length,)).tolist() for length in (5, 40, 17)]
requests = [{"prompt_token_ids": prompt} for prompt in prompts]
"""

LOGPROBS = """
model, engine = build(**CHANGES), serve()
sampling = SamplingParams(temperature=1.0, max_tokens=24, logprobs=0, prompt_logprobs=0, seed=1, ignore_eos=True)
worst = {"prefill": 0.0, "decode": 0.0}
for prompt, request in zip(prompts, engine.generate(requests, sampling)):
    sampled = list(request.outputs[0].token_ids)
    ids = torch.tensor([prompt + sampled])
    with torch.no_grad():
        logits = model(ids).logits
    ours = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert ours.std() > 0.3, "the model says nothing, so agreement shows nothing"
    theirs = [entry[token].logprob for entry, token in zip(request.prompt_logprobs[1:], prompt[1:])]
    theirs += [entry[token].logprob for entry, token in zip(request.outputs[0].logprobs, sampled)]
    difference = (ours - torch.tensor(theirs)).abs()
    worst["prefill"] = max(worst["prefill"], difference[: len(prompt) - 1].max().item())
    worst["decode"] = max(worst["decode"], difference[len(prompt) - 1 :].max().item())
print("worst", worst)
assert max(worst.values()) < 1e-4, worst
"""

SPECULATION = """
build(num_mtp_layers=1)
greedy = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
plain = [list(r.outputs[0].token_ids) for r in serve().generate(requests, greedy)]
engine = serve(speculative_config={"method": "mtp", "num_speculative_tokens": 1}, disable_log_stats=False)
drafted = [list(r.outputs[0].token_ids) for r in engine.generate(requests, greedy)]
print({m.name: m.value for m in engine.get_metrics() if "spec_decode" in m.name and hasattr(m, "value")})
assert plain == drafted, (plain, drafted)
"""


def run(script: str, folder: Path) -> str:
    pytest.importorskip("vllm")
    command = [sys.executable, "-c", PREPARE + script, str(folder / "checkpoint")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


SHAPES = {
    "small": {},
    "groups, query latent": dict(
        n_group=4, topk_group=2, q_lora_rank=48, routed_scaling_factor=2.5, n_shared_experts=2
    ),
    "every layer has experts": dict(first_k_dense_replace=0, norm_topk_prob=False),
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_vllm_gives_the_same_logprobs(changes, tmp_path):
    print(run(f"CHANGES = {changes!r}" + LOGPROBS, tmp_path)[-200:])


def test_vllm_speculates_with_the_mtp_module_and_says_the_same_tokens(tmp_path):
    print(run(SPECULATION, tmp_path)[-400:])
