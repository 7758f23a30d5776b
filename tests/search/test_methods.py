"""Each search against exact values on the toy chains, or against a script that says what must happen."""

import asyncio
import dataclasses
import math

import numpy as np
import pytest

from search import SEARCHES
from search.adaptive import Adaptive, allocate, mode_confidence
from search.base import END, TOKENS, Alternative, Sampling, Step, bind, derive
from search.beam import Beam
from search.cot import CotDecoding
from search.distinct import UNLISTED, Distinct
from search.dvts import Dvts
from search.force import Force
from search.marginal import estimate
from search.mcts import Mcts
from search.particle import Particle, evidence, systematic
from search.rebase import Rebase, apportion
from search.refine import Refine
from search.rejection import Rejection
from search.revise import Revise
from search.sample import BestOf, Sample
from search.scripted import Scripted
from search.self_score import SelfScore
from search.toy import ChainEngine, random_chain, same_number, trap
from search.tree import explore

CHAIN = trap()
CHANCE = CHAIN.chance(lambda answer: float(same_number(answer, "18")))


async def chance(path):
    return float(CHANCE[path.ids[-2] if path.end == "stop" else path.ids[-1]])


def run(search, root, engine, score=None, **how):
    return asyncio.run(explore(search, root, engine, score, **how)).paths


def toy(search, seed=0, score=chance, chain=CHAIN, **sampling):
    return run(search, chain.root(seed), ChainEngine(chain, Sampling(**sampling)), score)


def many(search, seeds, score=None, chain=CHAIN):
    """The same without a tree, for each of many seeds, in one event loop."""

    async def each():
        return [await search.run(chain.root(seed), ChainEngine(chain), score) for seed in range(seeds)]

    return asyncio.run(each())


# -- sampling -------------------------------------------------------------------------------------------------------


def test_best_of_returns_the_best_first_and_its_answer_wins():
    paths = toy(BestOf(n=20), seed=1)
    values = [p.value for p in paths]
    assert values == sorted(values, reverse=True) and values[0] == 1.0
    got = estimate(paths, equal=same_number, answer=CHAIN.answer, method=BestOf().method)
    assert same_number(got.answer, "18") and got.mass == pytest.approx(1)


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("last", 0.5), ("min", 0.2), ("product", 0.8 * 0.2 * 0.5), ("mean", 0.5)]
)
def test_process_scores_are_joined_as_they_say(aggregate, expected):
    scores = {"a\n": 0.8, "a\nb\n": 0.2, "a\nb\nc": 0.5}

    async def score(path):
        return scores[path.text]

    engine = Scripted(lambda text, child: "a\nb\nc"[len(text) :])
    (path,) = run(BestOf(n=1, aggregate=aggregate), Scripted.root("q"), engine, score)
    assert path.value == pytest.approx(expected) and path.text == "a\nb\nc"


def test_arithmetic_sample_has_less_spread_than_a_plain_one():
    def spread(search):
        answers = [[same_number(CHAIN.answer(p.text), "18") for p in toy(search, seed)] for seed in range(200)]
        return np.std([np.mean(a) for a in answers])

    assert spread(Sample(arithmetic=True)) < 0.75 * spread(Sample())


# -- beam and its kin -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_beam_at_full_width_is_exactly_the_likeliest_paths(seed):
    chain = random_chain(seed)
    exact = sorted(((lp, ids) for ids, lp in chain.paths()), reverse=True)
    paths = toy(Beam(width=10_000, branch=99, expand="top"), score=None, chain=chain)
    assert [p.logprob for p in paths] == pytest.approx([lp for lp, _ in exact], abs=1e-12)
    assert {p.ids[1:] for p in paths} == {ids for _, ids in exact}
    assert all(p.end == "stop" for p in paths)


def test_narrow_beam_can_miss_the_likeliest_path():
    """The width is what makes the search exact: were it ignored, this would fail."""
    missed = 0
    for seed in range(40):
        chain = random_chain(seed)
        best = max(lp for _, lp in chain.paths())
        missed += toy(Beam(width=1, branch=99, expand="top"), score=None, chain=chain)[0].logprob < best - 1e-9
    assert missed > 3


