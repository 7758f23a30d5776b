"""Every kernel in the emulator, forward and backward, at random shapes and under four thread orders; and fed with
numbers that are none. More shapes with `-m slow`."""

import random
from itertools import count

import pytest
import torch

from reasoner import kernels
from reasoner.kernels import head, reference, using

BF16 = torch.bfloat16


class Draw:
    """Shapes and tensors from one seed. Edges come often: a size is 1 or its largest in two cases of five."""

    def __init__(self, seed):
        self._sizes, self._tensors = random.Random(seed), torch.Generator().manual_seed(seed)

    def size(self, most, step=1):
        edge = self._sizes.random()
        units = most // step
        return step * (1 if edge < 0.2 else units if edge < 0.4 else self._sizes.randint(1, units))

    def choice(self, values):
        return self._sizes.choice(values)

    def normal(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, generator=self._tensors).to(dtype)

    def below(self, most, *shape):
        return torch.randint(most, shape, generator=self._tensors)

    def ranks(self, rows, columns):
        return torch.rand(rows, columns, generator=self._tensors).argsort(-1)


# Each gives (the op, its specification, leaves that get gradients, tolerance). Both functions take the leaves.


def rl_head(draw):
    tokens, width, vocabulary = draw.size(17), draw.size(24), draw.size(2100)
    dtype = draw.choice([torch.float32, BF16])
    leaves = [draw.normal(tokens, width, dtype=dtype), draw.normal(vocabulary, width, dtype=dtype)]
    target, heat = draw.below(vocabulary, tokens) - (draw.below(4, tokens) == 0) * vocabulary, draw.choice([0.5, 1.0])
    op = lambda h, w: torch.stack(kernels.token_logprob(h, w, target, heat))  # noqa: E731
    return op, lambda h, w: torch.stack(reference.token_logprob(h, w, target, heat)), leaves, 1e-4


