"""Estimators of the marginal against exact values, and the wrong weightings that the same tests must catch."""

import asyncio
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from search.base import Sampling, Step, Trajectory
from search.distinct import Distinct
from search.marginal import at_k, estimate, group, read_slot
from search.sample import Sample
from search.toy import Chain, ChainEngine, random_chain, same_number, trap

CHAIN = trap()
EXACT = {"18": 0.5893, "60": 0.25, "7": 0.1607}


def draw(n, seed=0, chain=CHAIN, **sampling):
    return asyncio.run(ChainEngine(chain, Sampling(**sampling)).extend(chain.root(seed), n=n))


def path(text, ids, logprob=-1.0, end="stop", **fields):
    return Trajectory((0,), (Step(tuple(ids), (logprob, *[0.0] * (len(ids) - 1)), text),), end=end, **fields)


def canonical(answer):
    return next(name for name in EXACT if same_number(name, answer))


def masses(paths, method, **how):
    got = estimate(paths, equal=same_number, answer=CHAIN.answer, method=method, **how)
    found = {canonical(name): mass for name, mass in got.masses.items()}
    return [found.get(name, 0.0) for name in EXACT]


def votes_times_p(paths):
    p = np.exp([path.logprob for path in paths])
    return masses(paths, "weighted", weights=p)


def votes_times_mean_p(paths):
    p = np.exp([path.logprob / path.sampled_tokens for path in paths])
    return masses(paths, "weighted", weights=p)


RIGHT = {
    "vote": lambda paths: masses(paths, "vote"),
    "horvitz_thompson": lambda paths: masses(paths, "horvitz_thompson"),
    "rao_blackwell": lambda paths: masses(paths, "rao_blackwell"),
}
WRONG = {
    "votes times p": votes_times_p,
    "votes times exp(mean log p)": votes_times_mean_p,
    "distinct sum": lambda paths: masses(paths, "distinct_sum"),
}


def worst(estimator, draws, size, seed=1, **sampling):
    """The largest |mean of the estimate - exact| in standard errors, over repeats of `size` draws."""
    pool = draw(draws, seed=seed, **sampling)
    values = np.array([estimator(pool[i : i + size]) for i in range(0, draws, size)])
    error = values.std(0, ddof=1) / math.sqrt(len(values))
    return float(np.max(np.abs(values.mean(0) - list(EXACT.values())) / error))


@pytest.mark.parametrize("name", RIGHT)
def test_unbiased_estimator_is_within_four_standard_errors(name):
    assert worst(RIGHT[name], 8_000, 16, top=60) < 4


