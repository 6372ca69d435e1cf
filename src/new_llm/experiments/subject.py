"""Load any trained model for `new-llm eval` and studies: from a run, a saved model, or a Hugging Face checkpoint.

GPT-NeoX checkpoints become models of this project; other kinds get a wrapper. `export_run` goes the other way: it
writes a run's model as a folder for Hugging Face's tools, with a model card that has the run's results.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

import new_llm.models.hf  # registers this project's models with the Auto classes
from new_llm.config import DataConfig, UserError
from new_llm.config.evaluation import SubjectConfig
from new_llm.config.files import write_text_atomically
from new_llm.config.terminal import hide_home, make_line
from new_llm.data.hub import describe_failure
from new_llm.data.tokenizer import fingerprint_tokenizer, get_tokenizer
from new_llm.evaluation import MEASURES
from new_llm.evaluation.language_models import HuggingFaceLM
from new_llm.evaluation.scoring import LanguageModel
from new_llm.experiments.config import ExperimentConfig
from new_llm.experiments.run_folder import (
    CONFIG_FILE,
    DATA_FILE,
    ENVIRONMENT_FILE,
    MODEL_RESULT_FILE,
    find_model_folder,
    load_run_model,
    read_begun,
    read_json,
)
from new_llm.models import TransformerLM
from new_llm.models.hf import export_auto, export_pythia, load_pythia
from new_llm.models.hf.folder import CONFIG_FILE as MODEL_CONFIG_FILE
from new_llm.models.hf.folder import find_checkpoint, read_config
from new_llm.models.hf.infini_adapter import attach_adapter, read_base_name
from new_llm.models.model_file import STRUCTURE_FILE
from new_llm.models.tensor_files import fingerprint_weights
from new_llm.training.checkpoint import BEST_FOLDER
from new_llm.training.devices import choose_device, choose_precision, make_autocast


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, on its device and in evaluation mode.

    Attributes:
        label: a short name that can be part of a file name.
        precision: fp32, bf16 (autocast), or the dtype of its weights.
        autocast: makes the context in which the model computes.
        facts: a description of the model for the record.
        folder: the run it belongs to; None: no run.
        config: that run's configuration; None: no run.
        tuning_documents: those on which its cache was tuned, if it has one.
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
    tuning_documents: Sequence[NDArray[Any]] = ()


def load_any_model(config: SubjectConfig) -> LoadedModel:
    """Load the configured model with its tokenizer."""
    device = choose_device(config.device)
    if (name := config.run) is None:
        if config.parallel_adapter is None:
            raise UserError("--run: give a run folder, a saved model's folder, or a Hugging Face folder or name")
        name = read_base_name(config.parallel_adapter)
    path = Path(name).expanduser()
    is_own = path.is_dir() and not (path / "config.json").is_file()
    label, model, tokenizer, run, facts = _load_own(config, path) if is_own else _load_hugging_face(config, name)
    if config.parallel_adapter is not None:
        if not isinstance(model, TransformerLM):
            raise UserError(f"--parallel-adapter: {name} is not a GPT-NeoX model; adapters fit only those")
        model = attach_adapter(model, config.parallel_adapter)
    precision = config.precision
    if is_own:
        environment = (read_json(run / ENVIRONMENT_FILE) if run else None) or {}
        facts["trained_by"] = environment.get("code")
        trained_in = environment.get("environment", {}).get("precision", "auto")
        precision = choose_precision(trained_in if precision == "auto" else precision, device)
    else:
        dtype = next(iter(model.parameters())).dtype
        stored = {torch.float32: "fp32"}.get(dtype, str(dtype).removeprefix("torch."))
        if precision not in ("auto", stored) and stored != "fp32":
            raise UserError(f"--precision {precision}: the weights of {name} are {stored}; use auto")
        precision = stored if precision == "auto" else precision
    run_config = read_begun(run, ExperimentConfig) if run else None
    facts |= {
        "seed": run_config.seed if run_config else None,
        "parallel_adapter": None if config.parallel_adapter is None else str(config.parallel_adapter),
        "weights_fingerprint": fingerprint_weights(model),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "segment_length": model.segment_length,
        "tokenizer_fingerprint": fingerprint_tokenizer(tokenizer),
    }
    model.to(device).eval()
    autocast = make_autocast(precision, device)
    return LoadedModel(label, model, tokenizer, device, precision, autocast, facts, run, run_config)


def _load_own(config: SubjectConfig, path: Path) -> tuple[str, TransformerLM, Tokenizer, Path | None, dict[str, Any]]:
    """Load a folder of this project: label, model, tokenizer, the run it belongs to, and facts."""
    for name in ("revision", "segment_length"):
        if getattr(config, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')}: only for Hugging Face models; {path} is a folder of this project"
            )
    folder = find_model_folder(path, config.model)
    model, tokenizer = load_run_model(folder)
    run = next((place for place in folder.resolve().parents[:2] if (place / CONFIG_FILE).is_file()), None)
    label = folder.parent.name if folder.name == BEST_FOLDER else folder.name
    return label, model, tokenizer, run, {"kind": "run", "path": str(path), "model": label}


def _load_hugging_face(config: SubjectConfig, name: str) -> tuple[str, Any, Tokenizer, None, dict[str, Any]]:
    """The same for a Hugging Face folder or name, which belongs to no run."""
    if config.model is not None:
        raise UserError(f"--model: only for a run of several models; {name} is a single model")
    if config.parallel_adapter is not None and config.segment_length is not None:
        raise UserError("--segment-length: an adapter has its own; leave it out with --parallel-adapter")
    model, tokenizer, kind = load_hugging_face(name, config.revision, config.segment_length)
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name) or "model"
    return label, model, tokenizer, None, {"kind": kind, "path": name, "revision": config.revision}


def load_hugging_face(
    name: str, revision: str | None, segment_length: int | None
) -> tuple[TransformerLM | HuggingFaceLM, Tokenizer, str]:
    """Load a folder or hub name: model, tokenizer and model type. Code in the checkpoint is never executed."""
    folder = find_checkpoint(name, revision)
    kind = read_config(folder).get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{folder / MODEL_CONFIG_FILE}: model_type is missing")
    model: TransformerLM | HuggingFaceLM
    if kind == "gpt_neox":
        try:
            model = load_pythia(folder, segment_length=segment_length)
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"--segment-length: {error}") from None
    else:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", trust_remote_code=False)
        except Exception as error:  # transformers can raise anything
            raise UserError(f"{name}: can't be loaded as a causal language model: {describe_failure(error)}") from None
        if kind == new_llm.models.hf.NewLLMConfig.model_type:
            if segment_length is not None:
                raise UserError(f"--segment-length: {name} has its own ({loaded.model.segment_length})")
            model = loaded.model
        else:
            model = HuggingFaceLM(loaded, segment_length)
    return model, get_tokenizer(name, DataConfig.hub_timeout_seconds, revision), kind


# Export


CARD_FILE = "README.md"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {title}

A causal language model in the shape of Pythia, trained with New-LLM. It is a base model: it continues texts but does
not answer questions.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
{registration}
model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
ids = tokenizer("The Congress", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```

{facts}
"""
REGISTRATION = "import new_llm.models.hf  # registers the model type; no code comes from the model's folder\n"


