"""The tree counts every token, keeps its budget, replays its log, and grows the same under any scheduling order."""

import asyncio
import inspect
import json
import math
import random

import pytest

from search import SEARCHES, find
from search.base import END, STEP, Engine, Sampling, derive
from search.beam import Beam
from search.mcts import Mcts
from search.sample import BestOf, Sample
from search.scripted import Jittered, Scripted
from search.toy import ChainEngine, same_number, trap
from search.tree import Record, Replay, Tree, explore, nodes, together

CHAIN = trap()
CHANCE = CHAIN.chance(lambda answer: float(same_number(answer, "18")))
WRITERS = ("revise", "refine", "force")
UNSCORED = ("sample", "adaptive", "distinct", "cot", "revise", "force")  # run without a scorer


def last(path):
    return path.ids[-2] if path.end == "stop" else path.ids[-1]


async def chance(path):
    return float(CHANCE[last(path)])


def run(search, engine=None, seed=0, score=chance, **how):
    return asyncio.run(explore(search, CHAIN.root(seed), engine or ChainEngine(CHAIN), score, **how))


def scripted(**sampling):
    def reply(text, child):
        return f"{derive(text, child) % 5}\n" * (1 + derive(text) % 3) + f"ans {derive(text, child, 'a') % 3}"

    return Scripted(reply, Sampling(**{"max_tokens": 40, **sampling}))


async def by_hash(path):
    return derive(path.text) % 1000 / 1000


def late(score, order):
    async def answer_late(path):
        for _ in range(order.randrange(6)):
            await asyncio.sleep(0)
        return await score(path)

    return answer_late


def any_search(kind, engine=None, seed=0, order=None, **how):
    """Each search with its defaults, on the toy chain or, if it writes, on a scripted engine."""
    search, writes = SEARCHES[kind](), kind in WRITERS
    engine = engine or (scripted() if writes else ChainEngine(CHAIN))
    score = by_hash if writes else chance
    if order is not None:
        engine, score = Jittered(engine, order), late(score, order)
    root = Scripted.root("q", seed) if writes else CHAIN.root(seed)
    return asyncio.run(explore(search, root, engine, score, **how))


def canonical(rows):
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


@pytest.mark.parametrize("kind", SEARCHES)
def test_same_seed_grows_the_same_tree_under_any_scheduling_order(kind):
    base = scripted() if kind in WRITERS else ChainEngine(CHAIN)
    plain = any_search(kind, base, seed=3)
    assert plain.paths
    for order in range(4):
        again = any_search(kind, base, seed=3, order=random.Random(order))
        assert again.paths == plain.paths
        if kind != "adaptive":  # what was in flight when it stopped is cancelled, or not, by chance
            assert canonical(again.tree.record.rows) == canonical(plain.tree.record.rows)
    assert any_search(kind, base, seed=4).paths != plain.paths or kind == "cot"  # cot is deterministic


@pytest.mark.parametrize("kind", SEARCHES)
def test_budget_is_never_exceeded(kind):
    engine = scripted() if kind in WRITERS else ChainEngine(CHAIN, Sampling(max_tokens=10))
    longest = engine.sampling.max_tokens
    free = any_search(kind, engine).tree.ledger.generated
    for budget in (longest, 2 * longest, 3 * longest, free):
        if budget >= longest:
            got = any_search(kind, engine, budget=budget)
            assert got.tree.ledger.generated <= budget
            assert got.tree.record.reserved == 0
    assert any_search(kind, engine, budget=100 * free + 10**5).tree.ledger.generated == free


@pytest.mark.parametrize("kind", [kind for kind in SEARCHES if kind != "adaptive"])  # what it cancels is not logged
def test_replaying_the_log_generates_nothing_and_finds_the_same(kind):
    engine = scripted() if kind in WRITERS else ChainEngine(CHAIN)
    first = any_search(kind, engine, seed=2)
    rows = json.loads(json.dumps(first.tree.record.rows))  # as it comes back from a file
    calls = []

    class Counted:
        sampling, offers = engine.sampling, engine.offers
        write = staticmethod(engine.write)

        def at(self, **changes):
            assert engine.at(**changes)
            return self

        async def extend(self, path, **how):
            calls.append(path)
            return []

    replay = Replay(rows, engine.sampling, Counted(), engine.offers)
    root = Scripted.root("q", 2) if kind in WRITERS else CHAIN.root(2)
    again = asyncio.run(SEARCHES[kind]().run(root, replay, replay.score))
    assert again == first.paths and not calls