@pytest.mark.parametrize("name", WRONG)
def test_wrong_weighting_fails_the_same_test(name):
    assert worst(WRONG[name], 8_000, 16, top=60) > 4


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RIGHT, *WRONG, "importance", "arithmetic", "gumbel"])
def test_unbiasedness_at_a_hundred_thousand_draws(name):
    if name == "importance":
        assert worst(reweighted, 100_000, 16, temperature=0.7) < 4
    elif name in ("arithmetic", "gumbel"):
        assert worst_of_searches(name, 100_000 // 16, 16) < 4
    else:
        assert (worst({**RIGHT, **WRONG}[name], 100_000, 16, top=60) < 4) == (name in RIGHT)


def worst_of_searches(name, repeats, size):
    """As `worst`, for paths that are not independent within a run."""
    search = Distinct(n=size) if name == "gumbel" else Sample(n=size, arithmetic=True)

    async def runs():
        return [await search.run(CHAIN.root(seed), ChainEngine(CHAIN), None) for seed in range(repeats)]

    method = "gumbel" if name == "gumbel" else "vote"
    values = np.array([masses(paths, method) for paths in asyncio.run(runs())])
    error = values.std(0, ddof=1) / math.sqrt(len(values))
    return float(np.max(np.abs(values.mean(0) - list(EXACT.values())) / error))


def model_logprob(path):
    ids = (0, *path.ids[1:])
    return math.fsum(math.log(CHAIN.transition[a, b]) for a, b in itertools.pairwise(ids))


def reweighted(paths):
    return masses(paths, "importance", target=[model_logprob(path) for path in paths])


def test_importance_weights_undo_a_temperature_and_the_plain_vote_does_not():
    assert worst(reweighted, 8_000, 16, temperature=0.7) < 4
    assert worst(RIGHT["vote"], 8_000, 16, temperature=0.7) > 4


def test_importance_weights_cannot_undo_top_p():
    assert worst(reweighted, 8_000, 16, top_p=0.8) > 4


def test_arithmetic_sampling_is_unbiased_with_less_spread():
    engine = ChainEngine(CHAIN, Sampling(arithmetic=True))
    runs = [asyncio.run(engine.extend(CHAIN.root(seed), n=16)) for seed in range(500)]
    plain = [draw(16, seed=seed) for seed in range(500)]
    values, others = (np.array([masses(paths, "vote") for paths in group]) for group in (runs, plain))
    error = values.std(0, ddof=1) / math.sqrt(len(values))
    assert np.max(np.abs(values.mean(0) - list(EXACT.values())) / error) < 4
    assert values.std(0)[0] < 0.75 * others.std(0)[0]


@pytest.mark.parametrize("method", RIGHT)
def test_intervals_cover_at_their_level(method):
    covered, repeats = 0, 300
    for seed in range(repeats):
        got = estimate(draw(24, seed=seed, top=60), equal=same_number, answer=CHAIN.answer, method=method)
        covered += got.interval[0] - 1e-12 <= EXACT[canonical(got.answer)] <= got.interval[1] + 1e-12
    assert covered / repeats > 0.95 - 4 * math.sqrt(0.95 * 0.05 / repeats)


def test_marginal_answers_where_greedy_best_path_and_surface_are_all_wrong():
    paths = draw(400)
    assert draw(1, temperature=0.0)[0].text.endswith("60")
    assert max(paths, key=lambda p: p.logprob).text.endswith("60")
    assert estimate(draw(20_000), answer=CHAIN.answer).answer == "60"  # surfaces taken as classes
    got = estimate(paths, equal=same_number, answer=CHAIN.answer, method="horvitz_thompson")
    assert got.answer in ("18", "$18", "18.0") and got.leaders == (got.answer,)
    assert all(same_number(CHAIN.answer(p.text), "18") for p in got.support)


def test_all_paths_give_the_exact_marginal_and_its_certificate():
    paths = [path(CHAIN.vocabulary[ids[-2]], ids, logprob) for ids, logprob in CHAIN.paths()]
    got = estimate(paths, equal=same_number, answer=CHAIN.answer, method="distinct_sum")
    assert got.certified and got.unseen < 1e-12
    assert {canonical(name): mass for name, mass in got.masses.items()} == pytest.approx(EXACT, abs=1e-12)


def test_certificate_is_right_on_a_thousand_random_chains():
    certified = 0
    for seed in range(1000):
        chain = random_chain(seed)
        exact, unfinished = chain.marginals(max_tokens=4)
        paths = draw(12, seed=seed, chain=chain, max_tokens=4)
        got = estimate(paths, answer=chain.answer, method=("vote", "horvitz_thompson", "distinct_sum")[seed % 3])
        if got.certified:
            certified += 1
            assert exact[got.answer] == max(exact.values())
        for name, mass in got.masses.items():
            named = {p.ids: p for p in paths if chain.answer(p.text) == name and p.end == "stop"}
            low = sum(math.exp(p.logprob) for p in named.values())
            assert got.method != "distinct_sum" or mass <= exact[name] + 1e-9
            assert low <= exact[name] + 1e-9
        assert unfinished >= 0
    assert 200 < certified < 1000  # neither never nor always: the test has both cases


def test_certificate_needs_the_lead_to_exceed_what_was_not_seen():
    a, b = path("1", (5, 1), math.log(0.5)), path("2", (6, 1), math.log(0.2))
    assert not estimate([a, b], method="vote").certified  # 0.3 ahead, 0.3 unseen
    c = path("2", (7, 1), math.log(0.1))
    assert not estimate([a, c], method="horvitz_thompson").certified  # 0.4 ahead, 0.4 unseen
    d = path("1", (8, 1), math.log(0.1))
    assert estimate([a, b, d], method="horvitz_thompson").certified  # 0.4 ahead, 0.2 unseen


def test_certificate_never_counts_a_prefix_twice():
    cut = path("1", (5,), math.log(0.5), end="length")
    whole = path("1", (5, 1), math.log(0.4))
    got = estimate([cut, whole], method="vote")
    assert got.unseen == pytest.approx(0.6) and not got.certified


def test_certificate_is_not_given_for_a_tempered_model():
    paths = [path("1", (5, 1), math.log(0.9)), path("2", (6, 1), math.log(0.05))]
    assert estimate(paths, method="horvitz_thompson").certified
    cold = estimate(paths, method="horvitz_thompson", sampling=Sampling(temperature=0.7))
    assert not cold.certified and "temperature=0.7" in cold.caveat


def test_path_at_the_length_limit_is_unfinished_and_never_a_vote():
    paths = [path("7", (5,), end="length"), path("7", (6,), end="length"), path("60", (7, 1))]
    got = estimate(paths)
    assert got.answer == "60" and got.mass == pytest.approx(1 / 3) and got.unfinished == pytest.approx(2 / 3)
    nothing = estimate(paths[:2])
    assert nothing.answer is None and "no path finished" in nothing.caveat and "max_tokens" in nothing.caveat


def test_unfinished_mass_agrees_with_dynamic_programming():
    _, exact = CHAIN.marginals(max_tokens=6)
    paths = draw(4000, max_tokens=6)
    got = estimate(paths, equal=same_number, answer=CHAIN.answer, method="horvitz_thompson")
    assert abs(got.unfinished - exact) < 4 * math.sqrt(exact * (1 - exact) / 4000)


def test_ties_are_named_and_do_not_depend_on_order():
    paths = [path("b", (5, 1)), path("a", (6, 1))]
    for order in (paths, paths[::-1]):
        got = estimate(order)
        assert got.answer == "a" and got.leaders == ("a", "b")


@pytest.mark.parametrize("method", ["horvitz_thompson", "importance", "distinct_sum"])
def test_missing_logprobs_are_named(method):
    with pytest.raises(ValueError, match="path 1 has log p = nan.*ask the engine"):
        estimate([path("1", (5, 1)), path("2", (6, 1), math.nan)], method=method)
    with pytest.raises(ValueError, match="total probability 2 > 1"):
        estimate([path("1", (5, 1), 0.0), path("2", (6, 1), 0.0)], method=method)


def test_vote_needs_no_logprobs():
    got = estimate([path("1", (5, 1), math.nan), path("2", (6, 1), math.nan), path("1", (7, 1), math.nan)])
    assert got.answer == "1" and not got.certified and math.isnan(got.unseen)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": "mode"}, "'mode' is none of vote"),
        ({"method": "prm"}, "needs weights="),
        ({"method": "prm", "weights": [1.0]}, "1 values of weights for 2 paths"),
        ({"method": "prm", "weights": [-1.0, 2.0]}, "at least 0"),
        ({"method": "prm", "weights": [math.nan, 2.0]}, "NaN"),
        ({"method": "gumbel"}, "search 'distinct'"),
        ({"method": "rao_blackwell"}, "alternatives at a one-token answer"),
        ({"method": "importance", "target": [math.nan, 0.0]}, "target holds NaN"),
        ({"answer": ["1"]}, "1 answers for 2 paths"),
        ({"answer": lambda text: 1 / 0}, r"answer\('1'\) raised ZeroDivisionError"),
        ({"equal": lambda a, b: 1 / 0}, r"equal\('1', '2'\) raised ZeroDivisionError"),
        ({"method": "rao_blackwell", "slots": [{"1": 1.0}]}, "1 slots for 2 paths"),
        ({"method": "rao_blackwell", "slots": [{"1": 0.9, "2": 0.2}, {}]}, "no distribution"),
    ],
)
def test_bad_input_is_named(how, message):
    with pytest.raises(ValueError, match=message):
        estimate([path("1", (5, 1)), path("2", (6, 1))], **how)


