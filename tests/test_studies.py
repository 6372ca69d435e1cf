"""The studies that the project commits: every variant of each is a valid experiment, and all train equally long,
except for those whose name says that they are short."""

import subprocess
import sys
from pathlib import Path

import pytest

from new_llm.config.loading import read_settings
from new_llm.experiments.config import StudyConfig

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_committed_study_can_run(path):
    study = read_settings(path, StudyConfig)
    assert study.name == path.stem
    assert study.question.endswith("?")
    assert f"new-llm study studies/{path.name}" in path.read_text()
    for name in study.variants:
        config = study.configure(name, study.seeds[0])
        reads_all = config.data.num_samples is None
        tokens = 0 if reads_all else config.data.num_samples * config.data.seq_length
        first = study.configure(next(iter(study.variants)), 0).data
        if not reads_all and config.data.reversal_pairs == first.reversal_pairs:  # else it trains on another text
            asked = first.num_samples * first.seq_length
            assert tokens < asked if name.endswith("-short") else tokens == asked


def test_a_difference_that_a_page_tells_is_that_of_the_committed_losses():
    ways = ("gated_delta-4-three/caches/+ all", "pythia/caches/+ all")
    command = [sys.executable, ROOT / "studies" / "compare.py", ROOT / "docs/experiments/novels/losses.json", *ways]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    said, _, seeds = found.rpartition(" ")
    assert said in (ROOT / "docs/experiments/novels.md").read_text(encoding="utf-8")
    assert seeds == "(3)"
