"""A run trains models on identical data in identical order, measures their best weights, and writes the run folder.

`Run` is the base class. `ExperimentRun` trains the model types of an experiment; `AdapterRun`
(`experiments/adapter.py`) trains an adapter.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from new_llm.config import DataConfig, UserError
from new_llm.config.evaluation import EVALUATIONS_FOLDER, RESULTS_VERSION
from new_llm.config.files import write_text_atomically
from new_llm.config.loading import TrainingSettings
from new_llm.config.terminal import open_console
from new_llm.data.dataset import PreparedData, find_changes, prepare_data
from new_llm.data.recall_facts import SamplePlanter
from new_llm.data.tokenizer import TOKENIZER_FILE, check_vocabulary, fingerprint_tokenizer
from new_llm.evaluation import (
    LanguageModel,
    Subject,
    evaluate_sliding_window,
    evaluate_streaming,
    find_measures,
    measure,
    unigram_perplexity,
)
from new_llm.experiments.config import ExperimentConfig, name_model_folder
from new_llm.experiments.run_folder import (
    DATA_FILE,
    ENVIRONMENT_FILE,
    LENGTHS,
    MODEL_RESULT_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    create_run,
    describe_code,
    describe_command,
    describe_making,
    hold_run,
    list_differences,
    load_run_model,
    read_begun,
    read_json,
    split_spec,
    write_json,
)
from new_llm.models import TransformerLM, create_model
from new_llm.models.cost import check_fits, count_flops, count_memory, count_state
from new_llm.models.factory import match_parameters
from new_llm.models.model_file import load_model
from new_llm.models.tensor_files import find_misfit, fingerprint_tensors, now
from new_llm.processes import start_processes
from new_llm.training import Trainer, TrainingResult
from new_llm.training.checkpoint import BEST_FOLDER, list_checkpoints, remove_checkpoints, share_weights
from new_llm.training.devices import (
    choose_device,
    choose_precision,
    compute_deterministically,
    interrupt_training,
    make_autocast,
    seed_generators,
)
from new_llm.training.log import TrainingProgress, check_trackers, read_metrics
from new_llm.training.preparation import LossFunction

ReportWriter = Callable[[dict[str, Any], Path], None]
"""Writes a run's results so far to a path: `new_llm.report.write_report`."""
Config = TypeVar("Config", bound=TrainingSettings)


def run_experiment(
    model_types: Sequence[str] | None = None,
    exp_config: ExperimentConfig | None = None,
    *,
    resume: bool = False,
    console: Console | None = None,
    write_report: ReportWriter | None = None,
    loss_fn: LossFunction | None = None,
) -> dict[str, Any]:
    """Train and compare models. With several processes, each makes the same call.

    Args:
        resume: continue the run named in the configuration.
        console: where to show progress; None: stderr.
        write_report: writes the report after every model, e.g. `new_llm.report.write_report`; None: no report.
        loss_fn: the training loss of a batch, summed over its predicted tokens; None: the model's own loss.

    Returns:
        The content of `results.json`, and the run folder as `results["folder"]`.

    Raises:
        UserError: bad input, in one line.
        OtherProcessError: another process of the same training has failed.
        TrainingError: a loss was not finite.
        TrainingInterrupted: stopped by a signal; the run can be resumed.
    """
    config = exp_config or ExperimentConfig()
    if model_types is not None:
        config = dataclasses.replace(config, models=tuple(str(kind) for kind in model_types))
    return ExperimentRun(config, resume=resume, console=console, write_report=write_report, loss_fn=loss_fn).execute()


