"""Process reward models: where they read, what they learn, how they are measured, and who uses them."""

import asyncio
import json
import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from reasoner import prm as prm_module
from reasoner.__main__ import main
from reasoner.credit import Process, assign
from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer, save
from reasoner.prm import Prm, Settings, bench, ece, measured, tokenised, train
from rollouts.base import Group, Rollout
from rollouts.local_engine import LocalEngine
from rollouts.score import ProcessModel, question_of
from search.base import Sampling, Step, Trajectory
from verifiers.base import Task, Verdict

TOKENIZER = char_tokenizer("0123456789+-= :\nAnswer")
TASK = Task("t/1", ({"role": "user", "content": "1 + 2 ="},), "3", "math")


def model(seed: int = 0) -> ReasonerForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=4
    )
    return ReasonerForCausalLM(ReasonerConfig.small(len(TOKENIZER), num_experts_per_tok=2, **sizes)).eval()


def path(text: str, *, end: str | None = "stop") -> Trajectory:
    prompt = tuple(TOKENIZER.apply_chat_template(list(TASK.prompt), add_generation_prompt=True, return_dict=False))
    ids = (*TOKENIZER.encode(text), *([TOKENIZER.eos_token_id] if end == "stop" else []))
    return Trajectory(prompt, (Step(ids, (-0.1,) * len(ids), text),), end)


def row(steps: list[str], label: int) -> dict:
    return {"problem": "1 + 2 =", "steps": steps, "label": label}


def labelled(steps: list[str], label: int) -> dict:
    ids, prompt, ends = tokenised(row(steps, label), TOKENIZER, "\n")
    values = [float(label < 0 or i < label) for i in range(len(steps))]
    return row(steps, label) | {"ids": ids, "prompt": prompt, "ends": ends, "values": values, "delimiter": "\n"}


def test_one_pass_judges_every_step_as_an_engine_does_one_by_one():
    text = "1+2=3\n3-0=3\nAnswer: 3"
    judge = Prm(model(), TOKENIZER, Settings())
    whole = path(text)
    ids, prompt, ends = tokenised(row(text.split("\n"), -1), TOKENIZER, "\n")
    assert whole.ids[:-1] == tuple(ids) and prompt == len(whole.prompt)
    (values,) = judge.values([(whole.ids, prompt, ends)])
    engine = LocalEngine(judge.model, TOKENIZER, Sampling())
    score = ProcessModel("", top=len(TOKENIZER)).open(question_of(TASK), engine, None)
    starts = [path("1+2=3\n", end=None), path("1+2=3\n3-0=3\n", end=None), whole]
    assert [asyncio.run(score(p)) for p in starts] == pytest.approx(values, abs=1e-5)
    assert judge.tokens == len(ids)


