"""Dense checkpoints made into ours: the exact is exact, the fitted is said, and what cannot be is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from reasoner import dense
from reasoner.__main__ import main
from reasoner.convert import convert, expert_width, rotary_component
from reasoner.model import char_tokenizer, load, save

ALPHABET = "0123456789+-= ans:"
TEXTS = [f"{a}+{b} = ans: {a + b}\n{b}-{a} = ans: {b - a}\n" * 20 for a in range(16) for b in (1, 17, 203)]
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, dict(rms_norm_eps=1e-5)),
    "llama, tied": (LlamaForCausalLM, LlamaConfig, dict(tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig, dict(sliding_window=48, head_dim=32)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, dict(head_dim=32)),
}


def write(folder, family="llama", seed=0, **changes):
    """A random checkpoint whose attention is sharp enough that an error in it shows."""
    torch.manual_seed(seed)
    model_class, config_class, own = FAMILIES[family]
    sizes = dict(
        vocab_size=len(char_tokenizer(ALPHABET)),
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = model_class(config_class(**(sizes | own | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            new = 1 + 0.2 * torch.randn_like(parameter) if parameter.ndim == 1 else parameter * 6
            parameter.copy_(new)
    save(model, char_tokenizer(ALPHABET), folder)
    return model


def converted(folder, latent=64, rope=16, **options):
    return convert(folder, latent=latent, rope=rope, texts=TEXTS, tokens=2048, **options)


def ids():
    """Without white space, which transformers' Qwen2Tokenizer drops from a vocabulary of single characters."""
    return torch.randint(5, 22, (4, 40), generator=torch.Generator().manual_seed(3))


def largest(one, other):
    with torch.no_grad():
        laws = [model(ids()).logits.log_softmax(-1) for model in (one, other)]
    assert laws[0].std() > 0.3  # else agreement says nothing
    return (laws[0] - laws[1]).abs().max().item()


@pytest.mark.parametrize(("family", "latent"), [("llama", 64), ("llama, tied", 96), ("mistral", 64)])
def test_model_with_one_key_head_and_a_wide_latent_converts_exactly(family, latent, tmp_path):
    original = write(tmp_path / "dense", family)
    rope = original.model.layers[0].self_attn.head_dim
    model, _, report = converted(tmp_path / "dense", rope=rope, latent=latent)
    assert largest(original, model) < 1e-3
    assert report["attention"]["kl"] < 1e-5 and report["experts"]["kl"] < 1e-5