def test_interrupted_search_resumes_from_its_log():
    engine, search = ChainEngine(CHAIN), Beam()
    whole = run(search, engine, seed=5)
    half = Replay(whole.tree.record.rows[: len(whole.tree.record.rows) // 2], engine.sampling, engine, engine.offers)
    tree = Tree(half, chance)
    assert asyncio.run(search.run(CHAIN.root(5), tree, tree.score)) == whole.paths


@pytest.mark.parametrize("search", [Sample(), BestOf(aggregate="min"), Beam(), Mcts(), SEARCHES["rebase"]()])
def test_generated_tokens_are_the_tree_minimum(search):
    outcome = run(search, seed=1)
    ledger, tree = outcome.tree.ledger, nodes(outcome.tree.record.rows)
    assert ledger.generated == sum(node["tokens"] for node in tree if node["parent"] is not None)
    assert ledger.generated / sum(node["tokens"] for node in tree) == 1.0
    assert ledger.prefilled + ledger.cached > 0 and ledger.seconds > 0


def test_scorer_is_asked_once_per_path_and_reads_each_token_once():
    asked = []

    async def score(path):
        asked.append(path.ids)
        return await chance(path)

    outcome = run(BestOf(n=8, aggregate="mean"), seed=1, score=score)
    assert len(asked) == len(set(asked))
    # A step of the chain is one token, but for the last: the answer and the end, read together.
    distinct = {path.ids[: i + 1] for path in outcome.paths for i in range(len(path.ids))}
    assert outcome.tree.ledger.judged == len(distinct) <= 1.15 * outcome.tree.ledger.generated


def test_cancelled_search_leaves_nothing_running():
    class Stuck(Scripted):
        async def extend(self, path, *, n=1, until=END):
            await asyncio.sleep(3600)

    async def main():
        tree = Tree(Stuck(lambda text, child: "x"))
        task = asyncio.ensure_future(together(tree.extend(Scripted.root("q", i)) for i in range(5)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return tree.ledger.cancelled, tree.record.reserved, len(asyncio.all_tasks())

    assert asyncio.run(main()) == (5, 0, 1)


def test_error_of_one_call_stops_the_others_and_is_not_hidden():
    class Broken(Scripted):
        async def extend(self, path, *, n=1, until=END):
            if path.seed == 2:
                raise RuntimeError("engine lost")
            await asyncio.sleep(3600)

    async def main():
        tree = Tree(Broken(lambda text, child: "x"))
        with pytest.raises(RuntimeError, match="engine lost"):
            await together(tree.extend(Scripted.root("q", i)) for i in range(4))
        return len(asyncio.all_tasks())

    assert asyncio.run(main()) == 1


def test_nan_score_is_an_error_and_never_a_rank():
    async def score(path):
        return math.nan

    with pytest.raises(ValueError, match="scorer gave NaN"):
        run(Beam(), score=score)


@pytest.mark.parametrize("kind", [kind for kind in SEARCHES if kind not in UNSCORED])
def test_search_that_needs_a_score_says_so_before_generating(kind):
    engine = scripted() if kind in WRITERS else ChainEngine(CHAIN)
    with pytest.raises(ValueError, match="needs a score and has none"):
        asyncio.run(explore(SEARCHES[kind](), CHAIN.root(), engine, None))


@pytest.mark.parametrize("kind", ["beam", "dvts", "rebase", "mcts", "particle"])
def test_step_search_without_a_delimiter_is_refused(kind):
    with pytest.raises(ValueError, match="sampling.step is empty"):
        run(SEARCHES[kind](), ChainEngine(CHAIN, Sampling(step="")))


@pytest.mark.parametrize("kind", ["distinct", "cot", "revise", "refine", "force"])
def test_engine_that_lacks_an_offer_is_named(kind):
    engine = Scripted(lambda text, child: "x", offers=frozenset())
    with pytest.raises(ValueError, match="needs an engine that offers '(top|write)'; Scripted does not"):
        asyncio.run(explore(SEARCHES[kind](), Scripted.root("q"), engine, by_hash))


def test_budget_smaller_than_one_path_is_refused():
    with pytest.raises(ValueError, match=r"budget=9 tokens is smaller than one path \(sampling.max_tokens=10\)"):
        run(Sample(), ChainEngine(CHAIN, Sampling(max_tokens=10)), budget=9)


@pytest.mark.parametrize(
    ("kind", "knobs", "message"),
    [
        ("sample", {"n": 0}, "Sample: n=0 must be positive"),
        ("best_of", {"aggregate": "median"}, "'median' is none of last, min, product, mean"),
        ("beam", {"expand": "all"}, "expand='all' is none of sample, top"),
        ("beam", {"until": "word"}, "until='word'"),
        ("dvts", {"until": 0}, "at least 1 token"),
        ("mcts", {"policy": "ucb"}, "policy='ucb' is none of puct, uct"),
        ("particle", {"ess": 2.0}, "ess=2.0"),
        ("particle", {"target": "prior"}, "target='prior'"),
        ("rejection", {"keep": 0.0}, "keep=0.0"),
        ("adaptive", {"confidence": 0.4}, "confidence=0.4"),
        ("rebase", {"balance": 0.0}, "balance=0.0 must be positive"),
        ("force", {"waits": -1}, "waits=-1"),
        ("revise", {"feedback": "key"}, "feedback='key'"),
    ],
)
def test_wrong_knob_is_named(kind, knobs, message):
    with pytest.raises(ValueError, match=message):
        SEARCHES[kind](**knobs)


def test_unknown_search_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'mcts'"):
        find("mtcs")
    assert find("beam") is Beam


@pytest.mark.parametrize("kind", SEARCHES)
def test_answer_key_has_no_way_into_a_search(kind):
    """A search is given a path, an engine and a score, and nothing else: no parameter could carry a reference."""
    assert list(inspect.signature(SEARCHES[kind].run).parameters) == ["self", "root", "engine", "score"]
    seen = []

    class Spy(ChainEngine):
        async def extend(self, path, *, n=1, until=END):
            seen.append((path, n, until))
            return await super().extend(path, n=n, until=until)

    if kind in UNSCORED and kind not in WRITERS:
        run(SEARCHES[kind](), Spy(CHAIN), score=None)  # runs to its end with no scorer at all
        assert seen


def test_path_already_at_its_limit_costs_nothing_and_is_unfinished():
    engine = ChainEngine(CHAIN)
    (path,) = asyncio.run(engine.extend(CHAIN.root(), until=STEP))
    tree = Tree(engine.at(max_tokens=1))
    (child,) = asyncio.run(tree.extend(path))
    assert child.end == "length" and child.ids == path.ids and tree.ledger.generated == 0
    rows = json.loads(json.dumps(tree.record.rows))
    assert asyncio.run(Replay(rows, tree.sampling).extend(path)) == [child]
    assert [node["tokens"] for node in nodes(rows)] == [1, 0]


def test_tree_of_paths_can_be_drawn():
    outcome = run(Beam(width=2, branch=2), seed=1)
    tree = {node["path"]: node for node in nodes(outcome.tree.record.rows)}
    roots = [node for node in tree.values() if node["parent"] is None]
    assert len(roots) == 1
    for node in tree.values():
        assert node["parent"] is None or node["parent"] in tree
        assert node["score"] is not None or node["parent"] is None
    assert any(node["end"] == "stop" and node["text"] in ("18", "$18", "18.0", "60", "7") for node in tree.values())


def test_tree_is_an_engine():
    tree = Tree(ChainEngine(CHAIN), None, Record())
    assert {name for name in vars(Engine) if not name.startswith("_")} <= {*dir(tree)}
    assert tree.at(temperature=0.5).sampling.temperature == 0.5 and tree.at(temperature=0.5).record is tree.record
    assert len(asyncio.run(tree.extend(CHAIN.root(), n=3, until=STEP))) == 3
