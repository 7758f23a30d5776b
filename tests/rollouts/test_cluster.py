"""The real thing once: Ray, a vLLM engine in an actor, a weight push in flight, and what must hold afterwards."""

import asyncio
import os
import random
import signal
import time
from dataclasses import replace
from itertools import product

import pytest
import torch

from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer, export, load, save
from rollouts.cluster import Engines, cluster
from rollouts.request import Placement
from search.base import STEP, TOKENS, Sampling, Step, Trajectory, derive

PLACEMENT = Placement(max_model_len=256, max_num_seqs=64, kv_cache_gib=0.25)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    tokenizer = char_tokenizer("0123456789+-= :\nAnswer")
    torch.manual_seed(0)
    model = ReasonerForCausalLM(ReasonerConfig.small(len(tokenizer), num_hidden_layers=2))
    with torch.no_grad():  # far enough from uniform that another model's log-probabilities are told apart
        model.lm_head.weight.mul_(20)
    folder = tmp_path_factory.mktemp("checkpoint") / "base"
    save(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def engines(checkpoint):
    with cluster("local"):
        engines = Engines.start(checkpoint, PLACEMENT, Sampling(max_tokens=48), seed=0)
        yield engines
        engines.stop()


def roots(count: int, seed: int = 0) -> list[Trajectory]:
    return [Trajectory((3 + i % 8, 5, 4, 9), seed=derive(seed, i)) for i in range(count)]


def sample(engines: Engines, paths: list[Trajectory], **options) -> list[Trajectory]:
    async def all_of_them():
        return await asyncio.gather(*(engines.extend(path, **options) for path in paths))

    return [path for group in asyncio.run(all_of_them()) for path in group]


def distance(model, paths: list[Trajectory]) -> float:
    """Largest difference of the model's log-probabilities from the engine's, over every sampled token."""
    worst = 0.0
    for path in paths:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([path.ids])).logits[0].float()
        start = len(path.prompt)
        for i, (token, logprob) in enumerate(zip(path.ids[start:], path.steps[0].logprobs, strict=True)):
            worst = max(worst, abs(logits[start - 1 + i].log_softmax(-1)[token].item() - logprob))
    return worst


def test_sampling_is_faithful_repeatable_and_counted(engines, checkpoint):
    before = engines.ledger.generated
    paths = sample(engines, roots(12), n=4)
    assert distance(load(checkpoint), paths[:12]) < 1e-4
    assert all(span == (0, 0, len(p.steps[0].ids)) for p in paths for span in p.steps[0].versions)
    assert engines.ledger.generated - before == sum(p.sampled_tokens for p in paths)
    assert len({p.ids for p in paths}) > 30  # hashed seeds: siblings differ
    assert sample(engines, roots(12), n=4) == paths


def test_paths_stop_at_steps_at_token_counts_and_at_the_limit(engines):
    for path in sample(engines, roots(6), n=2, until=STEP):
        assert path.end or path.text.endswith("\n") and path.text.count("\n") == 1
    (path,) = sample(engines, roots(1), until=TOKENS(3))
    assert path.end == "stop" or path.sampled_tokens == 3
    short = engines.at(max_tokens=5)
    for path in sample(short, roots(6), n=2):
        assert path.end == ("stop" if path.ids[-1] == 2 else "length") and path.sampled_tokens <= 5
    with pytest.raises(ValueError, match="ended"):
        sample(engines, [Trajectory((3,), end="stop")])


def test_children_compute_one_token_and_know_all_that_came_before(engines, checkpoint):
    model = load(checkpoint)
    before = replace(engines.ledger)
    parents = [path for path in sample(engines, roots(8, seed=3), n=2, until=TOKENS(21)) if path.end is None]
    children = [path for path in sample(engines, parents, n=3, until=TOKENS(9)) if path.end is None]
    grandchildren = sample(engines, children, n=2)
    for path in children + grandchildren:
        last = path.steps[-1]
        assert last.cached == path.length + len(path.prompt) - len(last.ids) - 1
        with torch.no_grad():
            law = model(input_ids=torch.tensor([path.ids])).logits[0, -len(last.ids) - 1 : -1].float().log_softmax(-1)
        exact = law.gather(1, torch.tensor(last.ids)[:, None])[:, 0]
        assert torch.allclose(exact, torch.tensor(last.logprobs), atol=1e-4)
    assert engines.ledger.prefilled - before.prefilled == 16 * 4 + 3 * len(parents) + 2 * len(children)


