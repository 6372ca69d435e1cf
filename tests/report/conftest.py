"""Fixtures: results as a finished experiment writes them."""

from typing import Any

import pytest
from report_runs import SHAPES, make_results


@pytest.fixture
def results() -> dict[str, Any]:
    """Pythia against Infini, complete."""
    return make_results("pythia", "infini")


@pytest.fixture
def four_models() -> dict[str, Any]:
    """Every model type, complete."""
    return make_results(*SHAPES)
