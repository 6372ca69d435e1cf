"""Every benchmark program runs to its end on something tiny, and the page holds its tables."""

import json

import pytest

from tiny import ROOT, run_python

FOLDER = ROOT / "benchmarks"
PROGRAMS = {
    "training": "GPT-NeoX, bf16, fused AdamW",
    "peers": "ours, all Infini",
    "generation": "both Pythias made the same 16 tokens in float32: yes",
    "scaling": "decoding by rows",
    "layers": "one layer, forward",
    "long_context": "streaming evaluation",
    "memory_fill": "| 8,192 |",
    "processes": "stopped by SIGTERM, resumed as another kind",
    "study_costs": "training steps of novels",
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_quick_run_writes_its_tables(program, tmp_path):
    page = tmp_path / "page.md"
    run_python(FOLDER / "all.py", "--quick", "--only", program, "--page", page)
    text = page.read_text()
    assert PROGRAMS[program] in text
    assert "Processor: " in text
    assert "| --- |" in text or "| ---: |" in text


def test_every_program_with_a_command_line_is_in_the_page_or_is_a_study():
    source = (FOLDER / "all.py").read_text()
    helpers = {"all", "gpu_check", "kernel_figures", "turns", "jobs", "parallel_adapter_page", "parallel_adapter_study"}
    for path in FOLDER.glob("*.py"):
        if path.stem not in helpers:
            assert f'"{path.stem}": [' in source, path.stem


@pytest.mark.slow
def test_the_rehearsal_runs_every_section_to_its_end(tmp_path):
    """Of the GPU check: small, on the CPU, without packages that a GPU machine may lack."""
    run_python(FOLDER / "gpu_check.py", "--cpu-rehearsal", "--minutes", 60, "--output", tmp_path)
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
