"""A run that is stopped anywhere and resumed is the run that was never stopped, bit for bit."""

import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from reasoner import checkpoints
from reasoner.__main__ import main
from reasoner.config import ConfigError, load
from reasoner.progress import Screen
from reasoner.train import train
from rollouts.journal import read

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.toml"
TINY = (
    "--engine.kind=local --steps=6 --tasks_per_step=4 --search.n=6 --tasks.train=64 --tasks.heldout=8 --base.steps=110 "
    "--base.lr=0.01 --base.batch=16 --base.hidden=32 --base.layers=1 --base.blurt=1.0 --base.haste=0.0 "
    "--evaluate.tasks=8 --evaluate.n=4 --evaluate.k=2 --sampling.max_tokens=16 --learner.lr_warmup=2 --learner.lr=1e-3 "
    "--verifier_workers=1 --learner.micro_batches=2 --checkpoint_every=2"
).split() + ["--tasks.params={min_terms=2, max_terms=2, min_digits=1, max_digits=1}"]


class Interrupted(Screen):
    """Stops the run, as Ctrl-C would, when it says a line that has some words."""

    def __init__(self, words: str = "never said") -> None:
        super().__init__(Console(file=io.StringIO(), width=200))
        self.words, self.lines = words, []

    def say(self, line: str) -> None:
        self.lines.append(line)
        if self.words in line:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def begin(folder: Path, cache: Path, *more: str, screen: Screen | None = None) -> Path:
    run = load(CONFIG, [a[2:] for a in [*TINY, f"--out={folder}", f"--cache={cache}", *more]])
    try:
        return train(run, ray="local", screen=screen or Interrupted())
    except KeyboardInterrupt:
        return folder / run.name


def go_on(run: Path, *more: str) -> int:
    return main(["train", f"--resume={run}", *more])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    run = begin(tmp_path_factory.mktemp("undisturbed"), cache)
    assert metrics(run)[-1]["version"] >= 3, "the model must have learned something"
    return run


def metrics(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "time"))} for row in found]


def digest(run: Path) -> str:
    return hashlib.sha256((run / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()


def paths(run: Path) -> list:
    """Every rollout, in the order that it was learned from, with its log-probabilities."""
    groups = ((step, g.task.id, [r.trajectory for r in g.rollouts]) for step, _, g in read(run / "journal.jsonl"))
    return [(step, name, [(path.ids, path.steps[0].logprobs) for path in found]) for step, name, found in groups]


def same(run: Path, undisturbed: Path) -> bool:
    """Metrics, weights, rollouts, and what is held out."""
    finals = [json.loads((each / "summary.json").read_text())["final"] for each in (run, undisturbed)]
    assert metrics(run) == metrics(undisturbed)
    assert paths(run) == paths(undisturbed)
    assert finals[0] == finals[1]
    return digest(run) == digest(undisturbed)


@pytest.mark.parametrize("words", ["base  ", "training 5/6", "final "])
def test_a_run_stopped_anywhere_and_resumed_equals_one_never_stopped(tmp_path, cache, undisturbed, words):
    run = begin(tmp_path, cache, screen=Interrupted(words))
    assert not (run / "summary.json").exists()
    assert go_on(run) == 0
    assert same(run, undisturbed)


def test_what_the_journal_has_is_not_rolled_out_again(tmp_path, cache):
    run = begin(tmp_path, cache, "--checkpoint_every=4", screen=Interrupted("training 3/6"))
    before = (run / "journal.jsonl").read_bytes()
    assert go_on(run) == 0
    after = (run / "journal.jsonl").read_bytes()
    assert after.startswith(before)
    tickets = [json.loads(line).get("ticket") for line in after.splitlines()]
    assert [t for t in tickets if t is not None] == list(range(24))


@pytest.mark.parametrize("file", ["trainer.pt", "model.safetensors"])
def test_a_checkpoint_that_does_not_load_has_one_before_it(tmp_path, cache, undisturbed, file):
    run = begin(tmp_path, cache, screen=Interrupted("training 5/6"))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-2", "step-4"]
    os.truncate(run / "checkpoints" / "step-4" / file, 500)
    assert go_on(run) == 0
    assert same(run, undisturbed)


def test_a_damaged_end_of_the_journal_is_cut_and_said(tmp_path, cache, undisturbed, capfd):
    run = begin(tmp_path, cache, screen=Interrupted("training 5/6"))
    journal = run / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40] + b"\n{x\n" + bytes(64))
    assert go_on(run) == 0
    assert "cut after its last whole record" in capfd.readouterr().err
    assert same(run, undisturbed)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def halved(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("journal.jsonl", halved),
        ("journal.jsonl", zeroed),
        ("metrics.jsonl", halved),
        ("metrics.jsonl", zeroed),
        ("evaluation-base.json", emptied),
        ("checkpoints/step-4/config.json", zeroed),
        ("checkpoints/step-4/state.json", emptied),
        ("lock", zeroed),
    ],
)
def test_a_file_that_lost_its_content_is_made_again(tmp_path, cache, undisturbed, name, damage, capfd):
    """As after a power cut, or a disk that lies."""
    run = begin(tmp_path, cache, screen=Interrupted("training 5/6"))
    damage(run / name)
    (run / "checkpoints" / ".writing-x").mkdir()
    assert go_on(run) == 0
    assert same(run, undisturbed)
    assert not list((run / "checkpoints").glob(".*")), "what a killed driver had begun to write is left"
    left_out = [line for line in capfd.readouterr().err.splitlines() if "resume    not from" in line]
    assert bool(left_out) == ("journal" in name or "metrics" in name or "checkpoints" in name)


