"""How much faster than transformers' DeepseekV3ForCausalLM with the same weights, in CPU seconds of one thread."""

import statistics
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer, save

pytestmark = pytest.mark.slow


@pytest.fixture
def pair(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours = ReasonerForCausalLM(ReasonerConfig.small(vocab_size=32))
    save(ours, char_tokenizer("0123456789"), tmp_path / "checkpoint")
    yield ours, AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    torch.set_num_threads(threads)


def ratio(ours, theirs, repeats: int) -> float:
    """Their seconds over ours, from alternating runs."""
    seconds = ([], [])
    for _ in range(repeats):
        for work, took in zip((ours, theirs), seconds, strict=True):
            start = time.process_time()
            work()
            took.append(time.process_time() - start)
    return statistics.median(seconds[1]) / statistics.median(seconds[0])


@pytest.mark.parametrize(("shortest", "wanted"), [(64, 1.2), (40, 1.4)], ids=["no padding", "padded"])
def test_training_step_is_faster_and_has_the_same_loss(pair, shortest, wanted):
    ids = torch.randint(3, 32, (128, 64))
    mask = (torch.arange(64) < torch.randint(shortest, 65, (128, 1))).long()
    labels = ids.masked_fill(mask == 0, -100)
    losses = {}

    def step(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def once():
            loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[model] = loss.item()

        return once

    for model in pair:
        model.train()
    faster = ratio(*(step(model) for model in pair), repeats=6)
    print(f"\ntraining step {faster:.2f} times as fast")
    assert abs(losses[pair[0]] - losses[pair[1]]) < 1e-3
    assert faster > wanted


def test_generation_is_faster(pair):
    ids = torch.randint(3, 32, (128, 20))

    def work(model):
        return lambda: model.eval().generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=True)

    faster = ratio(*(work(model) for model in pair), repeats=3)
    print(f"\ngeneration {faster:.2f} times as fast")
    assert faster > 1.5
