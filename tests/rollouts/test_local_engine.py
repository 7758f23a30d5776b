"""The in-process engine against teacher-forced forward passes, exact distributions and transformers' own generate."""

import asyncio
import threading
from collections import Counter

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rollouts.local_engine import LocalEngine
from search.base import STEP, TOKENS, Sampling, Step, Trajectory, derive

LETTERS = ["<pad>", "<eos>", "\n", *"0123456789+-= "]
EOS = 1
PROMPT = (6, 13, 7, 15)  # "3+4="


def characters():
    plain = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    plain.decoder = decoders.Fuse()
    template = "{% for m in messages %}{{ m['content'] }}{{ '<eos>' if m['role'] == 'assistant' else '=' }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>", chat_template=template)


def llama(seed=0, **changes):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    fixed = dict(vocab_size=len(LETTERS), max_position_embeddings=64, eos_token_id=EOS)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **fixed, **changes}))
    model.lm_head.weight.data *= 8  # random weights give nearly equal probabilities; these have favourites
    return model


def mla_moe():
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16)
    dims = dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    experts = dict(n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1)
    config = DeepseekV3Config(vocab_size=len(LETTERS), max_position_embeddings=64, **shape, **heads, **dims, **experts)
    model = DeepseekV3ForCausalLM(config)
    model.lm_head.weight.data *= 8
    return model


def engine(model=None, **sampling):
    return LocalEngine(model or llama(), characters(), Sampling(**{"max_tokens": 12, **sampling}))


def run(*extensions):
    async def all_at_once():
        return await asyncio.gather(*extensions)

    return asyncio.run(all_at_once())


def roots(count):
    return [Trajectory(PROMPT[: 1 + i % 4], seed=100 + i) for i in range(count)]


@torch.no_grad()
def teacher_forced(model, path, temperature=1.0):
    """Log-probabilities of the response tokens from one forward pass over the whole path."""
    logits = model(torch.tensor([path.ids])).logits[0, len(path.prompt) - 1 : -1] / temperature
    new = torch.tensor(path.ids[len(path.prompt) :])
    return logits.log_softmax(-1).gather(1, new[:, None])[:, 0]


def logprobs(path):
    return torch.tensor([lp for step in path.steps for lp in step.logprobs])


# --- refusals


def test_path_that_has_ended_is_refused():
    with pytest.raises(ValueError, match="has ended"):
        run(engine().extend(Trajectory(PROMPT, end="stop")))


@pytest.mark.parametrize("length", [0, 64, 70])
def test_prompt_that_leaves_no_room_or_is_empty_is_refused(length):
    with pytest.raises(ValueError, match=f"{length} tokens: give 1 to 63"):
        run(engine().extend(Trajectory((3,) * length)))


def test_weights_with_other_names_are_refused_before_any_is_written():
    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = {k: v + 1 for k, v in before.items()}
    tensors["lm_haed.weight"] = tensors.pop("lm_head.weight")
    local = engine(model)
    with pytest.raises(AssertionError, match="lm_haed"):
        local.load(tensors, version=1)
    assert local.version == 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_failure_in_the_model_reaches_every_caller_and_the_engine_lives_on():
    local = engine()
    bad = Trajectory((len(LETTERS) + 5,))  # no such token: the embedding raises

    async def two_then_one():
        failed = await asyncio.gather(local.extend(bad), local.extend(bad), return_exceptions=True)
        return failed, await local.extend(Trajectory(PROMPT))

    failed, good = asyncio.run(two_then_one())
    assert [type(f) for f in failed] == [IndexError, IndexError]
    assert len(good[0].steps) == 1


# --- numbers


@pytest.mark.parametrize("make", [llama, mla_moe])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_forward_pass_over_the_path(make, temperature):
    model = make()
    local = engine(model, temperature=temperature)
    groups = run(*(local.extend(root, n=4) for root in roots(6)))  # prefixes of unequal length: padding is exercised
    for path in (path for group in groups for path in group):
        assert torch.allclose(logprobs(path), teacher_forced(model, path, temperature), atol=1e-4)


def test_greedy_equals_generate_of_transformers():
    model = llama(seed=3)
    (path,) = run(engine(model, temperature=0.0).extend(Trajectory(PROMPT)))[0]
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
    assert path.ids == tuple(expected.tolist())
    assert torch.allclose(logprobs(path), teacher_forced(model, path), atol=1e-4)


