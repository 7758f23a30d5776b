"""Our model against transformers' DeepseekV3ForCausalLM on the same checkpoint: logits, gradients, cached decoding."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer, load, save

CONFIGURATIONS = {
    "small": {},
    "query latent": dict(q_lora_rank=48),
    "groups": dict(n_group=4, topk_group=2, routed_scaling_factor=2.5),
    "all experts, weights as they are": dict(first_k_dense_replace=0, norm_topk_prob=False, n_shared_experts=2),
    "all dense": dict(first_k_dense_replace=3),
    "yarn": dict(
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=1e4,
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=1.0,
            mscale_all_dim=0.7,
            beta_fast=32,
            beta_slow=1,
        )
    ),  # fmt: skip
    "values wider than keys": dict(v_head_dim=80, qk_nope_head_dim=16, q_lora_rank=32),
}


def random_model(seed: int = 0, **changes) -> ReasonerForCausalLM:
    """Weights large enough that experts, norms and biases differ visibly."""
    torch.manual_seed(seed)
    sizes = dict(num_hidden_layers=3, hidden_size=64, intermediate_size=96) | changes
    model = ReasonerForCausalLM(ReasonerConfig.small(vocab_size=32, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter) if parameter.ndim == 1 else parameter * 5)
        for buffer in model.buffers():
            buffer.normal_(std=0.1)
    return model


def tokens(rows: int = 3, columns: int = 23, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 32, (rows, columns), generator=torch.Generator().manual_seed(seed))


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


@pytest.fixture(params=CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def pair(request, tmp_path):
    ours = random_model(**request.param)
    save(ours, char_tokenizer("0123456789"), tmp_path / "checkpoint")
    return ours, AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")


def test_logits_equal_those_of_transformers(pair):
    ours, theirs = pair
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    logits = ours(tokens()).logits
    assert largest(logits) > 1  # else agreement says nothing
    assert largest(logits - theirs(tokens()).logits) < 1e-4


def drawn(seed: int) -> dict:
    """A random configuration: sizes, groups, dense layers, query latent, shared experts."""
    draw = random.Random(seed).choice
    groups = draw([1, 2, 4])
    return dict(
        hidden_size=draw([32, 48, 72]),
        num_hidden_layers=draw([1, 2, 4]),
        first_k_dense_replace=draw([0, 1, 2]),
        num_attention_heads=draw([1, 3, 4]),
        q_lora_rank=draw([None, 24, 40]),
        kv_lora_rank=draw([16, 64, 80]),
        qk_nope_head_dim=draw([8, 32]),
        qk_rope_head_dim=draw([4, 16]),
        v_head_dim=draw([8, 24, 48]),
        n_routed_experts=(experts := draw([8, 16, 32])),
        n_group=groups,
        topk_group=(open_groups := draw([g for g in (1, 2, 4) if g <= groups])),
        num_experts_per_tok=draw([k for k in (1, 2, 5, 8) if k <= experts // groups * open_groups]),
        n_shared_experts=draw([1, 3]),
        moe_intermediate_size=draw([8, 40]),
        norm_topk_prob=draw([True, False]),
        routed_scaling_factor=draw([1.0, 2.5]),
        num_mtp_layers=draw([0, 1, 2]),
    )


@pytest.mark.parametrize("seed", range(12))
def test_drawn_configuration_equals_transformers_in_prefill_and_cached_decoding(seed, tmp_path):
    ours = random_model(seed, **drawn(seed))
    save(ours, char_tokenizer("0123456789"), tmp_path / "checkpoint")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        whole = [model(tokens()).logits for model in (ours, theirs)]
        first = [model(tokens()[:, :14], use_cache=True) for model in (ours, theirs)]
        pieces = [first[0].logits]
        for column in range(14, 23):
            step = ours(tokens()[:, column : column + 1], past_key_values=first[0].past_key_values)
            pieces.append(step.logits)
    assert largest(whole[0]) > 1
    assert largest(whole[0] - whole[1]) < 1e-4
    assert largest(torch.cat(pieces, dim=1) - whole[1]) < 1e-4
    assert largest(first[0].logits - first[1].logits) < 1e-4


def test_cached_decoding_equals_transformers_with_left_padding(pair):
    ours, theirs = pair
    mask = torch.ones(3, 23, dtype=torch.long)
    mask[0, :7] = mask[1, :1] = 0
    generated = {
        name: model.generate(
            tokens(),
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for name, model in (("ours", ours), ("theirs", theirs))
    }
    assert torch.equal(generated["ours"].sequences, generated["theirs"].sequences)
    assert largest(torch.stack(generated["ours"].logits) - torch.stack(generated["theirs"].logits)) < 1e-4


def test_gradients_equal_those_of_transformers(pair):
    ours, theirs = pair
    for model in pair:
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = wanted[name].grad
        assert largest(parameter.grad - gradient) <= 1e-4 * largest(gradient), name


def test_loaded_checkpoint_computes_the_same(tmp_path):
    model = random_model()
    save(model, char_tokenizer("0123456789"), tmp_path / "checkpoint")
    again = load(tmp_path / "checkpoint")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_bfloat16_is_as_close_to_float32_as_in_transformers(tmp_path):
    """Judged on a model without experts: a token that changes its experts at a tie says nothing of rounding."""
    exact = random_model(first_k_dense_replace=3)
    save(exact, char_tokenizer("0123456789"), tmp_path / "checkpoint")
    wanted = exact(tokens()).logits.log_softmax(-1)
    rounded = (
        load(tmp_path / "checkpoint", torch.bfloat16),
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.bfloat16),
    )
    mine, theirs = ((model(tokens()).logits.float().log_softmax(-1) - wanted).abs().mean() for model in rounded)
    assert 0 < mine < 1.2 * theirs < 0.2
