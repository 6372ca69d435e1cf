"""Runs a study: trains its variants, measures each, and writes the comparison. Resumable run by run.

With `jobs` several trainings run at once, each in a process of its own with its share of the cores.
"""

import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console

from new_llm.config import UserError
from new_llm.config.evaluation import (
    CacheMeasureConfig,
    EvalConfig,
    LongDocumentsConfig,
    RecallConfig,
    SubjectConfig,
    TextConfig,
)
from new_llm.config.files import name_refusals, write_text_atomically
from new_llm.config.loading import read_settings
from new_llm.config.terminal import make_line, open_console
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation import Baseline, Subject, load_own_measures, measure
from new_llm.experiments.config import StudyConfig
from new_llm.experiments.evaluation import (
    check_tokenizer,
    describe_evaluation,
    load_evaluation_text,
    plain_settings,
)
from new_llm.experiments.run_folder import RESULTS_FILE, describe_code, read_json, write_json
from new_llm.experiments.runner import ReportWriter, run_experiment
from new_llm.experiments.study_table import describe_study, render_markdown
from new_llm.experiments.subject import LoadedModel, load_any_model
from new_llm.training import TrainingInterrupted

STUDY_FILE = "study.yaml"
SUMMARY_FILE = "study.json"
TABLE_FILE = "table.md"
MEASURED_FOLDER = "measured"
LOGS_FOLDER = "logs"
INTERRUPTED, BAD_INPUT = 130, 2
"""Exit codes of a job's process, those of the command."""

StudyWriter = Callable[[dict[str, Any], dict[str, list[dict[str, Any]]], Path], None]
"""Writes the page of a study's summary and its runs into a folder: `new_llm.report.study_page.write_study_page`."""


@dataclass(frozen=True)
class Cell:
    """One training of a study."""

    variant: str
    seed: int

    @property
    def name(self) -> str:
        """The run's name."""
        return f"{self.variant}-s{self.seed}"


def run_study(
    study: StudyConfig,
    *,
    only: Sequence[str] = (),
    jobs: int = 1,
    console: Console | None = None,
    write_report: ReportWriter | None = None,
    write_page: StudyWriter | None = None,
) -> dict[str, Any]:
    """Run what is missing of a study, seed by seed, and write its summary after every seed.

    Args:
        study: the study.
        only: variants to run now, and the baselines they need; none: all.
        jobs: runs at once, each in a process of its own with its share of the cores.
        console: where to show progress; None: the standard error.
        write_report: writes each run's page; None: none is written.
        write_page: writes the study's page into its folder.

    Returns:
        The summary, as `study.json` holds it.

    Raises:
        UserError: bad input, or the folder holds a study with other settings.
        TrainingInterrupted: a signal asked to stop; run the study again to continue.
    """
    console = console or open_console(stderr=True)
    _claim_folder(study)
    cells = plan_cells(study, only)
    for variant in study.variants:  # what has been trained before can be read without its measures
        for line in load_own_measures(study.configure(variant, study.seeds[0]).eval.measures):
            console.print(line, markup=False, highlight=False)
    summary: dict[str, Any] = {}
    for seed in study.seeds:
        of_seed = [cell for cell in cells if cell.seed == seed]
        train = partial(train_cell, write_report=write_report)
        for work in (train, measure_cell):  # a measurement reads the seed's other models, too
            if jobs > 1:
                run_in_processes(work, study, of_seed, jobs, console)
                continue
            for cell in of_seed:
                work(study, cell, console)
        try:
            summary = summarize_study(study)
            if write_page:
                write_page(summary, gather_runs(study), study.folder)
        except Exception as error:
            if seed == study.seeds[-1]:
                raise
            # The trainings of the other seeds do not depend on a table.
            console.print(f"the summary after seed {seed} failed: {error!r}", markup=False, highlight=False)
    return summary


def plan_cells(study: StudyConfig, only: Sequence[str] = ()) -> list[Cell]:
    """Every variant, or `only` some, with every seed; seed by seed, so that a stopped study compares all."""
    for name in only:
        if name not in study.variants:
            raise UserError(f"--only: {name!r} is no variant of {study.name}; there are {', '.join(study.variants)}")
    wanted = set(only or study.variants)
    if only:
        wanted |= {*study.baselines, *study.window_baselines}
    return [Cell(variant, seed) for seed in study.seeds for variant in study.variants if variant in wanted]


def train_cell(study: StudyConfig, cell: Cell, console: Console, *, write_report: ReportWriter | None = None) -> None:
    """Train and measure one variant as an experiment, or continue it; does nothing if it is done."""
    if is_trained(study, cell):
        return
    config = study.configure(cell.variant, cell.seed)
    console.print(cell.name, highlight=False)
    begun = (study.folder / cell.name / config.file_name).exists()
    run_experiment(exp_config=config, resume=begun, console=console, write_report=write_report)