def test_beam_with_exact_values_walks_to_a_right_answer():
    for seed in range(10):
        paths = toy(Beam(width=2, branch=4), seed)
        assert paths[0].value == 1.0 and same_number(CHAIN.answer(paths[0].text), "18")


def test_lookahead_scores_where_greedy_decoding_leads():
    """A first step that looks good but leads to a bad end is passed over with lookahead only."""

    def reply(text, child):
        if text.startswith("shiny") or text.startswith("plain"):
            return {"shiny\n": "bad", "plain\n": "good"}[text]
        return ["shiny\nbad", "plain\ngood"][child % 2]

    async def score(path):
        return {"shiny\n": 0.9, "plain\n": 0.1, "shiny\nbad": 0.0, "plain\ngood": 1.0}[path.text]

    def first(lookahead):
        return run(Beam(width=1, branch=2, lookahead=lookahead), Scripted.root("q"), Scripted(reply), score)[0].text

    assert first(0) == "shiny\nbad" and first(1) == "plain\ngood"


def test_dvts_keeps_one_path_per_tree_and_the_best_child_at_every_step():
    paths = toy(Dvts(trees=5, branch=3), seed=2)
    assert len(paths) == 5 and all(p.end == "stop" for p in paths)
    assert len({p.seed for p in paths}) == 5
    alone = toy(Dvts(trees=1, branch=3), seed=2)
    assert alone[0] in paths  # a tree does not depend on how many there are


def test_rebase_shares_its_width_in_proportion_to_the_softmax():
    assert apportion([0.0, 0.0], 6) == [3, 3]
    assert apportion([math.log(3), 0.0], 8) == [6, 2]
    assert apportion([0.0, 0.0, 0.0], 4) == [2, 1, 1]
    assert apportion([1000.0, 0.0], 5) == [5, 0]
    assert apportion([], 3) == [] and apportion([1.0], 0) == [0]
    paths = toy(Rebase(width=12), seed=3)
    assert 1 <= len(paths) <= 12 and all(p.end == "stop" for p in paths)


def test_rejection_spends_less_than_best_of_and_keeps_the_best():
    engine = ChainEngine(CHAIN)
    full = asyncio.run(explore(BestOf(n=32), CHAIN.root(1), engine, chance))
    early = asyncio.run(explore(Rejection(n=32, until=2), CHAIN.root(1), engine, chance))
    assert early.tree.ledger.generated < 0.7 * full.tree.ledger.generated
    assert early.paths[0].value == 1.0 and early.paths[0].end == "stop"


# -- trees ----------------------------------------------------------------------------------------------------------


def rewards(chain, seed):
    """A reward per path, and the exact value of every prefix: the best reward below it."""
    value = {}
    for ids, _ in chain.paths():
        reward = derive(seed, *ids) % 10**6 / 10**6
        for i in range(len(ids) + 1):
            value[ids[:i]] = max(value.get(ids[:i], 0.0), reward)
    return value


def regrets(simulations, c, blind=False, **knobs):
    """What MCTS misses of the best of about 1,450 leaves, on each of 12 chains."""
    missed = []
    for seed in range(12):
        chain = random_chain(seed, depth=5)
        value = rewards(chain, seed)

        async def score(path, value=value):
            return 0.5 if blind else value[path.ids[1:]]

        search = Mcts(simulations=simulations, branch=99, c=c, expand="top", finish=1, **knobs)
        missed.append(value[()] - value[toy(search, score=score, chain=chain)[0].ids[1:]])
    return missed


@pytest.mark.parametrize("policy", ["puct", "uct"])
@pytest.mark.parametrize("lanes", [1, 4])
def test_mcts_with_exact_values_finds_the_optimum(policy, lanes):
    assert regrets(40, 0.001, policy=policy, lanes=lanes) == [0.0] * 12


def test_mcts_with_blind_values_does_not_find_it():
    """It is the values that lead the search: the same one without them misses."""
    assert np.count_nonzero(regrets(40, 0.001, blind=True)) > 6


