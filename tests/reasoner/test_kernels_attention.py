"""Attention of training and prefill against its specification: values, gradients, ragged and continued sequences."""

import pytest
import torch

from reasoner.kernels import attention, reference

HEADS = [(192, 128), (128, 128), (64, 32), (40, 64), (7, 3)]  # width of a key, of a value


def inputs(key, value, sequences=2, queries=9, keys=None, heads=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((queries, key), (keys or queries, key), (keys or queries, value))
    return [
        torch.randn(sequences, length, heads, width, generator=generator, dtype=dtype).requires_grad_()
        for length, width in shapes
    ]


@pytest.mark.parametrize(("key", "value"), HEADS)
def test_values_and_gradients_are_those_of_the_specification(key, value):
    given = inputs(key, value)
    by = torch.randn(2, 9, 3, value)
    got, want = (way(*given, key**-0.5) for way in (attention, reference.attention))
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    pairs = zip(torch.autograd.grad(got, given, by), torch.autograd.grad(want, given, by), strict=True)
    for gradient, expected in pairs:
        torch.testing.assert_close(gradient, expected, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize(("key", "value"), [(6, 4), (4, 6)])
def test_gradients_are_those_of_finite_differences(key, value):
    torch.autograd.gradcheck(lambda *g: attention(*g, 0.4), inputs(key, value, queries=4, dtype=torch.float64))


@pytest.mark.parametrize(("key", "value"), [(192, 128), (128, 128)])
def test_packed_sequences_are_as_each_alone_forward_and_backward(key, value):
    given, lengths = inputs(key, value, sequences=4), [9, 1, 5, 8]
    by = torch.randn(4, 9, 3, value)
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    together = torch.autograd.grad(attention(*given, 0.1)[real], given, by[real])
    for row, length in enumerate(lengths):
        alone = [x[row : row + 1, :length].detach().requires_grad_() for x in given]
        out = attention(*alone, 0.1)
        torch.testing.assert_close(attention(*given, 0.1)[row, :length], out[0], atol=2e-6, rtol=1e-5)
        for got, want in zip(together, torch.autograd.grad(out, alone, by[row : row + 1, :length]), strict=True):
            torch.testing.assert_close(got[row, :length], want[0], atol=5e-6, rtol=1e-4)
            assert got[row, length:].abs().sum() == 0


def test_queries_that_go_on_from_earlier_keys_are_the_last_rows_of_the_whole():
    q, k, v = inputs(32, 24, queries=12)
    whole = attention(q, k, v, 0.2)
    seen = torch.arange(12) <= 8 + torch.arange(4)[:, None]
    torch.testing.assert_close(
        attention(q[:, 8:], k, v, 0.2, seen.expand(2, 4, 12)), whole[:, 8:], atol=2e-6, rtol=1e-5
    )


def test_shapes_that_do_not_belong_together_are_named():
    q, k, v = inputs(8, 4)
    with pytest.raises(ValueError, match="queries of 9 keys"):
        attention(q[:, :3], k, v, 1.0)
    with pytest.raises(ValueError, match=r"\(2, 9, 3, 8\), k \(2, 9, 3, 8\), v \(2, 8, 3, 4\)"):
        attention(q, k, v[:, 1:], 1.0)