def test_a_path_that_was_read_before_and_has_grown_is_read_from_there(engines, checkpoint):
    """As a process judge reads: the path so far, one token said of it, and again when the next step is there."""
    model, noise = load(checkpoint), random.Random(0)
    paths = [path for path in sample(engines, roots(8, seed=5), until=TOKENS(13)) if path.end is None]
    assert sample(engines, paths, until=TOKENS(1))
    before, added = replace(engines.ledger), 0
    for path, length in product(paths, (1, 7, 14, 15, 16, 34)):  # up to, onto and over the end of a block
        ids = tuple(noise.randrange(3, 20) for _ in range(length))
        (said,) = sample(engines, [path.grow(Step(ids, (0.0,) * length, sampled=False))], until=TOKENS(1))
        added += length
        with torch.no_grad():
            law = model(input_ids=torch.tensor([said.ids])).logits[0, -2].float().log_softmax(-1)
        assert law[said.ids[-1]].item() == pytest.approx(said.steps[-1].logprobs[0], abs=1e-4)
    # By chance a step begins with a token that the engine itself had drawn there: then that one is known, too.
    assert added - 5 <= engines.ledger.prefilled - before.prefilled <= added


def test_weights_pushed_in_flight_change_the_logprobs_and_every_token_names_its_version(engines, checkpoint):
    model = load(checkpoint)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.05 * torch.randn_like(buffer))

    async def push_while_sampling():
        running = asyncio.gather(*(engines.at(max_tokens=240).extend(path, n=4) for path in roots(16, seed=7)))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(engines.load, export(model), 1)
        return [path for group in await running for path in group]

    old = sample(engines, roots(4, seed=9), until=TOKENS(20))
    before = engines.checksums()
    crossed = asyncio.run(push_while_sampling())
    assert engines.checksums() != before
    for path in crossed:  # spans cover every token, in order, of the old version and then of the new
        spans = path.steps[0].versions
        assert [s for _, s, _ in spans] == [0, *(e for _, _, e in spans)][: len(spans)]
        assert spans[-1][2] == len(path.steps[0].ids) and [v for v, _, _ in spans] in ([0], [1], [0, 1])
    assert any([v for v, _, _ in path.steps[0].versions] == [0, 1] for path in crossed)

    grown = sample(engines, [path for path in old if path.end is None], until=TOKENS(5))
    assert {path.steps[1].cached for path in grown} == {0}  # nothing computed by the old weights is used again
    after = sample(engines, roots(12), n=2)
    assert {v for p in after for v, _, _ in p.steps[0].versions} == {1}
    assert distance(model, after) < 1e-4
    assert distance(load(checkpoint), after) > 0.1


@pytest.mark.slow
def test_engine_killed_while_it_samples_comes_back_with_the_weights_it_was_last_given(engines, checkpoint):
    model = load(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    engines.load(export(model), 2)
    sums, expected = engines.checksums(), sample(engines, roots(12), n=4)

    async def kill_under_way():
        answers = asyncio.gather(*(engines.extend(path, n=4) for path in roots(12)))
        await asyncio.sleep(0.05)
        os.kill(engines.pids()[0][0], signal.SIGKILL)
        return [path for group in await answers for path in group]

    start = time.monotonic()
    paths = asyncio.run(kill_under_way())
    assert time.monotonic() - start < 60
    assert [p.ids for p in paths] == [p.ids for p in expected] and distance(model, paths[:12]) < 1e-4
    assert {v for p in paths for v, _, _ in p.steps[0].versions} == {2}
    assert engines.checksums() == sums
    (state,) = engines.states()
    assert (state.state, state.version, state.restarts) == ("serving", 2, 1)