def test_a_path_is_read_once_however_often_it_was_drawn_and_in_any_batch():
    judge = Prm(model(), TOKENIZER, Settings())
    rows = [tokenised(row(steps, -1), TOKENIZER, "\n") for steps in (["1+2=3", "Answer: 3"], ["Answer: 12"])]
    alone = [judge.values([each])[0] for each in rows]
    judge.tokens = 0
    together = judge.values([rows[0], rows[1], rows[0], rows[0]])
    for found, expected in zip(together, [alone[0], alone[1], alone[0], alone[0]], strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert judge.tokens == len(rows[0][0]) + len(rows[1][0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A judge of a task that is learned in seconds: a step with a 9 in it is wrong."""
    folder, noise = tmp_path_factory.mktemp("prm"), random.Random(0)
    save(model(), TOKENIZER, folder / "base")
    rows = []
    for _ in range(300):
        steps = [f"{noise.randrange(10)}+{noise.randrange(10)}={noise.randrange(10)}" for _ in range(3)]
        rows.append(labelled(steps, next((i for i, s in enumerate(steps) if "9" in s), -1)))
    judge = train(rows[:220], folder / "base", steps=60, batch=16, lr=1e-2)
    judge.save(folder / "judge")
    return folder, rows[220:], judge


def test_a_generative_judge_learns_from_labels_and_is_measured_on_others(trained):
    folder, rows, judge = trained
    result = bench([row(r["steps"], r["label"]) for r in rows], judge)  # from the text: as a foreign file
    assert result["f1"] > 0.9 and result["ece"] < 0.1
    assert result["right"] + result["wrong"] == len(rows) and result["wrong_of_several_steps"] == result["wrong"]
    again = bench(rows, Prm.load(folder / "judge"))
    assert again["f1"] == result["f1"]


@pytest.fixture(scope="module")
def surprised():
    """A model, and rows whose right steps are what it would say itself; the wrong ones have another token in them."""
    judge, noise, rows = Prm(model(), TOKENIZER, Settings()), random.Random(0), []
    with torch.no_grad():
        judge.model.lm_head.weight *= 30  # sure of what it says
    for number in range(60):
        begun = TOKENIZER.encode(f"{number} =\n")
        ids, ends, wrong = list(begun), [], noise.choice([-1, 0, 1, 2])
        for step in range(3):
            for place in range(4):
                with torch.no_grad():
                    best = judge.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
                ids.append(3 + (best - 2) % (len(TOKENIZER) - 3) if (step, place) == (wrong, 2) else best)
            ends.append(len(ids))
        values = [float(wrong < 0 or step < wrong) for step in range(3)]
        steps = {"steps": ["?"] * 3, "label": wrong, "problem": str(number)}
        rows.append(steps | {"ids": ids, "prompt": len(begun), "ends": ends, "values": values, "delimiter": "\n"})
    return judge, rows


def test_a_judge_whose_sign_knows_nothing_names_what_surprises_it(surprised):
    judge, rows = surprised
    fitted = judge.calibrated(rows[:30])
    assert fitted.settings.mix[1] > 0.2
    assert bench(rows[30:], fitted)["f1"] > 0.9 > 0.5 > bench(rows[30:], judge)["f1"]


def test_a_judge_stays_as_it_is_where_nothing_is_wrong(surprised):
    judge, rows = surprised
    right = [row for row in rows if row["label"] < 0]
    assert judge.calibrated(right) is judge and judge.calibrated([]) is judge


def test_a_search_is_served_the_mix_that_the_checkpoint_says(surprised, tmp_path):
    judge, rows = surprised
    judge = replace(judge, settings=replace(judge.settings, mix=(0.5, 0.8, -0.3)))
    judge.save(tmp_path / "judge")
    engine = LocalEngine(judge.model, TOKENIZER, Sampling())
    score = ProcessModel(str(tmp_path / "judge"), top=len(TOKENIZER)).open(question_of(TASK), engine, None)
    row = next(row for row in rows if row["label"] == 2)
    ids, prompt, ends = row["ids"], row["prompt"], row["ends"]
    with torch.no_grad():
        law = judge.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    grown = Trajectory(tuple(ids[:prompt]))
    served = []
    for start, end in zip([prompt, *ends], ends, strict=False):
        drawn = tuple(law[i - 1, ids[i]].item() for i in range(start, end))
        grown = replace(grown, steps=(*grown.steps, Step(tuple(ids[start:end]), drawn, "?")))
        served.append(asyncio.run(score(grown)))
    (values,) = judge.values([(ids, prompt, ends)])
    lowest = [min(values[: i + 1]) for i in range(3)]  # an error is not mended by what follows
    assert served == pytest.approx(lowest, abs=1e-4) and served[2] < 0.5 < served[1]
    assert Prm.load(tmp_path / "judge").values([(ids, prompt, ends)])[0] == pytest.approx(values, abs=1e-5)


def test_its_values_are_the_steps_credit_of_a_group(trained):
    folder, _, judge = trained
    text = {"good": "1+2=3\n3-0=3\nAnswer: 3", "bad": "1+2=9\n9-0=9\nAnswer: 9"}
    rollouts = [
        Rollout(TASK, path(text["good"]), Verdict("scored", 1.0, True)),
        Rollout(TASK, path(text["bad"]), Verdict("scored", 0.0, False)),
        Rollout(TASK, path("1"), Verdict.fail("broke")),
    ]
    rule = Process(prm=str(folder / "judge"))
    decode = partial(TOKENIZER.decode, skip_special_tokens=True)
    samples = assign(rule, [Group(TASK, tuple(rollouts))], decode)
    start = len(rollouts[0].trajectory.prompt)
    good, bad = (s.advantages[start] for s in samples)  # of the first step: value after it less 1/2
    assert len(samples) == 2 and good > 0.3 and bad < -0.3
    assert sum({i: s for i, s in enumerate(dict.fromkeys(samples[0].advantages))}.values()) == pytest.approx(0.5)


def test_an_implicit_judge_is_the_log_ratio_to_the_reference():
    policy, reference = model(0), model(1)
    whole = path("1+2=3\nAnswer: 3")
    ids, prompt, ends = tokenised(row(["1+2=3", "Answer: 3"], -1), TOKENIZER, "\n")
    (values,) = Prm(policy, TOKENIZER, Settings("implicit", beta=0.5), reference).values([(ids, prompt, ends)])

    def logprob(of, end: int) -> float:
        with torch.no_grad():
            law = of(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(law[i - 1, ids[i]].item() for i in range(prompt, end))

    expected = [1 / (1 + math.exp(-0.5 * (logprob(policy, end) - logprob(reference, end)))) for end in ends]
    assert values == pytest.approx(expected, abs=1e-5) and whole.ids[:-1] == tuple(ids)


def test_f1_is_the_harmonic_mean_over_exact_names():
    """Hand-made values: one right solution of two passed, one wrong of four named exactly."""
    said = [[0.9, 0.9], [0.9, 0.4], [0.9, 0.4], [0.4, 0.4], [0.9, 0.9], [0.6]]
    rows = [row(["1", "2"], label) for label in (-1, -1, 1, 1, 0)] + [row(["1"], 0)]
    result = measured(rows, said)
    assert result["accuracy_on_right"] == 0.5 and result["accuracy_on_wrong"] == 0.25
    assert result["f1"] == pytest.approx(1 / 3) and result["accuracy_on_wrong_of_several_steps"] == pytest.approx(1 / 3)
    assert result["steps_judged"] == 2 + 2 + 2 + 2 + 1 + 1  # nothing behind the first wrong step


def test_calibration_error_is_the_mean_gap_over_bins():
    judged = [(0.95, True)] * 9 + [(0.95, False)] + [(0.15, False)] * 10
    assert ece(judged) == pytest.approx(0.5 * 0.05 + 0.5 * 0.15)
    assert ece([(1.0, True), (0.0, False)]) == 0.0


def test_a_tokenizer_that_cannot_spell_the_problem_or_the_signs_says_so():
    with pytest.raises(ValueError, match="cannot spell"):
        tokenised({"problem": "What is x?", "steps": ["x"], "label": -1}, TOKENIZER, "\n")
    with pytest.raises(ValueError, match="one token each"):
        prm_module.signs(type("T", (), {"encode": lambda self, text, add_special_tokens: [1, 2]})())


def test_the_command_measures_a_file_and_refuses_what_is_no_judge(trained, tmp_path, capsys):
    folder, rows, _ = trained
    file = tmp_path / "bench.jsonl"
    file.write_text("".join(json.dumps(row(r["steps"], r["label"])) + "\n" for r in rows))
    assert main(["prm", "bench", str(file), "--prm", str(folder / "judge"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["f1"] > 0.9
    assert main(["prm", "bench", str(file), "--prm", str(folder / "base")]) == 2
    assert "no prm.json" in capsys.readouterr().err
    assert main(["prm", "train", str(file), "--base", str(folder / "base"), "--out", str(tmp_path / "x")]) == 2
    assert "token ids" in capsys.readouterr().err
    assert main(["prm", "label", str(tmp_path), "--out", str(tmp_path / "y")]) == 2
    assert "journal.jsonl does not exist" in capsys.readouterr().err
