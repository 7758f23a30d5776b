"""Rounds of STaR: what is never learned from, what is kept, how it is weighed, and a whole run on the local engine."""

import json
import math
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reasoner.__main__ import main
from reasoner.config import ConfigError, load
from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer
from reasoner.rounds import _plausible, quantile
from reasoner.star import RFT, Star, hinted, leaks, resample, sift, structure, weights
from rollouts.base import Group, Rollout
from rollouts.journal import read
from rollouts.roll_out import encode
from search.base import Step, Trajectory
from verifiers.base import Task, Verdict

CONFIG = Path(__file__).parents[2] / "configs" / "star.toml"
HINT = "{question}\n\nHint: {answer}"
TASK = Task("t", ({"role": "user", "content": "3 + 4 - 2 ="},), "5", "math")
RIGHT = Verdict("scored", score=1.0, correct=True, answer="5")
WRONG = Verdict("scored", score=0.0, correct=False, answer="6")


def rollout(text, verdict=RIGHT, *, end="stop", logprob=-1.0):
    ids = tuple(map(ord, text))
    logprobs = (logprob,) + (0.0,) * (len(ids) - 1)
    return Rollout(TASK, Trajectory((1, 2), (Step(ids, logprobs, text),), end=end), verdict)


def kept(*rollouts, keep=4, hint=None):
    problems, dropped = sift([Group(TASK, rollouts)], keep, hint)
    return ["".join(map(chr, row["completion"])) for row in problems[0]], dropped


# --- what is never learned from


def test_a_wrong_an_unfinished_and_an_unjudged_path_are_dropped_and_counted():
    texts, dropped = kept(
        rollout("3+4=8\nAnswer: 6", WRONG),
        rollout("3+4=7\n7-2=5\nAnswer: 5", end="length"),
        rollout("3+4=7\nAnswer: 5", Verdict.abstain("no answer")),
        rollout("3+4=7\nAnswer: 5", Verdict.fail("broke")),
    )
    assert texts == []
    assert dropped == {"wrong": 1, "unfinished": 1, "abstained": 1, "failed": 1}


@pytest.mark.parametrize("text", ["Answer: 5", "5", "\nAnswer: 5\n"])
def test_a_rationalisation_that_merely_states_the_answer_is_dropped(text):
    assert kept(rollout(text), hint=HINT) == ([], {"states the answer": 1})
    assert kept(rollout(text))[0] == [text]  # without a hint it was the model's own


@pytest.mark.parametrize(
    "text",
    [
        "3+4=7\nThe hint says 5.\nAnswer: 5",
        "3+4=7\nHINT: 5\nAnswer: 5",
        "3+4=7\n7-2=5, as the answer given.\nAnswer: 5",
        "3+4=7\nSince I was told the answer, 5.\nAnswer: 5",
    ],
)
def test_a_rationalisation_that_tells_of_the_hint_is_dropped(text):
    assert kept(rollout(text), hint=HINT) == ([], {"tells of the hint": 1})


def test_a_rationalisation_that_repeats_the_wording_of_the_hint_is_dropped():
    hint = "{question} (Somebody wrote {answer} in the margin.)"
    assert leaks("3+4=7, as somebody wrote: 5", hint) and leaks("It is in the margin: 5", hint)
    assert not leaks("3+4=7\n7-2=5\nSo it is 5", hint)


def test_a_rationalisation_that_the_model_would_not_say_by_itself_is_dropped_and_counted():
    torch.manual_seed(0)
    tokenizer = char_tokenizer("0123456789+-= :\nAnswer")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "n_routed_experts": 8, "num_experts_per_tok": 2}
    model = ReasonerForCausalLM(ReasonerConfig.small(len(tokenizer), **sizes))
    stage = SimpleNamespace(model=model, tokenizer=tokenizer, run=SimpleNamespace(learner=Star(hint=HINT)))
    ids = tuple(tokenizer.encode("3+4=7\n7-2=5\nAnswer: 5")) + (tokenizer.eos_token_id,)
    step = Step(ids, (0.0,) * len(ids), "3+4=7\n7-2=5\nAnswer: 5")  # certain, with the hint
    helped = [Group(TASK, (Rollout(TASK, Trajectory((5, 6, 7, 8), (step,), end="stop"), RIGHT),))]
    prompt = encode(tokenizer, TASK)
    with torch.no_grad():
        laws = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    alone = laws[torch.arange(len(ids)), torch.tensor(ids)].mean().item()  # per token, without the hint
    kept_groups, lost, worth = _plausible(stage, [TASK], helped, alone - 0.01)
    assert worth == pytest.approx(-alone, abs=1e-4)
    assert lost == 0 and kept_groups[0].rollouts[0].trajectory.prompt == prompt
    kept_groups, lost, _ = _plausible(stage, [TASK], helped, alone + 0.01)
    assert lost == 1 and kept_groups[0].rollouts == ()