@pytest.mark.parametrize("method", ["vote", "importance", "horvitz_thompson", "rao_blackwell"])
def test_weighted_paths_are_not_counted_as_independent_ones(method):
    weighed = replace(path("1", (5, 1)), log_weight=-1.0)
    with pytest.raises(ValueError, match="these carry weights"):
        estimate([weighed, path("2", (6, 1))], method=method, slots=[{"1": 1.0}, {"2": 1.0}])


def test_paths_of_two_questions_are_refused():
    with pytest.raises(ValueError, match="different prompts"):
        estimate([path("1", (5, 1)), replace(path("2", (6, 1)), prompt=(9,))])
    with pytest.raises(ValueError, match="no paths"):
        estimate([])


def test_answer_classes_need_equality_both_ways():
    labels, names, odd = group(["a", "b"], lambda left, right: (left, right) == ("a", "b"))
    assert labels == [0, 1] and names == ["a", "b"] and not odd


def test_answer_classes_close_over_a_chain_of_equals_and_say_so():
    near = lambda left, right: abs(int(left) - int(right)) <= 1  # noqa: E731
    labels, names, odd = group(["3", "1", "2", "2", None], near)
    assert labels == [0, 0, 0, 0, -1] and names == ["2"] and "'1' and '3'" in odd


def test_equality_that_is_not_transitive_certifies_nothing():
    drawn = ((0, "1", 0.4), (1, "2", 0.3), (2, "3", 0.2))
    paths = [Trajectory((9,), (Step((i,), (math.log(p),), text),), end="stop") for i, text, p in drawn]
    near = {frozenset("12"), frozenset("23")}
    joined = estimate(paths, equal=lambda left, right: left == right or frozenset((left, right)) in near)
    assert "not transitive" in joined.caveat and not joined.certified
    assert estimate(paths, equal=lambda left, right: True).certified


