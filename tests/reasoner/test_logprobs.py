"""Log-probabilities without logits are those of the logits, gradients too; replayed experts are the recorded ones."""

import asyncio
from functools import partial

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

from reasoner.config import Learner
from reasoner.credit import spread
from reasoner.learner import learn
from reasoner.logprobs import is_plain, recorded_experts, token_logprobs
from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer
from reasoner.model.layout import tree
from reasoner.paged_engine import paged_engine
from reasoner.samples import collate, mismatch
from rollouts.base import Group, Rollout
from rollouts.journal import Journal, read
from search.base import STEP, Sampling, Trajectory
from verifiers.base import Task, Verdict

TOKENIZER = char_tokenizer("0123456789+-= \n")


def ours(seed=0):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=3)
    model = ReasonerForCausalLM(
        ReasonerConfig.small(len(TOKENIZER), n_routed_experts=8, num_experts_per_tok=2, **sizes)
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4
    return model.eval()


def llama(**changes):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **(sizes | changes)))


def batch(rows=5, columns=9, kept=4):
    ids = torch.randint(3, len(TOKENIZER), (rows, columns))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 3] = 0
        mask[row, columns - row % (kept + 1) :] = 0
    return ids, mask, kept


def by_logits(model, ids, mask, kept, *, temperature):
    logp = (model(input_ids=ids, attention_mask=mask).logits[:, -kept - 1 : -1] / temperature).log_softmax(-1)
    real = mask[:, -kept:].bool()
    picked = logp.gather(-1, ids[:, -kept:, None])[..., 0]
    return picked.masked_fill(~real, 0.0), (-(logp.exp() * logp).sum(-1)).masked_fill(~real, 0.0)


