"""YAML from elsewhere: plain values alone, in bounded time and memory."""

import re
from pathlib import Path
from typing import Any

import yaml

from new_llm.config.bounded_files import read_text_file
from new_llm.config.errors import UserError

MAX_YAML_BYTES = 1 << 18
"""Hundreds of times what a configuration has; the parser reads about as much in a second."""
MAX_YAML_VALUES = 50_000
"""Values, those counted again that an alias repeats."""
MAX_YAML_DEPTH = 50
MAX_REASON_CHARACTERS = 300
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
        raise UserError(f"{path}: not valid YAML: {_shorten(error)}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    except FAULTS as error:
        raise UserError(f"{path}: not valid YAML: {_shorten(error)}") from None
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


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:MAX_REASON_CHARACTERS]
