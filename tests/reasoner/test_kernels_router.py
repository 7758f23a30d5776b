"""Router and sort by expert: the kernels in the emulator against the specification."""

import pytest
import torch

from reasoner.kernels import reference, route, sort_by_expert, using

CASES = [  # T, E, chosen, groups, open groups
    (1, 1, 1, 1, 1),
    (5, 6, 2, 1, 1),
    (9, 32, 8, 4, 2),
    (19, 4, 2, 4, 2),  # groups of one
    (17, 40, 3, 5, 2),
    (3, 256, 8, 8, 4),
    (2, 300, 32, 1, 1),
]


def logits_and_bias(tokens, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator).requires_grad_(), torch.randn(
        experts, generator=generator
    ) * 0.1


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_kernel_routes_as_specified(case, normalise, thread_orders):
    tokens, experts, chosen, groups, opened = case
    logits, bias = logits_and_bias(tokens, experts)
    mix = torch.randn(tokens, chosen)
    want = reference.route(logits, bias, chosen, groups, opened, normalise, 2.5)
    (want_grad,) = torch.autograd.grad((want[0] * mix).sum(), logits)
    for _ in thread_orders("router"):
        with using("emulate"):
            weights, ids, load = route(logits, bias, chosen, groups, opened, normalise, 2.5)
            (grad,) = torch.autograd.grad((weights * mix).sum(), logits)
        assert torch.equal(ids, want[1])
        assert load.tolist() == torch.bincount(ids.flatten(), minlength=experts).tolist()
        torch.testing.assert_close(weights, want[0])
        torch.testing.assert_close(grad, want_grad, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["reference", "emulate"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_scores_still_give_valid_distinct_experts(mode, bad):
    with using(mode):
        _, ids, _ = route(torch.full((2, 8), bad), torch.zeros(8), 3, 4, 2)
    assert ids.tolist() == [[0, 1, 2]] * 2


def test_nan_expert_is_chosen_last():
    logits = torch.zeros(1, 4)
    logits[0, 1] = float("nan")
    for mode in ("reference", "emulate"):
        with using(mode):
            assert route(logits, torch.zeros(4), 3)[1].tolist() == [[0, 2, 3]]


def test_bias_chooses_but_does_not_count():
    logits = torch.zeros(1, 4)
    weights, ids, _ = route(logits, torch.tensor([0.0, 0.0, 0.0, 5.0]), 2)
    assert ids.tolist() == [[3, 0]] and weights.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(("tokens", "chosen", "experts"), [(1, 1, 1), (7, 2, 5), (100, 3, 8), (300, 2, 4)])
def test_sort_is_stable_and_invertible(tokens, chosen, experts, thread_orders):
    ids = torch.randint(experts, (tokens, chosen), generator=torch.Generator().manual_seed(1))
    want = reference.sort_by_expert(ids, experts)
    assert torch.equal(want[0][want[1].long()], torch.arange(tokens * chosen, dtype=torch.int32))
    for _ in thread_orders("router"):
        with using("emulate"):
            for got, expected in zip(sort_by_expert(ids, experts), want, strict=True):
                assert torch.equal(got, expected)


def test_expert_nobody_chose_ends_where_the_one_before_ends():
    with using("emulate"):
        assert sort_by_expert(torch.tensor([[0], [3]]), 4)[2].tolist() == [1, 1, 1, 2]


def test_gradient_of_the_weights_is_their_derivative():
    logits, bias = logits_and_bias(3, 8)
    ids = reference.route(logits, bias, 2, 1, 1, True, 1.5)[1]
    logits = logits.detach().double().requires_grad_()

    def weights(x):
        chosen = x.sigmoid().gather(1, ids)
        return chosen / chosen.sum(-1, keepdim=True) * 1.5

    mix = torch.randn(3, 2, dtype=torch.float64)
    (want,) = torch.autograd.grad((weights(logits) * mix).sum(), logits)
    torch.testing.assert_close(reference.route_backward(logits, ids, mix, True, 1.5), want)


def test_ops_keep_the_rules_of_torch_library():
    torch.library.opcheck(torch.ops.reasoner.route.default, (*logits_and_bias(5, 8), 2, 4, 2, True, 1.0))
    torch.library.opcheck(torch.ops.reasoner.sort_by_expert.default, (torch.tensor([[0, 2], [1, 2]]), 3))


def test_choice_that_the_groups_cannot_hold_is_named():
    with pytest.raises(ValueError, match="5 of 8 experts in 1 of 2 groups"):
        route(torch.zeros(1, 8), torch.zeros(8), 5, 2, 1)


def test_too_many_experts_for_the_kernel_are_named():
    with using("emulate"), pytest.raises(ValueError, match="600 experts"):
        route(torch.zeros(1, 600), torch.zeros(600), 2)
