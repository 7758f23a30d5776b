"""How many of torch's threads an engine in this process takes.

The operations of a small model are over before a second thread has woken; and where another thread of the process (the
learner's) has a team of OpenMP threads too, the teams are more than the cores, and each waits for the kernel to wake
it, operation by operation: four times as long on two cores. Knows nothing of engines; `local_engine` and
`reasoner.paged_engine` run their passes inside.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SMALL = 20_000_000  # parameters

_lock, _inside = threading.Lock(), 0
_before = torch.get_num_threads()  # asked for here also because a thread takes what holds when it first asks


@contextmanager
def threads_for(model: nn.Module) -> Iterator[None]:
    """One thread while a small model runs on the CPU, all of torch's else and afterwards."""
    global _inside, _before
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > SMALL or any(p.device.type != "cpu" for p in model.parameters()):
        yield
        return
    with _lock:  # engines run side by side: what the first found is what all leave behind
        if not _inside:
            _before = torch.get_num_threads()
        _inside += 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            torch.set_num_threads(_before)