@pytest.mark.parametrize("policy", ["puct", "uct"])
def test_mcts_regret_falls_with_simulations(policy):
    few, some, many = (np.mean(regrets(n, 0.1, policy=policy)) for n in (10, 40, 160))
    assert few > some > many and many < 0.001


def test_mcts_rollouts_are_answers_too():
    paths = toy(Mcts(simulations=4, value="rollout", finish=1), seed=1)
    assert len(paths) >= 4 and all(p.end == "stop" for p in paths)


def test_mcts_that_widens_is_not_stuck_where_all_first_children_answered():
    def distinct(widen):
        return len(toy(Mcts(simulations=40, branch=1, until="end", finish=1, widen=widen), seed=3))

    assert distinct(0.0) == 1 and distinct(0.7) > 4
    with pytest.raises(ValueError, match="widen"):
        Mcts(widen=0.5, expand="top")


def test_mcts_lanes_take_different_leaves_under_virtual_loss():
    for lanes in (1, 8):
        paths = toy(Mcts(simulations=24, lanes=lanes), seed=4)
        assert paths[0].value == 1.0


# -- particles ------------------------------------------------------------------------------------------------------


def twist(chain, seed):
    """A positive score of every prefix, and the exact E[score(path)] and E[score(path); answer]."""
    weight = 0.1 + np.random.default_rng(seed).random(len(chain.vocabulary))
    exact = {}
    for ids, lp in chain.paths():
        answer = chain.answers[ids[-2]]
        exact[answer] = exact.get(answer, 0.0) + math.exp(lp) * weight[ids[-2]]

    async def score(path):
        return float(weight[path.ids[-2] if path.end == "stop" else path.ids[-1]])

    return score, exact


@pytest.mark.parametrize("until", ["step", 1, 2])
@pytest.mark.parametrize("ess", [0.5, 1.0])
def test_particle_evidence_is_unbiased(until, ess):
    chain = random_chain(7)
    score, exact = twist(chain, 7)
    runs = many(Particle(n=6, until=until, ess=ess), 400, score, chain)
    values = [math.exp(evidence(paths)) for paths in runs]
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - sum(exact.values())) < 4 * error
    by_answer = [sum(math.exp(p.log_weight) for p in paths if chain.answer(p.text) == "1") for paths in runs]
    error = np.std(by_answer, ddof=1) / math.sqrt(len(by_answer))
    assert abs(np.mean(by_answer) - exact["1"]) < 4 * error


def test_particles_guided_by_scores_still_estimate_the_model_s_own_marginal():
    chain = random_chain(7)
    score, _ = twist(chain, 7)
    exact, _ = chain.marginals()
    runs = many(Particle(n=6, ess=1.0, target="model"), 400, score, chain)
    for answer in exact:
        values = [sum(math.exp(p.log_weight) for p in paths if chain.answer(p.text) == answer) for paths in runs]
        assert abs(np.mean(values) - exact[answer]) < 4 * np.std(values, ddof=1) / math.sqrt(len(values))


def test_particles_counted_without_their_weights_fail_the_same_test():
    chain = random_chain(7)
    score, _ = twist(chain, 7)
    exact, _ = chain.marginals()
    runs = many(Particle(n=6, ess=1.0, target="model"), 400, score, chain)
    worst = 0.0
    for answer in exact:
        values = [sum(chain.answer(p.text) == answer for p in paths) / len(paths) for paths in runs]
        worst = max(worst, abs(np.mean(values) - exact[answer]) / np.std(values, ddof=1) * math.sqrt(len(values)))
    assert worst > 4


def test_particles_that_all_die_are_no_answer():
    async def score(path):
        return 0.0 if path.end else 1.0

    paths = toy(Particle(n=4), score=score)
    assert evidence(paths) == -math.inf
    got = estimate(paths, answer=CHAIN.answer, method="particle")
    assert got.answer is None


def test_systematic_resampling_gives_each_its_share():
    assert systematic([0.5, 0.25, 0.25, 0.0], 0.5) == [0, 0, 1, 2]
    counts = np.zeros(3)
    for offset in np.arange(0.005, 1, 0.01):
        counts += np.bincount(systematic([0.2, 0.5, 0.3], offset), minlength=3)
    assert counts / 100 == pytest.approx([0.6, 1.5, 0.9], abs=0.02)


