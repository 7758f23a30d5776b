"""The engine on the paged cache against forward passes of the model, whatever joins, leaves, forks or gives way."""

import asyncio
import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reasoner import kernels
from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer
from reasoner.paged_engine import draw, paged_engine
from rollouts.noise import Noise
from rollouts.request import Request
from rollouts.row import Row
from search.base import END, STEP, TOKENS, Sampling, Trajectory

TOKENIZER = char_tokenizer("0123456789+-= \n")
EOS = TOKENIZER.eos_token_id
PROMPT = tuple(TOKENIZER.encode("12+34="))


def model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=3)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=32, n_routed_experts=8)
    dims = dict(qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=24, num_experts_per_tok=2)
    sizes |= heads | dims | {"max_position_embeddings": 64}
    made = ReasonerForCausalLM(ReasonerConfig.small(len(TOKENIZER), **(sizes | changes))).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4  # random weights are nearly the identity; these attend, choose and have favourites
    return made


def engine(of=None, *, max_tokens=20, rows=256, page=4, cache_gib=0.05, record=False, context=None, **sampling):
    options = dict(rows=rows, page=page, cache_gib=cache_gib, record=record, context=context)
    return paged_engine(of or model(), TOKENIZER, Sampling(max_tokens=max_tokens, **sampling), **options)


def cache_of(pages, page=4):
    """GiB that hold so many pages of `model()`."""
    return pages * page * 48 * 3 * 4 / 2**30


def run(*extensions):
    async def all_at_once():
        return await asyncio.gather(*extensions)

    return asyncio.run(all_at_once())


def roots(count, seed=0):
    draw = random.Random(seed)
    return [Trajectory(tuple(draw.choices(range(3, len(TOKENIZER)), k=1 + i % 13)), seed=100 + i) for i in range(count)]


@torch.no_grad()
def teacher_forced(of, path, temperature=1.0):
    logits = of(torch.tensor([path.ids])).logits[0, len(path.prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(path.ids[len(path.prompt) :])[:, None])[:, 0]


def assert_law(of, paths, temperature=1.0):
    assert paths
    for path in paths:
        got = torch.tensor([lp for step in path.steps for lp in step.logprobs])
        torch.testing.assert_close(got, teacher_forced(of, path, temperature), atol=1e-4, rtol=0)


def flat(groups):
    return [path for group in groups for path in group]


# --- refusals


def test_other_models_are_refused_with_the_engine_that_takes_them():
    small = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match="not LlamaForCausalLM: use kind 'local'"):
        paged_engine(LlamaForCausalLM(small), TOKENIZER)


def test_cache_that_does_not_hold_one_sequence_is_refused_with_the_size_that_does():
    with pytest.raises(ValueError, match="holds 60 tokens, not one sequence of 64: give at least"):
        engine(cache_gib=cache_of(15))
    engine(cache_gib=cache_of(16))


def test_token_that_the_model_does_not_have_is_refused_and_costs_the_others_nothing():
    local = engine()
    bad, good = Trajectory((len(TOKENIZER) + 5,)), Trajectory(PROMPT)

    async def both():
        return await asyncio.gather(local.extend(bad, n=2), local.extend(good, n=3), return_exceptions=True)

    refused, paths = asyncio.run(both())
    assert isinstance(refused, ValueError) and f"token {len(TOKENIZER) + 5}" in str(refused)
    assert_law(model(), paths)


def test_weights_with_other_names_are_refused_before_any_is_written():
    of = model()
    tensors = {k: v + 1 for k, v in of.state_dict().items()}
    tensors["lm_haed.weight"] = tensors.pop("lm_head.weight")
    local = engine(of)
    with pytest.raises(AssertionError, match="lm_haed"):
        local.load(tensors, version=1)
    assert local.version == 0 and torch.equal(of.lm_head.weight, model().lm_head.weight)


# --- numbers


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_a_forward_pass(temperature):
    of = model()
    local = engine(of, temperature=temperature)
    paths = flat(run(*(local.extend(root, n=3) for root in roots(16))))
    assert_law(of, paths, temperature or 1.0)


