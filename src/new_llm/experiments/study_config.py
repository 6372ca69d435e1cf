"""A study: one experiment's configuration, variants of it, seeds, and the measurements that compare them."""

import copy
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.evaluation import LongDocumentsConfig, RecallConfig
from new_llm.config.loading import RunSettings
from new_llm.config.sections import section
from new_llm.experiments.config import ExperimentConfig, config_from_dict, list_option_fields
from new_llm.models.factory import find_model_kind

VARIANT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"

VALIDATION = "validation"
"""The short name of the validation split among the long texts."""


@section
class StudyConfig(RunSettings):
    """Train variants of one model, each with several seeds, and measure them on long documents and recall.

    A variant is what it changes of `base`, in the form of an experiment's YAML: `{model: {use_delta_rule: false}}`.
    """

    name: Annotated[str, Field(pattern=VARIANT_NAME)]  # pyright: ignore[reportIncompatibleVariableOverride]
    """The study's name and folder."""
    question: str
    """What it is to answer, in a sentence."""
    cpu_minutes: Annotated[float, Field(gt=0)]
    """Time that the whole study took on two cores when it was written; it is said before the study starts."""
    base: dict[str, Any]
    """What all variants have in common: an experiment's configuration; what it leaves out keeps its default."""
    variants: Annotated[dict[Annotated[str, Field(pattern=VARIANT_NAME)], dict[str, Any]], Field(min_length=1)]
    """By name, what each changes; each trains one model."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Each variant is trained once with each."""
    reference: str | None = None
    """The variant that all others are compared with; None: the first one."""
    baselines: tuple[str, ...] = ()
    """Variants that read the long documents beside every other one, in consecutive segments."""
    window_baselines: tuple[str, ...] = ()
    """Likewise, but in sliding windows as long as their segment: models without memory with their whole context."""
    long_documents: LongDocumentsConfig | None = dataclasses.field(default_factory=LongDocumentsConfig)
    """How long validation documents are measured; its own baselines are to be left out. None: not at all."""
    texts: tuple[str, ...] = ()
    """Further sources of long documents, measured one by one."""
    recall: RecallConfig | None = None
    """How recall is measured; None: not at all."""
    runs_dir: Path = Path("runs")
    """Where the study's folder is made; each training is a run in it."""

    def __post_init__(self) -> None:
        for name in (*self.baselines, *self.window_baselines, *([self.reference] if self.reference else [])):
            if name not in self.variants:
                raise UserError(f"study: {name!r} is no variant; there are {', '.join(self.variants)}")
        if self.long_documents and (self.long_documents.baselines or self.long_documents.window_baselines):
            raise UserError("study: long_documents takes no baselines of its own; the study's are variants")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: {list(self.seeds)}: none may be there twice")
        for name in self.variants:
            config = self.configure(name, self.seeds[0])
            if name in self.window_baselines and self.long_documents:
                self.choose_window_stride(name, config.context_tokens(config.models[0]))
        names = [Path(source).stem for source in self.texts]
        for position, name in enumerate(names):
            if name == VALIDATION or name in names[:position]:
                raise UserError(f"texts: {self.texts[position]}: another text is called {name!r}, too; rename the file")

    def choose_window_stride(self, name: str, window: int) -> int:
        """Tokens from one window of a baseline to the next, where long documents are measured; at most a window."""
        assert self.long_documents is not None
        return self.long_documents.choose_window_stride(window, f"{self.name}: long_documents.window_stride", name)

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return self.runs_dir / self.name

    @property
    def reference_variant(self) -> str:
        """The variant that all others are compared with."""
        return self.reference or next(iter(self.variants))

    @property
    def long_texts(self) -> dict[str, str | None]:
        """The sources of long documents by their short names; None is the validation split."""
        return {VALIDATION: None} | {Path(source).stem: source for source in self.texts}

    def configure(self, variant: str, seed: int) -> ExperimentConfig:
        """The experiment of one variant and seed; an unknown key, a wrong value or several models are a `UserError`."""
        change = self.variants[variant]
        values = merge_settings(self.base, change)
        for key in ("name", "seed", "runs_dir"):
            if key in values:
                raise UserError(f"{self.name}: variant {variant}: {key}: is the study's to set")
        own = change.get("model", {})
        values["model"] = {
            name: value
            for name, value in values.get("model", {}).items()
            if name in own or is_taken(name, values.get("models", ()))  # base speaks to the variants that take it
        }
        values |= {"name": f"{variant}-s{seed}", "seed": seed, "runs_dir": str(self.folder)}
        config = config_from_dict(values, f"{self.name}: variant {variant}")
        if len(config.models) != 1:
            raise UserError(f"{self.name}: variant {variant}: models: one is needed, {len(config.models)} are given")
        return config


def is_taken(name: str, model_types: Iterable[str]) -> bool:
    """Whether a field of the model section is the shape's, or an option of one of some model types."""
    if name not in list_option_fields():
        return True
    return any(name in find_model_kind(model_type).defaults for model_type in model_types)


def merge_settings(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `change`, mappings merged key by key."""
    merged = copy.deepcopy(base)
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge_settings(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
