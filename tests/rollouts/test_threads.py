"""A small model takes one thread of torch's, and gives back what it found."""

import threading

import pytest
import torch
from torch import nn

from rollouts.threads import SMALL, threads_for


class Sized(nn.Module):
    def __init__(self, parameters: int, device: str = "cpu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device=device).expand(parameters))


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("model", "threads"),
    [(Sized(SMALL), 1), (Sized(SMALL + 1), 2), (Sized(10, "meta"), 2)],
    ids=["small", "big", "away"],
)
def test_a_small_model_on_the_cpu_takes_one_thread_until_it_is_done_or_fails(model, threads):
    with pytest.raises(KeyError), threads_for(model):
        assert torch.get_num_threads() == threads
        raise KeyError
    assert torch.get_num_threads() == 2


def test_engines_that_overlap_leave_what_the_first_of_them_found():
    inside, done, seen = threading.Event(), threading.Event(), []

    def first():
        with threads_for(Sized(10)):
            inside.set()
            done.wait(10)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with threads_for(Sized(10)):
        done.set()
        thread.join()
    assert [*seen, torch.get_num_threads()] == [2, 2]