@pytest.mark.parametrize("changes", [dict(q_lora_rank=16), dict(n_group=4, topk_group=2), dict(v_head_dim=40)])
def test_other_shapes_of_the_model_have_the_same_law(changes):
    of = model(**changes)
    local = engine(of)
    assert_law(of, flat(run(*(local.extend(root, n=2) for root in roots(8)))))


@pytest.mark.parametrize("seed", range(4))
def test_law_holds_when_paths_come_at_random_and_pages_run_out(seed):
    """Requests of all kinds arrive at random moments, extend what came of earlier ones, and pages are few."""
    of, draw = model(), random.Random(seed)
    local = engine(of, cache_gib=cache_of(20), rows=9, max_tokens=40, step="\n")

    async def visitor(root):
        await asyncio.sleep(draw.random() * 0.1)
        paths = [root]
        for _ in range(3):
            path = draw.choice(paths)
            if path.end is None:
                until = draw.choice([END, STEP, TOKENS(1), TOKENS(5)])
                paths += await local.extend(path, n=draw.choice([1, 2, 5]), until=until)
        return paths[1:]

    async def everybody():
        return await asyncio.gather(*(visitor(root) for root in roots(12, seed)))

    paths = flat(asyncio.run(everybody()))
    assert_law(of, paths)
    pages = local._decoder._pages
    assert pages.available == pages.count == 20  # all given back


def test_rows_that_give_way_come_back_with_the_same_tokens():
    few, many = (engine(cache_gib=cache_of(pages), max_tokens=40) for pages in (16, 400))
    paths = [flat(run(*(local.extend(root, n=3) for root in roots(6)))) for local in (few, many)]
    assert few.ledger.prefilled > many.ledger.prefilled  # some were read again
    assert [p.ids for p in paths[0]] == [p.ids for p in paths[1]]
    assert_law(model(), paths[0])


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_paths_are_the_same_however_many_rows_there_are(rows):
    paths = [flat(run(*(local.extend(root, n=2) for root in roots(7)))) for local in (engine(rows=rows), engine())]
    assert [p.ids for p in paths[0]] == [p.ids for p in paths[1]]


def test_path_does_not_depend_on_the_batch_it_is_in():
    root, local = Trajectory(PROMPT, seed=7), engine()
    alone = run(local.extend(root, n=2))[0]
    others = [local.extend(other, n=3) for other in roots(9)] + [local.at(temperature=0.3).extend(root)]
    assert [p.ids for p in run(*others, local.extend(root, n=2))[-1]] == [p.ids for p in alone]


