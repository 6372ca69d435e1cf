"""Fixtures: results as a finished experiment writes them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import vl_convert
from report_runs import SHAPES, make_results

DRAW = vl_convert.vegalite_to_svg
DRAWN: dict[str, str] = {}


@pytest.fixture(autouse=True, scope="module")
def draw_all() -> Iterator[None]:
    """Here every chart is drawn, and those that many tests share once."""

    def draw_or_find(spec: dict[str, Any], **options: Any) -> str:
        key = json.dumps(spec)
        if key not in DRAWN:
            DRAWN[key] = DRAW(spec, **options)
        return DRAWN[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "vegalite_to_svg", draw_or_find)
        yield


@pytest.fixture
def results() -> dict[str, Any]:
    """Pythia against Infini, complete."""
    return make_results("pythia", "infini")


@pytest.fixture
def four_models() -> dict[str, Any]:
    """Every model type, complete."""
    return make_results(*SHAPES)