@pytest.mark.parametrize("make", [ours, llama])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_entropies_and_gradients_are_those_of_the_logits(make, temperature):
    model, given = make(), batch()
    weights = torch.randn(5, 4)
    results = []
    for way in (token_logprobs, by_logits):
        logp, entropy = way(model, *given, temperature=temperature)
        model.zero_grad()
        ((logp * weights).sum() + 0.3 * entropy.sum()).backward()
        results.append((logp, entropy, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (logp, entropy, gradients), (want_logp, want_entropy, want_gradients) = results
    torch.testing.assert_close(logp, want_logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, want_entropy, atol=1e-5, rtol=0)
    for name, want in want_gradients.items():
        assert (gradients[name] - want).norm() <= 1e-4 * want.norm() + 1e-9, name


def branching(questions=3, children=6, length=7, prompt=4):
    """Rows of few distinct tokens, so that the children of a question part late, some never; lengths differ."""
    torch.manual_seed(1)
    ids = torch.randint(3, 5, (questions * children, prompt + length))
    ids[:, :prompt] = torch.randint(3, 6, (questions, prompt)).repeat_interleave(children, 0)
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        mask[row, : row // children] = 0  # one prompt, one length
        mask[row, prompt + 1 + row % length :] = 0
    shuffled = torch.randperm(len(ids))
    return ids[shuffled], mask[shuffled], length


def way_of(model, ids, mask, kept, way, monkeypatch):
    with monkeypatch.context() as patch:
        if way == "rows":
            patch.setattr("reasoner.model.layout.WIDEST", 0)
        model.train()
        model.zero_grad()
        read = []
        hook = model.model.layers[0].register_forward_pre_hook(lambda module, given: read.append(len(given[0])))
        logp, entropy = token_logprobs(model, ids, mask, kept)
        weights = torch.linspace(-1, 1, logp.numel()).view_as(logp)
        ((logp * weights).sum() + 0.3 * entropy.sum()).backward()
        hook.remove()
        loads = [block.mlp.load_E.double() for block in model.model.layers[1:]]
        for block in model.model.layers[1:]:
            block.mlp.load_E = None
        return logp, entropy, {n: p.grad.clone() for n, p in model.named_parameters()}, loads, sum(read)


def test_what_rows_have_in_common_is_read_once_and_nothing_changes(monkeypatch):
    """Log-probabilities, entropies, gradients and the experts' loads are those of rows read one by one."""
    model, given = ours(), branching()
    logp, entropy, gradients, loads, read = way_of(model, *given, "trees", monkeypatch)
    want_logp, want_entropy, want_gradients, want_loads, want_read = way_of(model, *given, "rows", monkeypatch)
    torch.testing.assert_close(logp, want_logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, want_entropy, atol=1e-5, rtol=0)
    for name, want in want_gradients.items():
        assert (gradients[name] - want).norm() <= 1e-4 * want.norm() + 1e-9, name
    assert all(torch.equal(load, want) for load, want in zip(loads, want_loads, strict=True))
    ids, mask, _ = given
    beginnings = {
        (tuple(row[:4].tolist()), tuple(real[:4].tolist()), *row[: i + 1][real[: i + 1].bool()].tolist())
        for row, real in zip(ids, mask, strict=True)
        for i in range(ids.shape[1])
        if real[i]
    }
    assert read == len(beginnings) < want_read == mask.sum()


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_other_models_read_what_rows_have_in_common_once_too(kind):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    model = AutoModelForCausalLM.from_config(kind(vocab_size=16, num_key_value_heads=2, sliding_window=None, **sizes))
    (ids, mask, kept), read, results = branching(), [], []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    for way in (token_logprobs, partial(by_logits, temperature=1.0)):
        logp, entropy = way(model, ids, mask, kept)
        model.zero_grad()
        ((logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum() + 0.3 * entropy.sum()).backward()
        results.append((logp, entropy, [p.grad.clone() for p in model.parameters()]))
    (logp, entropy, gradients), (want_logp, want_entropy, want_gradients) = results
    torch.testing.assert_close(logp, want_logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, want_entropy, atol=1e-5, rtol=0)
    for got, want in zip(gradients, want_gradients, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-7
    assert read[0] < 0.7 * read[1]


def test_models_with_a_window_of_attention_read_row_by_row():
    config = MistralConfig(vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, sliding_window=4)
    model, (ids, mask, kept), read = MistralForCausalLM(config), branching(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    token_logprobs(model, ids, mask, kept)
    assert read == [ids.numel()]


def test_questions_that_begin_alike_or_lie_in_one_row_do_not_see_each_other():
    """One prompt is the beginning of another's prompt and answer; two trees are so small that they share a row."""
    model = ours()
    ids = torch.tensor([[0, 5, 6, 7, 8], [5, 6, 7, 8, 9], [0, 5, 6, 7, 9], [0, 0, 5, 6, 0], [0, 0, 4, 6, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0]])
    assert tree(ids, mask, 3).sequences == 3  # rows, for four prompts
    alone = [token_logprobs(model, ids[i : i + 1], mask[i : i + 1], 2)[0] for i in range(5)]
    torch.testing.assert_close(token_logprobs(model, ids, mask, 2)[0], torch.cat(alone), atol=1e-5, rtol=0)


def test_trees_that_would_be_too_wide_are_read_row_by_row(monkeypatch):
    model, (ids, mask, kept) = ours(), branching()
    _, _, _, _, read = way_of(model, ids, mask, kept, "rows", monkeypatch)
    assert read == mask.sum()


def test_batches_that_have_little_in_common_or_are_large_are_read_row_by_row(monkeypatch):
    model, (ids, mask, kept) = ours(), branching()
    read = []
    model.model.layers[0].register_forward_pre_hook(lambda module, given: read.append(len(given[0])))
    apart = torch.arange(3, 3 + 12).expand(3, -1).clone()
    apart[:, 0] = torch.tensor([3, 4, 5])
    token_logprobs(model, apart, torch.ones_like(apart), 4)
    monkeypatch.setattr("reasoner.logprobs.CELLS", ids.numel() * ids.shape[1] - 1)
    token_logprobs(model, ids, mask, kept)
    monkeypatch.setattr("reasoner.logprobs.CELLS", ids.numel() * ids.shape[1])
    token_logprobs(model, ids, mask, kept)
    assert read[:2] == [apart.numel(), mask.sum()] and read[2] < read[1]


@pytest.mark.parametrize("make", [ours, llama])
def test_rows_read_by_their_lengths_come_back_in_their_order(make, monkeypatch):
    monkeypatch.setattr("reasoner.model.layout.WIDEST", 0)
    model, (ids, mask, kept) = make(), branching(questions=16, children=6)
    with torch.no_grad():
        logp, entropy = token_logprobs(model, ids, mask, kept)
        want_logp, want_entropy = by_logits(model, ids, mask, kept, temperature=1.0)
    torch.testing.assert_close(logp, want_logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, want_entropy, atol=1e-5, rtol=0)


def test_heads_that_are_more_than_a_matrix_are_left_to_the_model():
    assert is_plain(ours()) and is_plain(llama())
    assert not is_plain(llama(final_logit_softcapping=30.0)) and not is_plain(llama(logits_scaling=2.0))
    assert not is_plain(torch.nn.DataParallel(llama()))


def rollouts(engine, count=6, n=4):
    roots = [Trajectory(tuple(TOKENIZER.encode(f"{i}+{i}=")), seed=i) for i in range(count)]

    async def two_steps(root):
        first = await engine.extend(root, n=n, until=STEP)
        return first + [p for f in first if f.end is None for p in await engine.extend(f)]

    async def everybody():
        return await asyncio.gather(*(two_steps(root) for root in roots))

    return [path for group in asyncio.run(everybody()) for path in group]


def test_replay_routes_every_token_as_the_rollout_did():
    """The rollout runs in bfloat16, the learner in float32: alone they choose differently for some tokens."""
    model, recorder = ours(), ours()
    engine = paged_engine(recorder.to(torch.bfloat16), TOKENIZER, Sampling(max_tokens=24), context=64, record=True)
    samples = [spread(path, 0.0) for path in rollouts(engine)]
    rows = collate(samples, TOKENIZER.pad_token_id, config=model.config)
    ids, mask = (torch.cat([rows[f"prompt_{p}"], rows[f"completion_{p}"]], dim=1) for p in ("ids", "mask"))
    recorded = rows["experts"].long()
    known = recorded[..., -1, 0] >= 0  # in the last layer, an MoE layer
    assert known.sum() == mask.sum() - len(samples)  # all but the last token of each, which nothing has read

    def differently_routed(**replay):
        with torch.no_grad():
            used = model(ids, attention_mask=mask, output_experts=True, **replay).experts
        different = (used.sort(-1).values != recorded.sort(-1).values).any(-1)[known][:, 1:]  # layer 0 is dense
        return different.float().mean().item()

    assert differently_routed() > 0
    assert differently_routed(experts=recorded) == 0
    blind = [spread(path, 0.0) for path in rollouts(engine)]
    blind = [type(s)(s.ids, s.loss_mask, s.logprobs, s.advantages) for s in blind]
    assert mismatch(model, samples, 0) < mismatch(model, blind, 0)


def test_a_step_of_the_learner_goes_through_the_recorded_experts(tmp_path):
    """The gate's weights get a gradient only through experts that were used: record one pair for every token."""
    policy = ours()
    engine = paged_engine(ours(), TOKENIZER, Sampling(max_tokens=8), context=64, record=True)
    samples = [spread(path, (-1.0) ** i) for i, path in enumerate(rollouts(engine, count=1))]
    forced = torch.tensor([[[-1, -1], [2, 5], [2, 5]]], dtype=torch.int16).numpy().tobytes()
    samples = [type(s)(s.ids, s.loss_mask, s.logprobs, s.advantages, forced * (len(s.ids) - 1)) for s in samples]
    before = {name: p.clone() for name, p in policy.named_parameters()}

    def batches():
        yield samples

    options = dict(steps=1, seed=0, temperature=1.0, max_completion=16, folder=tmp_path)
    learn(policy, TOKENIZER, lambda snapshot: batches(), Learner(lr=1e-2, micro_batches=2, balance_rate=0.0), **options)
    gone = policy.model.layers[1].mlp.experts.down_proj - before["model.layers.1.mlp.experts.down_proj"]
    moved = {expert for expert in range(8) if gone[expert].abs().max() > 0}
    assert {2, 5} <= moved
    last = {i for s in samples for i in [s.ids[-1]]}  # only the last tokens choose for themselves, and teach nothing
    assert last and moved == {2, 5}


def test_record_of_another_model_is_refused():
    with pytest.raises(ValueError, match="10 bytes .* 3 layers with 2 experts each"):
        recorded_experts([b"0" * 10], [0], 8, ours().config)
    assert recorded_experts([b"", b""], [0, 0], 8, ours().config) is None


def test_journal_keeps_the_experts(tmp_path):
    engine = paged_engine(ours(), TOKENIZER, Sampling(max_tokens=8), context=64, record=True)
    task = Task("t", ({"role": "user", "content": "1+1="},), "2", "math")
    verdict = Verdict("scored", score=1.0, correct=True)
    group = Group(task, tuple(Rollout(task, path, verdict) for path in rollouts(engine, count=1)))
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append(group, step=0, version=0)
    ((_, _, back),) = read(tmp_path / "j.jsonl")
    for got, want in zip(back.rollouts, group.rollouts, strict=True):
        assert [s.experts for s in got.trajectory.steps] == [s.experts for s in want.trajectory.steps]
        assert want.trajectory.steps[0].experts


def test_trls_own_way_gives_the_same_loss_and_step(tmp_path, monkeypatch):
    engine = paged_engine(ours(), TOKENIZER, Sampling(max_tokens=12), context=64)
    samples = [spread(path, (-1.0) ** i) for i, path in enumerate(rollouts(engine, count=2))]
    results = []
    for name in ("ours", "trl"):
        if name == "trl":
            monkeypatch.setattr("reasoner.learner.is_plain", lambda model: False)
        policy, heard = ours(), []

        def batches(heard=heard):
            heard.append((yield samples))

        options = dict(steps=1, seed=0, temperature=1.0, max_completion=16, folder=tmp_path / name)
        learn(policy, TOKENIZER, lambda snapshot: batches(), Learner(lr=1e-3, balance_rate=0.0), **options)
        results.append((heard[0], policy))
    (mine, one), (theirs, other) = results
    for key in ("loss", "grad_norm", "entropy", "mismatch"):
        assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0, msg=name)
