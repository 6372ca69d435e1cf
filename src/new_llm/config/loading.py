"""The configuration that a run folder keeps, its YAML form, and YAML from elsewhere read in bounded time and memory."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from new_llm.config.data import DataConfig
from new_llm.config.errors import UserError
from new_llm.config.evaluation import EvalConfig
from new_llm.config.files import read_text_file, shorten
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
    """Build a configuration from plain values; `where` names their origin in errors."""
    try:
        # The JSON form is validated strictly: a YAML list is a tuple and a string an enum, but 'yes' is no bool.
        text = json.dumps(values, default=str)
    except (TypeError, ValueError) as error:  # a key that is no text
        raise UserError(f"{where}: not a mapping of names and plain values: {error}") from None
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise describe_validation_error(error, where) from None


MAX_YAML_BYTES = 1 << 18
"""Hundreds of times what a configuration has; the parser reads about as much in a second."""
MAX_YAML_VALUES = 50_000
"""Values, those counted again that an alias repeats."""
MAX_YAML_DEPTH = 50
FAULTS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)
"""What the parser's makers of numbers, dates and sets raise of text that is none."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number, as YAML 1.2 does, and takes no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dictionary of a mapping whose keys are all different."""
        seen = set[tuple[str, Any]]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                message = f"the key {key.value!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is too large or no YAML, nested too deeply, repeats itself by aliases without end, or asks for
            objects.
    """
    text = read_text_file(path, MAX_YAML_BYTES)
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if (fault := _find_excess(node)) is not None:
            raise UserError(f"{path}: not valid YAML: {fault}")
        return loader.construct_document(node)
    except UserError:
        raise
    except yaml.YAMLError as error:
        raise UserError(shorten(f"{path}: not valid YAML: {error}")) from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    except FAULTS as error:
        raise UserError(shorten(f"{path}: not valid YAML: {error}")) from None
    finally:
        if loader is not None:
            loader.dispose()


def _find_excess(root: yaml.Node) -> str | None:
    """What makes a document larger than it looks: aliases of aliases, and depth."""
    counts = dict[int, int]()  # of the values below a node; 0 while they are counted
    too_deep = f"nested more than {MAX_YAML_DEPTH} deep"

    def count(node: yaml.Node, depth: int) -> int:
        if depth > MAX_YAML_DEPTH:
            raise ValueError(too_deep)
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in counts:
            if not counts[id(node)]:
                raise ValueError("an alias stands inside of what it repeats")
            return counts[id(node)]
        counts[id(node)] = 0
        children = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        total = 1 + sum(count(child, depth + 1) for child in children)
        if total > MAX_YAML_VALUES:
            raise ValueError(f"more than {MAX_YAML_VALUES:,} values, aliases counted")
        counts[id(node)] = total
        return total

    try:
        count(root, 0)
    except ValueError as error:
        return str(error)
    return None
