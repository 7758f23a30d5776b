"""Engine and learner stay one policy: over thirty updates of a mixture of experts, at every one of them."""

import json
from pathlib import Path

import pytest

from reasoner.__main__ import main

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.toml"


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["grpo", "process"])
def test_log_probabilities_of_engine_and_learner_agree_at_every_step_of_thirty(tmp_path, credit):
    small = (
        "--engine.kind=local --steps=30 --tasks_per_step=8 --search.n=4 --tasks.train=256 --tasks.heldout=8 "
        "--base.steps=150 --base.batch=16 --evaluate.tasks=8 --evaluate.n=2 --evaluate.k=2 --checkpoint_every=100 "
        f"--learner.lr=1e-3 --learner.balance_rate=0.01 --credit.kind={credit} --tasks.verifier=process_math"
    ).split()
    policy = '--policies={process_math={outcome={form="simplest"}}}'
    folders = [f"--out={tmp_path}/runs", f"--cache={tmp_path}/cache"]
    assert main(["train", str(CONFIG), *small, policy, *folders]) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    updates = [row["mismatch"] for row in rows if "mismatch" in row]
    assert len(updates) > 20 and max(updates) <= 0.01, updates
