"""Engine and learner stay one policy: over thirty updates of a mixture of experts, at every one of them."""

import asyncio
import copy
import json
from pathlib import Path

import pytest
import torch

from reasoner.__main__ import main
from reasoner.config import Learner
from reasoner.credit import GRPO, assign
from reasoner.learner import learn
from reasoner.paged_engine import paged_engine
from reasoner.samples import collate
from rollouts.base import Group, Rollout
from search.base import Sampling, Trajectory, derive
from verifiers.base import Task, Verdict

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.toml"
STEPS = 30


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["grpo", "process"])
def test_log_probabilities_of_engine_and_learner_agree_at_every_step_of_thirty(tmp_path, credit):
    """Sums of two or three terms: some of every batch come out right after so short a warm-up, so each step updates."""
    small = (
        f"--engine.kind=local --steps={STEPS} --tasks_per_step=16 --search.n=8 --tasks.train=480 --tasks.heldout=8 "
        "--base.steps=150 --base.batch=16 --evaluate.tasks=8 --evaluate.n=2 --evaluate.k=2 --checkpoint_every=100 "
        f"--learner.lr=1e-3 --learner.balance_rate=0.01 --credit.kind={credit} --tasks.verifier=process_math"
    ).split()
    tables = [
        '--policies={process_math={outcome={form="simplest"}}}',
        "--tasks.params={min_terms=2, max_terms=3, min_digits=1, max_digits=1}",
    ]
    folders = [f"--out={tmp_path}/runs", f"--cache={tmp_path}/cache"]
    assert main(["train", str(CONFIG), *small, *tables, *folders]) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    updates = [row["mismatch"] for row in rows if "mismatch" in row]
    assert len(updates) == STEPS and max(updates) <= 0.01, updates


def test_with_router_replay_every_token_goes_through_the_rollouts_experts_at_every_step_of_thirty(
    tmp_path, model, tokenizer
):
    """The engine computes in bfloat16, the learner in float32: alone it would choose others for some tokens."""
    policy = model()
    engine = paged_engine(
        copy.deepcopy(policy).to(torch.bfloat16), tokenizer, Sampling(max_tokens=8), context=32, record=True
    )
    task = Task("t/1", ({"role": "user", "content": "3+4="},), "7", "math")
    shares = {"replayed": [], "free": []}

    def drawn(step):
        roots = [Trajectory(tuple(tokenizer.encode("3+4=")), seed=derive(0, step, i)) for i in range(8)]

        async def all_paths():
            return await asyncio.gather(*(engine.extend(root) for root in roots))

        paths = [path for found in asyncio.run(all_paths()) for path in found]
        scores = [path.text.count("7") / 8 for path in paths]
        return Group(
            task, tuple(Rollout(task, p, Verdict("scored", s, s > 0)) for p, s in zip(paths, scores, strict=True))
        )

    def steps():
        for step in range(STEPS):
            engine.load(policy.state_dict(), step)
            samples = assign(GRPO(), [drawn(step)])
            for name, share in shares.items():
                share.append(differently_routed(policy, tokenizer, samples, replay=name == "replayed"))
            yield samples

    settings = Learner(lr=1e-3, lr_warmup=0, balance_rate=0.01, router_replay=True)
    options = dict(seed=0, temperature=1.0, max_completion=8, folder=tmp_path)
    learn(policy, tokenizer, lambda _: steps(), settings, steps=STEPS, **options)
    assert shares["replayed"] == [0.0] * STEPS and max(shares["free"]) > 0


@torch.no_grad()
def differently_routed(policy, tokenizer, samples, *, replay):
    """Of all tokens that an engine has read, the share whose experts in the learner's pass are others in some layer."""
    rows = collate(samples, tokenizer.pad_token_id, config=policy.config)
    ids, mask = (torch.cat([rows[f"prompt_{p}"], rows[f"completion_{p}"]], dim=1) for p in ("ids", "mask"))
    recorded = rows["experts"].long()
    known = recorded[..., -1, 0] >= 0
    assert known.sum() == mask.sum() - len(samples)  # nothing has read the last token of a path
    chosen = {"experts": recorded} if replay else {}
    used = policy.eval()(ids, attention_mask=mask, output_experts=True, **chosen).experts
    different = (used.sort(-1).values != recorded.sort(-1).values).any(-1)[known][:, 1:]  # layer 0 is dense
    return different.any(-1).float().mean().item()
