"""Configuration without torch: a dataclass per section, and YAML in which unknown keys are errors."""

from new_llm.config.errors import UserError
from new_llm.config.evaluation import EvalConfig
from new_llm.config.model import PythiaConfig
from new_llm.config.train import DataConfig, TrainConfig

__all__ = ["DataConfig", "EvalConfig", "PythiaConfig", "TrainConfig", "UserError"]