def test_tokens_come_as_often_as_their_probabilities_say():
    of = model()
    children = run(engine(of, rows=4000).extend(Trajectory(PROMPT, seed=5), n=4000, until=TOKENS(1)))[0]
    counts = Counter(child.ids[-1] for child in children)
    with torch.no_grad():
        expected = 4000 * of(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    likely = [i for i, e in enumerate(expected.tolist()) if e > 5]
    chi2 = sum((counts[i] - expected[i].item()) ** 2 / expected[i].item() for i in likely)
    assert chi2 < 42  # far above the 99.9% point at up to 17 degrees of freedom; the draw is fixed by its seeds


def test_top_p_and_alternatives_follow_the_law_of_the_local_engine():
    from rollouts.local_engine import LocalEngine

    of, settings = model(), dict(max_tokens=6, top_p=0.6, top=3)
    paged = engine(of, **settings)
    for path in run(paged.extend(Trajectory(PROMPT, seed=5), n=20))[0]:
        step = path.steps[0]
        assert all(
            lp in [a.logprob for a in row if a.id == i]
            for i, lp, row in zip(step.ids, step.logprobs, step.top, strict=True)
        )
    first = {c.ids[-1] for c in run(paged.extend(Trajectory(PROMPT, seed=5), n=300, until=TOKENS(1)))[0]}
    local = LocalEngine(of, TOKENIZER, Sampling(**settings))
    assert first == {c.ids[-1] for c in run(local.extend(Trajectory(PROMPT, seed=5), n=300, until=TOKENS(1)))[0]}


@pytest.mark.parametrize(
    "settings",
    [dict(max_tokens=20), dict(arithmetic=True, max_tokens=4), dict(temperature=0.0), dict(top_p=0.8, temperature=1.3)],
)
def test_one_seed_gives_the_path_of_the_local_engine(settings):
    from rollouts.local_engine import LocalEngine

    of = model()
    both = (engine(of, **settings), LocalEngine(of, TOKENIZER, Sampling(**{"max_tokens": 20, **settings})))
    paths = [flat(run(*(each.extend(root, n=6) for root in roots(5)))) for each in both]
    assert [p.ids for p in paths[0]] == [p.ids for p in paths[1]]


def test_draw_by_the_kernel_follows_the_law_and_its_seeds_alone():
    logits = model()(torch.tensor([PROMPT])).logits[0, -1].detach()
    with kernels.using("emulate"):
        rows = [Row(Request(PROMPT, (i,), 9, END, Sampling()), i, Noise(i)) for i in range(2000)]
        tokens, logprobs = draw(logits.expand(2000, -1), rows, None)
        again, _ = draw(logits.expand(7, -1), rows[1000:1007], None)
    assert again == tokens[1000:1007]
    torch.testing.assert_close(torch.tensor(logprobs), logits.log_softmax(-1)[tokens], atol=1e-5, rtol=0)
    expected, counts = 2000 * logits.softmax(-1), Counter(tokens)
    likely = [i for i, e in enumerate(expected.tolist()) if e > 5]
    assert sum((counts[i] - expected[i].item()) ** 2 / expected[i].item() for i in likely) < 42


# --- where an extension stops


def test_answer_ends_at_its_end_token_and_steps_after_their_delimiter():
    children = run(engine(max_tokens=50).extend(Trajectory(PROMPT, seed=1), n=60, until=STEP))[0]
    assert {child.end for child in children} >= {"stop", None}
    for child in children:
        assert (child.end == "stop") == (child.ids[-1] == EOS) and EOS not in child.ids[:-1]
        if child.end is None:
            assert child.text.endswith("\n") and child.text.count("\n") == 1


def test_limit_is_the_context_or_max_tokens_whichever_is_nearer():
    for path in run(engine(context=16, max_tokens=99).extend(Trajectory(PROMPT, seed=3), n=20))[0]:
        assert len(path.ids) <= 16 and path.end in ("stop", "length")
    for path in run(engine(max_tokens=5).extend(Trajectory(PROMPT, seed=3), n=20))[0]:
        assert path.sampled_tokens <= 5


# --- sharing


def test_children_share_the_prompt_and_later_steps_find_what_was_read():
    local = engine(max_tokens=40, page=2)
    children = run(local.extend(Trajectory(PROMPT, seed=1), n=6, until=TOKENS(8)))[0]
    assert local.ledger.prefilled == len(PROMPT) and local.ledger.cached == 5 * len(PROMPT)
    pages = local._decoder._pages
    open_children = [child for child in children if child.end is None]
    grown = flat(run(*(local.extend(child) for child in open_children)))
    for before, after in zip(open_children, grown, strict=True):
        assert after.steps[1].cached == (len(before.ids) - 1) // 2 * 2
    assert pages.available == pages.count
    assert_law(model(), grown)


def test_pages_in_use_at_once_are_fewer_than_without_sharing():
    of, most = model(), []
    local = engine(of, page=2, max_tokens=2)
    pages = local._decoder._pages
    of.model.norm.register_forward_pre_hook(lambda *_: most.append(pages.count - pages.available))
    run(local.extend(Trajectory(PROMPT * 2, seed=1), n=10))
    assert max(most) <= 6 + 10 * 1  # six full pages for all, and one of its own for each


@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.0])
def test_rows_are_computed_once_until_they_draw_different_tokens(temperature):
    """As many tokens go through the head as there are distinct beginnings of what was drawn."""
    of, read = model(), []
    local = engine(of, page=4, temperature=temperature)
    of.lm_head.register_forward_pre_hook(lambda _, given: read.append(len(given[0])))
    paths = flat(run(*(local.extend(Trajectory(PROMPT[i:], seed=i), n=7) for i in (0, 1))))
    beginnings = {path.ids[:i] for path in paths for i in range(len(path.prompt), len(path.ids))}
    drawn = sum(path.length for path in paths)
    assert sum(read) == len(beginnings) and local.ledger.generated == drawn
    assert len(beginnings) * (7 if temperature == 0 else 1) <= drawn
    assert_law(of, paths, temperature or 1.0)