def test_the_level_to_reach_is_a_share_of_the_models_own_paths():
    assert quantile([-3.0, -1.0, -2.0, -4.0], 0.25) == -3.0
    assert quantile([-3.0, -1.0], 0.0) is None and quantile([], 0.5) is None


# --- what is kept


def test_paths_with_the_same_results_are_one_and_the_likeliest_stands_for_them():
    texts, dropped = kept(
        rollout("3+4=7\n7-2=5\nAnswer: 5", logprob=-3.0),
        rollout("3 + 4 = 7\n7 - 2 = 5\nAnswer: 5", logprob=-1.0),
    )
    assert texts == ["3 + 4 = 7\n7 - 2 = 5\nAnswer: 5"] and dropped == {"same results": 1}


def test_the_paths_that_are_kept_are_the_likeliest_and_those_least_like_it():
    texts, dropped = kept(
        rollout("3+4=7\n7-2=5\nAnswer: 5", logprob=-1.0),
        rollout("3+4=7\n7-1=6\n6-1=5\nAnswer: 5", logprob=-2.0),
        rollout("4-2=2\n3+2=5\nAnswer: 5", logprob=-3.0),
        keep=2,
    )
    assert texts == ["3+4=7\n7-2=5\nAnswer: 5", "4-2=2\n3+2=5\nAnswer: 5"]
    assert dropped == {"beyond keep": 1}


def test_a_path_without_equalities_is_known_by_its_lines():
    assert structure("Two and two\nmake four.\nAnswer: 4") == ("two and two", "make four.")
    assert structure("so 4 + 8 = 12, and\n12 - 5=7.\nAnswer: 7") == ("4+8=12", "12-5=7")
    assert structure("Answer: 7") == ()
    assert structure("x = 3\n\n4+8=12 = 6+6\nAnswer: 12") == ("4+8=12",)  # a chain counts by its first equality


def test_a_long_path_is_read_in_no_time():
    start = time.perf_counter()
    structure("1+" * 50_000 + "\n" + "7 " * 50_000)
    assert time.perf_counter() - start < 1


def test_a_hint_changes_the_question_alone_and_is_marked():
    task = hinted(TASK, HINT)
    assert task.question == "3 + 4 - 2 =\n\nHint: 5" and task.meta == {"hinted": True}
    assert (task.id, task.reference, task.verifier) == (TASK.id, TASK.reference, TASK.verifier)


# --- how much it counts


def test_em_gives_every_solved_problem_one_unit_and_its_absence_every_path():
    problems = [[{}] * 4, [{}]]
    assert weights(problems, em=True) == [0.25] * 4 + [1.0]
    assert weights(problems, em=False) == [1.0] * 5


def test_resampling_takes_every_row_as_often_as_it_weighs_never_off_by_one():
    shares = [0.25, 0.25, 0.25, 0.25, 1.0, 3.0]
    for seed in range(20):
        counts = Counter(resample(shares, 640, seed))
        assert sum(counts.values()) == 640
        for index, share in enumerate(shares):
            assert abs(counts[index] - 640 * share / 5) < 1


def test_resampling_is_right_on_average_when_rows_are_more_than_places():
    taken = Counter(i for seed in range(4000) for i in resample([1.0, 2.0, 3.0], 1, seed))
    assert taken[2] / 4000 == pytest.approx(1 / 2, abs=4 * math.sqrt(0.25 / 4000))


def test_every_round_is_longer_than_the_one_before():
    assert [Star(updates=40).length(number) for number in range(4)] == [40, 48, 58, 69]


def test_a_round_that_kept_little_is_short():
    star = Star(updates=40, batch=32, repeats=30)
    assert [star.length(0, rows) for rows in (1, 13, 42, 43, 1000)] == [1, 12, 39, 40, 40]


# --- mistakes in a config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learner.hint=the answer is {answer}"], "must name {question} and {answer}"),
        (["learner.plausible=1.0"], "must lie in [0, 1)"),
        (["learner.keep=0"], "keep=0 is too small"),
        (["learner.kind=rft"], "set steps = 1"),
        (["learner.kind=stir"], "Did you mean star?"),
        (["learner.loss=dapo"], "learner.loss is not a key of Star"),
        (["tasks_per_step=8", "learner.batch=64"], "cannot be filled"),
        (["resample=2"], "resample shapes policy gradients and learner.kind = 'star' has none"),
        (["credit.kind=rloo"], "credit shapes policy gradients"),
        (["max_lag=1"], "max_lag shapes policy gradients"),
        (["learner.micro_batches=2"], "learner.micro_batches is not a key of Star"),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(overrides, message):
    with pytest.raises(ConfigError, match=message.replace("{", r"\{").replace("[", r"\[").replace(")", r"\)")):
        load(CONFIG, overrides)


def test_a_hint_that_the_base_cannot_spell_is_told_before_the_first_path(tmp_path, capsys):
    assert train(tmp_path, "--base.steps=1", "--learner.hint={question} Hint: {answer}") == 2
    assert "cannot spell a question or learner.hint" in capsys.readouterr().err


