"""PyPI has another package called `verifiers`: loading it in place of ours must be loud."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_foreign_verifiers_package_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "verifiers").mkdir()
    (tmp_path / "verifiers" / "__init__.py").write_text("")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-P", "-m", "reasoner", "check", str(ROOT / "configs" / "quickstart.toml")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip uninstall verifiers" in done.stderr and "Traceback" not in done.stderr


def test_our_own_rooms_pass_the_guard():
    command = [sys.executable, "-c", "import rollouts"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
