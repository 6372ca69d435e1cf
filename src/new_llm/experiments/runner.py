"""Train some models on identical data in identical order, measure their best weights, write the run folder."""

import dataclasses
import datetime
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from new_llm.config import UserError
from new_llm.config.atomic import write_text_atomically
from new_llm.config.terminal import open_console
from new_llm.data.dataset import PreparedData, prepare_data
from new_llm.data.planted_facts import SamplePlanter
from new_llm.evaluation import find_measures, measure, unigram_perplexity
from new_llm.experiments.config import ExperimentConfig
from new_llm.experiments.measure import make_subject, measure_validation_loss
from new_llm.experiments.record import (
    DATA_FILE,
    ENVIRONMENT_FILE,
    MODEL_RESULT_FILE,
    REPORT_FILE,
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
from new_llm.models import TransformerLM, create_model
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
from new_llm.training.log import TrainingProgress, check_trackers, read_metrics
from new_llm.training.signals import interrupt_training

TOKENIZER_FILE = "tokenizer.json"


def run_experiment(
    model_types: Sequence[str] | None = None,
    exp_config: ExperimentConfig | None = None,
    *,
    resume: bool = False,
    console: Console | None = None,
    write_report: Callable[[dict[str, Any], Path], None] | None = None,
) -> dict[str, Any]:
    """Train and compare some models. Where a launcher has started several processes, each makes the same call.

    Args:
        model_types: the models; None: the configuration's.
        exp_config: the experiment; None: the reference.
        resume: go on with the run of this name.
        console: where to show progress; None: the standard error.
        write_report: writes the results so far to a path, after every model; None: `new_llm.report`'s page.

    Returns:
        What `results.json` holds; `results["folder"]` is the run folder.

    Raises:
        UserError: bad input, in one line.
        OtherProcessError: another process of the same training has failed.
        TrainingError: a loss was not finite.
        TrainingInterrupted: a signal asked to stop; the run can be resumed.
    """
    config = exp_config or ExperimentConfig()
    if model_types is not None:
        config = dataclasses.replace(config, models=tuple(str(kind) for kind in model_types))
    processes = start_processes()
    with processes.guard(), compute_deterministically(config.train.deterministic):
        console = (console or open_console(stderr=True)) if processes.is_main else Console(quiet=True)
        device = processes.place(choose_device(config.device))
        check_trackers(config.train.trackers)
        processes.slice_rows(config.train.batch_size)
        check_models(config)
        find_measures(config.eval.measures)  # an unknown one is refused before anything is trained
        with hold_run(config, resume=resume, processes=processes) as (config, folder):
            data = prepare_shared_data(config, processes)
            if not resume:  # only now, so that bad data leaves no folder behind
                processes.run_on_main(lambda: create_run(config, folder))
            console.print(f"run folder {folder}", highlight=False)
            for note in data.info.get("notes", []):
                console.print(f"note: {note}", highlight=False, soft_wrap=True)
            experiment = _Experiment(config, folder, data, device, console, processes)
            return experiment.run(write_report or find_report_writer()) | {"folder": str(folder)}


def check_models(config: ExperimentConfig) -> None:
    """Refuse a shape that a model can't be built with, before anything is read or written.

    Raises:
        UserError: names the model and what does not fit.
    """
    config.model.check_taken(config.models)
    for kind in config.models:
        try:
            with torch.device("meta"):  # nothing is allocated or drawn
                build_model(config, kind, vocab_size=1)
        except ValueError as error:
            raise UserError(f"model: {kind} can't be built: {error}") from None


def build_model(config: ExperimentConfig, kind: str, vocab_size: int) -> TransformerLM:
    """One of an experiment's models, with fresh weights from torch's global generator."""
    options = config.model.options_of(kind)
    return create_model(kind, config.model.shape(vocab_size), segment_length=config.context_tokens(kind), **options)


def prepare_shared_data(config: ExperimentConfig, processes: Processes) -> PreparedData:
    """The experiment's data: one process tokenizes them, and the others read its cache.

    Raises:
        UserError: as `prepare_data`; or machines that do not share the cache have read different texts.
    """
    data = processes.run_main_first(lambda: prepare_data(config.data))
    with processes.agree():
        if processes.share(data.info["split_fingerprint"]) != data.info["split_fingerprint"]:
            raise UserError(
                f"{config.data.source}: process {processes.rank} reads other data than process 0: their machines need "
                "the same source and tokenizer, or one token cache (data.cache_dir)"
            )
    return data


def write_results(results: dict[str, Any], folder: Path, write_report: Callable[[dict[str, Any], Path], None]) -> None:
    """The results so far and their report."""
    write_json(folder / RESULTS_FILE, results)
    write_report(results, folder / REPORT_FILE)


def find_report_writer() -> Callable[[dict[str, Any], Path], None]:
    """The report's writer, found by name: the report stands above the experiments, and nothing here depends on it."""
    return importlib.import_module("new_llm.report.html").write_report


class _Experiment:
    """One run: what its models share."""

    def __init__(
        self,
        config: ExperimentConfig,
        folder: Path,
        data: PreparedData,
        device: torch.device,
        console: Console,
        processes: Processes,
    ) -> None:
        self.config = config
        self.folder = folder
        self.data = data
        self.device = device
        self.console = console
        self.processes = processes
        self.precision = choose_precision(config.train.precision, device)
        self.autocast = make_autocast(self.precision, device)

    def run(self, write_report: Callable[[dict[str, Any], Path], None]) -> dict[str, Any]:
        """Train and measure the models one after another; the results and the report are written after each."""
        results = self.processes.run_on_main(self.describe)
        for kind in self.config.models:
            with interrupt_training(self.folder / kind):
                results["models"].append(self.run_model(kind))
                results["status"] = "complete" if len(results["models"]) == len(self.config.models) else "running"
                self.processes.run_on_main(lambda: write_results(results, self.folder, write_report))
        return results

    def describe(self) -> dict[str, Any]:
        """Write the facts of the run, and begin its results with them. A resumed run keeps its first facts."""
        facts = read_json(self.folder / ENVIRONMENT_FILE) or {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": describe_command(),
            "code": describe_code(),
            "environment": describe_environment(str(self.device), self.precision, torch.get_num_threads())
            | {"num_processes": self.processes.count, "sharding": self.config.train.sharding},
        }
        write_json(self.folder / ENVIRONMENT_FILE, facts)
        write_json(self.folder / DATA_FILE, self.data.info)
        write_text_atomically(self.folder / TOKENIZER_FILE, self.data.tokenizer.to_str(pretty=True))
        return {
            "schema_version": RESULTS_VERSION,
            "name": self.config.name,
            "status": "running",
            **facts,
            "config": self.config.to_dict(),
            "data": self.data.info,
            "unigram_perplexity": unigram_perplexity(self.data.validation),
            "models": [],
        }

    def create(self, kind: str) -> TransformerLM:
        """A model with fresh weights: those it shares with the other models are the same."""
        seed_generators(self.config.seed)
        return build_model(self.config, kind, self.data.vocab_size)

    def run_model(self, kind: str) -> dict[str, Any]:
        """Train and measure one model, or read its result where a resumed run has it."""
        folder = self.folder / kind
        done = self.processes.run_on_main(lambda: self._read_result(folder))
        if done is not None:
            self.console.print(f"{kind:<12} is done", highlight=False)
            return done
        progress = TrainingProgress(kind, self.console, device=self.device)
        trainer = Trainer(
            self.create(kind),
            self.data.train,
            self.config.data,
            self.config.train,
            folder,
            validate=lambda model: measure_validation_loss(
                model, self.data, self.config, self.autocast, self.processes
            ),
            device=self.device,
            progress=progress,
            seed=self.config.seed,
            processes=self.processes,
            planter=SamplePlanter.from_config(self.data.tokenizer, self.config.data, self.config.seed),
            settings=self.config.to_dict(),
        )
        try:
            training = trainer.run(resume=True)  # a new run has no checkpoint, and begins anew
        finally:
            progress.stop()
        model = self._load_best(kind, folder / BEST_FOLDER)
        with self.console.status("") as status:
            subject = make_subject(model, self.data, self.config, self.autocast, self.processes)
            measured = measure(subject, say=lambda what: status.update(f"{kind}: measuring {what}"))
        return self.processes.run_on_main(lambda: self._write_result(kind, folder, model, training, measured))

    @staticmethod
    def _read_result(folder: Path) -> dict[str, Any] | None:
        done = read_json(folder / MODEL_RESULT_FILE)
        if done is not None:
            remove_checkpoints(folder)  # if the process was killed before it could
        return done

    @torch.no_grad()
    def _load_best(self, kind: str, folder: Path) -> TransformerLM:
        """The best weights, which the main process reads for all."""
        with self.processes.agree():
            model = TransformerLM.load(folder) if self.processes.is_main else self.create(kind)
        held = model.state_dict()
        for name, tensor in self.processes.share_tensors(held):
            held[name].copy_(tensor)
        return model.to(self.device).eval()

    def _write_result(
        self, kind: str, folder: Path, model: TransformerLM, training: TrainingResult, measured: dict[str, Any]
    ) -> dict[str, Any]:
        """The model's result, which says that it is done; its checkpoint is needed no more."""
        lines = read_metrics(folder)
        result = {
            "model_type": str(kind),
            "options": self.config.model.options_of(kind),
            "context_tokens": self.config.context_tokens(kind),
            "num_parameters": model.num_parameters(),
            "memory_info": model.memory_info(),
            "training": {
                **dataclasses.asdict(training),
                "steps_log": [line for line in lines if line["event"] == "train"],
                "epochs_log": [line for line in lines if line["event"] == "epoch"],
            },
            "gates": model.gate_values(),
            "evaluation": measured,
        }
        write_json(folder / MODEL_RESULT_FILE, result)
        remove_checkpoints(folder)
        return result
