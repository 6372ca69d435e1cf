"""The configuration that a run folder keeps, and its YAML form."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from new_llm.config.data import DataConfig
from new_llm.config.errors import UserError
from new_llm.config.evaluation import EvalConfig
from new_llm.config.safe_yaml import read_yaml
from new_llm.config.sections import describe_validation_error
from new_llm.config.train import TrainConfig


class RunSettings:
    """What the configuration of any run has: a name, a place, and a form that is read back."""

    file_name: ClassVar[str] = "config.yaml"
    """The file in the run folder."""
    name: str | None
    runs_dir: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in YAML and JSON."""
        return TypeAdapter(type(self)).dump_python(self, mode="json")

    def to_yaml(self) -> str:
        """The YAML that `read_settings` reads back to an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


class TrainingSettings(RunSettings):
    """What the configuration of any run that trains has beside: a seed, a device, and three sections."""

    seed: int
    device: Literal["auto", "cpu", "cuda"]
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig


Settings = TypeVar("Settings", bound=RunSettings)


def read_settings(path: Path, kind: type[Settings]) -> Settings:
    """Read a configuration's YAML; what it leaves out keeps its default.

    Raises:
        UserError: the file is missing or no YAML mapping, or has an unknown key, wrong type or value out of range.
    """
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        fields = cast(Any, kind).__dataclass_fields__.values()
        sections = [field.name for field in fields if dataclasses.is_dataclass(field.type)]
        raise UserError(
            f"{path}: expected a mapping of sections ({', '.join(sections)}), found {type(values).__name__}"
        )
    return settings_from_dict(values, kind, str(path))


def settings_from_dict(values: dict[str, Any], kind: type[Settings], where: str) -> Settings:
    """Build a configuration from plain values; `where` names their origin in errors.

    Raises:
        UserError: an unknown key, a wrong type or a value out of range.
    """
    try:
        # The JSON form is validated strictly: a YAML list is a tuple and a string an enum, but 'yes' is no bool.
        text = json.dumps(values, default=str)
    except (TypeError, ValueError) as error:  # a key that is no text
        raise UserError(f"{where}: not a mapping of names and plain values: {error}") from None
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise describe_validation_error(error, where) from None
