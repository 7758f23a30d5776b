"""The toy chain served by the real vLLM: what holds by dynamic programming must hold through the whole stack."""

import asyncio
import math

import numpy as np
import pytest

from search.adaptive import Adaptive
from search.base import STEP, TOKENS, Sampling, Trajectory, bind
from search.beam import Beam
from search.cot import CotDecoding
from search.distinct import Distinct
from search.force import Force
from search.marginal import estimate
from search.sample import Sample
from search.toy import Chain, ChainEngine, random_chain, same_number, trap
from search.toy_checkpoint import write_checkpoint
from search.tree import explore

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

CHAIN = trap()
PROBABILITY = dict(CHAIN.paths())


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts engines on a chain."""
    from rollouts.cluster import Engines, cluster
    from rollouts.request import Placement

    def start(chain, **placement):
        folder = tmp_path_factory.mktemp("toy")
        write_checkpoint(chain, folder)
        place = Placement(**{"max_model_len": 64, "kv_cache_gib": 0.1, **placement})
        return Engines.start(folder, place, Sampling(max_tokens=12), seed=1)

    with cluster("local"):
        yield start


@pytest.fixture(scope="module")
def engine(start):
    engines = start(CHAIN)
    yield engines
    engines.stop()


@pytest.fixture
def serve(start):
    """The same for one test: a small machine has room for one more."""
    started = []

    def serve(*args, **placement):
        started.append(start(*args, **placement))
        return started[-1]

    yield serve
    for engines in started:
        engines.stop()


def run(search, engine, seed=0):
    return asyncio.run(explore(bind(search, CHAIN.answer, same_number), CHAIN.root(seed), engine))


def in_four_errors(got, mass=0.5893):
    return abs(got.mass - mass) < 4 * (got.interval[1] - got.interval[0]) / (2 * 1.96)


def test_sampled_logprobs_stops_and_estimates_are_the_chain_s(engine):
    outcome = run(Sample(n=400), engine, seed=1)
    for path in outcome.paths:
        assert path.end == "stop" and path.ids[-1] == CHAIN.end
        assert path.logprob == pytest.approx(PROBABILITY[path.ids[1:]], abs=1e-4)
    assert outcome.tree.ledger.generated == sum(path.sampled_tokens for path in outcome.paths)
    for method in ("vote", "horvitz_thompson"):
        got = estimate(outcome.paths, equal=same_number, answer=CHAIN.answer, method=method)
        assert same_number(got.answer, "18") and in_four_errors(got)
        assert len(got.support) == len({path.ids for path in got.support})


def test_arithmetic_codes_and_alternatives_sharpen_the_estimate(engine):
    outcome = run(Sample(n=64, arithmetic=True, top=64), engine, seed=1)
    for path in outcome.paths:
        assert path.logprob == pytest.approx(PROBABILITY[path.ids[1:]], abs=1e-4)
        for position in path.steps[0].top:
            assert math.fsum(math.exp(a.logprob) for a in position) == pytest.approx(1, abs=1e-5)
    got = estimate(outcome.paths, equal=same_number, answer=CHAIN.answer, method="rao_blackwell")
    assert same_number(got.answer, "18")
    assert got.mass == pytest.approx(0.5893, abs=0.02)  # 4.5 times the error on the chain itself; a vote has 0.06


def test_the_same_seeds_give_the_paths_of_the_engine_in_process(engine, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rollouts.local_engine import LocalEngine

    write_checkpoint(CHAIN, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    local = LocalEngine(model, tokenizer, Sampling(max_tokens=12, top=3))
    for arithmetic in (False, True):
        ours = run(Sample(n=50, arithmetic=arithmetic), local, seed=5).paths
        theirs = run(Sample(n=50, arithmetic=arithmetic), engine.at(top=3), seed=5).paths
        assert [path.ids for path in ours] == [path.ids for path in theirs]
        assert [path.text for path in ours] == [path.text for path in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert [[t.id for t in row] for row in a.steps[0].top] == [[t.id for t in row] for row in b.steps[0].top]


def test_prompts_cut_into_chunks_draw_what_they_draw_alone(serve):
    engine = serve(CHAIN, max_model_len=512)
    body = [CHAIN.vocabulary.index(word) for word in ("s0a\n", "s1b\n", "t2c\n")]
    roots = [Trajectory((*(body[(i + j) % 3] for j in range(300)), CHAIN.start), seed=i) for i in range(60)]

    async def together():
        return await asyncio.gather(*(engine.extend(root) for root in roots))  # 18,060 tokens, 8,192 to a step

    at_once = [path for (path,) in asyncio.run(together())]
    assert [path.ids for path in at_once] == [asyncio.run(engine.extend(root))[0].ids for root in roots]
    for path in at_once:
        assert path.logprob == pytest.approx(PROBABILITY[path.ids[301:]], abs=1e-4)


def test_admission_by_kv_keeps_trees_from_pushing_each_other_out(serve):
    from rollouts.admission import Admission, need_of

    search = Sample(n=16)
    engine = serve(CHAIN, max_model_len=512, max_num_seqs=64, kv_cache_gib=0.001)
    assert 1000 < engine.admission.room < 64 * 512
    # 222 tokens: six blocks that siblings share, and 30 of a block that each path soon leaves for another.
    prompts = [(*([11 + i % 5] * 221), CHAIN.start) for i in range(24)]

    async def all_of(room):
        gate = Admission(room)

        async def one(prompt, seed):
            async with gate.held(need_of(search, len(prompt), 12)):
                await explore(search, Trajectory(prompt, seed=seed), engine)

        await asyncio.gather(*(one(prompt, seed) for seed, prompt in enumerate(prompts)))
        return engine.usage()[0]["preempted"]

    crowded = asyncio.run(all_of(None))
    assert crowded > 0
    assert asyncio.run(all_of(engine.admission.room)) == crowded


def test_cot_decoding_measures_the_exact_margins(engine):
    margins = {path.text[0]: path.value for path in run(CotDecoding(k=3), engine).paths}
    assert margins == pytest.approx({"D": 0.35, "S": 0.47, "T": 0.45}, abs=1e-4)


def test_beam_over_tokens_and_sampling_without_replacement_are_exact(serve):
    chain = random_chain(2)
    engine, root = serve(chain).at(max_tokens=8), Trajectory((chain.start,), seed=1)
    exact = sorted((lp for _, lp in chain.paths() if lp > -20), reverse=True)[:10]
    beam = asyncio.run(explore(Beam(width=400, branch=8, expand="top"), root, engine)).paths
    assert [path.logprob for path in beam[:10]] == pytest.approx(exact, abs=1e-4)
    paths = asyncio.run(explore(Distinct(n=40), root, engine)).paths
    assert len({path.ids for path in paths}) == 40
    got = estimate(paths, answer=chain.answer, method="gumbel", normalise=True)
    masses, _ = chain.marginals()
    assert got.answer == max(masses, key=masses.get) and got.mass == pytest.approx(masses[got.answer], abs=0.05)


def test_written_text_is_continued_and_never_counted_as_sampled(engine):
    word = "S\n"
    written = engine.write(CHAIN.root(3), word)
    assert written.text == word and not written.steps[0].sampled and written.end is None
    for path in asyncio.run(engine.extend(written, n=20)):
        first = math.log(CHAIN.transition[CHAIN.start, path.ids[1]])
        assert path.logprob == pytest.approx(PROBABILITY[path.ids[1:]] - first, abs=1e-4)
    with pytest.raises(ValueError, match="vocabulary"):
        engine.write(CHAIN.root(3), "no such words")
    forced = run(Force(n=4, wait=word, finish=word), engine).paths
    assert all(path.text.count(word) >= 1 and path.sampled_tokens < path.length for path in forced)


def test_steps_end_at_a_delimiter_of_one_token_or_of_several(engine):
    for path in asyncio.run(engine.extend(CHAIN.root(), n=20, until=STEP)):
        assert len(path.steps[0].ids) == 1 and path.text.endswith("\n") and path.end is None
    whole = run(Sample(n=30), engine, seed=4).paths
    delimiter = whole[0].text[1:3]  # lies across tokens
    for path in asyncio.run(engine.at(step=delimiter).extend(CHAIN.root(4), n=30, until=STEP)):
        assert path.end == "stop" or delimiter in path.text
        before = "".join(CHAIN.vocabulary[token] for token in path.ids[1:-1])
        assert delimiter not in before  # not one token more than it took


def test_token_counts_are_exact_and_the_limit_ends_a_path(engine):
    for path in asyncio.run(engine.extend(CHAIN.root(2), n=20, until=TOKENS(2))):
        assert path.sampled_tokens == 2 or path.end == "stop"
    for path in asyncio.run(engine.at(max_tokens=2).extend(CHAIN.root(2), n=20)):
        assert path.end == "length" or path.ids[-1] == CHAIN.end


def endless(often: float) -> Chain:
    """Answers 1 at once, or with this chance writes a's for about 10,000 tokens first."""
    p = np.zeros((4, 4))
    p[0] = 0, 0, often, 1 - often
    p[1, 1] = p[3, 1] = 1
    p[2] = 0, 0, 0.9999, 0.0001
    return Chain(("?", "", "a", "1"), p, {3: "1"})


