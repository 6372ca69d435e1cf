"""The run that nothing happens to, and the dice."""

import os
import random
from pathlib import Path

import pytest
from fault_runs import FaultRun

SEED = int(os.environ.get("NEW_LLM_FAULT_SEED", "0"))
"""Of the instants; another one tries others."""


@pytest.fixture
def dice() -> random.Random:
    print(f"instants of NEW_LLM_FAULT_SEED={SEED}")
    return random.Random(SEED)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FaultRun:
    """A run that is never interrupted."""
    run = FaultRun(tmp_path_factory.mktemp("whole"), "whole")
    run.finish()
    return run


@pytest.fixture
def killed(tmp_path: Path) -> FaultRun:
    return FaultRun(tmp_path / "runs", "killed")