def test_rows_in_one_seat_keep_their_own_limits_and_laws():
    """Calls that begin alike but end, and draw, by different settings."""
    of = model()
    local = engine(of, max_tokens=12)
    same = Trajectory(PROMPT, seed=1)
    long, short, cold, few = run(
        local.extend(same),
        local.at(max_tokens=5).extend(same),
        local.at(temperature=0.0).extend(same),
        local.extend(same, until=TOKENS(3)),
    )
    assert short[0].ids == long[0].ids[: len(PROMPT) + 5] and few[0].ids == long[0].ids[: len(PROMPT) + 3]
    assert (len(short[0].ids), short[0].end, few[0].end) == (len(PROMPT) + 5, "length", None)
    assert_law(of, [*long, *short, *cold, *few])
    assert cold[0].ids == run(engine(of, max_tokens=12, temperature=0.0).extend(same))[0][0].ids


def test_rows_that_part_where_no_page_is_left_wait_and_lose_nothing():
    """One noise under five laws that hardly differ: rows agree for long and part late, when the few pages are taken."""

    def grown(**options):
        local = engine(page=4, **options)
        return local, flat(run(*(local.at(temperature=0.5 + 0.01 * k).extend(roots(1)[0]) for k in range(5))))

    local, got = grown(context=20, cache_gib=cache_of(6))
    _, want = grown(context=20)
    assert [path.ids for path in got] == [path.ids for path in want] and len({path.ids for path in got}) > 1
    assert local.ledger.prefilled > len(roots(1)[0].prompt)  # some were read again
    assert local._decoder._pages.available == local._decoder._pages.count


# --- weights


def test_new_weights_forget_the_cache_and_change_version_and_law():
    local, other = engine(), model(seed=9)
    before = run(local.extend(Trajectory(PROMPT, seed=1), n=3))[0]
    local.load(other.state_dict(), version=4)
    after = run(local.extend(Trajectory(PROMPT, seed=1), n=3))[0]
    assert after[0].steps[0].cached == 0
    assert {v for p in before for v, _, _ in p.steps[0].versions} == {0}
    assert {v for p in after for v, _, _ in p.steps[0].versions} == {4}
    assert_law(other, after)


def test_weights_loaded_in_flight_are_told_by_version_spans_and_leave_no_mixed_pages():
    of, other = model(), model(seed=9)
    local = engine(of, max_tokens=50, page=2)
    reached, go_on, passes = threading.Event(), threading.Event(), []

    def on_pass(*_):
        passes.append(0)
        if len(passes) == 5:
            reached.set()
            go_on.wait(10)

    of.model.norm.register_forward_pre_hook(on_pass)

    async def load_while_decoding():
        extension = asyncio.ensure_future(local.extend(Trajectory(PROMPT, seed=1), n=16))
        await asyncio.to_thread(reached.wait, 10)
        load = asyncio.ensure_future(asyncio.to_thread(local.load, other.state_dict(), 1))
        await asyncio.sleep(0.05)  # `load` waits for the token that holds the lock
        go_on.set()
        await load
        return await extension

    paths = asyncio.run(load_while_decoding())
    longest = max(paths, key=lambda p: len(p.ids)).steps[0]
    (old, zero, cut), (new, cut_again, end) = longest.versions
    assert (old, zero, new, end) == (0, 0, 1, len(longest.ids)) and cut == cut_again >= 5
    fresh = run(local.extend(Trajectory(PROMPT, seed=1), n=4))[0]
    assert fresh[0].steps[0].cached == 0
    assert_law(other, fresh)


# --- routing


def routed(path, of):
    layers, chosen = of.config.num_hidden_layers, of.config.num_experts_per_tok
    return np.frombuffer(b"".join(s.experts for s in path.steps), "<i2").reshape(-1, layers, chosen)


def test_recorded_experts_are_those_of_a_forward_pass_over_steps_forks_and_rows_that_gave_way():
    of = model()
    local = engine(of, record=True, cache_gib=cache_of(24), max_tokens=40)
    children = flat(run(*(local.extend(root, n=4, until=TOKENS(6)) for root in roots(5))))
    grown = flat(run(*(local.extend(child, n=2) for child in children if child.end is None)))
    for path in (*children, *grown):
        with torch.no_grad():
            used = of(torch.tensor([path.ids]), output_experts=True).experts[0, :-1]
        got = torch.from_numpy(routed(path, of).astype("int64"))
        assert torch.equal(got.sort(-1).values, used.sort(-1).values)


