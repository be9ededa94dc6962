"""The example of one strategy file for both frameworks, as its users start it, at smoke size."""

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "examples" / "both_frameworks" / "same_numbers.py"


def test_both_frameworks_have_the_same_numbers(tmp_path):
    command = [sys.executable, str(PROGRAM), "--smoke", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    short, trained = done.stdout.split("weights as they were trained:")
    assert "parameter files, names aside: equal to the byte" in short
    for text in (short, trained):
        counts = re.findall(r"(\d+) of (\d+) integers", text)
        assert len(counts) == 3
        assert all(equal == count for equal, count in counts)
        assert all(float(apart) < 1e-6 for apart in re.findall(r"apart by (\S+),", text))
        assert float(re.findall(r"agree on (\S+)%", text)[0]) > 99