def test_a_run_whose_last_words_were_lost_is_not_called_complete(tmp_path, undisturbed, capfd):
    """Killed between the last checkpoint and the link to it; the summary that a disk gave back is empty."""
    run = tmp_path / "quickstart"
    shutil.copytree(undisturbed, run, symlinks=True)
    emptied(run / "summary.json")
    (run / "checkpoint").unlink()
    (run / "checkpoint").symlink_to("checkpoints/step-4")
    assert go_on(run) == 0
    assert "nothing to resume" not in capfd.readouterr().err
    assert os.readlink(run / "checkpoint") == "checkpoints/step-6" and same(run, undisturbed)


def test_a_run_that_is_complete_says_so(undisturbed, capfd):
    before = digest(undisturbed)
    assert go_on(undisturbed) == 0
    assert "nothing to resume" in capfd.readouterr().err and digest(undisturbed) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--learner.lr=5e-4", "learner.lr = 0.001 in"),
        ("--steps=9", "steps = 6 in"),
        ("--search.n=8", "search.n = 6 in"),
        ("--learner.lrr=1", "Did you mean lr"),
    ],
)
def test_a_changed_config_names_the_keys(tmp_path, undisturbed, capsys, change, message):
    assert go_on(undisturbed, change) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert go_on(tmp_path) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_second_driver_on_a_run_refuses_to_resume_or_to_begin_it(tmp_path, cache, capsys):
    class Second(Interrupted):
        def say(self, line: str) -> None:
            super().say(line)
            if "training 2/6" in line:
                fresh = [str(CONFIG), *TINY, f"--out={tmp_path}", f"--cache={cache}"]
                assert main(["train", f"--resume={tmp_path}/quickstart"]) == 2
                assert main(["train", *fresh]) == 2
                self.error = capsys.readouterr().err

    screen = Second()
    run = begin(tmp_path, cache, screen=screen)
    assert screen.error.count("going on") == 2 and str(os.getpid()) in screen.error
    assert (run / "summary.json").exists()


def test_a_full_disk_stops_the_run_with_all_it_has_written_readable(tmp_path, cache, undisturbed, capfd):
    class Full(Interrupted):
        def say(self, line: str) -> None:
            super().say(line)
            if "training 3/6" in line:  # no file may grow beyond what the journal has now
                limit = (tmp_path / "quickstart" / "journal.jsonl").stat().st_size + 300
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="make room, then go on with `reasoner train --resume"):
            begin(tmp_path, cache, screen=Full())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run = tmp_path / "quickstart"
    assert len(list(read(run / "journal.jsonl"))) == 12
    assert all(json.loads(line) for line in (run / "journal.jsonl").read_bytes().splitlines())
    assert go_on(run) == 0
    assert same(run, undisturbed)