def is_trained(study: StudyConfig, cell: Cell) -> bool:
    """Whether a training is complete."""
    return (read_json(study.folder / cell.name / RESULTS_FILE) or {}).get("status") == "complete"


def measure_cell(study: StudyConfig, cell: Cell, console: Console) -> None:
    """Measure one trained model as the study asks, unless there is a record with these settings."""
    for what, make_record in _plan_measurements(study, cell):
        if read_measured(study, cell, what):
            continue
        path = measured_path(study, cell, what)
        with console.status(f"{cell.variant}, seed {cell.seed}: {what}"):
            record = make_record()
        if record is None:  # it does not apply to this text
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)


def measured_path(study: StudyConfig, cell: Cell, what: str) -> Path:
    """Where one measurement of one training is kept."""
    return study.folder / MEASURED_FOLDER / f"{cell.name}-{what}.json"


def list_measurements(study: StudyConfig) -> dict[str, dict[str, Any]]:
    """What a study measures, with the settings that its records must have."""
    wanted: dict[str, dict[str, Any]] = {}
    if study.long_documents is not None:
        others = {"baselines": study.baselines, "window_baselines": study.window_baselines}
        settings = plain_settings(study.long_documents) | others
        wanted |= {f"long-{text}": settings for text in study.long_texts}
    if study.caches is not None:
        settings = plain_settings(study.caches, study.long_documents or LongDocumentsConfig())
        wanted |= {f"caches-{text}": settings for text in study.long_texts}
    if study.recall is not None:
        wanted["recall"] = plain_settings(study.recall)
    return wanted


def read_measured(study: StudyConfig, cell: Cell, what: str) -> dict[str, Any] | None:
    """The record of one measurement; None: there is none, or it was made with other settings."""
    record = read_json(measured_path(study, cell, what))
    is_wanted = record and record.get("settings") == json.loads(json.dumps(list_measurements(study)[what]))
    return record if is_wanted else None


def _plan_measurements(study: StudyConfig, cell: Cell) -> Iterator[tuple[str, Callable[[], dict[str, Any] | None]]]:
    """What to measure of a training, each with the function that makes its record."""
    load = cache(lambda: _load(study, cell))
    wanted = list_measurements(study)
    is_baseline = cell.variant in (*study.baselines, *study.window_baselines)
    if (config := study.long_documents) is not None and not is_baseline:
        load_baselines = cache(lambda: _load_baselines(study, cell, load()))
        for text, source in study.long_texts.items():
            what = f"long-{text}"
            yield (
                what,
                lambda source=source, settings=wanted[what]: _measure_long(
                    load(), load_baselines(), source, config, settings
                ),
            )
    if (caches := study.caches) is not None:
        for text, source in study.long_texts.items():
            what = f"caches-{text}"
            yield (
                what,
                lambda source=source, settings=wanted[what]: _measure_caches(
                    load(), source, caches, study.long_documents, settings
                ),
            )
    if (recall := study.recall) is not None and cell.variant not in study.window_baselines:
        yield "recall", lambda: _measure_recall(load(), recall, wanted["recall"])


def _load(study: StudyConfig, cell: Cell) -> LoadedModel:
    config = study.configure(cell.variant, cell.seed)
    return load_any_model(SubjectConfig(run=str(study.folder / cell.name), device=config.device))


def _load_baselines(study: StudyConfig, cell: Cell, subject: LoadedModel) -> list[Baseline]:
    baselines: list[Baseline] = []
    for name in (*study.baselines, *study.window_baselines):
        other = _load(study, Cell(name, cell.seed))
        check_tokenizer(other, subject, f"{study.name}: {name}", cell.variant)
        stride = None
        if name in study.window_baselines:
            stride = study.choose_window_stride(name, other.model.segment_length)
        baselines.append(Baseline(name, other.model, stride, other.device, other.autocast, other.facts))
    return baselines


def _measure_long(
    subject: LoadedModel,
    baselines: list[Baseline],
    source: str | None,
    config: LongDocumentsConfig,
    settings: dict[str, Any],
) -> dict[str, Any]:
    text = load_evaluation_text(subject, TextConfig(source=source))
    result = _measure(subject, "long", text.split, EvalConfig(max_tokens=None, long_documents=config), baselines)
    return describe_evaluation("long", subject, text.info, settings, result["long"])


def _measure_caches(
    subject: LoadedModel,
    source: str | None,
    config: CacheMeasureConfig,
    long_documents: LongDocumentsConfig | None,
    settings: dict[str, Any],
) -> dict[str, Any] | None:
    text = load_evaluation_text(subject, TextConfig(source=source))
    documents = long_documents or LongDocumentsConfig()
    result = _measure(
        subject, "caches", text.split, EvalConfig(max_tokens=None, caches=config, long_documents=documents)
    )
    return describe_evaluation("caches", subject, text.info, settings, result["caches"]) if result else None