def test_tokens_come_as_often_as_their_probabilities_say():
    model = llama()
    children = run(engine(model).extend(Trajectory(PROMPT, seed=5), n=4000, until=TOKENS(1)))[0]
    counts = Counter(child.ids[-1] for child in children)
    with torch.no_grad():
        probabilities = model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    expected = 4000 * probabilities
    chi2 = sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected.tolist()))
    assert chi2 < 39.3  # the 99.9% point at 16 degrees of freedom; the draw is fixed by its seeds


def test_top_p_draws_only_from_the_nucleus_and_renormalises():
    model = llama()
    children = run(engine(model, top_p=0.5).extend(Trajectory(PROMPT, seed=5), n=400, until=TOKENS(1)))[0]
    with torch.no_grad():
        ranked = model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1).sort(descending=True)
    size = int((ranked.values.cumsum(0) < 0.5).sum()) + 1
    nucleus = dict(
        zip(ranked.indices[:size].tolist(), (ranked.values[:size] / ranked.values[:size].sum()).tolist(), strict=True)
    )
    assert {child.ids[-1] for child in children} == set(nucleus)
    for child in children:
        assert child.logprob == pytest.approx(torch.tensor(nucleus[child.ids[-1]]).log().item(), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_top_lists_the_likeliest_tokens_and_always_the_sampled_one(temperature):
    model = llama()
    for path in run(engine(model, top=3, temperature=temperature).extend(Trajectory(PROMPT, seed=5), n=20))[0]:
        step = path.steps[0]
        with torch.no_grad():
            laws = model(torch.tensor([path.ids])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        for token, logprob, row, law in zip(step.ids, step.logprobs, step.top, laws, strict=True):
            best = law.topk(3)
            assert [a.id for a in row[:3]] == best.indices.tolist()
            assert [a.logprob for a in row[:3]] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [a.logprob for a in row if a.id == token] == [logprob]
            assert len(row) == 3 + (token not in best.indices)
            assert all(a.ends == (a.id == EOS) and a.text == ("" if a.id < 2 else LETTERS[a.id]) for a in row)


def test_arithmetic_children_are_spread_evenly_over_the_first_token():
    model = llama()
    children = run(engine(model, arithmetic=True).extend(Trajectory(PROMPT, seed=5), n=64, until=TOKENS(1)))[0]
    counts = Counter(child.ids[-1] for child in children)
    with torch.no_grad():
        probabilities = model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1).tolist()
    for token, p in enumerate(probabilities):
        assert abs(counts[token] - 64 * p) < 1.01  # independent draws stray by several


@torch.no_grad()
def test_arithmetic_path_still_has_the_law_of_the_model_at_its_second_token():
    model = llama(eos_token_id=None)
    tokens = range(len(LETTERS))
    first = model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    second = model(torch.tensor([(*PROMPT, t) for t in tokens])).logits[:, -1].softmax(-1)
    first[EOS] = 0  # paths that end at once have no second token
    expected = (first[:, None] * second).sum(0)
    local = engine(model, arithmetic=True)
    paths = run(*(local.extend(Trajectory(PROMPT, seed=i), until=TOKENS(2)) for i in range(3000)))
    counts = Counter(path.ids[-1] for (path,) in paths if len(path.ids) == len(PROMPT) + 2)
    chi2 = sum((counts[t] - 3000 * expected[t].item()) ** 2 / (3000 * expected[t].item()) for t in tokens)
    assert chi2 < 40.8  # the 99.9% point at 17 degrees of freedom (the paths that end at once are one more cell)


def test_long_arithmetic_paths_do_not_run_out_of_code():
    local = engine(llama(eos_token_id=None), arithmetic=True, max_tokens=50)
    children = run(local.extend(Trajectory(PROMPT, seed=5), n=30))[0]
    tails = {path.ids[-10:] for path in children if path.end == "length"}
    assert len(tails) == sum(path.end == "length" for path in children) > 0


# --- text that a search writes


def stopped_path(local):
    children = run(local.extend(Trajectory(PROMPT, seed=1), n=40))[0]
    return next(child for child in children if child.end == "stop" and len(child.ids) > len(PROMPT) + 1)


def test_written_text_opens_a_stopped_path_in_place_of_its_end_token():
    local = engine(max_tokens=50)
    path = stopped_path(local)
    longer = local.write(path, "+ 1")
    assert longer.ids == (*path.ids[:-1], 13, 16, 4)
    assert (longer.end, longer.text) == (None, path.text + "+ 1")
    assert [step.sampled for step in longer.steps] == [True, False]
    assert longer.steps[0].versions == ((0, 0, len(path.steps[0].ids) - 1),)
    (child,) = run(local.extend(longer))[0]
    assert child.text.startswith(longer.text) and len(child.steps) == 3


def test_written_turn_is_what_the_chat_template_puts_between_two_answers():
    local, tokens = engine(max_tokens=50), characters()
    path = stopped_path(local)
    longer = local.write(path, "2-1", turn=True)
    chat = [("user", "?"), ("assistant", path.text), ("user", "2-1")]
    whole = tokens.apply_chat_template([{"role": r, "content": c} for r, c in chat], tokenize=False)
    after_question = whole.removeprefix("?=")
    assert longer.ids == (*PROMPT, *tokens.encode(after_question, add_special_tokens=False))


def test_text_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="write only what its vocabulary has"):
        engine().write(Trajectory(PROMPT), "Wait")


