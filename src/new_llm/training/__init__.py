"""Training: the loop, the optimizer, checkpoints, guards, logs."""

from new_llm.training.guards import TrainingError
from new_llm.training.loop import Trainer, TrainingResult
from new_llm.training.signals import TrainingInterrupted

__all__ = ["Trainer", "TrainingError", "TrainingInterrupted", "TrainingResult"]
