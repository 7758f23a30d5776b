"""The RL head against its specification, through the reference path and through the kernel in the emulator."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reasoner.kernels import head, reference, token_logprob, using

SHAPES = [(1, 8, 3), (5, 16, 97), (3, 8, 1024), (7, 24, 2051), (2, 8, 4100)]  # T, H, V; chunks hold 1024 entries here


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", {"cpu": 1})  # the floor of 1024 entries: several chunks even here


def inputs(tokens, width, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), target


def with_gradients(function, hidden, weight, target, temperature=1.0):
    logprob, entropy = function(hidden, weight, target, temperature)
    mix = torch.linspace(-1, 1, len(target)).to(logprob.dtype)
    gradients = torch.autograd.grad((logprob * mix).sum() + (entropy * mix.flip(0) * 0.3).sum(), (hidden, weight))
    return logprob.detach(), entropy.detach(), *gradients


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b.to(a.dtype), atol=tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize("mode", ["reference", "emulate"])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_give_what_the_whole_logits_give(shape, mode):
    given = inputs(*shape)
    want = with_gradients(
        reference.token_logprob, *(t.detach().double().requires_grad_() for t in given[:2]), given[2], 0.7
    )
    with using(mode):
        got = with_gradients(token_logprob, *given, 0.7)
    assert_close(got, want, 2e-5)


def test_kernel_is_the_same_under_every_thread_order(thread_orders):
    given = inputs(4, 8, 1500)
    results = []
    for _ in thread_orders("head"):
        with using("emulate"):
            results.append(with_gradients(token_logprob, *given))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["reference", "emulate"])
def test_bf16_input_gives_float32_logprobs_close_to_float64(mode):
    given = inputs(6, 64, 1100, torch.bfloat16)
    want = with_gradients(reference.token_logprob, *(t.detach().double().requires_grad_() for t in given[:2]), given[2])
    with using(mode):
        got = with_gradients(token_logprob, *given)
    assert got[0].dtype == torch.float32
    assert_close(got[:2], want[:2], 2e-5)  # products of bf16 numbers are exact in float32: only sums round
    assert_close(got[2:], want[2:], 1e-2)  # dZ and the gradients are rounded to bf16
    assert got[3].dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["reference", "emulate"])
def test_row_left_out_has_neither_value_nor_gradient(mode):
    hidden, weight, target = inputs(4, 8, 50)
    target[1] = -100
    with using(mode):
        logprob, entropy = token_logprob(hidden, weight, target)
        (logprob + entropy).sum().backward()
    assert logprob[1] == entropy[1] == 0 and hidden.grad[1].abs().max() == 0
    assert hidden.grad[0].abs().max() > 0


@pytest.mark.parametrize("mode", ["reference", "emulate"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_row_stays_in_its_row(mode, bad):
    hidden, weight, target = inputs(3, 8, 50)
    with torch.no_grad():
        hidden[1, 0] = bad
    with using(mode):
        logprob, entropy = token_logprob(hidden, weight, target)
    assert logprob[[0, 2]].isfinite().all() and entropy[[0, 2]].isfinite().all()
    assert not logprob[1].isfinite() and not entropy[1].isfinite()


@pytest.mark.parametrize("mode", ["reference", "emulate"])
def test_entry_of_zero_probability_leaves_entropy_finite(mode):
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[0.0], [0.0], [-1e30]], requires_grad=True)
    with using(mode):
        logprob, entropy = token_logprob(hidden, weight, torch.tensor([0]))
        (d_hidden, d_weight) = torch.autograd.grad(logprob.sum() + entropy.sum(), (hidden, weight))
    assert logprob.item() == pytest.approx(-math.log(2)) and entropy.item() == pytest.approx(math.log(2))
    assert d_weight.isfinite().all() and d_weight[2] == 0


class Largest(TorchDispatchMode):
    """Notes the most elements any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("mode", ["reference", "emulate"])
def test_logits_are_never_whole_in_memory(mode):
    given = inputs(8, 4, 8192)
    with using(mode), Largest() as largest:
        with_gradients(token_logprob, *given)
    assert (
        largest.elements == 4 * 8192
    )  # the weight's gradient; a chunk of logits is smaller, all logits would be 8 * 8192


def test_autocast_does_not_round_the_logits():
    given = inputs(5, 16, 97)
    want = with_gradients(token_logprob, *given)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(token_logprob, *given)
    assert_close(got, want, 1e-6)


def test_hidden_and_weight_of_different_types_are_multiplied_in_the_wider():
    hidden, weight, target = inputs(4, 8, 50)
    got = with_gradients(token_logprob, hidden.detach().bfloat16().requires_grad_(), weight, target)
    want = with_gradients(token_logprob, hidden.detach().bfloat16().float().requires_grad_(), weight, target)
    assert_close(got[:2], want[:2], 1e-6)
    assert got[2].dtype == torch.bfloat16 and got[3].dtype == torch.float32


def test_target_past_the_vocabulary_is_nan_not_a_number():
    hidden, weight, _ = inputs(1, 8, 50)
    assert token_logprob(hidden, weight, torch.tensor([50]))[0].isnan()


def test_no_tokens_give_no_numbers_and_no_gradient():
    hidden, weight, target = inputs(0, 8, 50)
    logprob, entropy = token_logprob(hidden, weight, target)
    (logprob.sum() + entropy.sum()).backward()
    assert logprob.shape == (0,) and weight.grad.abs().max() == 0


def test_gradient_is_the_derivative():
    given = inputs(3, 4, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: token_logprob(h, w, given[2], 0.6), given[:2])


def test_op_keeps_the_rules_of_torch_library():
    torch.library.opcheck(torch.ops.reasoner.token_logprob.default, (*inputs(3, 8, 50), 0.9))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, w, t: (h[:, :4], w, t, 1.0), r"\(3, 4\).*\(50, 8\)"),
        (lambda h, w, t: (h, w, t[:2], 1.0), "one target per row"),
        (lambda h, w, t: (h, w, t, 0.0), "temperature=0.0"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        token_logprob(*change(*inputs(3, 8, 50)))
