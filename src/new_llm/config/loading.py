"""Reading and writing the configuration of a run as YAML, and importing objects of users' own modules by name."""

import dataclasses
import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from new_llm.config.errors import UserError
from new_llm.config.evaluation import EvalConfig
from new_llm.config.files import read_text_file, shorten
from new_llm.config.sections import describe_validation_error
from new_llm.config.train import DataConfig, TrainConfig


def flatten_settings(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to {"train.batch_size": 4, …}; empty for anything else."""
    flat: dict[str, Any] = {}
    for key, value in values.items() if isinstance(values, Mapping) else ():
        flat |= flatten_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


class RunSettings:
    """What the configuration of any run has: a name, a folder, and a YAML form."""

    file_name: ClassVar[str] = "config.yaml"
    """The file in the run folder."""
    name: str | None
    runs_dir: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in YAML and JSON."""
        return TypeAdapter(type(self)).dump_python(self, mode="json")

    def to_yaml(self) -> str:
        """The YAML from which `read_settings` makes an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


class TrainingSettings(RunSettings):
    """What the configuration of any run that trains has in addition: models, a seed, a device, and three sections."""

    models: tuple[str, ...]
    seed: int
    device: Literal["auto", "cpu", "cuda"]
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig


Settings = TypeVar("Settings", bound=RunSettings)


def find_committed(path: Path, folder: str) -> Path:
    """The path as it is, or the file of New-LLM's own that it names: `quick` is `configs/quick.yaml`.

    Args:
        path: as given by the user; an existing file of this name wins.
        folder: `configs` or `studies`.
    """
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    files = resources.files("new_llm").joinpath(folder).iterdir()
    own = {Path(file.name).stem: Path(str(file)) for file in files if file.name.endswith(".yaml")}
    if path.name not in own:
        raise UserError(f"{path}: no such file, and not one of New-LLM's own {folder}: {', '.join(sorted(own))}")
    return own[path.name]


def read_settings(path: Path, kind: type[Settings], *, is_record: bool = False) -> Settings:
    """Read a configuration's YAML; fields that it leaves out keep their defaults.

    Args:
        is_record: the file is the record of a run: users' modules that only it names are not imported.
    """
    values = parse_yaml(read_text_file(path, MAX_YAML_BYTES), str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        sections = [field.name for field in dataclasses.fields(cast(Any, kind)) if dataclasses.is_dataclass(field.type)]
        raise UserError(
            f"{path}: expected a mapping of sections ({', '.join(sections)}), found {type(values).__name__}"
        )
    return settings_from_dict(values, kind, str(path), is_record=is_record)


def settings_from_dict(
    values: dict[str, Any], kind: type[Settings], where: str, *, is_record: bool = False
) -> Settings:
    """Build a configuration from plain values; `where` names their origin in errors, `is_record` as above."""
    try:
        # Strict validation as JSON: a YAML list can be a tuple and a string an enum, but 'yes' is not a bool.
        text = json.dumps(values, default=str)
    except (TypeError, ValueError) as error:  # a key is not a string
        raise UserError(f"{where}: not a mapping of names and plain values: {error}") from None
    try:
        return TypeAdapter(kind).validate_json(text, strict=True, context={"is_record": is_record})
    except ValidationError as error:
        raise describe_validation_error(error, where) from None


MAX_YAML_BYTES = 1 << 18
"""Hundreds of times the size of a configuration; the parser reads about this much per second."""
FAULTS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)
"""What the parser raises for malformed numbers, dates and sets."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number, as YAML 1.2 does, and rejects duplicate keys and aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Reject aliases: with aliases of aliases, a small file could expand to a huge configuration."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Reject duplicate keys."""
        seen = set[tuple[str, Any]]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                message = f"duplicate key {key.value!r}"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML into plain values; `where` names its origin in errors."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, *FAULTS) as error:
        raise UserError(shorten(f"{where}: not valid YAML: {error}")) from None


# Objects of a user's own module, imported by name: `--models my_module:MyLayer`


def is_user_name(name: str) -> bool:
    """Whether a name has the form "my_module:MyLayer"; `hub:owner/name` and paths do not."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


OWN_CODE: set[str] = set()
"""The files and folders of modules that were imported by name."""


def load_by_name(name: str, what: str = "an object") -> Any:
    """Import an object from a user's module by a name such as "my_module:MyLayer".

    Modules are looked up on Python's path, then in the current directory. `what` is the object, for the error message.
    """
    if not is_user_name(name):
        raise UserError(f"{name}: {what} of your own is named my_module:MyName")
    module_name, _, attribute = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{name}: importing {module_name} failed: {error}") from error
        raise UserError(f"{name}: no module named {error.name}, neither installed nor in {folder}") from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{name}: importing {module_name} failed: {reason} (--debug shows the traceback)") from error
    whole: Any = sys.modules[module_name.partition(".")[0]]
    OWN_CODE.update(getattr(whole, "__path__", None) or [getattr(whole, "__file__", None) or module_name])
    try:
        return getattr(module, attribute)
    except AttributeError:
        place = getattr(module, "__file__", None) or module_name
        raise UserError(f"{name}: {place} defines no {attribute}") from None


def describe_own_error(error: BaseException) -> str | None:
    """One line for an error raised in a user's own module, with file and line; None: it did not pass through one."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if any(frame.filename == path or frame.filename.startswith(path + os.sep) for path in OWN_CODE):
            place = f"{os.path.basename(frame.filename)}, line {frame.lineno}"
            return shorten(f"{type(error).__name__}: {error} (in your own code: {place})")
    return None
