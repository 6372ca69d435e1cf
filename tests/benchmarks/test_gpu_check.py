"""The rehearsal of the GPU check: every section, small, on the CPU, without packages that a GPU machine may lack."""

import json
import subprocess
import sys

import pytest

from tiny import ENVIRONMENT, ROOT


@pytest.mark.slow
def test_the_rehearsal_runs_every_section_to_its_end(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--cpu-rehearsal", "--minutes", "60"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert {found["state"] for found in sections.values()} == {"done"}
    assert all(row["verdict"] == "right" for row in sections["correctness"]["rows"])
    # a row that fails holds its error in the place of its figure
    for name, figure, least in (
        ("training", "tokens/s", 8),
        ("decoding", "tokens/s", 8),
        ("head", "ms", 3),
        ("memory", "ms", 3),
    ):
        rows = [row for row in sections[name]["rows"] if "value" not in row]
        assert len(rows) >= least
        assert all(isinstance(row[figure], int | float) for row in rows), rows
    page = (tmp_path / "results.md").read_text()
    assert "A REHEARSAL" in page
    assert "| quick | ours, Pythia, compiled |" in page
    assert len(list(tmp_path.glob("trace-*.json.gz"))) == 4
