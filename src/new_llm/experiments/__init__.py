"""Experiments: train models on identical data, measure them, and record everything in a run folder."""

from typing import TYPE_CHECKING, Any

from new_llm.experiments.config import ExperimentConfig, ModelConfig
from new_llm.models.factory import ModelType

if TYPE_CHECKING:
    from new_llm.experiments.runner import run_experiment

__all__ = ["ExperimentConfig", "ModelConfig", "ModelType", "run_experiment"]


def __getattr__(name: str) -> Any:
    if name == "run_experiment":  # lazily, so that configurations load without accelerate
        from new_llm.experiments.runner import run_experiment

        return run_experiment
    raise AttributeError(f"module 'new_llm.experiments' has no attribute {name!r}")
