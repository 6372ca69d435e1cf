"""Training: loop, optimizer, checkpoints, metrics."""

from new_llm.training.loop import Trainer
from new_llm.training.outcome import TrainingError, TrainingInterrupted, TrainingResult

__all__ = ["Trainer", "TrainingError", "TrainingInterrupted", "TrainingResult"]
