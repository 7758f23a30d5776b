"""What the learner's options do to the policy, the reference, the adapters and what the engines are sent."""

import copy
from pathlib import Path

import pytest
import torch

from reasoner.config import ConfigError, Learner, load
from reasoner.learner import learn
from reasoner.lora import adapt, fold
from reasoner.model import ReasonerConfig, ReasonerForCausalLM, export

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"
ANSWERS = (("7", 0.5), ("9", -0.5))


@pytest.fixture
def batch(sample):
    return lambda policy: [sample(answer, advantage, policy) for answer, advantage in ANSWERS]


@pytest.fixture
def logprob(sample):
    return lambda policy, answer: sum(sample(answer, 0.0, policy).logprobs)


@pytest.mark.parametrize(
    ("loss", "ratio"),
    [(x, "token") for x in ("dapo", "cispo", "grpo", "dr_grpo", "bnpo", "sapo", "vespo")]
    + [("grpo", "sequence"), ("luspo", "sequence")],
)
def test_every_loss_raises_what_earned_more(loss, ratio, tmp_path, model, run, batch, logprob):
    policy = model()
    before = [logprob(policy, answer) for answer, _ in ANSWERS]
    run(policy, [batch(policy)] * 2, tmp_path, loss=loss, ratio=ratio)
    after = [logprob(policy, answer) for answer, _ in ANSWERS]
    assert after[0] > before[0] and after[1] < before[1]


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_level_of_ratio_that_does_not_fit_the_loss_is_refused_with_the_remedy(ratio):
    loss = "luspo" if ratio == "token" else "dapo"
    with pytest.raises(ConfigError, match=f"learner.ratio = '{'sequence' if ratio == 'token' else 'token'}'"):
        load(QUICKSTART, [f"learner.loss={loss}", f"learner.ratio={ratio}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learner.kl=-1.0"], "learner.kl = -1.0 must not be negative"),
        (["learner.lora=-2"], "learner.lora = -2"),
        (["length.overlong=72"], "length.overlong = 72.*max_tokens = 72"),
        (["length.overlong=8", "credit.kind=maxrl"], "maxrl.*overlong = 8"),
        (["resample=-1"], "resample = -1"),
        (["curriculum.memory=0.5"], "curriculum.by is missing"),
        (["curriculum.by=num_terms", "curriculum.floor=0.0"], "floor = 0.0"),
        (["credit.kind=rloo", "search.n=1"], "search.n = 1"),
    ],
)
def test_options_that_contradict_are_told_before_a_run(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(QUICKSTART, overrides)


def test_the_divergence_from_the_base_is_measured_and_holds_the_policy_back(tmp_path, model, run, batch, logprob):
    moved = {}
    for kl in (0.0, 5.0):
        policy = model()
        before = logprob(policy, "7")
        heard = run(policy, [batch(policy)] * 6, tmp_path / str(kl), kl=kl, max_grad_norm=1e9)
        moved[kl] = logprob(policy, "7") - before
        assert ("kl" in heard[0]) == bool(kl)
    assert heard[0]["kl"] == pytest.approx(0.0, abs=1e-6) and heard[-1]["kl"] > 1e-5  # the reference stays
    assert 0 < moved[5.0] < 0.9 * moved[0.0]


def test_the_reference_may_be_another_model_than_the_one_that_goes_on(tmp_path, model, sample, tokenizer, batch):
    policy, base = model(0), model(1)
    heard = []

    def batches():
        heard.append((yield batch(policy)))

    options = dict(seed=0, temperature=1.0, max_completion=16, folder=tmp_path, base=base)
    learn(policy, tokenizer, lambda _: batches(), Learner(lr=1e-3, kl=0.1), steps=1, **options)
    ratios = [b - a for a, b in zip(sample("7", 0, policy).logprobs, sample("7", 0, base).logprobs, strict=True)]
    assert heard[0]["kl"] > 0.001 and any(ratios)


def test_adapters_learn_and_everybody_else_sees_one_plain_model(tmp_path, model, run, batch, logprob):
    policy = model()
    start = copy.deepcopy(policy.state_dict())
    before = logprob(policy, "7")
    heard = run(policy, [batch(policy)] * 3, tmp_path, lora=4, lr=1e-2)
    assert logprob(policy, "7") > before + 0.01
    assert heard[0]["mismatch"] < 1e-5
    assert policy.state_dict().keys() == start.keys()  # no trace of adapters: checkpoints and engines know the names
    changed = {name for name, t in policy.state_dict().items() if not torch.equal(t, start[name])}
    assert any("self_attn" in n for n in changed) and any("experts" in n for n in changed)
    assert all("proj" in name for name in changed)
    assert {name for name, _ in export(policy)} == {name for name, _ in export(model())}


def test_folding_gives_the_model_that_the_adapters_make(model, tokenizer):
    policy = model()
    adapted = adapt(policy, rank=4, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        for name, buffer in adapted.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.1, 0.1)
        ids = torch.randint(3, len(tokenizer), (2, 9))
        untouched = policy(input_ids=ids).logits
        fold(adapted, policy)
        merged, live = policy(input_ids=ids).logits, adapted(input_ids=ids).logits
    torch.testing.assert_close(merged, live, rtol=1e-4, atol=1e-5)
    assert (merged - untouched).abs().max() > 1e-3


def test_the_balancing_bias_stands_still_while_a_batch_lives_and_goes_to_the_engines_with_the_weights(
    tmp_path, model, tokenizer, batch
):
    policy = model()
    seen = []

    def biases():
        return torch.cat([t for name, t in export(policy) if name.endswith("e_score_correction_bias")]).clone()

    def batches():
        for _ in range(3):
            seen.append(biases())  # when the rollouts are drawn
            samples = batch(policy)
            assert torch.equal(biases(), seen[-1])  # forwards without gradient count no load
            yield samples
            seen.append(biases())  # after the step, when the weights are sent

    options = dict(seed=0, temperature=1.0, max_completion=16, folder=tmp_path)
    learn(policy, tokenizer, lambda _: batches(), Learner(lr=1e-3, balance_rate=0.01), steps=3, **options)
    for before, after, following in zip(seen[::2], seen[1::2], seen[2::2], strict=False):
        assert not torch.equal(before, after) and torch.equal(after, following)  # once a step, and only there


def with_mtp(tokenizer) -> ReasonerForCausalLM:
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64, num_hidden_layers=2, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=8
    )
    return ReasonerForCausalLM(
        ReasonerConfig.small(len(tokenizer), num_experts_per_tok=2, num_mtp_layers=1, **sizes)
    ).eval()