def test_classes_do_not_depend_on_the_order_of_paths():
    answers = ["18", "$18", "60", "18.0", "60", "7"]
    for order in itertools.permutations(answers):
        labels, names, _ = group(order, same_number)
        assert sorted(names) == ["18", "60", "7"] or sorted(names) == ["$18", "60", "7"]
        assert names == group(answers, same_number)[1]
        assert [names[i] for i in labels] == [names[group(answers, same_number)[0][answers.index(a)]] for a in order]


def test_accuracy_at_k_is_the_brute_force_mean_over_subsets():
    paths = draw(9, seed=3, top=60)
    right = [same_number(CHAIN.answer(p.text), "18") for p in paths]
    for method in ("vote", "horvitz_thompson", "rao_blackwell"):
        got = at_k(paths, right, 4, method=method, equal=same_number, answer=CHAIN.answer)
        values = []
        for subset in itertools.combinations(paths, 4):
            leaders = estimate(subset, equal=same_number, answer=CHAIN.answer, method=method).leaders
            values.append(sum(same_number(a, "18") for a in leaders) / len(leaders))
        assert got.exact and got.value == pytest.approx(np.mean(values), abs=1e-12)


def test_best_of_k_by_score_is_the_brute_force_mean_over_subsets():
    paths = draw(9, seed=3)
    paths[2] = replace(paths[2], end="length")
    scores = [0.1 * (i * 5 % 9) for i in range(9)]
    scores[2] = 5.0  # unfinished, so its score wins nothing
    right = [same_number(CHAIN.answer(p.text), "18") for p in paths]
    got = at_k(paths, right, 3, method="best", weights=scores, equal=same_number, answer=CHAIN.answer)
    values = []
    for subset in itertools.combinations(range(9), 3):
        values.append(right[max((i for i in subset if i != 2), key=lambda i: scores[i])])
    assert got.exact and got.value == pytest.approx(np.mean(values), abs=1e-12)


def test_resampled_accuracy_says_so_and_agrees_with_the_exact_one():
    paths = draw(14, seed=4)
    right = [same_number(CHAIN.answer(p.text), "18") for p in paths]
    how = {"equal": same_number, "answer": CHAIN.answer, "method": "horvitz_thompson"}
    exact, sampled = at_k(paths, right, 5, subsets=2002, **how), at_k(paths, right, 5, subsets=500, **how)
    assert exact.exact and not sampled.exact and sampled.subsets == 500
    assert abs(exact.value - sampled.value) < 4 * sampled.error
    assert at_k(paths, right, 5, subsets=500, **how) == sampled  # seeded


def test_prm_weights_move_the_answer_and_admit_what_they_are():
    paths = [path("1", (5, 1)), path("1", (6, 1)), path("2", (7, 1))]
    got = estimate(paths, method="prm", weights=[0.1, 0.1, 0.9])
    assert got.answer == "2" and got.mass == pytest.approx(0.9 / 1.1) and "not a mass" in got.caveat


def test_paths_that_the_scorer_all_gives_nothing_count_alike_and_say_so():
    paths = [path("1", (5, 1)), path("1", (6, 1)), path("2", (7, 1))]
    got = estimate(paths, method="prm", weights=[0.0, 0.0, 0.0])
    assert got.answer == "1" and got.mass == pytest.approx(2 / 3) and "count alike" in got.caveat


def test_slot_holds_the_exact_answer_law_of_its_branch():
    reasoned = next(p for p in draw(50, top=60) if p.text.startswith("S"))
    slot, going_on = read_slot(reasoned, CHAIN.answer)
    assert slot == pytest.approx({"60": 0.05, "18": 0.60, "18.0": 0.12, "$18": 0.10, "7": 0.13})
    assert going_on == 0
    assert read_slot(reasoned)[0] == slot, "a line of reasoning is no answer, also where nobody tells them apart"


def test_slots_are_refused_where_the_path_may_go_on_after_its_answer():
    tokens = ("?", "", "1", "2")  # 1 ends or becomes 11, 12, ...; 2 always ends
    p = np.array([[0, 0, 0.5, 0.5], [0, 1, 0, 0], [0, 0.5, 0.25, 0.25], [0, 1, 0, 0]])
    chain = Chain(tokens, p, {2: "1", 3: "2"})
    paths = asyncio.run(ChainEngine(chain).at(top=4).extend(chain.root(1), n=20))
    with pytest.raises(ValueError, match="go on after it with a chance of 0"):
        estimate(paths, method="rao_blackwell")
    assert estimate(paths, method="horvitz_thompson").answer == "2"
