"""Measures are known by name, those of a user's own module too; tests/test_how_to.py runs one."""

import pytest
import torch

from new_llm.config import EvalConfig, UserError
from new_llm.evaluation import find_measures


def test_unknown_measures_are_refused_by_name():
    assert [one.name for one in find_measures(EvalConfig().measures)] == list(EvalConfig().measures)
    with pytest.raises(UserError, match=r"unknown measure .slidng.; known are .*sliding"):
        find_measures(["slidng"])
    with pytest.raises(UserError, match="not a subclass"):
        find_measures([f"{torch.nn.__name__}:Linear"])