# -- without replacement --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 6])
def test_distinct_paths_give_unbiased_masses(n):
    chain = random_chain(3)
    exact, _ = chain.marginals()
    totals = {answer: [] for answer in exact}
    for paths in many(Distinct(n=n), 400, chain=chain):
        assert len({p.ids for p in paths}) == len(paths) == n
        masses = estimate(paths, answer=chain.answer, method="gumbel").masses
        for answer in exact:
            totals[answer].append(masses.get(answer, 0.0))
    for answer, values in totals.items():
        assert abs(np.mean(values) - exact[answer]) < 4 * np.std(values, ddof=1) / math.sqrt(len(values))


def test_distinct_paths_summed_without_weights_fail_the_same_test():
    chain = random_chain(3)
    exact, _ = chain.marginals()
    values = [sum(math.exp(p.logprob) for p in paths) for paths in many(Distinct(n=3), 100, chain=chain)]
    assert abs(np.mean(values) - sum(exact.values())) > 4 * np.std(values, ddof=1) / 10


@pytest.mark.parametrize("normalise", [False, True])
def test_intervals_of_distinct_paths_cover_at_their_level(normalise):
    exact = {"18": 0.5893, "60": 0.25, "7": 0.1607}
    covered, repeats = 0, 120
    for paths in many(Distinct(n=8), repeats):
        got = estimate(paths, equal=same_number, answer=CHAIN.answer, method="gumbel", normalise=normalise)
        truth = next(mass for name, mass in exact.items() if same_number(name, got.answer))
        covered += got.interval[0] <= truth <= got.interval[1]
    assert covered / repeats > 0.95 - 4 * math.sqrt(0.95 * 0.05 / repeats)


