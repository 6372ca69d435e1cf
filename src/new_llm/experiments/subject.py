"""The model of a measurement: one of a run, a saved one, or a Hugging Face checkpoint."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from new_llm.config import UserError
from new_llm.config.evaluation import SubjectConfig
from new_llm.data.tokenizer import fingerprint_tokenizer
from new_llm.evaluation.scoring import LanguageModel
from new_llm.experiments.config import ExperimentConfig
from new_llm.experiments.record import CONFIG_FILE, ENVIRONMENT_FILE, read_json, read_run_config
from new_llm.experiments.run_folder import find_model_folder, load_run_model
from new_llm.models import TransformerLM
from new_llm.models.tensor_files import fingerprint_weights
from new_llm.training.devices import choose_device, choose_precision, make_autocast


@dataclass(frozen=True)
class Subject:
    """A model to measure, on its device and in evaluation mode.

    Attributes:
        label: short name, fit for a file's.
        model: the model.
        tokenizer: its tokenizer.
        device: where it lies.
        precision: fp32, bf16 (autocast), or the dtype of its weights.
        autocast: makes the context in which it computes.
        facts: plain values for the record.
        folder: the run that it belongs to; None: none.
        config: that run's configuration; None: none.
    """

    label: str
    model: LanguageModel
    tokenizer: Tokenizer
    device: torch.device
    precision: str
    autocast: Callable[[], AbstractContextManager[Any]]
    facts: dict[str, Any]
    folder: Path | None
    config: ExperimentConfig | None

    def require_own(self, what: str) -> TransformerLM:
        """The model as one of this family, which some measurements need.

        Raises:
            UserError: it is a Hugging Face model of another kind.
        """
        if not isinstance(self.model, TransformerLM):
            raise UserError(f"{self.label}: {what} needs a model of this project or a GPT-NeoX checkpoint")
        return self.model


def load_subject(config: SubjectConfig) -> Subject:
    """Load the configured model with its tokenizer.

    Raises:
        UserError: no such model, several to choose from, or an option that doesn't fit its kind.
    """
    device = choose_device(config.device)
    name = _name_model(config)
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        return _load_run(config, path, device)
    return _load_hugging_face(config, name, device)


def _name_model(config: SubjectConfig) -> str:
    if config.run is not None:
        return config.run
    if config.parallel_adapter is None:
        raise UserError("--run: a model is needed: a run folder, a saved model, or a Hugging Face folder or name")
    from new_llm.models.hf.infini_adapter import read_base_name

    return read_base_name(config.parallel_adapter)


def _load_run(config: SubjectConfig, path: Path, device: torch.device) -> Subject:
    for name in ("revision", "segment_length"):
        if getattr(config, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')}: is for Hugging Face models; {path} is a folder of this project"
            )
    model_folder = find_model_folder(path, config.model)
    model, tokenizer = load_run_model(path, config.model)
    model = _adapt(model, config)
    run = _find_run(model_folder)
    run_config = read_run_config(run) if run else None
    environment = (read_json(run / ENVIRONMENT_FILE) if run else None) or {}
    trained_in = environment.get("environment", {}).get("precision", "auto")
    precision = choose_precision(trained_in if config.precision == "auto" else config.precision, device)
    name = model_folder.parent.name if model_folder.name == "best" else model_folder.name
    facts = {
        "kind": "run",
        "path": str(path),
        "model": name,
        "seed": run_config.seed if run_config else None,
        "trained_by": environment.get("code"),
    }
    return _make(name, model, tokenizer, device, precision, facts, config, folder=run, run_config=run_config)


def _find_run(model_folder: Path) -> Path | None:
    """The run that `<run>/<model>/best` belongs to."""
    places = model_folder.resolve().parents[:2]
    return next((place for place in places if (place / CONFIG_FILE).is_file()), None)


def _load_hugging_face(config: SubjectConfig, name: str, device: torch.device) -> Subject:
    from new_llm.experiments.hugging_face_subject import load_hugging_face

    if config.model is not None:
        raise UserError(f"--model: is for a run of several models; {name} is one model")
    if config.parallel_adapter is not None and config.segment_length is not None:
        raise UserError("--segment-length: an adapter has its own; leave it out with --parallel-adapter")
    model, tokenizer, kind = load_hugging_face(name, config.revision, config.segment_length)
    if isinstance(model, TransformerLM):
        model = _adapt(model, config)
    elif config.parallel_adapter is not None:
        raise UserError(f"--parallel-adapter: {name} is no GPT-NeoX model, and adapters are for those")
    dtype = next(iter(model.parameters())).dtype
    precision = {torch.float32: "fp32"}.get(dtype, str(dtype).removeprefix("torch."))
    if config.precision != "auto" and config.precision != precision:
        if precision != "fp32":
            raise UserError(f"--precision {config.precision}: the weights of {name} are {precision}; use auto")
        precision = config.precision
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name) or "model"
    facts = {"kind": kind, "path": name, "revision": config.revision, "seed": None}
    return _make(label, model, tokenizer, device, precision, facts, config)


def _adapt(model: TransformerLM, config: SubjectConfig) -> TransformerLM:
    if config.parallel_adapter is None:
        return model
    from new_llm.models.hf.infini_adapter import attach_adapter

    return attach_adapter(model, config.parallel_adapter)


def _make(
    label: str,
    model: Any,
    tokenizer: Tokenizer,
    device: torch.device,
    precision: str,
    facts: dict[str, Any],
    config: SubjectConfig,
    *,
    folder: Path | None = None,
    run_config: ExperimentConfig | None = None,
) -> Subject:
    facts = facts | {
        "parallel_adapter": None if config.parallel_adapter is None else str(config.parallel_adapter),
        "weights_fingerprint": fingerprint_weights(model),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "segment_length": model.segment_length,
        "tokenizer_fingerprint": fingerprint_tokenizer(tokenizer),
    }
    model.to(device).eval()
    autocast = make_autocast(precision, device)
    return Subject(label, model, tokenizer, device, precision, autocast, facts, folder, run_config)