async def at_rest(engine) -> int:
    """Tokens that the engine sampled in all; fails if it still samples some."""
    tokens = lambda: sum(usage["rows"] for usage in engine.usage())  # noqa: E731
    await asyncio.sleep(0.3)
    before = tokens()
    await asyncio.sleep(0.5)
    assert tokens() == before, "tokens are sampled for nobody"
    return before


def test_nothing_is_sampled_for_a_cancelled_search(serve):
    chain = endless(often=1.0)
    engine = serve(chain, max_model_len=2048).at(max_tokens=2000)

    async def cancel_early() -> int:
        doomed = asyncio.ensure_future(explore(Sample(n=8), chain.root(1), engine))
        while sum(usage["rows"] for usage in engine.usage()) < 80:
            await asyncio.sleep(0.01)
        doomed.cancel()
        return await at_rest(engine)

    assert asyncio.run(cancel_early()) < 8 * 1000
    (path,) = run(Sample(n=1), engine.at(max_tokens=5)).paths  # it goes on with others
    assert path.length == 5


def test_nothing_is_sampled_once_a_vote_is_decided(serve):
    chain = endless(often=0.1)
    engine = serve(chain, max_model_len=2048).at(max_tokens=2000)
    search = bind(Adaptive(n=32, lanes=32), chain.answer, same_number)

    async def vote(seed: int) -> tuple[int, int]:
        before = await at_rest(engine)
        found = await explore(search, chain.root(seed), engine)
        return found.tree.ledger.cancelled, await at_rest(engine) - before

    decided = [tokens for cancelled, tokens in (asyncio.run(vote(seed)) for seed in range(6)) if cancelled]
    assert decided and max(decided) < 2000, decided  # a single path that is not stopped has 2,000


def test_a_process_judge_reads_each_new_token_once(serve):
    from benchmarks.search import judged, prose

    chain = prose(step=1 / 7)
    writer = ChainEngine(chain, Sampling(max_tokens=256))
    found = asyncio.run(judged(chain, writer, serve(chain, max_model_len=512), tasks=8))
    assert found["read/generated"] <= 1 + found["prompts/generated"] <= 1.15, found
