"""Run a study: train its variants, measure each, and write the comparison. Finished runs are not repeated."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from new_llm.config import UserError
from new_llm.config.evaluation import (
    AllLongDocumentsConfig,
    CacheMeasureConfig,
    EvalConfig,
    RecallConfig,
    SubjectConfig,
    TextConfig,
)
from new_llm.config.files import write_text_atomically
from new_llm.config.loading import read_settings
from new_llm.config.terminal import open_console
from new_llm.evaluation import load_own_measures, measure
from new_llm.experiments.config import STUDY_FILE, StudyConfig, name_model_folder
from new_llm.experiments.evaluation import describe_evaluation, load_baselines, plain_settings, prepare_subject
from new_llm.experiments.run_folder import CONFIG_FILE, RESULTS_FILE, describe_code, list_refused, read_json, write_json
from new_llm.experiments.runner import ReportWriter, check_experiment, run_experiment
from new_llm.experiments.study_jobs import Cell, StudyProgress, open_pool
from new_llm.experiments.study_table import describe_study, render_csv, render_markdown
from new_llm.experiments.subject import load_any_model
from new_llm.training.log import read_metrics

SUMMARY_FILE = "study.json"
TABLE_FILE = "table.md"
FIGURES_FILE = "figures.csv"
MEASURED_FOLDER = "measured"


StudyWriter = Callable[..., None]
"""Writes a study's page into a folder, from its summary and runs: `new_llm.report.study_page.write_study_page`."""


def run_study(
    study: StudyConfig,
    *,
    only: Sequence[str] = (),
    jobs: int | None = None,
    console: Console | None = None,
    write_report: ReportWriter | None = None,
    write_page: StudyWriter | None = None,
) -> dict[str, Any]:
    """Run what is missing of a study, and update its summary whenever a run ends.

    Args:
        study: the study; with a `cluster`, its runs are jobs there.
        only: run only these variants and the baselines they need; empty: all.
        jobs: number of parallel runs, each in its own process with an equal share of the cores; None: one at a time in
            this process, or on a cluster all at once.
        console: where to show progress; None: stderr.
        write_report: writes each run's report; None: no reports.
        write_page: writes the study's page into its folder; None: no page.

    Returns:
        The summary, the content of `study.json`.

    Raises:
        UserError: bad input, the folder contains something else, or runs failed.
        TrainingInterrupted: stopped by a signal; run the study again to continue.
    """
    console = console or open_console(stderr=True)
    cells = plan_cells(study, only)
    work = partial(run_cell, study, write_report=write_report)
    trained = {cell for cell in cells if read_results(study, cell)}
    configs = {variant: study.configure(variant, study.seeds[0]) for variant in study.variants}
    for variant in dict.fromkeys(cell.variant for cell in cells if cell not in trained):
        try:
            check_experiment(configs[variant])  # now, not when its turn comes
        except UserError as error:
            raise UserError(f"{study.name}: variant {variant}: {error}") from error
    _claim_folder(study)
    pool = open_pool(work, study.folder, jobs, study.cluster)
    own = dict.fromkeys(name for config in configs.values() for name in config.eval.measures)
    for line in load_own_measures(own):  # runs that are done can be read without their own measures
        console.print(line, markup=False, highlight=False)
    waiting = [cell for cell in cells if cell not in trained or find_missing(study, cell)]
    started = dict[Cell, bool]()
    """The cells that were started, and whether they could be measured right after training."""
    has_news = False
    shown = StudyProgress(study.folder, pool.running, len(cells), len(waiting), console)
    with closing(pool), shown as progress:
        while True:
            for cell in list(waiting):
                can_measure = trained.issuperset(list_baselines(study, cell))
                if pool.has_room and (can_measure or (cell not in started and cell not in trained)):
                    waiting.remove(cell)
                    started[cell] = can_measure
                    progress.begin(cell)
                    pool.start(cell)
            if not pool.running:
                break
            if has_news:  # after the next runs were started
                try:
                    summarize_study(study, write_page, is_done=False)
                except Exception as error:  # the runs do not depend on it
                    console.print(f"the summary failed: {error!r}", markup=False, highlight=False)
            has_news = False
            for cell in pool.wait():
                trained.add(cell)
                if not started[cell] and find_missing(study, cell):
                    waiting.append(cell)  # to be measured against its baselines
                    continue
                progress.end(cell)
                has_news = True
    summary = summarize_study(study, write_page)
    for line in list_unmeasured(study, cells):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if pool.failures:
        raise UserError("; ".join(pool.failures))
    return summary


