"""The rooms and the direction of their imports, and which one file may touch each heavy dependency."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "verifiers": set(),
    "search": set(),
    "rollouts": {"verifiers", "search"},
    "reasoner": {"rollouts", "verifiers", "search"},
}
OWNERS = {  # the only files that may import a heavy dependency
    "vllm": {"rollouts/vllm_engine.py", "rollouts/shm_transfer.py", "rollouts/kv_tails.py"},
    "ray": {"rollouts/cluster.py", "reasoner/data_parallel.py"},
    "trl": {"reasoner/learner.py"},
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_room_imports_only_rooms_below_it(room):
    for file in (ROOT / room).rglob("*.py"):
        strangers = imports(file) & set(ALLOWED) - ALLOWED[room] - {room}
        assert not strangers, f"{file.relative_to(ROOT)} imports {strangers}"


@pytest.mark.parametrize("dependency", OWNERS)
def test_heavy_dependency_is_imported_by_its_owner_alone(dependency):
    users = {
        str(file.relative_to(ROOT))
        for room in ALLOWED
        for file in (ROOT / room).rglob("*.py")
        if dependency in imports(file)
    }
    assert users <= OWNERS[dependency]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("verifiers", ["torch", "ray", "vllm", "trl"]),
        ("search", ["torch", "ray", "vllm", "trl"]),
        ("rollouts", ["torch", "ray", "vllm", "trl"]),
        ("reasoner.model", ["ray", "vllm", "trl", "accelerate.commands"]),
        ("reasoner.kernels", ["ray", "vllm", "trl"]),
    ],
)
def test_import_loads_nothing_heavy(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_room_for_leftovers():
    names = {p.stem for room in ALLOWED for p in (ROOT / room).rglob("*")}
    assert not names & {"utils", "common", "core", "helpers"}


def test_the_architecture_page_names_every_file_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for room in ("verifiers", "search", "rollouts", "reasoner", "reasoner/model", "reasoner/kernels"):
        section = page.split(f"### `{room}/`")[1].split("### `")[0]
        named = set(re.findall(r"^\| `(\w+\.py)` \|", section, re.MULTILINE))
        assert named == {file.name for file in (ROOT / room).glob("*.py")}, f"docs/architecture.md, {room}"