def _measure_recall(subject: LoadedModel, config: RecallConfig, settings: dict[str, Any]) -> dict[str, Any]:
    text = load_evaluation_text(subject, TextConfig())
    result = _measure(subject, "recall", text.split, EvalConfig(recall=config))
    return describe_evaluation("recall", subject, text.info, settings, result["recall"])


def _measure(
    subject: LoadedModel, name: str, split: TokenSplit, settings: EvalConfig, baselines: Sequence[Baseline] = ()
) -> dict[str, dict[str, Any]]:
    place: dict[str, Any] = {"device": subject.device, "autocast": subject.autocast, "baselines": baselines}
    return measure(Subject(subject.model, subject.tokenizer, split, settings, **place), [name])


def gather_runs(study: StudyConfig) -> dict[str, list[dict[str, Any]]]:
    """By variant, all trainings that are done by now, with what was measured of them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in plan_cells(study):
        results = read_json(study.folder / cell.name / RESULTS_FILE)
        if not results or results.get("status") != "complete":
            continue
        measured = {what: read_measured(study, cell, what) for what in list_measurements(study)}
        found.setdefault(cell.variant, []).append(
            {"seed": cell.seed, "model": results["models"][0], "code": results["code"], "measured": measured}
        )
    return found


def summarize_study(study: StudyConfig) -> dict[str, Any]:
    """Compare all that is done by now, and write `study.json` and `table.md`."""
    summary = describe_study(study, gather_runs(study)) | {"code": describe_code()}
    write_json(study.folder / SUMMARY_FILE, summary)
    write_text_atomically(study.folder / TABLE_FILE, render_markdown(summary))
    return summary


def _claim_folder(study: StudyConfig) -> None:
    """Create the study's folder, or check that it holds the same study; variants and seeds may have been added."""
    path = study.folder / STUDY_FILE
    if path.exists():
        begun = read_settings(path, StudyConfig)
        moved = dataclasses.replace(study, runs_dir=begun.runs_dir)  # a study's folder may be moved
        for variant in begun.variants:
            if variant in study.variants and begun.configure(variant, 0) != moved.configure(variant, 0):
                raise UserError(
                    f"{study.folder}: variant {variant} was begun with other settings; choose another name for the "
                    "study, or another --runs-dir"
                )
    study.folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, study.to_yaml())


# Several trainings at once


def run_in_processes(
    work: Callable[..., None], study: StudyConfig, cells: Sequence[Cell], jobs: int, console: Console
) -> None:
    """Call work(study, cell, console) for every cell, `jobs` at once, each in a process that writes to a log file.

    If one fails, the others are asked to stop; trainings write a checkpoint. `work` is a function of a module.

    Raises:
        UserError: one of them failed: its name, its last line, and its log.
        TrainingInterrupted: one of them was asked to stop.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(cells)
    running: dict[int, tuple[Cell, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.popleft()
                process = context.Process(target=_work, args=(work, study, cell, _log_file(study, cell)))
                with share_cores(jobs):
                    process.start()
                running[process.sentinel] = cell, process
            for sentinel in wait(list(running)):
                cell, process = running.pop(int(sentinel))  # pyright: ignore[reportArgumentType]
                process.join()
                _check_end(process.exitcode, cell, _log_file(study, cell))
                console.print(f"{cell.name}: done, {len(waiting)} to begin", highlight=False)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


@contextmanager
def share_cores(jobs: int) -> Iterator[None]:
    """Processes started inside the block use 1/jobs of the cores each; a user's OMP_NUM_THREADS wins."""
    name = "OMP_NUM_THREADS"
    given = os.environ.get(name)
    os.environ[name] = given or str(max(1, (os.cpu_count() or 1) // jobs))
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


def _log_file(study: StudyConfig, cell: Cell) -> Path:
    return study.folder / LOGS_FOLDER / f"{cell.name}.log"


def _work(work: Callable[..., None], study: StudyConfig, cell: Cell, log: Path) -> None:
    """The body of a job's process."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # training itself catches both
    log.parent.mkdir(parents=True, exist_ok=True)
    with name_refusals(log), log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            work(study, cell, open_console(file=file, width=120))
        except (TrainingInterrupted, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        except UserError as error:
            file.write(f"{make_line(error)}\n")
            sys.exit(BAD_INPUT)
        except Exception:
            traceback.print_exc(file=file)
            sys.exit(1)


def _check_end(code: int | None, cell: Cell, log: Path) -> None:
    if code == 0:
        return
    if code == INTERRUPTED:
        raise TrainingInterrupted(f"{cell.name}: interrupted", log.parent.parent / cell.name)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    last = lines[-1].strip() if lines else f"its process ended with {code}"
    raise UserError(f"{cell.name}: {last}; more is in {log}")