def plan_cells(study: StudyConfig, only: Sequence[str] = ()) -> list[Cell]:
    """Every variant, or `only` these, with every seed. All variants of one seed come before the next seed, so that an
    interrupted study still compares all variants; baselines come first, because the others are measured against them.
    """
    for name in only:
        if name not in study.variants:
            raise UserError(f"--only: {name!r} is not a variant of {study.name}; it has {', '.join(study.variants)}")
    wanted = dict.fromkeys([*study.all_baselines, *(only or study.variants)])
    return [Cell(variant, seed) for seed in study.seeds for variant in wanted]


def list_baselines(study: StudyConfig, cell: Cell) -> list[Cell]:
    """The baselines of a model on long documents: those with its seed."""
    names = study.all_baselines
    return [] if cell.variant in names else [Cell(name, cell.seed) for name in names]


def run_cell(study: StudyConfig, cell: Cell, *, write_report: ReportWriter | None = None) -> None:
    """Train a cell, or continue its training, unless it is done; then measure it if its baselines are trained."""
    console = open_console(width=120)
    if read_results(study, cell) is None:
        config = study.configure(cell.variant, cell.seed)
        begun = (study.folder / cell.name / config.file_name).exists()
        run_experiment(exp_config=config, resume=begun, console=console, write_report=write_report)
    if all(read_results(study, other) for other in list_baselines(study, cell)):
        measure_cell(study, cell, console)


def read_results(study: StudyConfig, cell: Cell) -> dict[str, Any] | None:
    """The results of a cell's run; None: it is not complete."""
    results = read_json(study.folder / cell.name / RESULTS_FILE)
    return results if results and results.get("status") == "complete" else None


def list_unmeasured(study: StudyConfig, cells: Sequence[Cell]) -> list[str]:
    """A line for each measure that variants requested and that failed, with the reason and the runs."""
    found = defaultdict[tuple[str, str], list[str]](list)
    for cell in cells:
        if results := read_results(study, cell):
            for item in list_refused(results):
                found[item].append(cell.name)
    return [f"{measure} is not measured: {why} ({', '.join(runs)})" for (measure, why), runs in found.items()]


# Measurements of trained models, in addition to those of their runs


class Measurement(NamedTuple):
    """A measure, the source of its text (None: the validation split), and the settings that its record must have."""

    kind: str
    source: str | None
    settings: dict[str, Any]


def list_measurements(study: StudyConfig, variant: str) -> dict[str, Measurement]:
    """A study's measurements of a variant, by name."""
    sections: dict[str, dict[str, Any]] = {}
    if study.long_documents is not None and variant not in study.all_baselines:
        others = {"baselines": study.baselines, "window_baselines": study.window_baselines}
        sections["long"] = plain_settings(study.long_documents) | others
    if study.caches is not None:
        sections["caches"] = plain_settings(study.caches, study.long_documents or AllLongDocumentsConfig())
    found = {
        f"{kind}-{text}": Measurement(kind, source, settings)
        for kind, settings in sections.items()
        for text, source in study.long_texts.items()
    }
    if study.recall is not None and variant not in study.window_baselines:
        found["recall"] = Measurement("recall", None, plain_settings(study.recall))
    return found


def measured_path(study: StudyConfig, cell: Cell, what: str) -> Path:
    """The file of one measurement of one cell."""
    return study.folder / MEASURED_FOLDER / f"{cell.name}-{what}.json"


def read_measured(study: StudyConfig, cell: Cell) -> dict[str, dict[str, Any]]:
    """A cell's records by name, without those made with other settings.

    Their `result` is None if the measure does not apply to the text.
    """
    wanted = list_measurements(study, cell.variant)
    records = {what: read_json(measured_path(study, cell, what)) for what in wanted}
    return {
        what: record
        for what, record in records.items()
        if record and record.get("settings") == json.loads(json.dumps(wanted[what].settings))
    }


def find_missing(study: StudyConfig, cell: Cell) -> dict[str, Measurement]:
    """The measurements of a cell that are still to be made."""
    found = read_measured(study, cell)
    return {what: one for what, one in list_measurements(study, cell.variant).items() if what not in found}


