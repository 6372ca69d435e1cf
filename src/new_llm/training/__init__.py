"""Training: the loop, the optimizer, checkpoints, guards, logs."""

from new_llm.training.devices import TrainingInterrupted
from new_llm.training.guards import TrainingError
from new_llm.training.loop import Trainer, TrainingResult

__all__ = ["Trainer", "TrainingError", "TrainingInterrupted", "TrainingResult"]