def router(draw):
    groups = draw.choice([1, 1, 2, 4])
    experts, opened = draw.size(130, groups), draw.size(groups)
    chosen = draw.size(min(32, experts // groups * opened))
    bias, rest = draw.normal(experts) * 0.1, (chosen, groups, opened, draw.choice([True, False]), 2.5)
    leaves = [draw.normal(draw.size(40), experts)]
    return lambda x: kernels.route(x, bias, *rest)[0], lambda x: reference.route(x, bias, *rest)[0], leaves, 1e-4


def norm(draw):
    width, dtype = draw.size(600), draw.choice([torch.float32, BF16])
    leaves = [draw.normal(draw.size(300), width, dtype=dtype), draw.normal(width, dtype=dtype)]
    return kernels.rms_norm, lambda x, w: w * (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()), leaves, 1e-4


def gate(draw):
    leaves = [draw.normal(draw.size(150), 2 * draw.size(90), dtype=draw.choice([torch.float32, BF16]))]
    return kernels.swiglu, reference.swiglu, leaves, 1e-4


def experts(draw):
    number, hidden, inner = draw.size(5), draw.size(72, 8), draw.size(40, 8)
    tokens, chosen = draw.size(12), draw.size(number)
    ids = draw.ranks(tokens, number)[:, :chosen]
    order, _, ends = reference.sort_by_expert(ids, number)
    leaves = [
        draw.normal(tokens, hidden, dtype=BF16),
        draw.normal(tokens, chosen).sigmoid(),
        (draw.normal(number, 2 * inner, hidden) * hidden**-0.5).to(BF16),
        (draw.normal(number, hidden, inner) * inner**-0.5).to(BF16),
    ]
    op = lambda x, w, g, d: kernels.moe_experts(x, w, ids, g, d)  # noqa: E731
    return op, lambda x, w, g, d: reference.moe_experts(x, w, order, ends, g, d), leaves, 1e-4


def decode(draw):
    queries, page = draw.size(4), draw.choice([8, 16, 64])
    heads, batch, rotary = draw.size(64 // queries // 4), draw.size(3), draw.choice([32, 64])
    lengths = [draw.size(90) - draw.choice([0, 0, 1]) for _ in range(batch)]
    each = max(1, -(-max(lengths) // page))
    table = draw.ranks(1, batch * each)[0].view(batch, each).int()
    given = (table, torch.tensor(lengths).int(), 128, 0.1)
    cache = draw.normal(batch * each, page, 128 + rotary, dtype=BF16)
    leaves = [draw.normal(batch, queries, heads, 128 + rotary, dtype=BF16), cache]
    run = lambda way: lambda q, c: way(q, c, *given)  # noqa: E731
    return run(kernels.latent_decode), run(reference.latent_decode), leaves, 1e-4


def latent_write(draw):
    tokens, heads, latent, rotary = draw.size(20), draw.size(5), draw.size(140), draw.size(32, 2)
    dtype, slots = draw.choice([torch.float32, BF16]), draw.ranks(1, 3 * tokens)[0, :tokens] - draw.choice([0, 1])
    angles = draw.normal(tokens, rotary // 2)
    weight, blank = draw.normal(latent, dtype=dtype), torch.zeros(3, tokens, latent + rotary)
    leaves = [draw.normal(tokens, latent + rotary, dtype=dtype), draw.normal(tokens, heads, rotary, dtype=dtype)]

    def run(way):
        def written(kv, q):
            cache = blank.to(kv.dtype)
            turned = way(kv, weight.to(kv.dtype), q, angles.cos(), angles.sin(), slots, cache, 1e-6)
            return torch.cat((turned.flatten(), cache.flatten()))

        return written

    return run(kernels.write_latent), run(reference.write_latent), leaves, 1e-4


def sampling(draw):
    rows, heat = draw.size(9), draw.choice([0.0, 0.7, 1.0])
    seeds = draw.below(2**62, rows)
    leaves = [draw.normal(rows, draw.size(700)).to(draw.choice([torch.float32, BF16]))]
    run = lambda way: lambda x: torch.stack([t.double() for t in way(x, seeds, heat)])  # noqa: E731
    return run(kernels.sample), run(lambda x, *rest: reference.sample(x.float(), *rest)), leaves, 1e-4


SOURCES = {
    rl_head: "head",
    router: "router",
    norm: "norm",
    gate: "swiglu",
    experts: "experts",
    decode: "decode",
    latent_write: "norm",
    sampling: "sample",
}
TRAINS = {rl_head, router, norm, gate, experts}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", {"cpu": 1})  # the floor: two chunks of the vocabulary are many


def outcome(function, leaves, by, trains):
    leaves = [leaf.detach().requires_grad_(trains) for leaf in leaves]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, by(out)) if trains else ()
    return [out.detach(), *gradients]


def check(make, seed, orders):
    op, specification, leaves, tolerance = make(Draw(seed))
    trains = make in TRAINS
    by = lambda out: torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)  # noqa: E731
    want = outcome(specification, [leaf.double() for leaf in leaves], by, trains)
    in_its_type = outcome(specification, leaves, by, trains)  # what rounding alone costs
    for _ in orders:
        with using("emulate"):
            got = outcome(op, leaves, by, trains)
        for a, b, rounded in zip(got, want, in_its_type, strict=True):
            half = a.dtype == BF16 or BF16 in {leaf.dtype for leaf in leaves}
            allowed = (2**-6 if half else tolerance) * max(b.abs().max().item(), 1e-2)
            allowed = max(allowed, 3 * (rounded.double() - b.double()).abs().max().item())
            worst = (a.double() - b.double()).abs().max().item()
            assert worst <= allowed, f"off by {worst}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_kernel_is_its_specification_at_random_shapes(make, seed, thread_orders):
    check(make, seed, thread_orders(SOURCES[make]))


@pytest.mark.slow
@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_kernel_is_its_specification_at_many_more_shapes(make, thread_orders):
    for seed in range(100, 160):
        check(make, seed, thread_orders(SOURCES[make]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_numbers_that_are_none_hang_no_kernel_and_read_no_foreign_memory(make, bad):
    """A barrier that some threads miss, or an access out of bounds, is an error of the emulator."""
    for spoil in count(0):
        op, _, leaves, _ = make(Draw(7))
        if spoil == len(leaves):
            return
        leaves[spoil].fill_(bad)
        with using("emulate"):
            outcome(op, leaves, torch.ones_like, make in TRAINS)