class Run(ABC, Generic[Config]):
    """One run. Subclasses define how its models are built and on which data they are trained."""

    untrained: Sequence[str] = ()
    """Models that are only measured."""

    def __init__(
        self,
        config: Config,
        *,
        resume: bool = False,
        console: Console | None = None,
        write_report: ReportWriter | None = None,
        loss_fn: LossFunction | None = None,
    ) -> None:
        self.config = config
        self.resume = resume
        self.processes = start_processes()
        self.console = (console or open_console(stderr=True)) if self.processes.is_main else Console(quiet=True)
        self.write_report = write_report
        self.loss_fn = loss_fn
        self.training_data: DataConfig = config.data
        """How the training documents are cut into samples."""
        self.origins: dict[str, dict[str, Tensor]] = {}
        """Initial weights by model, loaded but not yet used."""

    # What subclasses define

    @abstractmethod
    def check(self) -> None:
        """Reject bad settings, measures included, with a `UserError`, before anything is read or written."""

    @abstractmethod
    def prepare(self) -> PreparedData:
        """The data for all models; its `info["notes"]` are printed. The main process calls this before the others."""

    @abstractmethod
    def build(self, name: str) -> TransformerLM:
        """A model with fresh weights; torch's generators have just been seeded."""

    def list_options(self, name: str) -> dict[str, Any]:
        """The options that a model was built with, for its result."""
        return {}

    def find_origin(self, name: str) -> dict[str, Tensor] | None:
        """The weights from which a model's training starts; None: those of `build`."""
        return None

    def finish(self, results: dict[str, Any]) -> dict[str, Any]:
        """Complete the results after all models are done; called by the main process only."""
        return results

    # What all runs do

    def execute(self) -> dict[str, Any]:
        """Train and measure all models that are not done yet; see `run_experiment`."""
        train = self.config.train
        with self.processes.guard(), compute_deterministically(train.deterministic):
            if self.resume and self.config.name is None:
                raise UserError("--resume needs --name NAME, the run to continue")
            self.device = self.processes.place(choose_device(self.config.device))
            self.precision = choose_precision(train.precision, self.device)
            self.autocast = make_autocast(self.precision, self.device)
            check_trackers(train.trackers)
            self.processes.slice_rows(train.batch_size)
            self.check()
            with hold_run(self.config, resume=self.resume, processes=self.processes) as (self.config, self.folder):
                return self._execute() | {"folder": str(self.folder)}

    def _execute(self) -> dict[str, Any]:
        on_main = self.processes.run_on_main
        done = on_main(lambda: read_json(self.folder / RESULTS_FILE) if self.resume else None)
        longer = on_main(self._find_longer)
        if done is not None and done["status"] == "complete" and not longer:
            self.console.print(f"{self.folder} is done", highlight=False, markup=False)
            return on_main(lambda: self._write(done))
        self.data = self._share_data()
        if longer:
            on_main(lambda: self._lengthen(*longer))
        elif not self.resume:  # not earlier, so that bad data leaves no folder behind
            on_main(lambda: create_run(self.config, self.folder))
        self.console.print(f"run folder {self.folder}", highlight=False, markup=False)
        for note in self.data.info.get("notes", []):
            self.console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
        results = on_main(self._describe)
        try:
            for name in self.config.models:
                with interrupt_training(self.model_folder(name)):
                    results["models"].append(self._run_model(name))
                    on_main(lambda: self._write(results))
            with interrupt_training(self.folder):
                return on_main(lambda: self._write(self.finish(results | {"status": "complete"})))
        except OSError:
            if (self.folder / self.config.file_name).exists():
                raise
            raise UserError(f"{self.folder}: deleted or renamed while the run used it; its results are lost") from None

    def _find_longer(self) -> tuple[list[str], list[Path]] | None:
        """If a resumed run may train longer than it began with: what changed, and the folders of the models that
        continue; else None.
        """
        if not self.resume:
            return None
        begun = read_begun(self.folder, type(self.config))
        changes = [line for line in list_differences(begun, self.config) if line.split(" ", 1)[0] in LENGTHS]
        if not changes:
            return None
        folders = [self.model_folder(name) for name in self.config.models if name not in self.untrained]
        # More patience is for models that stopped early, more epochs are for the others.
        is_patient = begun.train.patience != self.config.train.patience
        results = {folder: read_json(folder / MODEL_RESULT_FILE) or {} for folder in folders}
        stopped = [folder for folder in folders if results[folder].get("training", {}).get("stopped_early")]
        folders = [folder for folder in folders if (is_patient if folder in stopped else len(changes) > is_patient)]
        for folder in folders:
            if (folder / MODEL_RESULT_FILE).exists() and not list_checkpoints(folder):
                raise UserError(f"{folder}: no checkpoint to continue from (see train.keep_last_checkpoint)")
        return changes, folders

    def _lengthen(self, changes: Sequence[str], folders: Sequence[Path]) -> None:
        """Discard the results of models that are to be trained longer, and record the new settings.

        These are written last: if the run is killed here, it still trains or measures whatever is missing.
        """
        self.console.print(f"continuing with {'; '.join(changes)}", highlight=False, markup=False)
        facts = read_json(self.folder / ENVIRONMENT_FILE) or {}
        entry = {"date": now(), "changes": list(changes), "command": describe_command(), "code": describe_code()}
        write_json(self.folder / ENVIRONMENT_FILE, facts | {"lengthened": [*facts.get("lengthened", []), entry]})
        later = self.folder / EVALUATIONS_FOLDER  # measurements of the best weights so far
        if folders and later.exists():
            later.rename(later.with_name(f"{later.name}-{len(facts.get('lengthened', []))}"))
        for path in (self.folder / RESULTS_FILE, *(folder / MODEL_RESULT_FILE for folder in folders)):
            path.unlink(missing_ok=True)
        create_run(self.config, self.folder)

    def _share_data(self) -> PreparedData:
        """The data, tokenised by one process; the others read its cache or, on other machines, the same texts.

        Rejects data that differ from the main process's, or from those that a resumed run began with.
        """
        data, source = self.processes.run_main_first(self.prepare), self.config.data.source
        with self.processes.agree():
            if self.processes.share(data.info["split_fingerprint"]) != data.info["split_fingerprint"]:
                raise UserError(
                    f"{source}: process {self.processes.rank} reads other data than process 0: their machines need "
                    "the same source and tokenizer, or a shared token cache (data.cache_dir)"
                )
        with self.processes.agree():
            # The file is missing if the process was killed before it could write it.
            begun = read_json(self.folder / DATA_FILE) if self.resume and self.processes.is_main else None
            if begun and (changed := find_changes(begun, data.info)):
                raise UserError(
                    f"{self.folder}: a run can only continue on the data it began with; changed in {source}: "
                    f"{' and '.join(changed)}; restore them, or choose another --name"
                )
        return data

    def _describe(self) -> dict[str, Any]:
        """Write the run's environment, data and tokenizer, and begin its results with them.

        A resumed run keeps its first environment.
        """
        facts = read_json(self.folder / ENVIRONMENT_FILE)
        if facts is None:
            origins = {name: self.find_origin(name) for name in self.config.models}
            fingerprints = {name: fingerprint_tensors(weights) for name, weights in origins.items() if weights}
            facts = describe_making(self.device, self.precision) | {"init_from": fingerprints}
            facts["environment"] |= {"num_processes": self.processes.count, "sharding": self.config.train.sharding}
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

    def _write(self, results: dict[str, Any]) -> dict[str, Any]:
        write_json(self.folder / RESULTS_FILE, results)
        if self.write_report is not None:
            self.write_report(results, self.folder / REPORT_FILE)
        return results

    # One model

    def model_folder(self, name: str) -> Path:
        """A model's folder in the run."""
        return self.folder / name_model_folder(name)

    def create(self, name: str) -> TransformerLM:
        """A model with fresh weights; models start with equal values in the weights that they share."""
        seed_generators(self.config.seed)
        return self.build(name)

    def _run_model(self, name: str) -> dict[str, Any]:
        """Train and measure a model, unless it is done; returns its result, whose file marks it as done."""
        folder, on_main = self.model_folder(name), self.processes.run_on_main
        result = on_main(lambda: read_json(folder / MODEL_RESULT_FILE))
        if result is not None:
            self.console.print(f"{name:<12} is done", highlight=False, markup=False)
        else:
            training = None if name in self.untrained else self._train(name, folder)
            model = self._load_best(name) if training else self.create(name).to(self.device).eval()
            refused: dict[str, str] = {}
            with self.console.status("") as status:
                measured = measure(
                    self._make_subject(model),
                    say=lambda what: status.update(f"{name}: measuring {what}"),
                    refused=refused,
                )
            for what, why in refused.items():
                self.console.print(f"note: {name}: {what} is not measured: {why}", markup=False, soft_wrap=True)
            found = {"evaluation": measured, "not_measured": refused}
            result = on_main(lambda: self._write_result(name, model, training, found))
        keep = int(self.config.train.keep_last_checkpoint)
        on_main(lambda: remove_checkpoints(folder, keep))  # also for a model that is done: the run may have died here
        return result

    def _train(self, name: str, folder: Path) -> TrainingResult:
        config, data, processes = self.config, self.data, self.processes
        progress = TrainingProgress(name, self.console, device=self.device)

        def measure_checkpoint(model: TransformerLM) -> dict[str, Any]:
            refused: dict[str, str] = {}
            found = measure(self._make_subject(model), config.eval.checkpoint_measures, refused=refused)
            for what, why in refused.items():
                progress.note(f"{what} is not measured along the training: {why}")
            return found

        # Sharded weights come from the main process.
        has_weights = processes.is_main or config.train.sharding != "fsdp"
        with nullcontext() if has_weights else torch.device("meta"):
            model = self.create(name)
        if has_weights and not list_checkpoints(folder) and (weights := self.find_origin(name)):
            model.load_state_dict(weights)
        self.origins.pop(name, None)
        trainer = Trainer(
            model,
            data.train,
            self.training_data,
            config.train,
            folder,
            validate=self.measure_validation_loss,
            measure=measure_checkpoint,
            checkpoints=config.eval.checkpoints,
            device=self.device,
            progress=progress,
            seed=config.seed,
            loss_fn=self.loss_fn,
            processes=processes,
            planter=SamplePlanter(data.tokenizer, config.data, config.seed) if config.data.planted_facts else None,
            settings=config.to_dict(),
        )
        try:
            return trainer.run(resume=True)  # a new run has no checkpoint
        finally:
            progress.stop()

    def measure_validation_loss(self, model: LanguageModel) -> float:
        """Loss in nats per validation token, read as in training: streams with memory, or single samples."""
        settings, split = self.config.eval, self.data.validation
        reading = {"batch_size": settings.batch_size, "max_tokens": settings.max_tokens}
        shared = {"autocast": self.autocast, "processes": self.processes}
        if self.config.data.order == "stream":
            return evaluate_streaming(model, split, **reading, **shared).loss
        length = self.config.data.seq_length
        return evaluate_sliding_window(model, split, context=length, stride=length, **reading, **shared).loss

    def _make_subject(self, model: TransformerLM) -> Subject:
        return Subject(
            model=model,
            tokenizer=self.data.tokenizer,
            split=self.data.validation,
            settings=self.config.eval,
            seq_length=self.config.data.seq_length,
            seed=self.config.seed,
            autocast=self.autocast,
            processes=self.processes,
            facts=self.data.info,
        )

    def _load_best(self, name: str) -> TransformerLM:
        with self.processes.agree():
            is_main = self.processes.is_main
            model = load_model(self.model_folder(name) / BEST_FOLDER) if is_main else self.create(name)
        if self.processes.count > 1:
            share_weights(model.state_dict() if is_main else {}, model, self.processes)
        return model.to(self.device).eval()

    def _write_result(
        self, name: str, model: TransformerLM, training: TrainingResult | None, found: dict[str, Any]
    ) -> dict[str, Any]:
        folder = self.model_folder(name)
        result: dict[str, Any] = {
            "model_type": name,
            "options": self.list_options(name),
            "context_tokens": model.segment_length,
            "num_parameters": model.num_parameters(),
            "memory_info": model.memory_info(),
            "cost": {
                "memory_numbers": count_memory(model),
                "state_numbers": count_state(model),
                "flops_per_token": count_flops(model, self.config.data.seq_length),
            },
            "gates": model.gate_values(),
            **found,
        }
        if training is not None:
            lines = read_metrics(folder)
            result["training"] = {
                **dataclasses.asdict(training),
                "steps_log": [line for line in lines if line["event"] == "train"],
                "epochs_log": [line for line in lines if line["event"] == "epoch"],
            }
        write_json(folder / MODEL_RESULT_FILE, result)
        return result