def test_experts_compute_what_the_dense_layers_did(tmp_path):
    """Of a model whose attention is far from exact: the step is judged by itself."""
    write(tmp_path / "dense", num_key_value_heads=4)
    attention, _, _ = converted(tmp_path / "dense", experts=False)
    model, _, report = converted(tmp_path / "dense")
    assert largest(attention, model) < 1e-3
    assert report["experts"]["largest"] < 1e-3 < report["attention"]["largest"]
    used = model(ids(), output_experts=True).experts
    assert used.unique().numel() == 32  # every copy has its share
    assert (used // 8 == used[..., :1] // 8).all()  # and no token mixes two


def test_served_checkpoint_is_the_model_that_was_measured(tmp_path):
    write(tmp_path / "dense", num_key_value_heads=2)
    model, tokenizer, _ = converted(tmp_path / "dense")
    save(model, tokenizer, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    assert largest(model, theirs) < 1e-4
    assert largest(model, load(tmp_path / "ours")) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_converts_and_says_what_was_fitted(family, tmp_path):
    write(tmp_path / "dense", family, num_key_value_heads=2)
    model, _, report = converted(tmp_path / "dense")
    assert torch.isfinite(model(ids()).logits).all()
    fitted = family in ("qwen2", "qwen3")  # biases, norms of heads
    assert (report["projections_missed"][1] > 1e-5) == fitted
    assert model.config.max_position_embeddings == (48 if family == "mistral" else 128)


def test_biases_are_exact_where_a_constant_is_linear_in_the_residual(tmp_path):
    """As in a first layer with fewer tokens than dimensions: some direction has the same product with all of them."""
    original = write(tmp_path / "dense", "qwen2", num_hidden_layers=1)
    model, _, report = converted(tmp_path / "dense")
    assert report["projections_missed"][0] < 1e-4
    assert largest(original, model) < 1e-2


def test_latent_narrower_than_the_residual_misses_no_key_or_value_it_has_room_for(tmp_path):
    original = write(tmp_path / "dense", head_dim=16)
    model, _, report = converted(tmp_path / "dense", latent=48)
    assert max(report["latent_missed"]) < 1e-6  # one head of values, all keys are rotary: rank 16
    assert largest(original, model) < 2.0  # what is left is the latent's norm
    _, _, cramped = converted(tmp_path / "dense", latent=8)
    assert min(cramped["latent_missed"]) > 1e-3


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_rope_scaling_becomes_yarn_with_nearly_the_same_frequencies(kind, tmp_path):
    ends = dict(low_freq_factor=1.0, high_freq_factor=4.0) if kind == "llama3" else dict(beta_fast=32, beta_slow=1)
    rope = dict(rope_type=kind, rope_theta=1e4, factor=4.0, original_max_position_embeddings=32, **ends)
    original = write(tmp_path / "dense", rope_parameters=rope, head_dim=32)
    model, _, report = converted(tmp_path / "dense", rope=32)
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert report["frequencies_moved"] < (0.6 if kind == "llama3" else 1e-4)
    if kind == "yarn":
        assert largest(original, model) < 1e-3


def test_wider_heads_share_slots_of_the_rotary_key(tmp_path):
    write(tmp_path / "dense", head_dim=64)
    _, _, report = converted(tmp_path / "dense", rope=32)
    assert 0.1 < report["frequencies_moved"] < 0.4  # every other frequency is its neighbour's
    _, _, exact = converted(tmp_path / "dense", rope=64)
    assert exact["frequencies_moved"] < 1e-4 and min(exact["rotary_kept"]) > 0.999


def complex_moments(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(*shape, 5, dtype=torch.complex128, generator=generator)
    return root @ root.mH, generator


def loss_of_rotation(a, b, keys):
    rest = torch.eye(3) - torch.outer(a, b.conj())
    return torch.einsum("rm,rmn,rn->", rest, keys, rest.conj()).real.item()


def test_combination_that_keeps_its_rotation_cannot_be_improved():
    keys, generator = complex_moments(3, 3)
    a, b, (left, without) = rotary_component(keys)
    assert left == pytest.approx(loss_of_rotation(a, b, keys)) and left < 0.9 * without
    for _ in range(50):
        noise = torch.randn(2, 3, dtype=torch.complex128, generator=generator) * 0.05
        assert loss_of_rotation(a + noise[0], b + noise[1], keys) > left


def test_rotary_combination_of_equal_queries_is_the_principal_component():
    keys, _ = complex_moments(3)
    _, b, (left, without) = rotary_component(keys.expand(3, 3, 3))
    values = torch.linalg.eigvalsh(keys)
    assert left == pytest.approx(values[:2].sum().item(), rel=1e-4) and without == pytest.approx(values.sum().item())


def test_one_key_loses_nothing():
    a, b, (left, without) = rotary_component(torch.full((1, 1, 1), 3.0, dtype=torch.complex128))
    assert (a * b.conj()).item() == pytest.approx(1) and left < 1e-12 < without


def test_experts_have_room_for_every_neuron():
    assert expert_width(1536) == 128  # SmolLM2: nothing to fill up
    for neurons in (8, 88, 8192, 11008, 14336):
        inner = expert_width(neurons)
        assert neurons <= 12 * inner < neurons + 12 * 64 and inner % 8 == 0


def test_other_architecture_is_named_with_those_supported(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=21, n_embd=32, n_layer=1, n_head=2))
    save(model, char_tokenizer(ALPHABET), tmp_path / "dense")
    with pytest.raises(ValueError, match="'gpt2'.*llama, mistral, qwen2, qwen3"):
        dense.read(tmp_path / "dense")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(mlp_bias=True), "mlp_bias=True"),
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)), "rope_type='linear'"),
    ],
)
def test_setting_without_a_counterpart_is_named(changes, named, tmp_path):
    write(tmp_path / "dense", **changes)
    with pytest.raises(ValueError, match=named):
        dense.read(tmp_path / "dense")


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path):
    write(tmp_path / "dense")
    name = "model.layers.1.self_attn.k_proj.weight"
    edit(tmp_path / "dense", lambda t: t.update({"model.layers.7.extra": t.pop(name)}))
    with pytest.raises(ValueError, match=rf"1 tensors missing \['{name}'\], 1 surplus \['model.layers.7.extra'\]"):
        dense.read(tmp_path / "dense")
    edit(tmp_path / "dense", lambda t: t.update({name: t.pop("model.layers.7.extra")[:-1]}))
    with pytest.raises(ValueError, match=rf"{name} is \(15, 64\) but config.json makes it \(16, 64\)"):
        dense.read(tmp_path / "dense")


def test_command_writes_a_whole_checkpoint_and_its_report(tmp_path, capsys):
    write(tmp_path / "dense", num_key_value_heads=2)
    (tmp_path / "text.txt").write_text("".join(TEXTS) * 4)
    command = ["convert", "--from", str(tmp_path / "dense"), "--to", str(tmp_path / "ours"), "--kv-lora-rank=64"]
    assert main([*command, "--rope-dim=16", "--tokens=1024", "--text", str(tmp_path / "text.txt")]) == 0
    report = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert report["attention"]["kl"] > 0 and report["experts"]["largest"] < 1e-3
    assert "serving: kv_lora_rank=64" in capsys.readouterr().out
    load(tmp_path / "ours")
    assert main(command) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--kv-lora-rank=0", "--rope-dim=-2", "--rope-dim=15", "--tokens=0"])
def test_option_out_of_range_is_named_and_leaves_no_folder(option, tmp_path, capsys):
    write(tmp_path / "dense")
    assert main(["convert", "--from", str(tmp_path / "dense"), "--to", str(tmp_path / "ours"), option]) == 2
    assert option.split("=")[1] in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_failed_conversion_leaves_no_folder(tmp_path, capsys):
    write(tmp_path / "dense")
    edit(tmp_path / "dense", lambda t: t.pop("model.norm.weight"))
    assert main(["convert", "--from", str(tmp_path / "dense"), "--to", str(tmp_path / "ours")]) == 2
    assert "model.norm.weight" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
