"""Train a parallel memory adapter on long documents, measure it against its base, write the run folder.

```
runs/<name>/
  adapter.yaml       the resolved configuration     environment.json   machine, versions, code revision, command
  data.json          fingerprints and counts        tokenizer.json     the base's tokenizer
  parallel_infini/   metrics.jsonl, tensorboard/, best/ (the adapted model), checkpoints/ (while training)
  results.json       what was trained and measured
```
"""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer

from new_llm.config import PythiaConfig, UserError
from new_llm.config.atomic import write_text_atomically
from new_llm.config.terminal import open_console
from new_llm.data.dataset import PreparedData, prepare_data
from new_llm.data.hub import hub_answers
from new_llm.data.planted_facts import SamplePlanter
from new_llm.experiments.adapter_config import AdapterTrainingConfig
from new_llm.experiments.adapter_documents import choose_long_documents
from new_llm.experiments.adapter_measure import measure_adapter, read_wikitext
from new_llm.experiments.config import ExperimentConfig, ModelConfig
from new_llm.experiments.measure import measure_validation_loss
from new_llm.experiments.record import (
    DATA_FILE,
    ENVIRONMENT_FILE,
    RESULTS_FILE,
    RESULTS_VERSION,
    create_run,
    describe_code,
    describe_command,
    describe_environment,
    hold_run,
    read_json,
    write_json,
)
from new_llm.experiments.run_folder import find_model_folder, find_tokenizer_file
from new_llm.experiments.runner import TOKENIZER_FILE
from new_llm.models import TransformerLM
from new_llm.models.hf.adapter_layers import add_parallel_infini, split_weights
from new_llm.models.hf.infini_adapter import load_base, save_adapter
from new_llm.models.layers import ParallelInfiniLayer
from new_llm.processes import Processes, start_processes
from new_llm.training import Trainer, TrainingResult
from new_llm.training.checkpoint import BEST_FOLDER, remove_checkpoints
from new_llm.training.devices import (
    choose_device,
    choose_precision,
    compute_deterministically,
    make_autocast,
    seed_generators,
)
from new_llm.training.log import TrainingProgress, read_metrics
from new_llm.training.signals import interrupt_training

MODEL_FOLDER = ParallelInfiniLayer.kind
BASE_HERE = (
    "without the hub a base is trained here by `new-llm experiment --models pythia --data.source sotu --name base` and "
    "taken by `--base runs/base`"
)


