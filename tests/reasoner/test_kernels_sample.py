"""Drawing tokens: the kernel in the emulator against the specification, and that against the distribution."""

import math

import pytest
import torch

from reasoner.kernels import reference, sample, using


def rows(count, vocabulary, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    seeds = torch.randint(0, 2**62, (count,), generator=generator) * 2 + 1
    return (torch.randn(count, vocabulary, generator=generator) * 2).to(dtype), seeds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (5, 300), (3, 2049)])
def test_kernel_draws_the_tokens_of_the_specification(shape, temperature, dtype, thread_orders):
    logits, seeds = rows(*shape, dtype)
    want = reference.sample(logits, seeds, temperature)
    for _ in thread_orders("sample"):
        with using("emulate"):
            token, logprob = sample(logits, seeds, temperature)
        assert torch.equal(token, want[0])
        torch.testing.assert_close(logprob, want[1], atol=2e-5, rtol=1e-5)


def test_draws_follow_the_distribution():
    p = torch.tensor([0.5, 0.25, 0.2, 0.04, 0.01])
    count = 20000
    token, _ = sample(p.log().expand(count, -1), torch.arange(count) * 7919 + (torch.arange(count) << 33))
    chi_square = ((torch.bincount(token, minlength=5) - p * count) ** 2 / (p * count)).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: p = 0.001


def test_draws_of_neighbouring_seeds_are_independent():
    count = 20000
    token, _ = sample(torch.zeros(count, 2), torch.arange(count))
    same = (token[1:] == token[:-1]).float().mean()
    assert abs(same - 0.5) < 4 * 0.5 / math.sqrt(count)


@pytest.mark.parametrize("mode", ["reference", "emulate"])
def test_entry_left_out_is_never_drawn(mode):
    logits = torch.full((64, 5), -math.inf)
    logits[:, 3] = 0.0
    with using(mode):
        token, logprob = sample(logits, torch.arange(64))
    assert (token == 3).all() and (logprob == 0).all()


@pytest.mark.parametrize("mode", ["reference", "emulate"])
def test_greedy_takes_the_first_of_equals(mode):
    with using(mode):
        token, logprob = sample(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([5]), 0.0)
    assert token.item() == 1 and logprob.item() == pytest.approx(1 - math.log(1 + 2 * math.e), abs=1e-5)


@pytest.mark.parametrize("mode", ["reference", "emulate"])
def test_row_of_nan_gives_a_valid_token_and_nan(mode):
    logits = torch.zeros(2, 4)
    logits[0] = math.nan
    with using(mode):
        token, logprob = sample(logits, torch.tensor([1, 2]))
    assert token[0] == 0 and logprob[0].isnan() and logprob[1].isfinite()


def test_op_keeps_the_rules_of_torch_library():
    torch.library.opcheck(torch.ops.reasoner.sample.default, (*rows(3, 9), 1.0))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="one seed per row"):
        sample(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature=-1"):
        sample(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), -1.0)
