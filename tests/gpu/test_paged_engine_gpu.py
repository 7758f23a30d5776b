"""The paged engine on a real GPU: its law is the model's, with and without CUDA graphs. Run with `-m gpu`."""

import asyncio

import pytest
import torch

from reasoner import kernels
from reasoner.kernels import reference
from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer
from reasoner.paged_engine import paged_engine
from search.base import Sampling, Trajectory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = "cuda"
TOKENIZER = char_tokenizer("0123456789+-= \n")


def model(dtype):
    torch.manual_seed(0)
    sizes = dict(hidden_size=256, num_hidden_layers=3, num_attention_heads=4, kv_lora_rank=512)
    dims = dict(qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128, moe_intermediate_size=64)
    config = ReasonerConfig.small(len(TOKENIZER), **sizes, **dims)
    return ReasonerForCausalLM(config).to(DEVICE, dtype).eval()


def paths(of, rows=3, n=20):
    engine = paged_engine(of, TOKENIZER, Sampling(max_tokens=40), context=128, page=64)
    roots = [Trajectory(tuple(TOKENIZER.encode(f"{i}+{i}=")), seed=i) for i in range(rows)]

    async def everybody():
        return await asyncio.gather(*(engine.extend(root, n=n) for root in roots))

    return [path for group in asyncio.run(everybody()) for path in group]


@torch.no_grad()
def differences(of, found):
    """Of the engine's log-probabilities and one forward pass over each path."""
    for path in found:
        logits = of(torch.tensor([path.ids], device=DEVICE)).logits[0, len(path.prompt) - 1 : -1].float()
        new = torch.tensor(path.ids[len(path.prompt) :], device=DEVICE)
        got = torch.tensor([lp for step in path.steps for lp in step.logprobs], device=DEVICE)
        yield (got - logits.log_softmax(-1).gather(1, new[:, None])[:, 0]).abs()


@pytest.mark.parametrize("graphs", [True, False])
def test_log_probabilities_in_bfloat16_are_the_forward_pass_to_rounding(graphs, monkeypatch, caplog):
    if not graphs:
        monkeypatch.setattr("reasoner.paged_engine.GRAPH_SIZES", ())
    of = model(torch.bfloat16)
    with kernels.using("require"):
        difference = torch.cat(list(differences(of, paths(of))))
    assert difference.mean() < 0.06
    assert "without CUDA graphs" not in caplog.text


def test_float32_runs_on_the_references_and_is_exact():
    torch.backends.cuda.matmul.allow_tf32 = False
    of = model(torch.float32)
    assert max(d.max() for d in differences(of, paths(of))) < 1e-4


@pytest.mark.parametrize(("key", "value"), [(192, 128), (128, 128)])
def test_attention_and_its_gradients_are_those_of_the_specification(key, value):
    given = [
        torch.randn(2, 515, 4, width, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        for width in (key, key, value)
    ]
    exact = [x.detach().double().requires_grad_() for x in given]
    by = torch.randn(2, 515, 4, value, device=DEVICE, dtype=torch.bfloat16)
    got, want = kernels.attention(*given, key**-0.5), reference.attention(*exact, key**-0.5)
    pairs = zip(
        (got, *torch.autograd.grad(got, given, by)), (want, *torch.autograd.grad(want, exact, by.double())), strict=True
    )
    for one, other in pairs:
        assert (one.double() - other).norm() / other.norm() < 1e-2
