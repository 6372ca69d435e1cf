"""Fixtures: results as a finished experiment writes them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import vl_convert
from report_runs import SHAPES, make_results


@pytest.fixture(autouse=True, scope="session")
def draw_once() -> Iterator[None]:
    """Charts that many tests share are drawn once."""
    draw, drawn = vl_convert.vegalite_to_svg, {}

    def draw_or_find(spec: dict[str, Any], **options: Any) -> str:
        key = json.dumps(spec)
        if key not in drawn:
            drawn[key] = draw(spec, **options)
        return drawn[key]

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
