"""Joins tasks, engines, searches and verifiers into judged paths, at scale (Ray and vLLM at the rim).

Before anything else it refuses a foreign `verifiers` package: PyPI has one (Prime Intellect), and a console
script would load it silently in place of ours.
"""

import importlib.util
from pathlib import Path


def require_own_rooms(rooms: tuple[str, ...] = ("verifiers", "search")) -> None:
    """Raise ImportError when `import verifiers` (or search) would find another package than ours."""
    root = Path(__file__).resolve().parents[1]
    for room in rooms:
        spec = importlib.util.find_spec(room)  # looks, does not import
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        ours = root / room / "__init__.py"
        if found != ours:
            raise ImportError(
                f"`import {room}` would load {found}, not {ours}. Another installed package has the same name: "
                f"run `pip uninstall {room}` in this environment, or use the one that `make setup` makes."
            )


require_own_rooms()

from rollouts.base import Group, Rollout  # noqa: E402 (the guard comes first)

__all__ = ["Group", "Rollout", "require_own_rooms"]
