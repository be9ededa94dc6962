"""The tutorial, as it stands: every command of it runs in a fresh environment and ends in a backend that passes."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def commands():
    text = (ROOT / "docs" / "backend-authoring.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


@pytest.fixture
def outside():
    """The environment without what would make the tutorial's own one see this one."""
    hidden = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "TOX_", "PYTEST_")
    return {key: value for key, value in os.environ.items() if not key.startswith(hidden)}


def test_the_tutorial_ends_in_a_backend_that_passes(tmp_path, outside):
    (tmp_path / "dopt").symlink_to(ROOT, target_is_directory=True)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands()],
        cwd=tmp_path,
        env=outside,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    claims = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in done.stdout.splitlines()[-10:] if "|" in line
    }
    assert claims["core"].startswith("yes (")
    assert "of" not in claims["core"], "gaps are left"
    assert claims["retraining"].startswith("yes (")