def test_tasks_whose_answer_is_no_text_cannot_be_rationalised():
    with pytest.raises(ValueError, match="set learner.rationalise = 0"):
        Star().helped([Task("t", TASK.prompt, {"entry": 5}, "reasoning_gym")])
    assert Star(rationalise=0).helped([Task("t", TASK.prompt, {"entry": 5}, "reasoning_gym")]) == []


def test_a_variant_is_a_kind_with_its_own_settings():
    star, rft = load(CONFIG).learner, load(CONFIG, ["learner.kind=rft", "steps=1"]).learner
    assert isinstance(rft, RFT) and (rft.keep, rft.em) == (100, False) and (star.keep, star.em) == (4, True)


# --- a whole run

SMALL = (
    "--steps=2 --tasks_per_step=24 --tasks.digits=1 --tasks.train=48 --tasks.heldout=8 --evaluate.tasks=8 "
    "--evaluate.n=4 --evaluate.k=2 --sampling.max_tokens=20 --verifier_workers=1 --base.steps=40 --base.batch=32 "
    "--base.hidden=32 --base.layers=2 --base.lr=6e-3 --learner.updates=3 --learner.batch=8"
).split()


def train(folder: Path, *more: str) -> int:
    return main(["train", str(CONFIG), *SMALL, f"--out={folder}/runs", f"--cache={folder}/cache", *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("star")
    assert train(folder, "--learner.kind=v_star", "--learner.rationalise=2", "--learner.verifier_updates=2") == 0
    return folder / "runs" / "star"


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_path_of_a_round_is_kept_or_lost_for_one_reason(run):
    for row in metrics(run):
        assert row["rollouts"] == 24 * 4 == row["kept"] + sum(row["lost"].values())
        asked = 24 - round(24 * row["coverage"])
        assert asked * 2 == row["kept_hinted"] + sum(row["lost_hinted"].values())
        assert row["coverage"] <= row["coverage_all"] <= 1
        assert row["pass_gap"] == pytest.approx(row["pass_at_k"] - row["pass_at_1"]) and row["pass_gap"] >= 0
    assert [row["updates"] for row in metrics(run)] == [3, 4]


def test_what_is_trained_on_has_no_hint_in_it_though_the_journal_does(run):
    groups = list(read(run / "journal.jsonl"))
    prompts = {tuple(g.rollouts[0].trajectory.prompt) for _, _, g in groups if not g.task.meta.get("hinted")}
    helped = {tuple(g.rollouts[0].trajectory.prompt) for _, _, g in groups if g.task.meta.get("hinted")}
    rows = [json.loads(line) for number in (0, 1) for line in (run / f"paths-{number}.jsonl").read_text().splitlines()]
    assert helped and not prompts & helped
    assert rows and all(tuple(row["prompt"]) in prompts for row in rows)


def test_the_report_tells_why_paths_were_not_trained_on(run):
    page = (run / "report.html").read_text()
    assert "path not trained on: wrong" in page and "path with a hint not trained on: wrong" in page
    assert "Held-out accuracy after each round" in page and "its scores agree" not in page


def test_the_verifier_of_v_star_is_a_checkpoint_and_its_choice_is_measured(run):
    summary = json.loads((run / "summary.json").read_text())
    assert (run / "verifier" / "model.safetensors").is_file()
    assert 0 <= summary["final"]["selected_at_k"] <= 1 and summary["rounds"]["verifier"]["pairs"] > 0
    assert len(summary["rounds"]["heldout"]) == 3


def test_a_run_that_was_interrupted_goes_on_after_its_last_whole_round(run, tmp_path):
    again = tmp_path / "star"
    shutil.copytree(run, again, symlinks=True)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "step-2")
    (again / "checkpoint").unlink()
    (again / "checkpoint").symlink_to("checkpoints/step-1")
    (again / "paths-1.jsonl").write_text("")
    assert main(["train", "--resume", str(again)]) == 0

    def plain(rows):
        return [{k: v for k, v in row.items() if not k.startswith(("seconds", "time"))} for row in rows]

    assert plain(metrics(again)) == plain(metrics(run))
    assert (again / "paths-1.jsonl").read_text() == (run / "paths-1.jsonl").read_text()
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (run, again))
    assert before["rounds"] == after["rounds"] and before["final"] == after["final"]


def test_a_round_that_verifies_nothing_ends_with_what_to_change(tmp_path, capsys):
    assert train(tmp_path, "--base.steps=1", "--learner.rationalise=0", "--steps=1") == 2
    said = capsys.readouterr().err
    assert "round 0 verified no path of 24 problems" in said and "learner.rationalise = 4" in said


def test_the_plan_of_a_run_in_rounds_says_what_each_round_does(capsys):
    assert main(["check", str(CONFIG), "--steps=3", "--learner.updates=40", "--learner.rationalise=4"]) == 0
    said = capsys.readouterr().out
    assert "star: 3 rounds" in said
    assert "4 paths with the answer as a hint where all fail; at most 4 paths a problem, 40, 48, 58 updates" in said
