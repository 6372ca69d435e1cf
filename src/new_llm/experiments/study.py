"""Runs a study: trains its variants one by one, measures each, and writes the comparison. Resumable run by run."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from new_llm.config import UserError
from new_llm.config.atomic import write_text_atomically
from new_llm.config.measurement import SubjectConfig, TextConfig
from new_llm.config.study import StudyConfig
from new_llm.evaluation.long_documents import Baseline, evaluate_long_documents
from new_llm.evaluation.recall import evaluate_recall
from new_llm.experiments.evaluation_record import describe_evaluation, plain_settings
from new_llm.experiments.evaluation_text import load_evaluation_text
from new_llm.experiments.record import RESULTS_FILE, describe_code, read_json, write_json
from new_llm.experiments.runner import run_experiment
from new_llm.experiments.study_table import describe_study, render_markdown
from new_llm.experiments.subject import Subject, load_subject

STUDY_FILE = "study.yaml"
SUMMARY_FILE = "study.json"
TABLE_FILE = "table.md"
MEASURED_FOLDER = "measured"
VALIDATION = "validation"


@dataclass(frozen=True)
class Cell:
    """One training of a study."""

    variant: str
    seed: int


def run_study(
    study: StudyConfig,
    *,
    only: Sequence[str] = (),
    console: Console | None = None,
    write_figures: Callable[[dict[str, Any], Path], None] | None = None,
) -> dict[str, Any]:
    """Do what of a study is not done yet, and write its summary after every run.

    Args:
        study: the study.
        only: variants to run now, and the baselines they need; none: all.
        console: where to show progress; None: the standard error.
        write_figures: draws the summary into the study's folder.

    Returns:
        The summary, as `study.json` holds it.

    Raises:
        UserError: bad input, or a folder in which a study with other settings stands.
        TrainingInterrupted: a signal asked to stop; run the study again to go on.
    """
    console = console or Console(stderr=True)
    _claim_folder(study)
    cells = plan_cells(study, only)
    for number, cell in enumerate(cells, start=1):
        console.print(f"[{number}/{len(cells)}] {cell.variant}, seed {cell.seed}", highlight=False)
        train_cell(study, cell, console)
    for cell in cells:
        measure_cell(study, cell, console)
    summary = summarize_study(study)
    if write_figures:
        write_figures(summary, study.folder)
    return summary


def plan_cells(study: StudyConfig, only: Sequence[str] = ()) -> list[Cell]:
    """Every variant with every seed; seed by seed, so that a study that is stopped has compared all variants.

    Raises:
        UserError: `only` names no variant.
    """
    for name in only:
        if name not in study.variants:
            raise UserError(f"--only: {name!r} is no variant of {study.name}; there are {', '.join(study.variants)}")
    wanted = set(only or study.variants)
    if only:
        wanted |= {*study.baselines, *study.window_baselines}
    return [Cell(variant, seed) for seed in study.seeds for variant in study.variants if variant in wanted]


def train_cell(study: StudyConfig, cell: Cell, console: Console) -> None:
    """Train and measure one variant as an experiment, or go on with it; nothing where it is done."""
    config = study.configure(cell.variant, cell.seed)
    folder = study.folder / str(config.name)
    if (read_json(folder / RESULTS_FILE) or {}).get("status") == "complete":
        return
    run_experiment(exp_config=config, resume=folder.exists(), console=console)


def measure_cell(study: StudyConfig, cell: Cell, console: Console) -> None:
    """Measure one trained model on long documents and recall, what of it is not measured yet."""
    for what, measure in _plan_measurements(study, cell):
        path = measured_path(study, cell, what)
        if path.exists():
            continue
        with console.status(f"{cell.variant}, seed {cell.seed}: {what}"):
            record = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)


def measured_path(study: StudyConfig, cell: Cell, what: str) -> Path:
    """Where one measurement of one training is kept."""
    return study.folder / MEASURED_FOLDER / f"{cell.variant}-s{cell.seed}-{what}.json"


def _plan_measurements(study: StudyConfig, cell: Cell) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    is_baseline = cell.variant in (*study.baselines, *study.window_baselines)
    if study.long_documents is not None and not is_baseline:
        for what, source in name_texts(study).items():
            yield what, lambda source=source: _measure_long(study, cell, source)
    if study.recall is not None and cell.variant not in study.window_baselines:
        yield "recall", lambda: _measure_recall(study, cell)


def name_texts(study: StudyConfig) -> dict[str, str | None]:
    """A short name for each text of long documents; None is the validation split."""
    return {f"long-{VALIDATION}": None} | {f"long-{Path(source).stem}": source for source in study.texts}


def _measure_long(study: StudyConfig, cell: Cell, source: str | None) -> dict[str, Any]:
    settings = study.long_documents
    assert settings is not None
    subject = _load(study, cell)
    text = load_evaluation_text(subject, TextConfig(source=source))
    baselines: list[Baseline] = []
    for name in (*study.baselines, *study.window_baselines):
        other = _load(study, Cell(name, cell.seed))
        if other.facts["tokenizer_fingerprint"] != subject.facts["tokenizer_fingerprint"]:
            raise UserError(f"{study.name}: {name} and {cell.variant} have different tokenizers: nothing to compare")
        stride = None
        if name in study.window_baselines:
            stride = settings.window_stride or max(1, other.model.segment_length // 2)
        baselines.append(Baseline(name, other.model, stride, other.device, other.autocast))
    result = evaluate_long_documents(
        subject.model,
        text.split,
        min_tokens=settings.min_tokens,
        edges=settings.edges,
        batch_size=settings.batch_size,
        max_documents=settings.max_documents,
        max_tokens_per_document=settings.max_tokens_per_document,
        baselines=baselines,
        segments_per_call=settings.segments_per_call,
        num_resamples=settings.num_resamples,
        confidence=settings.confidence,
        seed=settings.seed,
        device=subject.device,
        autocast=subject.autocast,
    )
    return describe_evaluation("long", subject, text.info, plain_settings(settings), result.to_dict())


def _measure_recall(study: StudyConfig, cell: Cell) -> dict[str, Any]:
    settings = study.recall
    assert settings is not None
    subject = _load(study, cell)
    text = load_evaluation_text(subject, TextConfig())
    result = evaluate_recall(
        subject.model,
        subject.tokenizer,
        text.split,
        device=subject.device,
        autocast=subject.autocast,
        **dataclasses.asdict(cast(Any, settings)),
    )
    return describe_evaluation("recall", subject, text.info, plain_settings(settings), result.to_dict())


def _load(study: StudyConfig, cell: Cell) -> Subject:
    config = study.configure(cell.variant, cell.seed)
    return load_subject(SubjectConfig(run=str(study.folder / str(config.name)), device=config.device))


def summarize_study(study: StudyConfig) -> dict[str, Any]:
    """Gather all that is done by now, and write `study.json` and `table.md`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in plan_cells(study):
        name = str(study.configure(cell.variant, cell.seed).name)
        results = read_json(study.folder / name / RESULTS_FILE)
        if not results or results.get("status") != "complete":
            continue
        whats = [*name_texts(study), "recall"]
        measured = {what: read_json(measured_path(study, cell, what)) for what in whats}
        found.setdefault(cell.variant, []).append(
            {"seed": cell.seed, "model": results["models"][0], "code": results["code"], "measured": measured}
        )
    summary = describe_study(study, found) | {"code": describe_code()}
    write_json(study.folder / SUMMARY_FILE, summary)
    write_text_atomically(study.folder / TABLE_FILE, render_markdown(summary))
    return summary


def _claim_folder(study: StudyConfig) -> None:
    """Make the study's folder, or find in it the same study; more variants or seeds may have been added since.

    Raises:
        UserError: other settings have made it.
    """
    path = study.folder / STUDY_FILE
    if path.exists():
        from new_llm.config.run_settings import read_settings

        begun = read_settings(path, StudyConfig)
        for variant in begun.variants:
            if variant in study.variants and begun.configure(variant, 0) != study.configure(variant, 0):
                raise UserError(
                    f"{study.folder}: variant {variant} was begun with other settings; choose another name for the "
                    "study, or another --runs-dir"
                )
    study.folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, study.to_yaml())