def measure_cell(study: StudyConfig, cell: Cell, console: Console) -> None:
    """Make a trained cell's missing measurements."""

    def find_run(variant: str) -> str:
        return str(study.folder / Cell(variant, cell.seed).name)

    load = cache(lambda: load_any_model(SubjectConfig(run=find_run(cell.variant), device=device)))
    device = study.configure(cell.variant, cell.seed).device
    long = study.long_documents or AllLongDocumentsConfig()
    settings = EvalConfig(
        long_documents=long,
        caches=study.caches or CacheMeasureConfig(),
        recall=study.recall or RecallConfig(),
        max_tokens=None,
    )
    others, windows = (tuple(map(find_run, names)) for names in (study.baselines, study.window_baselines))
    specs = dataclasses.replace(long, baselines=others, window_baselines=windows)
    names = study.all_baselines
    load_others = cache(lambda: load_baselines(load(), SubjectConfig(device=device), specs, None, names))
    for what, one in find_missing(study, cell).items():
        console.print(f"{cell.name}: measuring {what}", highlight=False)
        baselines = load_others() if one.kind == "long" else []
        subject, text = prepare_subject(load(), settings, SubjectConfig(), TextConfig(source=one.source), baselines)
        result = measure(subject, [one.kind]).get(one.kind)
        path = measured_path(study, cell, what)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, describe_evaluation(one.kind, load(), text, one.settings, result))


# The comparison


def gather_runs(study: StudyConfig) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
    """By variant, the finished runs with their measurements; and by variant and seed, the measurements during training.

    The latter are by the share of training that was asked for, and include unfinished runs; for finished ones, they end
    with the final measurements at a share of 1, also where patience stopped them early.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in study.variants}
    logs: dict[str, list[dict[str, Any]]] = {name: [] for name in study.variants}
    for cell in plan_cells(study):
        config = study.configure(cell.variant, cell.seed)
        name, shares = name_model_folder(config.models[0]), config.eval.checkpoints
        log = {
            max((share for share in shares if share <= line["share"]), default=line["share"]): line
            for line in read_metrics(study.folder / cell.name / name)
            if line["event"] == "checkpoint"
        }
        if results := read_results(study, cell):
            model, measured = results["models"][0], read_measured(study, cell)
            run = {"seed": cell.seed, "model": model, "code": results["code"], "measured": measured}
            runs[cell.variant].append(run)
            end = {"share": 1.0, "tokens": model["training"]["tokens"], "evaluation": model["evaluation"]}
            log |= {1.0: end} if shares else {}
        if log:
            logs[cell.variant].append({"seed": cell.seed, "log": log})
    done = {name: found for name, found in runs.items() if found}
    return done, {name: found for name, found in logs.items() if found}


def summarize_study(
    study: StudyConfig, write_page: StudyWriter | None = None, *, is_done: bool = True
) -> dict[str, Any]:
    """Compare the finished runs, and write `study.json`, `table.md`, `figures.csv` and the page. Charts are written to
    separate files only once the study is done."""
    found, checkpoints = gather_runs(study)
    summary = describe_study(study, found, checkpoints) | {"code": describe_code()}
    write_json(study.folder / SUMMARY_FILE, summary)
    write_text_atomically(study.folder / TABLE_FILE, render_markdown(summary))
    write_text_atomically(study.folder / FIGURES_FILE, render_csv(summary))
    if write_page:
        write_page(summary, found, study.folder, with_figures=is_done)
    return summary


def _claim_folder(study: StudyConfig) -> None:
    """Create the study's folder, or check that it contains the same study; variants and seeds may have been added."""
    path = study.folder / STUDY_FILE
    if (study.folder / CONFIG_FILE).exists():
        raise UserError(f"{study.folder}: is a run, not a study; choose another name, or another --runs-dir")
    if path.exists():
        begun = read_settings(path, StudyConfig)
        moved = dataclasses.replace(study, runs_dir=begun.runs_dir)  # a study's folder may be moved
        for variant in begun.variants:
            if variant in study.variants and begun.configure(variant, 0) != moved.configure(variant, 0):
                raise UserError(
                    f"{study.folder}: variant {variant} began with other settings; choose another name for the study, "
                    "or another --runs-dir"
                )
    study.folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, study.to_yaml())
