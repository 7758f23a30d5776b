"""RMSNorm, SwiGLU and the latent-cache write: the kernels in the emulator against the specification."""

import pytest
import torch

from reasoner.kernels import reference, rms_norm, swiglu, using, write_latent

BF16 = torch.bfloat16


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(got, want, dtype):
    if dtype == BF16:  # equal but for sums that fall on the other side of a rounding
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)
        assert (got != want).float().mean() < 0.05
    else:
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (2, 576), (300, 8), (2, 2100)])
def test_norm_kernel_is_the_specification_forward_and_backward(shape, dtype, thread_orders):
    x, weight, by = (normal(*s, dtype=dtype, seed=i).requires_grad_() for i, s in enumerate((shape, shape[1:], shape)))
    want = reference.rms_norm(x.detach(), weight.detach(), 1e-6)
    want_grads = reference.rms_norm_backward(x.detach(), weight.detach(), want[1], by.detach())
    for _ in thread_orders("norm"):
        with using("emulate"):
            y = rms_norm(x, weight, 1e-6)
            grads = torch.autograd.grad(y, (x, weight), by.detach())
        for got, expected in zip((y.detach(), *grads), (want[0], *want_grads), strict=True):
            same(got, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (5, 64), (130, 32)])
def test_swiglu_kernel_is_the_specification_forward_and_backward(shape, dtype, thread_orders):
    x, by = normal(*shape, dtype=dtype).requires_grad_(), normal(shape[0], shape[1] // 2, dtype=dtype, seed=1)
    for _ in thread_orders("swiglu"):
        with using("emulate"):
            y = swiglu(x)
            (grad,) = torch.autograd.grad(y, x, by)
        same(y.detach(), reference.swiglu(x.detach()), dtype)
        same(grad, reference.swiglu_backward(x.detach(), by), dtype)


def test_swiglu_of_large_gates_stays_finite():
    with using("emulate"):
        assert swiglu(torch.tensor([[200.0, -200.0, 1.0, 1.0]])).tolist() == [[200.0, 0.0]]


def latent_inputs(tokens, heads, latent, rotary, dtype):
    angles = normal(tokens, rotary // 2, seed=5) * 3
    q = normal(tokens, heads, latent + rotary, dtype=dtype, seed=6)[..., latent:]  # a view with gaps between its rows
    slots = torch.randperm(3 * tokens, generator=torch.Generator().manual_seed(7))[:tokens]
    slots[0] = -1
    cache = normal(3, tokens, latent + rotary, dtype=dtype, seed=8)
    return (
        normal(tokens, latent + rotary, dtype=dtype),
        normal(latent, dtype=dtype),
        q,
        angles.cos(),
        angles.sin(),
        slots,
        cache,
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (4, 3, 24, 6), (2, 4, 512, 64)])
def test_latent_is_written_as_specified_and_nothing_else(shape, dtype, thread_orders):
    *given, cache = latent_inputs(*shape, dtype)
    want = cache.clone()
    want_q = reference.write_latent(*given, want, 1e-6)
    for _ in thread_orders("norm"):
        got = cache.clone()
        with using("emulate"):
            q = write_latent(*given, got, 1e-6)
        same(q, want_q, dtype)
        same(got, want, dtype)
        untouched = torch.ones(cache.flatten(0, 1).shape[0], dtype=torch.bool).index_fill(
            0, given[5][given[5] >= 0], False
        )
        assert torch.equal(got.flatten(0, 1)[untouched], cache.flatten(0, 1)[untouched])


def test_norm_and_swiglu_gradients_are_derivatives():
    x, weight = normal(3, 6).double().requires_grad_(), normal(6).double().requires_grad_()
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_norm_is_bit_equal_to_transformers_in_bf16():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    module = DeepseekV3RMSNorm(64, 1e-6).to(BF16)
    module.weight.data = normal(64, dtype=BF16, seed=1)
    x = normal(9, 64, dtype=BF16)
    assert torch.equal(rms_norm(x, module.weight), module(x))
    with using("emulate"):
        assert (rms_norm(x, module.weight) != module(x)).sum() <= 2  # the sum of squares may round differently


def test_ops_keep_the_rules_of_torch_library():
    x = normal(3, 6).requires_grad_()
    torch.library.opcheck(torch.ops.reasoner.rms_norm.default, (x, normal(6).requires_grad_(), 1e-6))
    torch.library.opcheck(torch.ops.reasoner.swiglu.default, (x,))
    torch.library.opcheck(torch.ops.reasoner.write_latent.default, (*latent_inputs(4, 3, 24, 6, torch.float32), 1e-6))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: rms_norm(torch.zeros(2, 4), torch.zeros(5)), r"\(2, 4\).*\(5,\)"),
        (lambda: swiglu(torch.zeros(2, 5)), r"\(2, 5\).*even"),
        (
            lambda: write_latent(*(torch.zeros(s) for s in ((2, 9), (4,), (2, 1, 4), (2, 2), (2, 2), (2,), (3, 9)))),
            "4 latent .* 4 rotary",
        ),
    ],
)
def test_bad_shapes_are_named(run, words):
    with pytest.raises(ValueError, match=words):
        run()
