"""The toy chain knows its own marginals, and serves exactly itself."""

import asyncio
import math

import pytest

from search.base import END, STEP, TOKENS, Sampling
from search.toy import ChainEngine, random_chain, same_number, trap

CHAIN = trap()


def run(engine, path, **how):
    return asyncio.run(engine.extend(path, **how))


def test_enumeration_equals_dynamic_programming():
    exact, unfinished = CHAIN.marginals()
    summed = dict.fromkeys(exact, 0.0)
    count = 0
    for ids, logprob in CHAIN.paths():
        summed[CHAIN.answers[ids[-2]]] += math.exp(logprob)
        count += 1
    assert count == 54_565 and unfinished == 0
    assert summed == pytest.approx(exact, abs=1e-12)


def test_every_trap_is_set():
    exact, _ = CHAIN.marginals()
    classes = {"60": 0.0, "18": 0.0, "7": 0.0}
    for surface, mass in exact.items():
        classes[next(c for c in classes if same_number(c, surface))] += mass
    assert classes == pytest.approx({"60": 0.25, "18": 0.5893, "7": 0.1607})
    assert max(exact, key=exact.get) == "60"  # the likeliest surface
    squares = dict.fromkeys(exact, 0.0)
    best = (-math.inf, None)
    for ids, logprob in CHAIN.paths():
        squares[CHAIN.answers[ids[-2]]] += math.exp(2 * logprob)
        best = max(best, (logprob, CHAIN.answers[ids[-2]]))
    assert best[1] == "60" and math.exp(best[0]) == pytest.approx(0.22)
    assert squares["60"] > sum(squares.values()) / 2
    greedy = run(ChainEngine(CHAIN, Sampling(temperature=0.0)), CHAIN.root())[0]
    assert greedy.text == "D\n60" and greedy.end == "stop"


def test_logprobs_of_a_path_multiply_to_its_probability():
    probability = dict(CHAIN.paths())
    for path in run(ChainEngine(CHAIN), CHAIN.root(5), n=50):
        assert path.logprob == pytest.approx(probability[path.ids[1:]], abs=1e-12)


def test_granularity_changes_nothing_but_where_it_stops():
    engine = ChainEngine(CHAIN, Sampling(temperature=0.0))
    whole = run(engine, CHAIN.root(), until=END)[0]
    for until in (STEP, TOKENS(1)):
        path = CHAIN.root()
        while path.end is None:
            path = run(engine, path, until=until)[0]
        assert path.ids == whole.ids and path.end == "stop"
    assert len(run(engine, CHAIN.root(), until=TOKENS(2))[0].ids) == 3


def test_limit_ends_a_path_as_unfinished_at_every_granularity():
    engine = ChainEngine(CHAIN, Sampling(max_tokens=3))
    paths = run(engine, CHAIN.root(), n=200)
    assert {p.end for p in paths} == {"stop", "length"}  # "D 60 end" has three tokens
    for path in run(engine, CHAIN.root(), n=50, until=STEP):
        while path.end is None:
            path = run(engine, path, until=STEP)[0]
        assert path.sampled_tokens <= 3
    with pytest.raises(ValueError, match="has ended"):
        run(engine, paths[0])


def test_same_seed_gives_the_same_children_and_children_differ():
    engine = ChainEngine(CHAIN)
    first, second = run(engine, CHAIN.root(1), n=20), run(engine, CHAIN.root(1), n=20)
    assert first == second and len({p.ids for p in first}) > 5
    assert run(engine, CHAIN.root(1), n=3) == first[:3]
    assert run(engine, CHAIN.root(2), n=20) != first


@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {"top_p": 0.8}, {"temperature": 0.5, "top_p": 0.7}])
def test_sampling_settings_change_the_law_they_say(sampling):
    engine = ChainEngine(CHAIN, Sampling(**sampling))
    n = 4000
    firsts = [p.ids[1] for p in run(engine, CHAIN.root(), n=n, until=TOKENS(1))]
    law = {i: q for i, q in CHAIN.successors[0]}
    tempered = {i: q ** (1 / sampling.get("temperature", 1)) for i, q in law.items()}
    total = sum(tempered.values())
    kept, mass = {}, 0.0
    for i in sorted(tempered, key=lambda i: -tempered[i]):
        if mass < sampling.get("top_p", 1):
            kept[i] = tempered[i] / total
            mass += kept[i]
    for i in law:
        q = kept.get(i, 0.0) / sum(kept.values())
        assert abs(firsts.count(i) / n - q) <= 4 * math.sqrt(q * (1 - q) / n)


def test_alternatives_hold_the_sampled_token_and_its_rivals():
    path = run(ChainEngine(CHAIN, Sampling(top=1)), CHAIN.root(9), n=30)
    for p in path:
        step = p.steps[0]
        for token, logprob, row in zip(step.ids, step.logprobs, step.top, strict=True):
            assert (token, logprob) in [(a.id, a.logprob) for a in row]
            assert 1 <= len(row) <= 2 and row[0].logprob == max(a.logprob for a in row)


def test_arithmetic_codes_spread_over_the_first_branch():
    engine = ChainEngine(CHAIN, Sampling(arithmetic=True))
    for seed in range(20):
        firsts = [p.ids[1] for p in run(engine, CHAIN.root(seed), n=100)]
        assert [firsts.count(i) for i in (2, 3, 4)] == pytest.approx([40, 33, 27], abs=1)


def test_random_chains_are_distributions_and_finish():
    for seed in range(50):
        exact, unfinished = random_chain(seed).marginals()
        assert sum(exact.values()) == pytest.approx(1) and unfinished == 0
