"""What a run keeps to go on from: checkpoints that are whole or not there, and a lock against a second driver.

    RUN/checkpoints/step-40/   model and tokenizer in Hugging Face form, trainer.pt (optimizer, schedule, random state),
                               state.json (`Position`: everything else)
    RUN/checkpoint             a link to the newest

A checkpoint is written beside, forced to the disk and renamed; the newest two are kept, so that one that does not load
has one before it. Knows nothing of the loop or of TRL.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reasoner.config import ConfigError
from rollouts.feed import Ledger

KEEP = 2


@dataclass(frozen=True)
class Position:
    """Where a run stands between two steps."""

    step: int = 0  # the next one
    version: int = 0  # of the policy: updates so far
    ledger: Ledger = field(default_factory=Ledger)
    journal: int = 0  # bytes
    metrics: int = 0  # bytes of metrics.jsonl
    seconds: Mapping[str, float] = field(default_factory=dict)  # by phase
    tokens: Mapping[str, int] = field(default_factory=dict)  # generated, prefilled
    pools: Mapping[str, Any] = field(default_factory=dict)  # of a curriculum: what was right and seen, by pool
    base: str = ""  # folder of the checkpoint that the engines start from


def write(folder: Path, model: Any, tokenizer: Any, trainer: Mapping[str, Any], position: Position) -> Path:
    """Leave a checkpoint in the run's folder and remove those before the last two."""
    import torch
    from safetensors import SafetensorError

    from reasoner.model import save

    final = folder / "checkpoints" / f"step-{position.step}"
    final.parent.mkdir(exist_ok=True)
    for scratch in final.parent.glob(".writing-*"):  # of a driver that was killed; this one holds the lock
        shutil.rmtree(scratch)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=final.parent, ignore_cleanup_errors=True) as scratch:
        fresh = Path(scratch) / final.name
        try:
            save(model, tokenizer, fresh)
        except SafetensorError as error:
            for code in (errno.ENOSPC, errno.EFBIG):
                if f"os error {code}" in str(error):
                    raise OSError(code, os.strerror(code)) from error
            raise
        try:
            with (fresh / "trainer.pt").open("wb") as file:
                torch.save(dict(trainer), file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk: torch's own complaint covers the system's
                raise error.__context__ from error
            raise
        (fresh / "state.json").write_text(json.dumps(asdict(position), indent=1) + "\n")
        for path in (*fresh.iterdir(), fresh):
            _to_disk(path)
        if final.exists():  # a resumed run wrote this step before, and its copy did not load
            shutil.rmtree(final)
        os.replace(fresh, final)
    _to_disk(final.parent)
    point(folder, final)
    for old in _steps(folder)[KEEP:]:
        shutil.rmtree(old)
    return final


def point(folder: Path, checkpoint: Path) -> None:
    """Let RUN/checkpoint be this one."""
    link = folder / ".checkpoint"
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.relative_to(folder))
    os.replace(link, folder / "checkpoint")


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _steps(folder: Path) -> list[Path]:
    """Newest first."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest(folder: Path, say: Callable[[str], None]) -> Iterator[tuple[Path, Position, Mapping[str, Any]]]:
    """(folder, position, the trainer's state) of every checkpoint that the run can go on from, newest first.

    One that is damaged is left out, and one that counts on more of the journal or of metrics.jsonl than there is: what
    these have lost is done again from an earlier one.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    broken = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)
    for path in _steps(folder):
        try:
            for file in path.glob("*.json"):
                json.loads(file.read_text())
            state = json.loads((path / "state.json").read_text())
            _require_written(folder, state)
            trainer = torch.load(path / "trainer.pt", weights_only=False)
            for weights in path.glob("*.safetensors"):
                with safe_open(weights, "pt"):  # reads no tensor; a file that was cut short is found out
                    pass
        except broken as error:  # whatever the disk made of it
            say(f"resume    not from {path}, which is damaged or ahead of the run's files: {error}")
            continue
        ledger = state.pop("ledger")
        ledger["open"] = {int(ticket): place for ticket, place in ledger["open"].items()}
        yield path, Position(**state | {"ledger": Ledger(**ledger)}), trainer


def _require_written(folder: Path, state: Mapping[str, Any]) -> None:
    """ValueError where journal or metrics have lost what a checkpoint counts on."""
    with (folder / "journal.jsonl").open("rb") as journal:
        journal.seek(max(0, state["journal"] - 1))
        if state["journal"] and journal.read(1) != b"\n":
            raise ValueError(f"journal.jsonl has no record that ends at byte {state['journal']}")
    rows = (folder / "metrics.jsonl").read_bytes()[: state["metrics"]].splitlines()
    if [json.loads(row)["step"] for row in rows] != list(range(state["step"])):
        raise ValueError(f"metrics.jsonl has not the {state['step']} steps before it")


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Held by the one driver of a run; the system lets go of it when that process ends, however it ends."""
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise ConfigError(
                f"{folder} belongs to a run that is going on (process {owner}): wait for it, stop it, or give this run "
                "another name"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