def export_run(
    run: str | Path, model: str | None, directory: str | Path, *, layout: Literal["auto", "gpt_neox"] = "auto"
) -> None:
    """Write a run's model with its best weights, tokenizer and a model card; an exported model there is replaced.

    `layout`: auto for any model, gpt_neox for plain Pythia models only.
    """
    source, directory = find_model_folder(Path(run), model), Path(directory).expanduser()
    if (directory / STRUCTURE_FILE).is_file():
        raise UserError(f"{directory}: contains a model of this project; choose another folder to export to")
    loaded, tokenizer = load_run_model(source)
    export = export_pythia if layout == "gpt_neox" else export_auto
    export(loaded, directory, tokenizer)
    write_text_atomically(directory / CARD_FILE, write_card(loaded, source, layout, directory.resolve().name))


def write_card(model: TransformerLM, source: Path, layout: str, title: str) -> str:
    """The model card in Markdown, with the hub's metadata: how to load the model, its facts, and its run's results."""
    kinds = [layer.kind for layer in model.layer_list]
    facts = {
        "layers": ", ".join(kinds),
        "parameters": f"{model.num_parameters()['total']:,}",
        "segment": f"{model.segment_length:,} tokens",
        "weights": str(model.embed_in.weight.dtype).removeprefix("torch."),
        "memory": f"{model.memory_info()['total_bytes']:,} bytes" if model.memory_layers else None,
    }
    if (result := read_json(source.parent / MODEL_RESULT_FILE)) is not None:
        data, run = (read_json(source.parent.parent / name) or {} for name in (DATA_FILE, ENVIRONMENT_FILE))
        facts |= {
            "trained on": data.get("source"),
            "tokenizer": data.get("tokenizer", {}).get("name"),
            "tokens read": f"{result['training']['tokens']:,}" if "training" in result else None,
            "command": f"`{run['command']}`" if "command" in run else None,
            "code revision": run.get("code", {}).get("git_revision"),
        } | {
            MEASURES[name].title: f"{found['perplexity']:,.4g}"
            for name, found in result.get("evaluation", {}).items()
            if name in MEASURES and found and found.get("perplexity") is not None
        }
    shown = {
        name: hide_home(make_line(value)).replace("|", "\\|") for name, value in facts.items() if value is not None
    }
    rows = [f"| {name} | {value} |" for name, value in shown.items()]
    return CARD.format(
        tags=", ".join(["new-llm", *dict.fromkeys(kinds)]),
        title=title,
        registration=REGISTRATION if layout == "auto" else "",
        facts="\n".join(["| | |", "| --- | --- |", *rows]),
    )