# --- identity of a path


def test_path_does_not_depend_on_the_batch_it_is_in():
    root = Trajectory(PROMPT, seed=7)
    local = engine()
    alone = run(local.extend(root, n=2))[0]
    others = [local.extend(other, n=3) for other in roots(9)] + [local.at(temperature=0.3).extend(root)]
    crowded = run(*others, local.extend(root, n=2))[-1]
    assert [p.ids for p in alone] == [p.ids for p in crowded]
    assert torch.allclose(logprobs(alone[0]), logprobs(crowded[0]), atol=1e-4)


def test_children_have_seeds_and_tokens_of_their_own():
    children = run(engine().extend(Trajectory(PROMPT, seed=7), n=8))[0]
    assert [child.seed for child in children] == [derive(7, i) for i in range(8)]
    assert len({child.ids for child in children}) > 4


def test_small_batches_give_the_same_paths_as_large_ones():
    few, many = (LocalEngine(llama(), characters(), Sampling(max_tokens=8), rows=rows) for rows in (3, 100))
    paths = [run(*(local.extend(root, n=2) for root in roots(5))) for local in (few, many)]
    assert [[p.ids for p in group] for group in paths[0]] == [[p.ids for p in group] for group in paths[1]]


# --- where an extension stops


def test_answer_ends_at_its_end_token_which_belongs_to_the_step():
    children = run(engine(max_tokens=50).extend(Trajectory(PROMPT, seed=1), n=40))[0]
    stopped = [child for child in children if child.end == "stop"]
    assert stopped
    for child in stopped:
        assert child.ids[-1] == EOS and EOS not in child.ids[:-1] and "<eos>" not in child.text


def test_step_ends_after_its_delimiter():
    children = run(engine(max_tokens=50).extend(Trajectory(PROMPT, seed=1), n=40, until=STEP))[0]
    going_on = [child for child in children if child.end is None]
    assert going_on
    for child in going_on:
        assert child.text.endswith("\n") and child.text.count("\n") == 1


def test_delimiter_may_span_tokens():
    children = run(engine(max_tokens=50, step="+ ").extend(Trajectory(PROMPT, seed=2), n=200, until=STEP))[0]
    going_on = [child for child in children if child.end is None]
    assert going_on
    assert all(child.text.endswith("+ ") and child.text.count("+ ") == 1 for child in going_on)


def test_tokens_gives_so_many_or_fewer_at_the_end():
    for child in run(engine().extend(Trajectory(PROMPT, seed=1), n=40, until=TOKENS(3)))[0]:
        assert child.sampled_tokens == 3 if child.end is None else child.sampled_tokens <= 3


def test_limit_counts_the_tokens_of_all_steps():
    written = Step((3, 4), (0.0, 0.0), "01", sampled=False)
    local = engine(max_tokens=6)
    for path in run(local.extend(Trajectory(PROMPT, seed=3).grow(written), n=20))[0]:
        assert len(path.ids) - len(PROMPT) <= 6
        assert (path.end == "length") == (path.ids[-1] != EOS)
    full = Trajectory(PROMPT, seed=3).grow(Step((3,) * 6, (0.0,) * 6, "0" * 6, sampled=False))
    (ended,) = run(local.extend(full))[0]
    assert (ended.end, ended.steps, ended.seed) == ("length", full.steps, derive(3, 0))