def test_first_of_distinct_paths_is_an_ordinary_sample():
    chain = random_chain(5)
    probability = dict(chain.paths())
    n = 600
    firsts = [paths[0].ids[1:] for paths in many(Distinct(n=1), n, chain=chain)]
    for ids, lp in sorted(probability.items(), key=lambda pair: -pair[1])[:5]:
        p = math.exp(lp)
        assert abs(firsts.count(ids) / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_more_distinct_paths_than_exist_is_enumeration():
    chain = random_chain(1, depth=1, width=2, answers=2)
    exact, _ = chain.marginals()
    got = estimate(toy(Distinct(n=100), 0, None, chain), answer=chain.answer, method="gumbel")
    assert got.masses == pytest.approx({a: m for a, m in exact.items() if m}, abs=1e-12) and got.certified


def test_mass_beyond_the_listed_tokens_is_reported_and_not_lost():
    chain = random_chain(3)
    exact, _ = chain.marginals()
    masses, lost = [], []
    for paths in many(Distinct(n=3, top=2), 300, chain=chain):
        assert all(p.end == ("length" if UNLISTED in p.ids else "stop") for p in paths)
        got = estimate(paths, answer=chain.answer, method="gumbel")
        lost.append(got.unfinished)
        masses.append(sum(got.masses.values()) + got.unfinished)
    assert np.mean(lost) > 0.01
    assert abs(np.mean(masses) - 1) < 4 * np.std(masses, ddof=1) / math.sqrt(len(masses))


def test_distinct_sampling_beats_the_vote_at_equal_paths():
    def error(search, method, repeats=60):
        wrong = []
        for paths in many(search, repeats):
            got = estimate(paths, equal=same_number, answer=CHAIN.answer, method=method, normalise=True)
            wrong.append(sum(m for a, m in got.masses.items() if same_number(a, "18")) - 0.5893)
        return math.sqrt(np.mean(np.square(wrong)))

    assert error(Distinct(n=16), "gumbel") < 0.8 * error(Sample(n=16), "vote")


# -- decoding and revision ------------------------------------------------------------------------------------------


def test_cot_decoding_measures_the_margin_on_the_answer_alone():
    paths = toy(bind(CotDecoding(k=3), CHAIN.answer, same_number), score=None)
    margins = {p.text.splitlines()[0]: p.value for p in paths}
    assert margins == pytest.approx({"D": 0.35, "S": 0.47, "T": 0.45}, abs=1e-9)
    got = estimate(paths, equal=same_number, answer=CHAIN.answer, method=CotDecoding.method)
    assert same_number(got.answer, "18") and got.mass == pytest.approx(0.92 / 1.27)


def test_cot_decoding_branches_on_first_tokens_only():
    paths = toy(CotDecoding(k=2), score=None)
    assert [p.text[0] for p in sorted(paths, key=lambda p: p.text)] == ["D", "S"]
    greedy = toy(Sample(n=1), score=None, temperature=0.0)[0]
    assert greedy.ids in {p.ids for p in paths}


def chat(text, child):
    """A model that errs at first, and finds its error when asked."""
    if "solve the problem again" in text.rsplit("[user]", 1)[-1]:
        return "right"
    return "found a mistake" if "[user]" in text else "wrong"


async def by_last_word(path):
    return float(path.text.endswith("right"))


def test_revision_keeps_the_best_version():
    paths = run(Revise(rounds=1), Scripted.root("q"), Scripted(chat), by_last_word)
    assert [p.text.split()[-1] for p in paths] == ["right", "wrong"] and paths[0].value == 1.0
    assert [step.sampled for step in paths[0].steps] == [True, False, True, False, True]
    assert "found a mistake" in paths[0].text


def test_revision_that_makes_it_worse_is_not_chosen():
    async def score(path):
        return float(path.text.endswith("wrong"))

    assert run(Revise(rounds=2), Scripted.root("q"), Scripted(chat), score)[0].text == "wrong"


def test_revision_without_a_scorer_takes_the_last():
    assert run(Revise(rounds=2), Scripted.root("q"), Scripted(chat))[0].text.count("[user]") == 4


def test_feedback_by_score_tells_the_number_and_nothing_else():
    path = run(Revise(rounds=1, feedback="score"), Scripted.root("q"), Scripted(chat), by_last_word)[0]
    assert "rates this solution 0.00 out of 1" in path.text and "found a mistake" not in path.text


def test_refine_revises_answers_in_a_tree():
    paths = run(Refine(drafts=2, simulations=4), Scripted.root("q"), Scripted(chat), by_last_word)
    assert len(paths) == 6 and paths[0].value == 1.0
    assert len({p.seed for p in paths}) == 6


def test_forced_thinking_goes_on_where_it_stopped():
    engine = Scripted(lambda text, child: " so 8" if text.endswith("Wait") else "it is 7")
    (path,) = run(Force(waits=2), Scripted.root("q"), engine)
    assert path.text == "it is 7\nWait so 8\nWait so 8" and path.end == "stop"
    assert 0 not in path.ids[:-1]  # the tokens that would have ended it are gone


def test_response_at_its_limit_is_made_to_answer():
    engine = Scripted(lambda text, child: " 9" if text.endswith("is") else "and " * 99, Sampling(max_tokens=20))
    (path,) = run(Force(waits=0, answer_tokens=5), Scripted.root("q"), engine)
    assert path.text.endswith("The final answer is 9") and path.end == "stop"


class Judge(Scripted):
    """Says yes to what ends in "right"; lists three spellings among its alternatives."""

    async def extend(self, path, *, n=1, until=END):
        assert self.sampling.top == 20 and until == TOKENS(1) and path.text.endswith("yes or no.\n")
        p = 0.6 if "right" in path.text else 0.1
        listed = {" Yes": p, "yes": 0.1, "No": 0.2}
        top = tuple(Alternative(i, math.log(q), text) for i, (text, q) in enumerate(listed.items()))
        return [path.grow(Step((0,), (math.log(p),), " Yes", top=(top,)), end="length")]


def test_self_score_is_the_share_of_yes_among_the_alternatives():
    score = SelfScore(Judge(None, offers=frozenset({"write", "top"})))
    for text, expected in (("right", 0.7 / 0.9), ("wrong", 0.2 / 0.4)):
        path = Scripted.root("q").grow(Step(tuple(map(ord, text)), (0.0,) * 5, text), end="stop")
        assert asyncio.run(score(path)) == pytest.approx(expected)


def test_self_score_without_alternatives_is_refused():
    with pytest.raises(ValueError, match="offers top; Scripted does not"):
        SelfScore(Scripted(chat))


# -- adaptive -------------------------------------------------------------------------------------------------------


def test_adaptive_stops_when_the_leader_is_safe():
    engine = Scripted(lambda text, child: "7")
    adaptive = Adaptive(n=40, confidence=0.95, lanes=1)
    assert len(run(adaptive, Scripted.root("q"), engine)) == 4
    unsure = Scripted(lambda text, child: "7", logprob=math.nan)
    certain = run(Adaptive(n=40, confidence=1.0, lanes=1), Scripted.root("q"), unsure)
    assert len(certain) == 21  # 21 of 40 cannot be caught


def test_adaptive_answers_as_the_full_vote_does_nearly_always():
    adaptive = bind(Adaptive(n=64, confidence=0.98), CHAIN.answer, same_number)
    agree, drawn = 0, 0
    for seed in range(60):
        paths = toy(adaptive, seed, None)
        drawn += len(paths)
        agree += same_number(estimate(paths, equal=same_number, answer=CHAIN.answer).answer, "18")
    assert agree >= 55 and drawn < 0.5 * 60 * 64


def test_adaptive_cancels_what_is_in_flight():
    class Slow(Scripted):
        async def extend(self, path, **how):
            if path.seed in late:
                await asyncio.sleep(3600)
            return await super().extend(path, **how)

    root = Scripted.root("q")
    late = {derive(root.seed, "again", i) for i in range(4, 64)}
    outcome = asyncio.run(explore(Adaptive(n=64, lanes=8), root, Slow(lambda text, child: "7")))
    assert len(outcome.paths) == 4
    assert outcome.tree.ledger.cancelled == outcome.tree.ledger.calls - 4 > 0


def test_mode_confidence_is_the_exact_beta_tail():
    rng = np.random.default_rng(0)
    for first, second in [(0, 0), (3, 1), (10, 7)]:
        p = rng.beta(first + 1, second + 1, 200_000)
        assert mode_confidence(first, second) == pytest.approx(np.mean(p > 0.5), abs=0.005)


def test_budget_goes_to_the_question_that_needs_it():
    class Mixed(Scripted):
        async def extend(self, path, **how):
            hard = path.prompt == (ord("h"),)
            own = Scripted(lambda text, child: str(derive(path.seed, child) % 2) if hard else "7", self.sampling)
            return await own.extend(path, **how)

    roots = [Scripted.root("e", 1), Scripted.root("h", 2)]
    paths = asyncio.run(allocate(roots, Mixed(None, Sampling(max_tokens=4)), budget=80))
    easy, hard = map(len, paths)
    assert hard > 2 * easy
    assert sum(p.sampled_tokens for each in paths for p in each) <= 80
    with pytest.raises(ValueError, match="budget=20 is smaller than 4 paths of 4 tokens for each of 2"):
        asyncio.run(allocate(roots, Mixed(None, Sampling(max_tokens=4)), budget=20))


def test_answers_are_read_the_way_the_caller_binds():
    search = bind(Adaptive(), CHAIN.answer, same_number)
    assert search.answer == CHAIN.answer and search.equal == same_number
    assert bind(Sample(), CHAIN.answer, same_number) == Sample()  # looks at no answer
    assert bind(CotDecoding(), CHAIN.answer, None).answer == CHAIN.answer
    for kind, search in SEARCHES.items():  # binding fills in callables and never overwrites a knob
        fields = {f.name: f.default for f in dataclasses.fields(search) if f.name in ("answer", "equal")}
        assert all(default is None or callable(default) for default in fields.values()), kind


def test_trajectory_weights_of_plain_draws_are_neutral():
    paths = toy(Sample(n=5), score=None)
    assert all(p.log_weight == 0 and p.value is None for p in paths)
    assert estimate(paths, answer=CHAIN.answer, method="particle").masses == pytest.approx(
        estimate(paths, answer=CHAIN.answer).masses
    )
