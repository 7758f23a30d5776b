"""The whole loop on the in-process engine: no Ray, no vLLM, seconds."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from reasoner import checkpoints
from reasoner.__main__ import main
from rollouts.journal import read

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.toml"
SMALL = (
    "--engine.kind=local --steps=2 --tasks_per_step=4 --search.n=4 --tasks.train=64 --tasks.heldout=8 --base.steps=4 "
    "--base.batch=8 --base.hidden=32 --base.layers=2 --evaluate.tasks=8 --evaluate.n=4 --evaluate.k=2 "
    "--sampling.max_tokens=24 --learner.lr_warmup=0 --verifier_workers=1 --learner.micro_batches=2"
).split()


def train(folder: Path, *more: str) -> Path:
    assert main(["train", str(CONFIG), *SMALL, f"--out={folder}/runs", f"--cache={folder}/cache", *more]) == 0
    return folder / "runs" / "quickstart"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"))


def rows(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "time"))} for row in found]


def test_a_run_leaves_everything_that_others_read(run):
    summary = json.loads((run / "summary.json").read_text())
    for side in ("base", "final"):
        assert {"greedy", "mean_at_k", "pass_at_k", "maj_at_k", "marginal_at_k", "k", "n", "ci"} <= summary[side].keys()
        assert 0 <= summary[side]["mean_at_k"] <= summary[side]["pass_at_k"] <= 1
    assert {"warmup", "rollouts", "verify", "learn", "sync", "eval", "total"} <= summary["seconds"].keys()
    assert {"generated", "prefilled"} <= summary["tokens"].keys() and summary["tokens"]["generated"] > 0
    assert summary["mismatch"]["first"] < 0.01 and summary["mismatch"]["last"] < 0.01
    assert {"versions", "seed", "peak_rss_bytes"} <= summary.keys()
    assert (run / "report.html").stat().st_size > 1000
    assert (run / "checkpoint" / "config.json").is_file() and (run / "checkpoint" / "model.safetensors").is_file()
    assert json.loads((run / "config.json").read_text())["steps"] == 2


def test_the_journal_holds_every_rollout_with_the_version_of_every_token(run):
    groups = list(read(run / "journal.jsonl"))
    assert [step for step, _, _ in groups] == [0] * 4 + [1] * 4
    metrics = rows(run)
    for step, version, group in groups:
        assert version == metrics[step]["version"] and len(group.rollouts) == 4
        for rollout in group.rollouts:
            (span,) = rollout.trajectory.steps[0].versions
            assert span == (version, 0, len(rollout.trajectory.steps[0].ids))


def test_steps_without_contrast_are_no_updates(tmp_path):
    found = rows(train(tmp_path, "--steps=6", "--tasks_per_step=1", "--search.n=2"))
    assert any(row["groups_used"] == 0 for row in found)
    for row, following in zip(found, found[1:], strict=False):
        assert following["version"] - row["version"] == row["groups_used"]


def test_two_runs_with_one_seed_give_identical_metrics(run, tmp_path):
    assert rows(train(tmp_path)) == rows(run)


def test_the_paged_engine_gives_the_rollouts_of_the_local_one(run, tmp_path):
    other = train(tmp_path, "--engine.kind=paged", "--learner.router_replay=true")
    groups = ([g for _, _, g in read(folder / "journal.jsonl")] for folder in (run, other))
    for want, got in zip(*groups, strict=True):
        assert [r.trajectory.ids for r in got.rollouts] == [r.trajectory.ids for r in want.rollouts]
        assert all(r.trajectory.steps[0].experts for r in got.rollouts)


@pytest.mark.slow
def test_a_run_on_the_paged_engine_needs_neither_ray_nor_vllm(tmp_path):
    folders = [f"--out={tmp_path}/runs", f"--cache={tmp_path}/cache"]
    arguments = ["train", str(CONFIG), *SMALL, "--engine.kind=paged", *folders]
    code = f"import sys; sys.modules.update(ray=None, vllm=None); from reasoner.__main__ import main; main({arguments})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=CONFIG.parents[1]
    )
    assert (tmp_path / "runs" / "quickstart" / "summary.json").is_file(), done.stderr[-2000:]


@pytest.mark.parametrize("kind", ["process", "verifier"])
def test_training_rollouts_can_be_searched_with_a_score(tmp_path, kind):
    search = ["--search.kind=beam", "--search.width=2", "--search.branch=2", f"--score.kind={kind}", "--steps=1"]
    plain = [a for a in SMALL if "search.n" not in a and "steps=2" not in a]
    config = tmp_path / "searched.toml"
    config.write_text(CONFIG.read_text().replace('[search]\nkind = "sample"\nn = 8\n', ""))
    folders = [f"--out={tmp_path}/runs", f"--cache={tmp_path}/cache"]
    assert main(["train", str(config), *plain, *search, *folders]) == 0
    groups = [group for _, _, group in read(tmp_path / "runs" / "quickstart" / "journal.jsonl")]
    values = [r.trajectory.value for group in groups for r in group.rollouts]
    assert len(groups) == 4 and all(0 <= value <= 1 for value in values)
    assert json.loads((tmp_path / "runs" / "quickstart" / "config.json").read_text())["score"]["kind"] == kind


def test_a_step_search_on_responses_without_steps_ends_with_its_remedy(tmp_path, capsys):
    plain = [a for a in SMALL if "search.n" not in a]
    config = tmp_path / "searched.toml"
    config.write_text(CONFIG.read_text().replace('[search]\nkind = "sample"\nn = 8\n', '[search]\nkind = "beam"\n'))
    more = ["--sampling.step=:::", "--score.kind=process", f"--out={tmp_path}/runs", f"--cache={tmp_path}/cache"]
    assert main(["train", str(config), *plain, *more]) == 2
    assert "sampling.step = ':::'" in capsys.readouterr().err


def test_another_seed_gives_another_run(run, tmp_path):
    assert rows(train(tmp_path, "--seed=5")) != rows(run)


def test_an_earlier_run_of_the_same_name_is_moved_aside_not_lost(tmp_path):
    first = train(tmp_path)
    before = (first / "summary.json").read_text()
    train(tmp_path)
    assert (tmp_path / "runs" / "quickstart.1" / "summary.json").read_text() == before


def test_a_checkpoint_can_be_evaluated(run, tmp_path, capsys):
    arguments = [f"--checkpoint={run}/checkpoint", f"--out={tmp_path}"]
    assert main(["eval", str(CONFIG), *SMALL, *arguments]) == 0
    result = json.loads((tmp_path / "quickstart-eval" / "evaluation.json").read_text())
    final = json.loads((run / "summary.json").read_text())["final"]
    assert result["greedy"] == final["greedy"] and result["mean_at_k"] == final["mean_at_k"]


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert main(["train", str(CONFIG), "--dry-run", f"--out={tmp_path}/runs", f"--cache={tmp_path}/cache"]) == 0
    assert "32 tasks, 256 paths" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz=3"], "Did you mean steps?"),
        (["--base.kind=pretrained", "--base.path=nowhere"], "nowhere"),
        (["--tasks.dataset=no_such_thing"], "no_such_thing"),
        (["--tasks.kind=jsonl", "--tasks.path=missing.jsonl", "--tasks.heldout=0.5"], "missing.jsonl"),
        (["--tasks.verifier=mathh"], "math"),
        (["--tasks_per_step=100000"], "tasks_per_step = 100000"),
        (["--engine.max_model_len=80", "--sampling.max_tokens=70"], "engine.max_model_len = 80"),
        (["--tasks.prompt={question}"], 'tasks.prompt = "{expression} ="'),
        (["--evaluate.tasks=9"], "evaluate.tasks = 9"),
        (["--policies.code.credit=tests"], "policies.code"),
        (["--search.kind=best_of"], "score"),
        (["--ray=127.0.0.1:1", "--engine.kind=vllm"], "ray start --head"),
        (["--out=/dev/null/runs"], "out: no folder can be made in /dev/null"),
        (["--cache=/proc/cache"], "cache: no folder can be made in /proc"),
    ],
)
def test_a_mistake_is_one_message_exit_code_2_and_nothing_written(tmp_path, capsys, arguments, message):
    plain = [a for a in SMALL if not any(a.split("=")[0] == b.split("=")[0] for b in arguments)]
    config = CONFIG
    if table := next((t for t in ("tasks", "base") if any(f"{t}.kind" in a for a in arguments)), None):
        plain = [a for a in plain if not a.startswith(f"--{table}.")]  # another kind has other keys
        config = tmp_path / "other.toml"
        config.write_text('name = "x"\nsteps = 1\n')
    code = main(["train", str(config), *plain, f"--out={tmp_path}/runs", f"--cache={tmp_path}/cache", *arguments])
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error, error
    assert not (tmp_path / "runs").exists()


def test_a_folder_in_use_is_refused_before_anything_is_computed(tmp_path, capsys):
    (tmp_path / "quickstart").mkdir()
    with checkpoints.lock(tmp_path / "quickstart"):
        assert main(["train", str(CONFIG), *SMALL, f"--out={tmp_path}", f"--cache={tmp_path}/cache"]) == 2
    error = capsys.readouterr().err
    assert "belongs to a run that is going on" in error and "warm-up" not in error
    assert not (tmp_path / "cache").exists()


def test_a_reference_that_the_verifier_cannot_read_names_its_task(tmp_path, capsys):
    (tmp_path / "tasks.jsonl").write_text('{"question": "3+4=", "answer": ""}\n{"question": "1+1=", "answer": "2"}\n')
    (tmp_path / "held.jsonl").write_text('{"question": "2+2=", "answer": "4"}\n')
    config = tmp_path / "c.toml"
    config.write_text(
        f'name = "x"\nsteps = 1\ntasks_per_step = 1\n[tasks]\nkind = "jsonl"\npath = "{tmp_path}/tasks.jsonl"\n'
        f'heldout_path = "{tmp_path}/held.jsonl"\n'
    )
    assert main(["check", str(config)]) == 2
    assert "tasks/1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_process_and_leaves_a_readable_journal(tmp_path, sent):
    arguments = [a for a in SMALL if "kind" not in a and "steps=2" not in a]
    command = [
        sys.executable,
        "-m",
        "reasoner",
        "train",
        str(CONFIG),
        *arguments,
        "--steps=2000",
        f"--out={tmp_path}/runs",
    ]
    process = subprocess.Popen(
        [*command, f"--cache={tmp_path}/cache", "--engine.kv_cache_gib=0.1"], stderr=subprocess.PIPE, text=True
    )
    journal = tmp_path / "runs" / "quickstart" / "journal.jsonl"
    deadline = time.monotonic() + 300
    while not (journal.exists() and journal.stat().st_size > 20_000) and time.monotonic() < deadline:
        time.sleep(0.2)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(sent)
    assert process.wait(60) == 130 and "Traceback" not in process.stderr.read()
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive and len(gone) > 4
    assert len(list(read(journal))) >= 4
