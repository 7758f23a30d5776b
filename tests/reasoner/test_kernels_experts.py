"""The routed experts: the kernels in the emulator against the specification."""

import pytest
import torch

from reasoner.kernels import moe_experts, reference, using

CASES = [  # T, H, E, K, I
    (1, 8, 1, 1, 8),
    (5, 40, 3, 2, 24),
    (150, 16, 2, 1, 8),  # an expert with more rows than a tile of 128
    (95, 16, 3, 1, 8),  # ... and of the 32 that serve a decode step
    (7, 136, 4, 3, 72),  # more than one tile of columns, and edges in both
]


def inputs(tokens, hidden, experts, chosen, inner, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    ids = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in range(tokens)])
    weights = normal(tokens, chosen).sigmoid().requires_grad_()
    gate_up, down = normal(experts, 2 * inner, hidden) * hidden**-0.5, normal(experts, hidden, inner) * inner**-0.5
    return [t.to(dtype).requires_grad_() for t in (normal(tokens, hidden), gate_up, down)], weights, ids


def rounded(x):
    return x.bfloat16().double()


def specified(x, weights, ids, gate_up, down, by_y, rounded=rounded):
    """The layer and its gradients in float64, rounded to bf16 where the kernels store."""
    x, weights, gate_up, down, by_y = (t.detach().double() for t in (x, weights, gate_up, down, by_y))
    y, d_x, d_weights = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weights)
    d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    for t in range(len(x)):
        for k, e in enumerate(ids[t].tolist()):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            s, w = gate.sigmoid(), weights[t, k]
            act, by_act = gate * s * up, down[e].T @ by_y[t]
            y[t] += w * rounded(down[e] @ rounded(act))
            d_weights[t, k] = by_act @ act
            d_pre = rounded(torch.cat((w * by_act * up * s * (1 + gate * (1 - s)), w * by_act * gate * s)))
            d_x[t] += rounded(gate_up[e].T @ d_pre)
            d_gate_up[e] += torch.outer(d_pre, x[t])
            d_down[e] += torch.outer(by_y[t], rounded(w * act))
    return y, d_x, d_weights, d_gate_up, d_down


def run(matrices, weights, ids, by_y):
    x, gate_up, down = matrices
    y = moe_experts(x, weights, ids, gate_up, down)
    return y.detach(), *torch.autograd.grad(y, (x, weights, gate_up, down), by_y)


def assert_close(got, want, most):
    for a, b in zip(got, want, strict=True):
        # A step or two of bf16 at the largest number; and, over all numbers, far less than one.
        assert (a.double() - b).abs().max() <= most * b.abs().max(), (a.double() - b).abs().max() / b.abs().max()
        assert (a.double() - b).norm() <= 0.3 * most * b.norm() + 1e-12


@pytest.mark.parametrize("case", CASES)
def test_kernel_is_the_layer_forward_and_backward(case, thread_orders):
    matrices, weights, ids = inputs(*case)
    by_y = torch.randn(case[:2], generator=torch.Generator().manual_seed(9)).bfloat16()
    want = specified(matrices[0], weights, ids, *matrices[1:], by_y)
    for seed in thread_orders("experts"):
        if seed and case[0] > 5:
            break  # the larger cases once
        with using("emulate"):
            assert_close(run(matrices, weights, ids, by_y), want, 2**-7)


def test_reference_is_the_layer_forward_and_backward():
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2**-5)):  # in bf16 it also rounds gate and up
        matrices, weights, ids = inputs(5, 40, 3, 2, 24, dtype)
        by_y = torch.randn(5, 40).to(dtype)
        exact = (lambda x: x) if dtype == torch.float32 else rounded
        want = specified(matrices[0], weights, ids, *matrices[1:], by_y, exact)
        assert_close(run(matrices, weights, ids, by_y), want, most)


def test_expert_nobody_chose_has_zero_gradient():
    matrices, weights, ids = inputs(4, 16, 3, 1, 8)
    with using("emulate"):
        got = run(matrices, weights, torch.full_like(ids, 1), torch.ones(4, 16).bfloat16())
    for gradient in got[3:]:
        assert gradient[0].abs().max() == 0 and gradient[2].abs().max() == 0 and gradient[1].abs().max() > 0


def test_non_finite_token_spoils_its_own_row_alone():
    matrices, weights, ids = inputs(6, 16, 3, 2, 8)
    with torch.no_grad():
        matrices[0][2, 3] = float("nan")
    with using("emulate"):
        y = moe_experts(matrices[0], weights, ids, *matrices[1:])
    assert y[2].isnan().all() and y[[0, 1, 3, 4, 5]].isfinite().all()


def test_gradient_is_the_derivative():
    matrices, weights, ids = inputs(3, 4, 3, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w, g, d: moe_experts(x, w, ids, g, d),
        (matrices[0], weights.detach().double().requires_grad_(), *matrices[1:]),
    )


def test_op_keeps_the_rules_of_torch_library():
    matrices, weights, ids = inputs(5, 16, 3, 2, 8, torch.float32)
    order, _, ends = reference.sort_by_expert(ids, 3)
    torch.library.opcheck(torch.ops.reasoner.moe_experts.default, (matrices[0], weights, order, ends, *matrices[1:]))


def test_bad_sizes_are_named():
    matrices, weights, ids = inputs(2, 12, 2, 1, 8)
    with using("emulate"), pytest.raises(ValueError, match="hidden 12"):
        moe_experts(matrices[0], weights, ids, *matrices[1:])
    with pytest.raises(ValueError, match=r"\(2, 12\).*\(E, 2 I, H\)"):
        moe_experts(matrices[0], weights, ids, matrices[1][:, 1:], matrices[2])
