"""A batch shared by two workers of Ray Train gives the gradients that one process gives."""

import copy

import pytest
import torch

from reasoner.config import Learner
from reasoner.credit import Sample
from reasoner.data_parallel import learn_together, share
from reasoner.learner import learn
from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer
from rollouts.cluster import cluster
from rollouts.host import ClusterError


def batch(seed: int, count: int = 7) -> list[Sample]:
    noise = torch.Generator().manual_seed(seed)

    def row(length: int) -> Sample:
        ids = torch.randint(3, 15, (length,), generator=noise).tolist()
        advantages = torch.randn(length, generator=noise).tolist()
        mask = [i >= 4 for i in range(length)]
        logprobs = [-2.5 * m for m in mask]
        return Sample(
            tuple(ids), tuple(mask), tuple(logprobs), tuple(a * m for a, m in zip(advantages, mask, strict=True))
        )

    return [row(8 + i) for i in range(count)]


def test_every_sample_is_in_one_share():
    samples = batch(0)
    assert sorted(map(str, share(samples, 0, 2) + share(samples, 1, 2))) == sorted(map(str, samples))
    with pytest.raises(ValueError, match="batch of 7 samples is too small for learner.workers = 8"):
        share(samples, 0, 8)


@pytest.mark.slow
def test_two_workers_learn_what_one_learns(tmp_path):
    tokenizer = char_tokenizer("0123456789+-= :\nAnswer")
    torch.manual_seed(0)
    start = ReasonerForCausalLM(ReasonerConfig.small(len(tokenizer), num_hidden_layers=2))
    options = dict(steps=3, seed=0, temperature=1.0, max_completion=32, folder=tmp_path)

    def run(how, workers):
        model, seen, states = copy.deepcopy(start), [], []

        def loop(snapshot):
            for step in range(3):
                seen.append((yield batch(step)))
                states.append(snapshot()["updates"])

        how(model, tokenizer, loop, Learner(lr=1e-3, workers=workers), **options)
        return model, seen, states

    alone, metrics, _ = run(learn, 1)
    with cluster("local"):
        together, shared, states = run(learn_together, 2)
        with pytest.raises(ClusterError, match="learner.workers = 99 needs 1 CPU each"):
            run(learn_together, 99)
    assert states == [1, 2, 3]
    assert shared[0] == pytest.approx(metrics[0], rel=1e-5)  # the same loss and gradient from the same weights
    for one, two in zip(metrics, shared, strict=True):  # Adam's first steps make much of rounding
        assert two == pytest.approx(one, rel=0.01, abs=1e-4)

    def gap(a, b):
        return sum(((x - y) ** 2).sum() for x, y in zip(a.parameters(), b.parameters(), strict=True)) ** 0.5

    assert gap(together, alone) < 0.1 * gap(alone, start)
