"""What all configuration sections share: validation on construction, and short flags.

A section is a dataclass whose fields carry their range (pydantic) and perhaps a short flag (tyro). So Python, YAML and
the command line accept and reject the same values.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
from typing import Any, TypeVar, cast, dataclass_transform

import tyro
from pydantic import AfterValidator, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError

from new_llm.config.errors import UserError

T = TypeVar("T")
MAX_FAULTS, MAX_FAULT_CHARACTERS, MAX_INPUT_CHARACTERS = 10, 600, 100
"""Limits to what an error quotes of a configuration with many faults or long values."""


@dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
def section(kind: type[T]) -> type[T]:
    """Make a validated, keyword-only dataclass; bad values raise a one-line `UserError`."""
    made = pydantic_dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False), kw_only=True)(kind)
    validate = made.__init__
    place = getattr(kind, "place_keywords", None)  # a section may move keywords into its subsections

    @functools.wraps(validate)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        try:
            validate(self, *args, **(place(kwargs) if place else kwargs))
        except ValidationError as error:
            raise describe_validation_error(error) from None

    made.__init__ = __init__
    return cast(type[T], made)


def short(*flags: str) -> Any:
    """Further flags for a field: `num_samples` is both `--data.num-samples` and `--samples`."""
    return tyro.conf.arg(aliases=list(flags))


def _check_unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise PydanticCustomError("duplicate", "names a value twice")
    return values


UNIQUE = AfterValidator(_check_unique)
"""Rejects a tuple with duplicate values."""


def read_field_docs(kind: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and its bases, by field name."""
    bases = [base for base in reversed(kind.__mro__) if "__annotations__" in vars(base)]
    return {name: text for base in bases for name, text in _read_docs(base.__module__).get(base.__name__, {}).items()}


@functools.cache
def _read_docs(module: str) -> dict[str, dict[str, str]]:
    """The docstrings of fields in a module, by class and field; empty if it has no source file."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}
    return {
        node.name: {
            field.target.id: inspect.cleandoc(str(text.value.value))
            for field, text in itertools.pairwise(node.body)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def describe_validation_error(error: ValidationError, where: str = "") -> UserError:
    """One line for all faults of a configuration, each with its field's name; `where` names the file, if any."""
    faults: list[str] = []
    # pydantic also reports a list as too short if its items were rejected.
    refused = {fault["loc"][:-1] for fault in error.errors() if fault["loc"]}
    found = [fault for fault in error.errors() if not (fault["type"] == "too_short" and fault["loc"] in refused)]
    for fault in found[:MAX_FAULTS]:
        path = [str(part) for part in fault["loc"] if not str(part).startswith("function-")]
        name = ".".join(path) or "the configuration"
        message = fault["msg"].removeprefix("Value error, ")
        match fault["type"]:
            case "unexpected_keyword_argument" | "extra_forbidden":
                faults.append(f"unknown key {preview(name)}")
            case "missing":
                faults.append(f"{name} is missing")
            case "value_error":  # raised by a section, which names the field itself
                faults.append(message)
            case _:
                faults.append(f"{name}: {message[0].lower()}{message[1:]} (got {preview(fault['input'])})")
    if (more := len(found) - MAX_FAULTS) > 0:
        faults.append(f"and {more} more")
    return UserError((where and f"{where}: ") + "; ".join(fault[:MAX_FAULT_CHARACTERS] for fault in faults))


def preview(value: Any) -> str:
    """A value as quoted in errors, shortened."""
    text = repr(value)
    return text if len(text) <= MAX_INPUT_CHARACTERS else text[: MAX_INPUT_CHARACTERS - 1] + "…"
