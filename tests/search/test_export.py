"""Training data from searched paths: pairs differ from their first token on, written tokens are never learnt."""

import asyncio
from dataclasses import replace

import pytest

from search.base import STEP, Step, Trajectory
from search.export import dpo, sft, shared, step_labels
from search.toy import ChainEngine, same_number, trap

PROMPT = (100, 101)


def path(*steps, end="stop", logprob=-1.0, written=()):
    made = tuple(
        Step(tuple(ids), (logprob,) * len(ids) if i not in written else (0.0,) * len(ids), sampled=i not in written)
        for i, ids in enumerate(steps)
    )
    return Trajectory(PROMPT, made, end=end)


def test_wrong_unfinished_and_unjudged_paths_are_never_imitated():
    paths = [path([1, 0]), path([2, 0]), path([3, 4], end="length"), path([5, 0])]
    rows = sft(paths, [True, False, True, None])
    assert [row["completion"] for row in rows] == [[1, 0]] and rows[0]["prompt"] == [100, 101]


def test_chosen_paths_branch_early_and_share_one_unit_of_weight():
    likely = path([1, 1], [1, 0], logprob=-0.1)
    near = path([1, 1], [2, 0], logprob=-0.2)
    far = path([9, 9], [9, 0], logprob=-5.0)
    rows = sft([far, near, likely, replace(near, seed=5)], [True] * 4, keep=2)
    assert [row["completion"] for row in rows] == [[1, 1, 1, 0], [9, 9, 9, 0]]
    assert sum(row["weight"] for row in rows) == 1
    assert len(sft([far, near, likely, near], [True] * 4)) == 3  # no path twice
    assert sft([far], [False]) == []


def test_pairs_share_a_prefix_and_differ_from_the_first_token_on():
    right, wrong = path([1, 2], [3, 0]), path([1, 2], [4, 0])
    other = path([7, 0])
    (row,) = dpo([right, wrong, other], [True, False, False])
    assert row["prompt"] == [100, 101, 1, 2] and row["chosen"] == [3, 0] and row["rejected"] == [4, 0]


def test_each_path_is_in_one_pair_at_most():
    rights, wrongs = [path([1, i, 0]) for i in range(5, 8)], [path([1, i, 0]) for i in range(8, 10)]
    rows = dpo(rights + wrongs, [True] * 3 + [False] * 2)
    assert len(rows) == 2
    assert len({tuple(row["chosen"]) for row in rows}) == len({tuple(row["rejected"]) for row in rows}) == 2
    assert len(dpo(rights + wrongs, [True] * 3 + [False] * 2, pairs=1)) == 1


def test_pairs_never_diverge_at_a_token_that_the_search_wrote():
    right, wrong = path([1], [2], [3, 0], written=(1,)), path([1], [4], [3, 0], written=(1,))
    assert dpo([right, wrong], [True, False]) == []


def test_written_tokens_are_masked():
    (row,) = sft([path([1], [2, 3], [4, 0], written=(1,))], [True])
    assert row["completion"] == [1, 2, 3, 4, 0] and row["mask"] == [1, 0, 0, 1, 1]


def test_step_labels_are_shares_of_right_paths_through_the_prefix():
    a, b, c = path([1], [2, 0]), path([1], [3, 0]), path([9], [2, 0])
    rows = step_labels([a, b, c, path([1], [5, 0])], [True, False, False, None])
    assert [row["soft"] for row in rows] == [[0.5, 1.0], [0.5, 0.0], [0.0, 0.0]]
    assert [row["hard"] for row in rows] == [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    assert [row["ends"] for row in rows] == [[1, 3]] * 3 and rows[0]["paths"] == [2, 1]


@pytest.mark.parametrize(("a", "b", "length"), [((1, 2, 3), (1, 2, 4), 2), ((1,), (1, 2), 1), ((), (1,), 0)])
def test_shared_prefix_is_counted_in_tokens(a, b, length):
    assert shared(a, b) == shared(b, a) == length


def test_step_labels_of_many_samples_approach_the_exact_chances():
    chain = trap()
    chance = chain.chance(lambda answer: float(same_number(answer, "18")))

    async def draw():
        engine = ChainEngine(chain)
        open_, done = await engine.extend(chain.root(1), n=3000, until=STEP), []
        while open_:
            grown = [(await engine.extend(p, until=STEP))[0] for p in open_]
            done += [p for p in grown if p.end]
            open_ = [p for p in grown if not p.end]
        return done

    paths = asyncio.run(draw())
    rows = step_labels(paths, [same_number(chain.answer(p.text), "18") for p in paths])
    for row in rows[:200]:
        first = row["completion"][0]
        p, n = chance[first], row["paths"][0]
        assert abs(row["soft"][0] - p) < 4 * (p * (1 - p) / n) ** 0.5
