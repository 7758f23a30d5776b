"""The toy chain as a real checkpoint: what holds by dynamic programming must hold through a served model."""

import asyncio

import pytest

from search.adaptive import Adaptive
from search.base import STEP, Sampling, Trajectory, bind
from search.beam import Beam
from search.cot import CotDecoding
from search.distinct import Distinct
from search.marginal import estimate
from search.sample import Sample
from search.toy import ChainEngine, random_chain, same_number, trap
from search.toy_checkpoint import write_checkpoint
from search.tree import explore

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def load(chain, folder):
    write_checkpoint(chain, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


CHAIN = trap()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    from rollouts.local_engine import LocalEngine

    return LocalEngine(*load(CHAIN, tmp_path_factory.mktemp("toy")), Sampling(max_tokens=12))


def run(search, engine, seed=0):
    search = bind(search, CHAIN.answer, same_number)
    return asyncio.run(explore(search, CHAIN.root(seed), engine)).paths


def test_tokenizer_spells_what_the_chain_says(tmp_path):
    _, tokenizer = load(CHAIN, tmp_path)
    for path in asyncio.run(ChainEngine(CHAIN).extend(CHAIN.root(4), n=20)):
        ids = list(path.ids[1:-1])
        assert tokenizer.encode(path.text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == path.text
    assert tokenizer.eos_token_id == CHAIN.end


def test_served_logprobs_and_stop_token_are_the_chain_s(engine):
    probability = dict(CHAIN.paths())
    for path in run(Sample(n=100), engine):
        assert path.end == "stop" and path.ids[-1] == CHAIN.end
        assert path.logprob == pytest.approx(probability[path.ids[1:]], abs=1e-5)
        assert CHAIN.answer(path.text) == CHAIN.answers[path.ids[-2]]


def test_served_estimates_agree_with_dynamic_programming(engine):
    paths = run(Sample(n=500, top=58), engine, seed=1)
    for method in ("vote", "horvitz_thompson", "rao_blackwell"):
        got = estimate(paths, equal=same_number, answer=CHAIN.answer, method=method)
        low, high = got.interval
        assert same_number(got.answer, "18")
        assert abs(got.mass - 0.5893) < 4 * (high - low) / (2 * 1.96)


def test_served_arithmetic_sampling_is_stratified(engine):
    firsts = [path.ids[1] for path in run(Sample(n=100, arithmetic=True), engine, seed=2)]
    assert [firsts.count(i) for i in (2, 3, 4)] == pytest.approx([40, 33, 27], abs=1)


def test_served_cot_decoding_measures_the_exact_margins(engine):
    margins = {path.text[0]: path.value for path in run(CotDecoding(k=3), engine)}
    assert margins == pytest.approx({"D": 0.35, "S": 0.47, "T": 0.45}, abs=1e-4)


def test_served_steps_end_at_the_delimiter(engine):
    for path in asyncio.run(engine.extend(CHAIN.root(), n=20, until=STEP)):
        assert len(path.steps[0].ids) == 1 and path.text.endswith("\n") and path.end is None


def test_served_adaptive_sampling_stops_early(engine):
    paths = run(Adaptive(n=64, lanes=4), engine, seed=3)
    assert 4 <= len(paths) < 64


def test_served_searches_without_replacement_and_by_beam_are_exact(tmp_path):
    from rollouts.local_engine import LocalEngine

    chain = random_chain(2)
    small = LocalEngine(*load(chain, tmp_path), Sampling(max_tokens=8))
    root = Trajectory((chain.start,), seed=1)
    exact = sorted((lp for _, lp in chain.paths() if lp > -20), reverse=True)[:10]
    beam = asyncio.run(explore(Beam(width=400, branch=8, expand="top"), root, small)).paths
    assert [path.logprob for path in beam[:10]] == pytest.approx(exact, abs=1e-4)
    paths = asyncio.run(explore(Distinct(n=40), root, small)).paths
    assert len({path.ids for path in paths}) == 40
    got = estimate(paths, answer=chain.answer, method="gumbel", normalise=True)
    masses, _ = chain.marginals()
    assert got.answer == max(masses, key=masses.get) and got.mass == pytest.approx(masses[got.answer], abs=0.05)
