"""Checkpoints in the public format: what is written and refused; the tokenizer beside them; the traps of serving."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DeepseekV3Config, LlamaConfig, LlamaForCausalLM

from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer, check_serving, export, load, save

ALPHABET = "0123456789+-= ans:"


def tiny(**changes) -> ReasonerForCausalLM:
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=2, hidden_size=64, n_routed_experts=8, num_experts_per_tok=2) | changes
    return ReasonerForCausalLM(ReasonerConfig.small(vocab_size=len(char_tokenizer(ALPHABET)), **sizes))


@pytest.fixture
def folder(tmp_path):
    save(tiny(), char_tokenizer(ALPHABET), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def change(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def test_missing_tensor_is_named(folder):
    change(folder, lambda weights: weights.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    with pytest.raises(ValueError, match=r"1 tensors missing \(model.layers.1.mlp.experts.3.up_proj.weight\)"):
        load(folder)


def test_surplus_tensor_is_named(folder):
    change(folder, lambda weights: weights.update({"model.layers.7.nonsense": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"surplus \(model.layers.7.nonsense\)"):
        load(folder)


def test_tensor_of_another_shape_is_named_with_both_shapes(folder):
    change(folder, lambda weights: weights.update({"lm_head.weight": torch.ones(5, 64)}))
    with pytest.raises(ValueError, match=r"lm_head.weight is \(5, 64\) but config.json makes it \(22, 64\)"):
        load(folder)


def test_file_cut_short_is_named(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors cannot be read .*cut short"):
        load(folder)


def test_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load(tmp_path)


def test_tied_embeddings_are_refused():
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        tiny(tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scoring_func="softmax"), "scoring_func='softmax'"),
        (dict(rope_interleave=False), "rope_interleave=False"),
        (dict(n_group=4, topk_group=1, num_experts_per_tok=9), "num_experts_per_tok=9"),
        (dict(n_group=5, topk_group=5), "n_group=5 does not divide"),
        (dict(hidden_size=100), "hidden_size=100 must be a positive multiple of 8"),
        (dict(moe_intermediate_size=0), "moe_intermediate_size=0 must be"),
        (dict(qk_rope_head_dim=15), "qk_rope_head_dim=15"),
        (dict(hiden_size=64), "unknown key 'hiden_size': did you mean 'hidden_size'?"),
    ],
)
def test_configuration_that_the_model_cannot_run_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ReasonerConfig.small(vocab_size=8, **change)


def test_files_hold_what_servers_need(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    wanted = dict(
        model_type="deepseek_v3", topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1, rms_norm_eps=1e-6,
        rope_interleave=True, moe_router_dtype="float32", num_nextn_predict_layers=0, tie_word_embeddings=False,
        n_group=1, topk_group=1,
    )  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    weights = load_file(folder / "model.safetensors")
    assert weights["model.layers.1.mlp.experts.7.down_proj.weight"].shape == (64, 32)
    assert "lm_head.weight" in weights


def test_router_bias_is_float32_in_a_bfloat16_checkpoint(tmp_path):
    model = tiny()
    model.model.layers[1].mlp.gate.e_score_correction_bias += 1.001
    save(model.to(torch.bfloat16), char_tokenizer(ALPHABET), tmp_path / "checkpoint")
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(weights["model.layers.1.mlp.gate.e_score_correction_bias"], torch.full((8,), 1.001))
    again = load(tmp_path / "checkpoint")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.model.layers[1].mlp.gate.e_score_correction_bias, torch.full((8,), 1.001))


def test_failed_save_leaves_the_old_checkpoint(folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(tiny(), Broken(), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert os.listdir(folder.parent) == [folder.name]


def test_saving_again_replaces_the_checkpoint(folder):
    model = tiny()
    model.lm_head.weight.data.fill_(0.5)
    save(model, char_tokenizer(ALPHABET), folder)
    assert torch.equal(load(folder).lm_head.weight, model.lm_head.weight)
    assert os.listdir(folder.parent) == [folder.name]


def test_a_checkpoint_decodes_with_a_cache_although_its_trainer_had_none(tmp_path):
    model = tiny()
    model.config.use_cache = model.generation_config.use_cache = False  # as trainers leave it
    save(model, char_tokenizer(ALPHABET), tmp_path / "checkpoint")
    assert not model.config.use_cache
    again, widths = load(tmp_path / "checkpoint").eval(), []
    again.model.register_forward_pre_hook(lambda _, args, kwargs: widths.append(args[0].shape[1]), with_kwargs=True)
    again.generate(torch.full((2, 5), 4), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert widths == [5, 1, 1]


def test_export_copies_nothing():
    model = tiny()
    for _, tensor in export(model):
        tensor.data.fill_(3)
    assert all((p == 3).all() for p in model.parameters())


def test_what_a_trainer_saves_by_itself_loads_too(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_other_models_load_and_export_under_their_own_names(tmp_path):
    sizes = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    other = LlamaForCausalLM(LlamaConfig(vocab_size=len(char_tokenizer(ALPHABET)), **sizes))
    save(other, char_tokenizer(ALPHABET), tmp_path / "llama")
    again = load(tmp_path / "llama")
    assert type(again) is LlamaForCausalLM
    exported = dict(export(again))
    assert exported.keys() == other.state_dict().keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in other.state_dict().items())


def test_checkpoint_written_by_transformers_keeps_its_groups(folder):
    """transformers leaves out of config.json what equals its own defaults (8 groups), so ours must be the same."""
    assert ReasonerConfig().n_group == DeepseekV3Config().n_group
    assert ReasonerConfig().topk_group == DeepseekV3Config().topk_group


def test_text_over_the_alphabet_survives_encoding(tmp_path):
    text = "  1+2 = 3 \n\n ans: 3  \n"
    char_tokenizer(ALPHABET).save_pretrained(tmp_path)
    for tokenizer in (char_tokenizer(ALPHABET), AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.batch_decode([ids, ids[:3]]) == [text, text[:3]]


def test_character_outside_the_alphabet_is_not_swallowed():
    with pytest.raises(Exception, match="UNK"):
        char_tokenizer(ALPHABET)("1+2?")


def test_empty_alphabet_is_refused():
    with pytest.raises(ValueError, match="alphabet is empty"):
        char_tokenizer("")


def test_chat_template_ends_a_question_with_a_newline_and_an_answer_with_eos():
    tokenizer = char_tokenizer(ALPHABET)
    question = [{"role": "user", "content": "1+1 ="}]
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == "1+1 =\n"
    answer = [*question, {"role": "assistant", "content": "ans: 2"}]
    assert tokenizer.apply_chat_template(answer, tokenize=False) == "1+1 =\nans: 2<eos>"
    ids = tokenizer.apply_chat_template(answer, return_dict=False)
    assert ids[-1] == tokenizer.eos_token_id == 2 and tokenizer.decode(ids, skip_special_tokens=True) == "1+1 =\nans: 2"


def test_serving_traps_are_named():
    config = DeepseekV3Config(rms_norm_eps=1e-5, tie_word_embeddings=True, kv_lora_rank=64, qk_nope_head_dim=20)
    found = "\n".join(check_serving(config))
    for trap in (
        "topk_method",
        "scoring_func",
        "moe_layer_freq",
        "moe_router_dtype",
        "rms_norm_eps",
        "tie_word",
        "kv_lora_rank",
        "= 84",
    ):
        assert trap in found
    assert check_serving(LlamaConfig()) == []


def test_values_that_vllm_would_cut_are_named():
    found = check_serving(ReasonerConfig.small(vocab_size=8, v_head_dim=128))
    assert any("cuts values down to 64" in line for line in found)


def test_reference_sizes_have_no_serving_traps():
    sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=128)
    assert check_serving(ReasonerConfig.small(vocab_size=64, **sizes)) == []
    (only,) = check_serving(ReasonerConfig.small(vocab_size=64))
    assert "VLLM_MLA_DISABLE" in only