@pytest.mark.parametrize("room", [0, 2000, 60_000])
def test_a_disk_that_is_full_while_the_trainer_is_saved_is_told_as_such(tmp_path, room):
    class Weights:
        config = generation_config = None

        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "config.json").write_text("{}")

    trainer = {"moments": torch.zeros(20_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(room, 3), before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.write(tmp_path, Weights(), Weights(), trainer, checkpoints.Position())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_base_that_lost_its_content_in_the_cache_is_told_with_the_cure(tmp_path, cache, undisturbed, name):
    shutil.copytree(cache, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("warmup-*")
    emptied(folder / name)
    with pytest.raises(ConfigError, match=f"{folder.name} is damaged .*: remove that folder, and it is made again"):
        begin(tmp_path, tmp_path / "cache")


def kill_and_resume(tmp_path: Path, cache: Path, *, kills: int, seed: int, more: tuple[str, ...] = ()) -> Path:
    """SIGKILL the driver `kills` times, each after a random time of its life, then let it end."""
    luck = random.Random(seed)
    run, env = tmp_path / "quickstart", os.environ | {"PYTHONPATH": os.getcwd()}
    fresh = [str(CONFIG), *TINY, f"--out={tmp_path}", f"--cache={cache}", *more]
    for life in range(kills + 1):
        arguments = [f"--resume={run}"] if (run / "config.json").exists() else fresh
        process = subprocess.Popen(
            [sys.executable, "-m", "reasoner", "train", *arguments], env=env, stderr=subprocess.PIPE, text=True
        )
        if life < kills:
            while not (run / "journal.jsonl").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(luck.random() * 0.4)
            process.send_signal(signal.SIGKILL)
        error = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), error
    return run


@pytest.mark.slow
def test_a_killed_driver_leaves_a_run_that_can_be_resumed(tmp_path, cache, undisturbed):
    run = kill_and_resume(tmp_path, cache, kills=1, seed=1)
    assert same(run, undisturbed)


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(tmp_path, cache, undisturbed):
    run = kill_and_resume(tmp_path, cache, kills=10, seed=2, more=("--checkpoint_every=1",))
    assert same(run, undisturbed)


def records(run: Path) -> list[bytes]:
    return [line for line in (run / "journal.jsonl").read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def under_way(run: Path) -> int:
    """Groups of the step under way that are recorded."""
    kinds = ["take" if line.startswith(b'{"take"') else "group" for line in records(run)]
    return len(kinds) if "take" not in kinds else kinds[::-1].index("take")


@pytest.mark.slow
def test_a_step_that_a_kill_cut_in_two_goes_on_where_it_was_bit_for_bit(tmp_path, cache):
    """vLLM on a CPU: what is missing is sampled without what stood beside it, and no bit differs."""
    vllm = ("--engine.kind=vllm", "--engine.kv_cache_gib=0.1", "--engine.max_num_seqs=64", "--tasks_per_step=16")
    whole = begin(tmp_path / "whole", cache, *vllm)
    fresh = [str(CONFIG), *TINY, *vllm, f"--out={tmp_path / 'killed'}", f"--cache={cache}"]
    run, found = tmp_path / "killed" / "quickstart", []
    for _ in range(4):
        arguments = [f"--resume={run}"] if (run / "config.json").exists() else fresh
        process = subprocess.Popen(
            [sys.executable, "-m", "reasoner", "train", *arguments],
            env=os.environ | {"PYTHONPATH": os.getcwd()},
            stderr=subprocess.PIPE,
            text=True,
        )
        begun = len(found[-1]) if found else 0
        while process.poll() is None and len(found) < 3:
            time.sleep(0.0005)
            if (run / "journal.jsonl").exists() and len(records(run)) > begun + 3 and 0 < under_way(run) < 16:
                process.kill()
        error = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), error
        if process.returncode:
            found.append(records(run))
            assert 0 < under_way(run) < 16, "the kill came late: this machine was too slow or too busy to try it"
    assert len(found) == 3
    assert all(records(run)[: len(before)] == before for before in found), "a recorded group was rolled out again"
    assert same(run, whole)


def test_kept_checkpoints_do_not_pile_up(undisturbed):
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["step-4", "step-6"]
    assert os.readlink(undisturbed / "checkpoint") == "checkpoints/step-6"


@pytest.mark.slow
def test_on_vllm_too_a_resumed_run_equals_one_never_stopped(tmp_path, cache):
    """Ray and vLLM as in the quickstart: a new engine, brought to the policy of the checkpoint."""
    more = ("--engine.kind=vllm", "--engine.kv_cache_gib=0.1", "--engine.max_num_seqs=64")
    whole = begin(tmp_path / "whole", cache, *more)
    stopped = begin(tmp_path / "stopped", cache, *more, screen=Interrupted("training 3/6"))
    assert go_on(stopped) == 0
    assert same(stopped, whole)


@pytest.mark.slow
@pytest.mark.parametrize("max_lag", [1, 4])
def test_rollouts_ahead_survive_kills_with_no_task_lost_or_learned_twice(tmp_path, cache, max_lag):
    run = kill_and_resume(tmp_path, cache, kills=6, seed=3, more=(f"--max_lag={max_lag}", "--steps=12"))
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    groups = [r["ticket"] for r in records if "task" in r]
    taken = [ticket for r in records if "take" in r for ticket in r["tickets"]]
    dropped = [int(ticket) for r in records if "take" in r for ticket in r["dropped"]]
    assert len(groups) == len(set(groups)) and set(taken) <= set(groups)
    assert sorted(taken + dropped) == list(range(48 + len(dropped)))
    assert [r["take"] for r in records if "take" in r] == list(range(12))
    assert [row["step"] for row in metrics(run)] == list(range(12))
    assert max(row["lag_max"] for row in metrics(run)) <= max_lag
