"""Configuration: dataclasses for every section, and YAML that refuses what it does not know."""

from new_llm.config.adapter import AdapterConfig, AdapterLayerConfig, AdapterTrainingConfig
from new_llm.config.data import DataConfig
from new_llm.config.errors import UserError
from new_llm.config.evaluation import EvalConfig
from new_llm.config.experiment import ExperimentConfig, config_from_dict, load_config
from new_llm.config.model import MODEL_OPTIONS, MemoryConfig, ModelConfig, ModelType, PythiaConfig, SelectiveConfig
from new_llm.config.train import TrainConfig

__all__ = [
    "MODEL_OPTIONS",
    "AdapterConfig",
    "AdapterLayerConfig",
    "AdapterTrainingConfig",
    "DataConfig",
    "EvalConfig",
    "ExperimentConfig",
    "MemoryConfig",
    "ModelConfig",
    "ModelType",
    "PythiaConfig",
    "SelectiveConfig",
    "TrainConfig",
    "UserError",
    "config_from_dict",
    "load_config",
]
