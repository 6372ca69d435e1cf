"""A tiny experiment on real text."""

from pathlib import Path

import pytest

from new_llm.experiments.config import ExperimentConfig
from tiny import make_settings


@pytest.fixture
def tiny(addresses: Path, tmp_path: Path) -> ExperimentConfig:
    return ExperimentConfig(name="tiny", **make_settings(addresses, tmp_path / "runs"))
