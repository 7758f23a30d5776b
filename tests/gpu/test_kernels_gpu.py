"""Every kernel on a real GPU against its specification, at sizes that models have. Run with `-m gpu`."""

import pytest
import torch

from reasoner import kernels
from reasoner.kernels import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def kernels_required():
    torch.manual_seed(0)
    with kernels.using("require"):
        yield


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1000, 49152, 49153])
def test_head_is_within_a_ten_thousandth_of_float64(dtype, vocabulary):
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden, weight = (
        normal(515, 576, dtype=dtype).requires_grad_(),
        (normal(vocabulary, 576) * 576**-0.5).to(dtype).requires_grad_(),
    )
    target = torch.randint(vocabulary, (515,), device="cuda")
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    results = []
    for function, h, w in ((kernels.token_logprob, hidden, weight), (reference.token_logprob, *exact)):
        logprob, entropy = function(h, w, target, 0.8)
        mix = torch.linspace(-1, 1, 515, device="cuda", dtype=logprob.dtype)
        results.append((logprob, entropy, *torch.autograd.grad((logprob * mix).sum() + 0.3 * entropy.sum(), (h, w))))
    (logprob, entropy, *gradients), (want_logprob, want_entropy, *want_gradients) = results
    assert (logprob - want_logprob).abs().max() < 1e-4 and (entropy - want_entropy).abs().max() < 2e-4
    for got, want in zip(gradients, want_gradients, strict=True):
        assert relative(got, want) < (1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("groups", "opened"), [(1, 1), (8, 4)])
@pytest.mark.parametrize("experts", [32, 256])
def test_router_chooses_as_specified(experts, groups, opened):
    logits, bias = (
        normal(4099, experts, dtype=torch.float32).requires_grad_(),
        normal(experts, dtype=torch.float32) * 0.01,
    )
    weights, ids, load = kernels.route(logits, bias, 8, groups, opened)
    want_weights, want_ids = reference.route(logits, bias, 8, groups, opened, True, 1.0)
    same = (ids == want_ids).all(1)
    assert same.float().mean() > 0.999  # the sigmoid's last bit may swap two that are equal but for it
    torch.testing.assert_close(weights[same], want_weights[same], atol=1e-5, rtol=1e-4)
    assert torch.equal(load.long(), torch.bincount(ids.flatten(), minlength=experts))
    for got, want in zip(kernels.sort_by_expert(ids, experts), reference.sort_by_expert(ids, experts), strict=True):
        assert torch.equal(got, want)


def test_norm_swiglu_and_latent_write_are_as_specified():
    x, weight, by = normal(4097, 2048).requires_grad_(), normal(2048).requires_grad_(), normal(4097, 2048)
    y = kernels.rms_norm(x, weight)
    want, rstd = reference.rms_norm(x.detach(), weight.detach(), 1e-6)
    assert relative(y, want) < 1e-3
    pairs = zip(
        torch.autograd.grad(y, (x, weight), by),
        reference.rms_norm_backward(x.detach(), weight.detach(), rstd, by),
        strict=True,
    )
    assert all(relative(got, expected) < 5e-3 for got, expected in pairs)
    assert relative(kernels.swiglu(x), reference.swiglu(x.detach())) < 1e-3
    kv, q, slots = normal(33, 576), normal(33, 16, 128)[..., 64:], torch.randperm(640, device="cuda")[:33]
    angles, cache = normal(33, 32, dtype=torch.float32), torch.zeros(10, 64, 576, dtype=torch.bfloat16, device="cuda")
    other = cache.clone()
    given = (kv, normal(512), q, angles.cos(), angles.sin(), slots)
    assert relative(kernels.write_latent(*given, cache), reference.write_latent(*given, other, 1e-6)) < 1e-3
    assert relative(cache, other) < 1e-3


@pytest.mark.parametrize(("batch", "queries", "heads"), [(1, 1, 16), (3, 2, 16), (130, 1, 9), (5, 4, 16)])
def test_decode_attends_as_specified(batch, queries, heads):
    lengths = torch.randint(queries, 1500, (batch,), device="cuda").int()
    cache, table = normal(batch * 24, 64, 576), torch.randperm(batch * 24, device="cuda").int().view(batch, 24)
    given = (normal(batch, queries, heads, 576), cache, table, lengths, 512, 576**-0.5)
    assert (
        relative(kernels.latent_decode(*given), reference.latent_decode(given[0].float(), cache.float(), *given[2:]))
        < 4e-3
    )


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "experts"), [(1, 576, 128, 32), (777, 576, 128, 32), (1024, 2048, 768, 8)]
)
def test_experts_are_the_layer_forward_and_backward(tokens, hidden, inner, experts):
    x, gate_up, down = (
        normal(tokens, hidden),
        normal(experts, 2 * inner, hidden) * hidden**-0.5,
        normal(experts, hidden, inner) * inner**-0.5,
    )
    ids, weights = torch.rand(tokens, experts, device="cuda").topk(4).indices, torch.rand(tokens, 4, device="cuda")
    by_y, results = normal(tokens, hidden), []
    order, _, ends = reference.sort_by_expert(ids, experts)
    for wide in (False, True):
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in (x, weights, gate_up, down)]
        if wide:
            y = reference.moe_experts(leaves[0], leaves[1], order, ends, leaves[2], leaves[3])
        else:
            y = kernels.moe_experts(leaves[0], leaves[1], ids, leaves[2], leaves[3])
        results.append((y, *torch.autograd.grad(y, leaves, by_y.to(y.dtype))))
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < 1.5e-2


def test_a_decode_step_can_be_captured_in_a_cuda_graph():
    batch, heads = 4, 16
    cache, table = normal(batch * 4, 64, 576), torch.randperm(batch * 4, device="cuda").int().view(batch, 4)
    q, head, seeds = normal(batch, 1, heads, 576), normal(heads * 512, 1000), torch.arange(batch, device="cuda")
    lengths = torch.full((batch,), 100, dtype=torch.int32, device="cuda")

    def step():
        attended = kernels.latent_decode(q, cache, table, lengths, 512, 576**-0.5)
        return kernels.sample(attended.flatten(1) @ head, seeds, 0.8)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token, logprob = step()
    for new_length in (100, 200):
        lengths.fill_(new_length)
        graph.replay()
        want_token, want_logprob = step()
        assert torch.equal(token, want_token) and torch.equal(logprob, want_logprob)
