"""Training: loop, optimizer, checkpoints, metrics."""

from new_llm.training.loop import Trainer, TrainingError, TrainingInterrupted, TrainingResult

__all__ = ["Trainer", "TrainingError", "TrainingInterrupted", "TrainingResult"]
