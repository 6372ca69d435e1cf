"""Experiment trackers beside the run folder: Weights & Biases, MLflow or trackio, through Accelerate."""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from new_llm.config import UserError

PROJECT = "new-llm"
NAME_ARGUMENTS = {"wandb": "name", "mlflow": "run_name", "trackio": "name"}
"""What each tracker calls the name of one run."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is not installed, before anything is done.

    Raises:
        UserError: names the package.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"train.trackers: {name} is not installed: pip install {name}")


def choose_trackers(names: Sequence[str]) -> list[str | LoggerType | GeneralTracker]:
    """What Accelerate is asked to log with."""
    return list(names)


@contextmanager
def open_trackers(
    accelerator: Accelerator, names: Sequence[str], run: str, config: Mapping[str, Any]
) -> Iterator["Trackers"]:
    """Inside the block metrics go to the trackers, if any; at its end they are told that the run is over.

    Args:
        accelerator: of the training; it was made with `log_with=choose_trackers(names)`.
        names: the trackers.
        run: the run's name.
        config: the experiment's configuration, nested.
    """
    if names:
        options = {name: {NAME_ARGUMENTS[name]: run} for name in names}
        accelerator.init_trackers(PROJECT, config=flatten(config), init_kwargs=options)
    try:
        yield Trackers(accelerator)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


class Trackers:
    """The open trackers of one training."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def log(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers of one line of metrics, by the names that TensorBoard has."""
        if self.accelerator.trackers:
            self.accelerator.log(name_numbers(event, values), step=step)


def name_numbers(event: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line by name: `train/loss`, `gates/layers.0.1` for a head, `alpha/layers.0`."""
    numbers: dict[str, float] = {
        f"{event}/{name}": value
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    for name, gates in values.get("gates", {}).items():
        numbers |= {f"gates/{name}.{head}": gate for head, gate in enumerate(gates)}
    return numbers | {f"alpha/layers.{layer}": alpha for layer, alpha in values.get("alpha", {}).items()}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; lists and None as text, which every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return flat
