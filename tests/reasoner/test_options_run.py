"""The options of a step together, through the whole loop on the in-process engine."""

import json
from pathlib import Path

import pytest

from reasoner.__main__ import main

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.toml"
SMALL = (
    "--engine.kind=local --steps=2 --tasks_per_step=4 --search.n=4 --tasks.train=64 --tasks.heldout=8 --base.steps=4 "
    "--base.batch=8 --base.hidden=32 --base.layers=2 --evaluate.tasks=8 --evaluate.n=4 --evaluate.k=2 "
    "--sampling.max_tokens=24 --learner.lr_warmup=0 --verifier_workers=1"
).split()


def train(folder: Path, *more: str) -> list[dict]:
    assert main(["train", str(CONFIG), *SMALL, f"--out={folder}/runs", f"--cache={folder}/cache", *more]) == 0
    return [json.loads(line) for line in (folder / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_draws_by_pools_until_there_is_contrast_and_counts_all_of_it(tmp_path):
    rows = train(
        tmp_path, "--curriculum.by=num_terms", "--resample=2", "--length.overlong=8", "--learner.kl=0.1",
        "--learner.lora=2", "--credit.kind=tree",
    )  # fmt: skip
    for row in rows:
        assert row["rollouts"] == 4 * (row["groups_used"] + row["groups_agreeing"] + row["groups_unjudged"])
        assert row["rollouts"] > 16  # an untrained model rarely disagrees with itself: further batches were taken
    assert any("kl" in row for row in rows)
    states = [json.loads(p.read_text()) for p in (tmp_path / "runs/quickstart/checkpoints").glob("*/state.json")]
    assert {"4", "5"} == set(states[-1]["pools"])  # a resumed run knows how hard each pool was


def test_process_credit_runs_on_the_verifiers_step_scores(tmp_path):
    rows = train(tmp_path, "--credit.kind=process", "--tasks.verifier=process_math", "--policies={}")
    assert any("grad_norm" in row for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--curriculum.by=level"], "curriculum.by = 'level'"),
        (["--credit.kind=process"], "tasks.verifier = 'process_math'"),
        (["--credit.kind=process", "--credit.prm=nowhere"], "credit.prm = 'nowhere'"),
    ],
)
def test_what_the_tasks_cannot_give_is_told_before_the_run(arguments, message, capsys):
    assert main(["check", str(CONFIG), *arguments]) == 2
    assert message in capsys.readouterr().err
