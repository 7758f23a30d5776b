"""Fixtures of the kernel tests."""

import pytest

from reasoner.kernels import build


@pytest.fixture
def thread_orders():
    """`for _ in thread_orders("head")`: the body runs under four thread orders of the emulator."""

    def orders(source):
        library = build.load(build.SOURCES / f"{source}.cu", build.EMULATOR)
        for seed in range(4):
            library.set_thread_order(seed)
            yield seed

    return orders