def test_mtp_modules_follow_the_policy_and_leave_its_trunk_alone(tmp_path, run, batch, tokenizer):
    states = {}
    for weight in (0.0, 1.0):
        policy = with_mtp(tokenizer)
        start = copy.deepcopy(policy.state_dict())
        run(policy, [batch(policy)] * 2, tmp_path / str(weight), mtp=weight, max_grad_norm=1e9)
        states[weight] = policy.state_dict()
        moved = {name for name, t in states[weight].items() if not torch.equal(t, start[name])}
        assert any(name.startswith("model.layers.2.") for name in moved) == bool(weight)
    for name, tensor in states[0.0].items():
        if not name.startswith("model.layers.2."):
            torch.testing.assert_close(states[1.0][name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{"lora": 4}, {"kl": 1.0}])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(options, tmp_path, model, tokenizer, batch):
    """Adapters adapt the base, and the reference is the base: not the model that the checkpoint holds."""
    kept = {}
    learner = Learner(lr=1e-2, balance_rate=0.01, **options)
    common = dict(steps=2, seed=0, temperature=1.0, max_completion=16, folder=tmp_path)
    base, policy = model(), model()
    data = batch(base)

    def batches(snapshot):
        yield data
        kept["state"], kept["model"] = copy.deepcopy(dict(snapshot())), copy.deepcopy(policy)
        yield data

    learn(policy, tokenizer, batches, learner, **common)
    resumed = kept["model"]
    learn(resumed, tokenizer, lambda _: iter_once(data), learner, start=kept["state"], base=base, **common)
    for name, tensor in policy.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def iter_once(data):
    yield data
