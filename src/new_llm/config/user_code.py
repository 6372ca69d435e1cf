"""Objects of a user's own module, taken by name: `--models my_module:MyLayer`."""

import importlib
import os
import sys
from typing import Any

from new_llm.config.errors import UserError


def is_user_name(name: str) -> bool:
    """Whether a name has the form "my_module:MyLayer"; `hub:owner/name` and paths do not."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_by_name(name: str, what: str = "an object") -> Any:
    """Import a user's module and return what it calls by this name, such as "my_module:MyLayer".

    Modules are looked for where Python looks for them, then in the current directory. `what` is expected there.

    Raises:
        UserError: the name has another form, there is no such module, its code fails, or it lacks the attribute.
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
    try:
        return getattr(module, attribute)
    except AttributeError:
        place = getattr(module, "__file__", None) or module_name
        raise UserError(f"{name}: {place} defines no {attribute}") from None
