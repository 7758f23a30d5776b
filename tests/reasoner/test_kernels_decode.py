"""MLA decode: the kernel in the emulator against the specification."""

import ctypes

import pytest
import torch

from reasoner.kernels import build, latent_decode, reference, using
from reasoner.kernels.decode import splits_for

CASES = [  # lengths, queries, heads, latent, rotary, page
    ([1], 1, 1, 128, 32, 16),
    ([70, 3, 64], 1, 3, 128, 32, 16),
    ([65, 2], 2, 9, 128, 64, 32),
    ([40, 33], 4, 12, 128, 32, 8),
    ([90], 2, 5, 256, 32, 64),
]


def inputs(lengths, queries, heads, latent, rotary, page, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pages_each = max(1, -(-max(lengths) // page))
    pages = len(lengths) * pages_each + 2
    cache = torch.randn(pages, page, latent + rotary, generator=generator).bfloat16()
    table = torch.randperm(pages, generator=generator)[: len(lengths) * pages_each].view(len(lengths), -1).int()
    place = torch.arange(pages_each * page)
    for row, length in enumerate(lengths):  # what lies behind a sequence must not matter
        behind = place[place >= length]
        cache[table[row, behind // page].long(), behind % page] = float("nan")
    q = torch.randn(len(lengths), queries, heads, latent + rotary, generator=generator).bfloat16()
    return q, cache, table, torch.tensor(lengths).int(), latent, (latent + rotary) ** -0.5


def exact(q, cache, *rest):
    return reference.latent_decode(q.double(), cache.double(), *rest)


def assert_rounded(got, want):
    """`got` is `want` rounded to bf16, but for the few that lie on the edge between two numbers."""
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=2**-8)
    assert (got != want.bfloat16()).double().mean() < 0.03


@pytest.mark.parametrize("case", CASES)
def test_kernel_attends_as_specified(case, thread_orders):
    given = inputs(*case)
    want = exact(*given)
    for seed in thread_orders("decode"):
        if seed and len(case[0]) > 1 and case[2] > 3:
            break  # the larger cases once: a tile costs milliseconds here
        with using("emulate"):
            assert_rounded(latent_decode(*given), want)


def test_kernel_attends_at_the_size_of_the_public_models():
    given = inputs([67], 2, 16, 512, 64, 64)
    with using("emulate"):
        assert_rounded(latent_decode(*given), exact(*given))


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits_change_nothing(splits, monkeypatch):
    monkeypatch.setattr("reasoner.kernels.decode.splits_for", lambda *_: splits)
    given = inputs([150, 0, 64, 1], 1, 2, 128, 32, 32)
    with using("emulate"):
        got = latent_decode(*given)
    assert_rounded(got, exact(*given))
    assert got[1].abs().max() == 0


@pytest.mark.parametrize(("queries", "splits"), [(1, 1), (2, 1), (2, 3)])
def test_every_cached_row_is_read_once_whatever_the_queries(queries, splits, monkeypatch):
    monkeypatch.setattr("reasoner.kernels.decode.splits_for", lambda *_: splits)
    lengths, heads, width = [150, 64, 9], 3, 160
    given = inputs(lengths, queries, heads, 128, 32, 32)
    library = build.load(build.SOURCES / "decode.cu", build.EMULATOR)
    library.take_copied_bytes.restype = ctypes.c_longlong
    library.take_copied_bytes()
    with using("emulate"):
        latent_decode(*given)
    of_queries = len(lengths) * splits * queries * heads
    assert library.take_copied_bytes() == 2 * width * (sum(lengths) + of_queries)


def test_later_query_sees_one_token_more():
    q, cache, table, lengths, latent, scale = inputs([20], 2, 2, 128, 32, 32)
    both = latent_decode(q, cache, table, lengths, latent, scale)
    torch.testing.assert_close(both[:, :1], latent_decode(q[:, :1], cache, table, lengths - 1, latent, scale))
    torch.testing.assert_close(both[:, 1:], latent_decode(q[:, 1:], cache, table, lengths, latent, scale))


def test_non_finite_row_spoils_its_sequence_alone():
    q, cache, table, lengths, latent, scale = inputs([20, 20], 1, 2, 128, 32, 32)
    cache[table[0, 0], 3] = float("inf")
    with using("emulate"):
        got = latent_decode(q, cache, table, lengths, latent, scale)
    assert got[0].isnan().any() and got[1].isfinite().all()


@pytest.mark.parametrize(
    ("batch", "tokens", "splits"), [(128, 4096, 1), (64, 4096, 2), (1, 64, 1), (1, 65, 2), (1, 1 << 20, 64)]
)
def test_splits_fill_the_device_and_no_more(batch, tokens, splits):
    assert splits_for(batch, tokens) == splits


def test_op_keeps_the_rules_of_torch_library():
    torch.library.opcheck(torch.ops.reasoner.latent_decode.default, inputs([20, 3], 2, 2, 128, 32, 16))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (([9], 1, 1, 64, 32, 8), "latent 64"),
        (([9], 4, 17, 128, 32, 8), "17 heads"),
        (([9], 1, 1, 128, 16, 8), "rotary 16"),
    ],
)
def test_size_the_kernel_does_not_take_is_named(case, words):
    with using("emulate"), pytest.raises(ValueError, match=words):
        latent_decode(*inputs(*case))
