"""Experiments: the runner and the run folder."""

from new_llm.config import ExperimentConfig, ModelType
from new_llm.experiments.runner import run_experiment

__all__ = ["ExperimentConfig", "ModelType", "run_experiment"]