def test_path_cannot_grow_past_what_the_model_reads():
    model = llama(max_position_embeddings=8)
    for path in run(engine(model, max_tokens=99).extend(Trajectory(PROMPT, seed=3), n=20))[0]:
        assert len(path.ids) <= 8 and path.end in ("stop", "length")


def test_path_grown_token_by_token_has_the_text_of_the_whole():
    class Halves:  # two tokens to a character: the first half is not yet text
        eos_token_id = None

        def decode(self, ids, skip_special_tokens):
            return bytes(b"\xc3\xa4"[i % 2] for i in ids).decode(errors="replace")

    local = LocalEngine(llama(eos_token_id=None), Halves(), Sampling(max_tokens=20))
    path = Trajectory(PROMPT, seed=1)
    while path.end is None:
        (path,) = run(local.extend(path, until=TOKENS(1)))[0]
    assert "\u00e4" in path.text
    assert path.text == Halves().decode(path.ids[len(PROMPT) :], True)


# --- weights


def test_new_weights_change_the_paths_and_their_version():
    local, other = engine(), llama(seed=9)
    before = run(local.extend(Trajectory(PROMPT, seed=1), n=3))[0]
    local.load(other.state_dict(), version=4)
    after = run(local.extend(Trajectory(PROMPT, seed=1), n=3))[0]
    assert [p.steps[0].versions for p in before] == [((0, 0, len(p.steps[0].ids)),) for p in before]
    assert [p.steps[0].versions for p in after] == [((4, 0, len(p.steps[0].ids)),) for p in after]
    for path in after:
        assert torch.allclose(logprobs(path), teacher_forced(other, path), atol=1e-4)


def test_weights_loaded_in_flight_are_told_by_the_version_spans():
    model, other = llama(), llama(seed=9)
    passes = threading.Event()
    local = engine(model, max_tokens=40)
    calls = []

    def on_pass(*_):
        calls.append(0)
        if len(calls) == 5:
            passes.set()
            loading.wait(10)

    loading = threading.Event()
    model.register_forward_pre_hook(on_pass)

    async def load_while_decoding():
        extension = asyncio.ensure_future(local.extend(Trajectory(PROMPT, seed=1), n=16))
        await asyncio.to_thread(passes.wait, 10)
        load = asyncio.ensure_future(asyncio.to_thread(local.load, other.state_dict(), 1))
        await asyncio.sleep(0.05)  # `load` waits for the pass that holds the lock
        loading.set()
        await load
        return await extension

    paths = asyncio.run(load_while_decoding())
    longest = max(paths, key=lambda p: len(p.ids)).steps[0]
    (old, zero, cut), (new, cut_again, end) = longest.versions
    assert (old, zero, new, end) == (0, 0, 1, len(longest.ids))
    assert cut == cut_again >= 5


# --- cost


def test_concurrent_calls_share_a_batch_and_equal_prefixes_are_read_once():
    model = llama()
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    local = engine(model, max_tokens=5)
    same = [Trajectory(PROMPT, seed=i) for i in range(10)]
    paths = [p for group in run(*(local.extend(root, n=2) for root in same)) for p in group]
    assert len(passes) == 5
    assert (local.ledger.prefilled, local.ledger.cached) == (len(PROMPT), 19 * len(PROMPT))
    assert sum(p.steps[0].cached for p in paths) == local.ledger.cached
    assert local.ledger.generated == sum(p.sampled_tokens for p in paths)
    assert local.at(temperature=0.5).ledger == local.ledger


def test_event_loop_runs_while_the_model_computes():
    local = engine(max_tokens=50)

    async def count_turns():
        turns = 0
        extension = asyncio.ensure_future(local.extend(Trajectory(PROMPT, seed=1), n=200))
        while not extension.done():
            await asyncio.sleep(0.001)
            turns += 1
        return turns

    assert asyncio.run(count_turns()) > 5


def test_nothing_is_drawn_for_a_cancelled_search_but_the_token_under_way(drawn_after_cancelling):
    after, own = drawn_after_cancelling(engine(max_tokens=60), PROMPT)
    assert after <= own + 2 * 8  # the token under way, and one that began before the cancellation was seen


def test_cancelled_call_leaves_the_queue_working():
    local = engine()

    async def cancel_one():
        doomed = asyncio.ensure_future(local.extend(Trajectory(PROMPT, seed=1)))
        await asyncio.sleep(0)
        doomed.cancel()
        return await local.extend(Trajectory(PROMPT, seed=2))

    assert asyncio.run(cancel_one())[0].steps
