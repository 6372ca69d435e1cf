"""The studies that the project commits: every variant of each is a valid experiment, and all train equally long,
except for those whose name says that they are short."""

from pathlib import Path

import pytest

from new_llm.config.loading import read_settings
from new_llm.experiments.config import StudyConfig

STUDIES = sorted((Path(__file__).parents[1] / "studies").glob("*.yaml"))


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
