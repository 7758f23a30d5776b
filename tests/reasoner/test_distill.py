"""Healing a converted checkpoint: what the loss is, what is trained, that it heals, and what it leaves when stopped."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reasoner import distill
from reasoner.__main__ import main
from reasoner.convert import compare, convert
from reasoner.distill import Healing, attention_loss, divergence, heal, soft_label_loss
from reasoner.model import char_tokenizer, load, save

ALPHABET = "0123456789+-= ans:"
TEXTS = [f"{a}+{b} = ans: {a + b}\n{b}-{a} = ans: {b - a}\n" * 20 for a in range(16) for b in (1, 17, 203)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model of two key heads, and what conversion made of it."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=22, num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=128, **sizes)
    teacher = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    save(teacher, char_tokenizer(ALPHABET), folder / "teacher")
    student, tokenizer, _ = convert(folder / "teacher", latent=64, rope=16, texts=TEXTS, tokens=2048)
    save(student, tokenizer, folder / "student")
    (folder / "text.txt").write_text("".join(TEXTS))
    return folder


@pytest.fixture
def pair(folders):
    return load(folders / "student"), load(folders / "teacher")


def tokens(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 22, (rows, 32), generator=torch.Generator().manual_seed(seed))


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_divergence_is_the_sum_over_the_vocabulary():
    student, teacher = logits(5, 7), logits(5, 7, seed=1)
    q, p = (student / 2).softmax(-1), 0.9 * (teacher / 2).softmax(-1) + 0.1 / 7
    forward, backward = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    found = divergence(student, teacher, temperature=2.0, reverse=0.25, smoothing=0.1)
    torch.testing.assert_close(found, 4 * (0.75 * forward + 0.25 * backward))


@pytest.mark.parametrize("reverse", [0.0, 0.5, 1.0])
def test_divergence_of_equal_laws_is_nothing_and_pulls_nowhere(reverse):
    teacher = logits(5, 7)
    student = (teacher + 3).requires_grad_()  # a constant changes no law
    found = divergence(student, teacher, reverse=reverse)
    found.sum().backward()
    assert found.abs().max() < 1e-12 and student.grad.abs().max() < 1e-12


def test_gradient_through_the_last_hidden_states_is_that_of_the_whole(pair):
    """`soft_label_loss` never holds the logits of two rows."""
    student, teacher = pair
    parameters = distill.attention_inputs(student)
    soft_label_loss(student, teacher, tokens(3), Healing(reverse=0.3, temperature=1.5, smoothing=0.05))
    found = [p.grad.clone() for p in parameters]
    student.zero_grad()
    law = divergence(student(tokens(3)).logits, teacher(tokens(3)).logits, 1.5, 0.3, 0.05)
    law.mean().backward()
    for gradient, parameter in zip(found, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_attention_of_an_exact_conversion_has_no_error_layer_by_layer(tmp_path):
    """With one key head; the norms' eps differ, so the residual is scaled."""
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=22, hidden_size=64, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, rms_norm_eps=1e-4, max_position_embeddings=128,
        )
    )  # fmt: skip
    with torch.no_grad():
        teacher.model.embed_tokens.weight.mul_(6)
    save(teacher, char_tokenizer(ALPHABET), tmp_path / "teacher")
    student, _, _ = convert(tmp_path / "teacher", latent=64, rope=16, texts=TEXTS, tokens=2048)
    distill.attention_inputs(student)
    assert attention_loss(student, teacher.eval(), tokens(2), Healing()) < 1e-5


@pytest.mark.parametrize("layerwise", [0.0, 1.0])
def test_both_parts_heal_and_train_attention_inputs_alone(pair, layerwise):
    student, teacher = pair
    before = {name: p.clone() for name, p in student.named_parameters()}
    steps = Healing(steps=30, minutes=5, lr=1e-2, layerwise=layerwise, evaluate_every=1e9)
    summary = heal(student, teacher, tokens(64), tokens(4, seed=1), steps)
    assert summary["after"]["kl"] < 0.7 * summary["before"]["kl"]
    assert summary["steps"] == 30 and summary["tokens"] == 30 * 4 * 32
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("self_attn" in name and "o_proj" not in name for name in moved)
    assert summary["after"]["kl"] == pytest.approx(compare(teacher, student, tokens(4, seed=1))["kl"])


@pytest.mark.parametrize(
    ("change", "named"), [(dict(smoothing=1.5), "smoothing=1.5"), (dict(temperature=0.0), "temperature=0.0")]
)
def test_setting_out_of_range_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        Healing(**change)


def command(folders, out, *more: str) -> list[str]:
    where = ["--student", str(folders / "student"), "--teacher", str(folders / "teacher"), "--to", str(out)]
    return ["distill", *where, "--text", str(folders / "text.txt"), "--length=32", *more]


def test_command_writes_checkpoint_curve_and_summary(folders, tmp_path, capsys):
    assert main(command(folders, tmp_path / "healed", "--steps=6", "--lr=1e-2", "--evaluate-every=0.001")) == 0
    curve = [json.loads(line) for line in (tmp_path / "healed" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["part"] for entry in curve if "loss" in entry] == ["attention_loss"] * 2 + ["soft_label_loss"] * 4
    measured = [entry for entry in curve if "kl" in entry]
    summary = json.loads((tmp_path / "healed" / "summary.json").read_text())
    assert measured[0]["kl"] == summary["before"]["kl"] and measured[-1]["kl"] == summary["after"]["kl"]
    assert len(measured) == 8 and measured[-1]["step"] == summary["steps"] == 6
    assert summary["settings"]["minutes"] == 10.0 and summary["seconds"] < 600  # what was allowed, and what it took
    load(tmp_path / "healed" / "checkpoint")
    assert main(command(folders, tmp_path / "healed")) == 2 and "is there already" in capsys.readouterr().err


def test_student_learns_on_its_own_continuations_too(folders, tmp_path):
    more = ("--steps=1", "--batch=8", "--lr=1e-2", "--on-policy=12")
    assert main(command(folders, tmp_path / "healed", *more)) == 0
    curve = [json.loads(line) for line in (tmp_path / "healed" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in curve if "on_policy_step" in entry]
    measured = [entry["kl"] for entry in curve if "kl" in entry]
    assert len(losses) == 12 and measured[-1] < 0.9 * measured[-2]
    assert json.loads((tmp_path / "healed" / "summary.json").read_text())["after"]["kl"] == measured[-1]


def test_stopped_healing_leaves_the_checkpoint_of_its_last_evaluation(folders, tmp_path, capsys, monkeypatch):
    class Interrupted(torch.optim.Adam):
        def step(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim, "Adam", Interrupted)
    assert main(command(folders, tmp_path / "healed")) == 130
    healed, student = load(tmp_path / "healed" / "checkpoint"), load(folders / "student")
    assert torch.equal(healed(tokens(1)).logits, student(tokens(1)).logits)


def test_teacher_of_another_shape_is_refused_with_both_sizes(folders, tmp_path, capsys):
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=22, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    save(other, char_tokenizer(ALPHABET), tmp_path / "other")
    words = command(folders, tmp_path / "healed")
    words[words.index("--teacher") + 1] = str(tmp_path / "other")
    assert main(words) == 2
    assert "hidden_size is 64 in --student and 32 in --teacher" in capsys.readouterr().err
    words[words.index("--student") + 1] = str(tmp_path / "other")
    assert main(words) == 2 and "llama checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "healed").exists()
