"""The whole configuration of an experiment, and its YAML form."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from new_llm.config.data import DataConfig
from new_llm.config.errors import UserError
from new_llm.config.evaluation import EvalConfig
from new_llm.config.model import ModelConfig, ModelType
from new_llm.config.run_settings import RunSettings, read_settings, settings_from_dict
from new_llm.config.sections import section
from new_llm.config.train import TrainConfig

SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "eval": EvalConfig}


@section
class ExperimentConfig(RunSettings):
    """Train some models on identical data and compare them.

    The defaults are the reference: the shape of Pythia-70m on 5,000 samples of 256 tokens of the Pile.
    From Python, a section's field may be given by its own name where only one section has it:
    `ExperimentConfig(num_samples=5000, seq_length=256, num_epochs=30, num_memories=4)`.
    """

    name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=100)] = None
    """The run's name and folder; None: the configuration's name and the time."""
    models: Annotated[tuple[ModelType, ...], Field(min_length=1)] = (
        ModelType.PYTHIA,
        ModelType.INFINI,
        ModelType.TOKEN_MEMORY,
    )
    """The models to train and compare."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initialisation, splits and order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one. CUDA_VISIBLE_DEVICES says which."""
    runs_dir: Path = Path("runs")
    """Where run folders are made."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    @classmethod
    def place_keywords(cls, keywords: dict[str, Any]) -> dict[str, Any]:
        """Move a keyword that is some one section's field into that section."""
        placed = dict(keywords)
        for name in [name for name in keywords if name not in cls.__dataclass_fields__]:
            owners = [key for key, kind in SECTIONS.items() if name in kind.__dataclass_fields__]
            if len(owners) != 1:
                continue
            given = placed.get(owners[0], {})
            fields = dict(given) if isinstance(given, dict) else dataclasses.asdict(given)
            placed[owners[0]] = fields | {name: placed.pop(name)}
        return placed

    def __post_init__(self) -> None:
        if len(set(self.models)) != len(self.models):
            raise UserError(f"models: {[str(m) for m in self.models]} names a model twice")
        if self.segment_length > self.model.max_position_embeddings:
            raise UserError(
                f"model.segment_length: {self.segment_length} is over model.max_position_embeddings "
                f"({self.model.max_position_embeddings})"
            )

    @property
    def segment_length(self) -> int:
        """Tokens in a segment."""
        return self.model.segment_length or self.data.seq_length // self.data.segments_per_sample


def load_config(path: Path) -> ExperimentConfig:
    """Read an experiment's YAML; what it leaves out keeps its default.

    Raises:
        UserError: the file is missing or no YAML mapping, or has an unknown key, wrong type or value out of range.
    """
    return read_settings(path, ExperimentConfig)


def config_from_dict(values: dict[str, Any], where: str) -> ExperimentConfig:
    """Build a configuration from plain values; `where` names their origin in errors."""
    return settings_from_dict(values, ExperimentConfig, where)