class ExperimentRun(Run[ExperimentConfig]):
    """A run of the model types that an experiment names."""

    def check(self) -> None:
        """See `check_experiment`."""
        check_experiment(self.config)

    def prepare(self) -> PreparedData:
        """The experiment's source, split and tokenised.

        A resumed run uses its own copy of a given tokenizer, because the original may be out of reach by now. A
        tokenizer that the run trained is trained again, so that changed text is noticed.
        """
        begun = (read_json(self.folder / DATA_FILE) if self.resume else None) or {}
        own = self.folder / TOKENIZER_FILE
        if begun.get("tokenizer", {}).get("is_trained", True) or not own.is_file():
            self.data = prepare_data(self.config.data)
            if (rows := self.config.model.vocab_size) is not None:
                check_vocabulary(
                    self.data.tokenizer, rows, "model.vocab_size: the tokenizer has ids up to {}; the model"
                )
            for name in self.config.models if not self.resume else ():
                self.find_origin(name)  # rejects weights that do not fit
            return self.data
        data = prepare_data(dataclasses.replace(self.config.data, tokenizer=str(own)))
        data.info["tokenizer"]["name"] = begun["tokenizer"]["name"]
        return data

    def find_origin(self, name: str) -> dict[str, Tensor] | None:
        """The weights of `init_from`, kept until the model's training has begun."""
        if self.config.init_from is None or name in self.origins:
            return self.origins.get(name)
        run, model_name = split_spec(self.config.init_from)
        own = Path(run) / name_model_folder(name) / BEST_FOLDER
        other, tokenizer = load_run_model(Path(run), model_name or (name if own.is_dir() else None))
        if fingerprint_tokenizer(tokenizer) != fingerprint_tokenizer(self.data.tokenizer):
            raise UserError(
                f"init_from: {self.config.init_from}: its tokenizer differs from this run's; pass its tokenizer.json "
                "as --data.tokenizer"
            )
        with torch.device("meta"):
            built = build_model(self.config, name, self.data.vocab_size)
        weights = self.origins[name] = other.state_dict()
        if misfit := find_misfit(weights, built.state_dict()):
            raise UserError(f"init_from: {self.config.init_from}: its weights do not fit {name}: {misfit}")
        return weights

    def build(self, name: str) -> TransformerLM:
        """A model of this type in the experiment's shape."""
        return build_model(self.config, name, self.data.vocab_size)

    def list_options(self, name: str) -> dict[str, Any]:
        """The options of the model type."""
        return self.config.model.options_of(name)


def check_experiment(config: ExperimentConfig) -> None:
    """Reject unknown measures, options that no model has, and models that can't be built."""
    find_measures([*config.eval.measures, *config.eval.checkpoint_measures])
    config.model.check_taken(config.models)
    for name in config.models:
        try:
            with torch.device("meta"):  # allocates nothing, draws no random numbers
                model = build_model(config, name, config.model.vocab_size or 1)
            check_fits(model.layer_list, model.vocab_size)
        except ValueError as error:
            raise UserError(f"model: {name} can't be built: {error}") from None


def build_model(config: ExperimentConfig, name: str, vocab_size: int) -> TransformerLM:
    """Build one of an experiment's models with fresh weights, drawn from torch's global generator."""
    options = config.model.options_of(name)
    shape = config.model.shape(vocab_size)
    if config.matches_parameters:
        shape = match_parameters(name, shape, **options)
    return create_model(name, shape, segment_length=config.context_tokens(name), **options)