def train_adapter(
    config: AdapterTrainingConfig, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Train and measure one adapter, and write its file. Of several processes each makes the same call.

    Args:
        config: the training.
        resume: go on with the run of this name.
        console: where to show progress; None: the standard error.

    Returns:
        What `results.json` holds; `results["folder"]` is the run folder.

    Raises:
        UserError: bad input, in one line.
        OtherProcessError: another process of the same training has failed.
        TrainingError: a loss was not finite.
        TrainingInterrupted: a signal asked to stop; the run can be resumed.
    """
    processes = start_processes()
    with processes.guard(), compute_deterministically(config.train.deterministic):
        console = (console or open_console(stderr=True)) if processes.is_main else Console(quiet=True)
        device = processes.place(choose_device(config.device))
        processes.slice_rows(config.train.batch_size)
        with hold_run(config, resume=resume, processes=processes) as (config, folder):
            processes.run_on_main(lambda: check_place(config.out))
            done = processes.run_on_main(lambda: read_json(folder / RESULTS_FILE) if resume else None)
            if done is not None:
                processes.run_on_main(lambda: remove_checkpoints(folder / MODEL_FOLDER))
                console.print(f"{folder} is done", highlight=False)
                return done | {"folder": str(folder)}
            source, tokenizer_name = find_base(config)
            base = processes.run_main_first(lambda: load_configured_base(config, source))
            data = processes.run_main_first(lambda: prepare_documents(config, tokenizer_name))
            check_vocabulary(base, data.tokenizer, config.base)
            wikitext = processes.run_main_first(lambda: read_wikitext(config, data.tokenizer))
            seed_generators(config.seed)
            model = add_parallel_infini(base, config.adapter, base_name=str(source))
            if not resume:  # only now, so that bad input leaves no folder behind
                processes.run_on_main(lambda: create_run(config, folder))
            console.print(f"run folder {folder}", highlight=False)
            for note in (*data.info["notes"], *wikitext.notes):
                console.print(f"note: {note}", highlight=False, soft_wrap=True)
            precision = choose_precision(config.train.precision, device)
            results = processes.run_on_main(
                lambda: describe_training(config, folder, data, model, str(device), precision)
            )
            with interrupt_training(folder / MODEL_FOLDER):
                training = run_training(
                    config, folder / MODEL_FOLDER, model, data, device, precision, console, processes
                )

                def finish() -> dict[str, Any]:
                    best = TransformerLM.load(folder / MODEL_FOLDER / BEST_FOLDER)
                    save_adapter(best, config.out, with_base=not config.adapter.freeze_base_model)
                    with console.status("") as status:
                        measured = measure_adapter(
                            load_configured_base(config, source).to(device).eval(),
                            best.to(device).eval(),
                            {"held_out": data.validation}
                            | ({} if wikitext.split is None else {"wikitext": wikitext.split}),
                            config.eval,
                            make_autocast(precision, device),
                            lambda what: status.update(f"measuring {what}"),
                        )
                    return write_results(folder, results, training, best, measured)

                return processes.run_on_main(finish) | {"folder": str(folder)}


def write_results(
    folder: Path,
    results: dict[str, Any],
    training: TrainingResult,
    best: TransformerLM,
    measured: dict[str, Any],
) -> dict[str, Any]:
    """What is known of the run now that it is done; its checkpoints are needed no more."""
    lines = read_metrics(folder / MODEL_FOLDER)
    results = results | {
        "status": "complete",
        "training": {
            **dataclasses.asdict(training),
            "steps_log": [line for line in lines if line["event"] == "train"],
            "epochs_log": [line for line in lines if line["event"] == "epoch"],
        },
        "alpha": best.get_alpha(),
        "gates": best.gate_values(),
        "evaluation": measured,
    }
    write_json(folder / RESULTS_FILE, results)
    remove_checkpoints(folder / MODEL_FOLDER)
    return results


def find_base(config: AdapterTrainingConfig) -> tuple[str | Path, str]:
    """Where the base is: a hub name or a directory; and its tokenizer: a hub name or a file.

    Raises:
        UserError: a directory without a model or tokenizer, or a run without a model of its own to choose.
    """
    path = Path(config.base).expanduser()
    if not path.is_dir():
        return config.base, config.base
    if (path / "config.json").is_file():
        folder = path
    elif (path / "pythia" / BEST_FOLDER).is_dir():
        folder = path / "pythia" / BEST_FOLDER
    else:
        folder = find_model_folder(path)
    if config.data.tokenizer != "auto":
        return folder, config.data.tokenizer
    return folder, str(find_tokenizer_file(folder))


def load_configured_base(config: AdapterTrainingConfig, source: str | Path) -> TransformerLM:
    """The base with the segments of the training.

    Raises:
        UserError: it can't be found or read; offline the line says how to have a base here.
    """
    try:
        return load_base(source, revision=config.revision, segment_length=config.segment_length)
    except UserError as error:
        if isinstance(source, Path) or hub_answers(
            f"{source}/resolve/main/config.json", config.data.hub_timeout_seconds
        ):
            raise
        raise UserError(f"--base {source}: {error}; {BASE_HERE}") from None
    except ValueError as error:
        raise UserError(
            f"--base {source}: {error}; a segment is data.seq_length ({config.data.seq_length}) / "
            f"data.segments_per_sample ({config.data.segments_per_sample})"
        ) from None


def prepare_documents(config: AdapterTrainingConfig, tokenizer_name: str) -> PreparedData:
    """The source's long documents, split and tokenised as the base's tokenizer does.

    Raises:
        UserError: see `prepare_data`; or no training document is long enough.
    """
    tokenizer = tokenizer_name if config.data.tokenizer == "auto" else config.data.tokenizer
    data = prepare_data(dataclasses.replace(config.data, tokenizer=tokenizer))
    return choose_long_documents(
        data,
        num_docs=config.num_docs,
        min_tokens=config.min_doc_tokens or config.data.seq_length,
        max_tokens=config.max_doc_tokens,
        seed=config.data.split_seed,
    )


def check_vocabulary(model: TransformerLM, tokenizer: Tokenizer, name: str) -> None:
    """Refuse a tokenizer with ids that the base does not know.

    Raises:
        UserError: says both numbers.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= model.vocab_size:
        raise UserError(f"--base {name}: the tokenizer has ids up to {largest}, the base knows {model.vocab_size}")


def check_place(out: Path) -> None:
    """Refuse, before the work, a place where the adapter's file can't be written.

    Raises:
        UserError: a folder, or a place that can't be written to.
    """
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: can't write to {out.parent}: {error.strerror or error}") from None


def describe_training(
    config: AdapterTrainingConfig, folder: Path, data: PreparedData, model: TransformerLM, device: str, precision: str
) -> dict[str, Any]:
    """Write the facts of the run, and begin its results with them. A resumed run keeps its first facts."""
    facts = read_json(folder / ENVIRONMENT_FILE) or {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": describe_command(),
        "code": describe_code(),
        "environment": describe_environment(device, precision, torch.get_num_threads()),
    }
    write_json(folder / ENVIRONMENT_FILE, facts)
    write_json(folder / DATA_FILE, data.info)
    write_text_atomically(folder / TOKENIZER_FILE, data.tokenizer.to_str(pretty=True))
    base, adapter = split_weights(model)
    return {
        "schema_version": RESULTS_VERSION,
        "kind": "parallel_adapter",
        "name": config.name,
        "status": "running",
        **facts,
        "config": config.to_dict(),
        "data": data.info,
        "num_parameters": {
            "base": sum(tensor.numel() for tensor in base.values()),
            "adapter": sum(tensor.numel() for tensor in adapter.values()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "memory_info": model.memory_info(),
    }


def run_training(
    config: AdapterTrainingConfig,
    folder: Path,
    model: TransformerLM,
    data: PreparedData,
    device: torch.device,
    precision: str,
    console: Console,
    processes: Processes,
) -> TrainingResult:
    """Train by the experiments' own loop: streams of whole documents, memory carried between samples."""
    # All samples of the chosen documents; num_samples bounded what was read.
    longest = max(PythiaConfig.max_position_embeddings, config.segment_length)
    experiment = ExperimentConfig(
        models=("pythia_segments",),
        seed=config.seed,
        model=ModelConfig(max_position_embeddings=longest),
        data=dataclasses.replace(config.data, num_samples=None),
        train=config.train,
        eval=config.eval,
    )
    autocast = make_autocast(precision, device)
    progress = TrainingProgress("adapter", console)
    trainer = Trainer(
        model,
        data.train,
        experiment.data,
        experiment.train,
        folder,
        validate=lambda model: measure_validation_loss(model, data, experiment, autocast, processes),
        device=device,
        progress=progress,
        seed=config.seed,
        processes=processes,
        planter=SamplePlanter.from_config(data.tokenizer, config.data, config.seed),
        settings=config.to_dict(),
    )
    try:
        return trainer.run(resume=True)  # a new run has no checkpoint, and begins anew
    finally:
        progress.stop()