def test_nothing_is_recorded_unless_asked_for():
    assert run(engine().extend(Trajectory(PROMPT)))[0][0].steps[0].experts == b""


# --- the queue


def test_event_loop_runs_while_the_model_computes():
    local = engine(max_tokens=50)

    async def count_turns():
        turns, extension = 0, asyncio.ensure_future(local.extend(Trajectory(PROMPT, seed=1), n=200))
        while not extension.done():
            await asyncio.sleep(0.001)
            turns += 1
        return turns

    assert asyncio.run(count_turns()) > 5


def test_rows_join_between_two_tokens_of_others():
    of = model()
    local, widths = engine(of, max_tokens=50), []
    of.model.norm.register_forward_pre_hook(lambda _, given: widths.append(len(given[0])))

    async def join():
        first = asyncio.ensure_future(local.extend(Trajectory(PROMPT, seed=1), n=8))
        while len(widths) < 4:
            await asyncio.sleep(0)
        return flat([await local.extend(Trajectory(PROMPT[:3], seed=2), until=TOKENS(1)), await first])

    assert_law(model(), asyncio.run(join()))
    assert 1 in widths[4:-1]  # the second prompt was read before the first rows were done


def test_nothing_is_drawn_for_a_cancelled_search(drawn_after_cancelling):
    after, own = drawn_after_cancelling(engine(max_tokens=50), PROMPT)
    assert after <= own + 2 * 8  # the token under way, and one that began before the cancellation was seen


def test_cancelled_call_gives_its_pages_back():
    local = engine(max_tokens=50)

    async def cancel_one():
        doomed = asyncio.ensure_future(local.extend(Trajectory(PROMPT, seed=1), n=4))
        await asyncio.sleep(0.02)
        doomed.cancel()
        return await local.extend(Trajectory(PROMPT, seed=2))

    assert asyncio.run(cancel_one())[0].steps
    pages = local._decoder._pages
    assert pages.available == pages.count


def test_not_a_number_in_the_weights_is_an_error_and_hangs_nothing():
    of, good = model(), model().state_dict()
    of.lm_head.weight.data.fill_(float("nan"))
    local = engine(of, max_tokens=5)
    with pytest.raises(FloatingPointError, match="weights are spoiled"):
        run(local.extend(Trajectory(PROMPT), n=3))
    local.load(good, 1)
    assert run(local.extend(Trajectory(PROMPT)))[0][0].end in ("stop", "length")


def test_step_runs_on_the_kernels_as_on_the_references():
    """In the emulator, at a size the kernels take: bfloat16, so the laws agree to its rounding."""
    sizes = dict(kv_lora_rank=128, qk_rope_head_dim=32, num_hidden_layers=2)
    paths = {}
    for mode in ("emulate", "reference"):
        with kernels.using(mode):
            local = engine(model(**sizes).to(torch.bfloat16), max_tokens=3, temperature=0.0)
            paths[mode] = flat(run(*(local.extend(root) for root in roots(3))))
    for got, want in zip(paths["emulate"], paths["reference"], strict=True):
        assert got.steps[0].logprobs[0] == pytest.approx(want.steps[0].logprobs[0], abs=0.05)


# --- what it needs


SCRIPT = """
import sys
for absent in ("accelerate", "trl", "ray", "vllm", "datasets", "peft", "rich"):
    sys.modules[absent] = None  # importing it raises
import asyncio, torch
from reasoner.model import *
from reasoner.paged_engine import paged_engine
from search.base import Sampling, Trajectory
tokenizer = char_tokenizer("0123456789+=")
model = ReasonerForCausalLM(ReasonerConfig.small(vocab_size=len(tokenizer), num_hidden_layers=2))
engine = paged_engine(model, tokenizer, Sampling(max_tokens=4), context=64)
print(len(asyncio.run(engine.extend(Trajectory((3, 4, 5)), n=3))))
"""


def test_engine_needs_torch_and_transformers_alone():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "3", done.stderr
