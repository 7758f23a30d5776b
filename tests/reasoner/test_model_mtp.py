"""Multi-token prediction modules: parity with transformers, what they see, what they teach, how they are stored."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_layers import MtpModel

from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer, load, save


def build(modules: int = 2) -> ReasonerForCausalLM:
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=2, hidden_size=64, n_routed_experts=8, num_experts_per_tok=2)
    model = ReasonerForCausalLM(ReasonerConfig.small(vocab_size=32, num_mtp_layers=modules, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter) if parameter.ndim == 1 else parameter * 5)
    return model


@pytest.fixture
def model():
    return build()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 32, shape, generator=torch.Generator().manual_seed(1))


def ahead(model, ids, **kwargs):
    hidden = model.model(ids, **kwargs).last_hidden_state
    return model.look_ahead(hidden, ids, **kwargs)


def test_drafts_equal_those_of_transformers(model, tmp_path):
    save(model, char_tokenizer("0123456789"), tmp_path / "checkpoint")
    trunk = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    trunk._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\..*" for layer in (2, 3)]
    theirs = MtpModel.from_pretrained(trunk).eval()
    ids = tokens(1, 12)
    with torch.no_grad():
        hidden = trunk.model(ids[:, :-1]).last_hidden_state
        positions = torch.arange(1, 12)[None]
        draft, logits, _ = theirs(ids[:, 1:], hidden, None, positions, None)
        ours = ahead(model, torch.cat([ids, draft[:, :1]], dim=1))
    assert logits.shape == (1, 2, 32)
    for module in (0, 1):
        assert (ours[module][:, 10] - logits[:, module]).abs().max() < 1e-4


def test_module_sees_its_own_number_of_tokens_ahead_and_no_more(model):
    ids = tokens(1, 10)
    before = ahead(model, ids)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 29 + 3
    for module, (old, new) in enumerate(zip(before, ahead(model, changed), strict=True), start=1):
        unmoved = ((old - new).abs() < 1e-5).all(-1)[0]
        assert unmoved[: 6 - module].all() and not unmoved[6 - module : 10 - module].any()


def test_padding_and_packing_change_no_draft(model):
    short, long = tokens(1, 6), tokens(1, 11)
    wanted = [ahead(model, row) for row in (short, long)]
    padded = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    positions = torch.cat([torch.arange(6), torch.arange(11)])[None]
    drafts = ahead(model, padded, attention_mask=mask)
    packed = ahead(model, torch.cat([short, long], 1), position_ids=positions)
    for module in (0, 1):
        known = module + 1  # the last tokens of a sequence have nothing ahead of them
        assert (drafts[module][0, 5:-known] - wanted[0][module][0, :-known]).abs().max() < 1e-5
        assert (drafts[module][1, :-known] - wanted[1][module][0, :-known]).abs().max() < 1e-5
        assert (packed[module][0, : 6 - known] - wanted[0][module][0, :-known]).abs().max() < 1e-5
        assert (packed[module][0, 6:-known] - wanted[1][module][0, :-known]).abs().max() < 1e-5


def test_loss_is_the_mean_over_modules_of_their_cross_entropy(model):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100  # a prompt
    out = model(ids, attention_mask=mask, labels=labels, mtp_weight=0.3)
    losses = []
    for known, logits in enumerate(ahead(model, ids, attention_mask=mask), start=2):
        nats = [
            -logits[row, i - known].log_softmax(-1)[ids[row, i]] for row, end in ((0, 9), (1, 6)) for i in range(4, end)
        ]
        losses.append(torch.stack(nats).mean())
    torch.testing.assert_close(out.mtp_loss, torch.stack(losses).mean())
    plain = model(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(out.loss, plain + 0.3 * out.mtp_loss)


@pytest.mark.parametrize("detached", [True, False])
def test_detached_modules_teach_the_trunk_nothing(model, detached):
    ids = tokens(2, 9)
    hidden = model.model(ids).last_hidden_state
    model.mtp_loss(hidden, ids, ids, detached=detached).backward()
    modules = ("model.layers.2.", "model.layers.3.")
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"model.layers.2.eh_proj.weight", "model.layers.3.shared_head.norm.weight"} <= touched
    assert all(name.startswith(modules) for name in touched) == detached


def test_mtp_loss_without_modules_is_refused():
    with pytest.raises(ValueError, match="num_mtp_layers=0"):
        build(modules=0)(tokens(1, 5), labels=tokens(1, 5), mtp_weight=0.3)


def test_modules_are_written_as_layers_after_the_trunk_and_read_back(model, tmp_path):
    save(model, char_tokenizer("0123456789"), tmp_path / "checkpoint")
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    for layer in (2, 3):
        for name in (
            "enorm.weight",
            "hnorm.weight",
            "eh_proj.weight",
            "shared_head.norm.weight",
            "mlp.experts.7.up_proj.weight",
        ):
            assert f"model.layers.{layer}.{name}" in weights
        assert torch.equal(weights[f"model.layers.{layer}.shared_head.head.weight"], model.lm_head.weight)
        assert torch.equal(weights[f"model.layers.{layer}.embed_tokens.weight"], model.model.embed_tokens.weight)
    again = load(tmp_path / "checkpoint")
    assert all(torch.equal(a, b) for a, b in zip(ahead(again, tokens(1, 8)), ahead(model, tokens(1, 8)), strict=True))


def test_checkpoint_whose_modules_transformers_dropped_loads_without_them(model, tmp_path):
    tokenizer = char_tokenizer("0123456789")
    save(model, tokenizer, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    save(theirs, tokenizer, tmp_path / "theirs")
    again = load(tmp_path / "theirs")
    assert again.config.num_mtp_layers == 0
    assert (again(tokens(1, 8)).logits - model(tokens(1, 8)).logits).abs().max() < 1e-6


def test_generation_ignores_the_modules(model):
    ids = tokens(1, 5)
    whole = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    logits = model(whole[:, :-1]).logits[:, 4:]
    assert torch.equal(logits.argmax(-1), whole[:, 5:])
    assert isinstance(model(ids, use_cache=True).past_key_values, DynamicCache)
