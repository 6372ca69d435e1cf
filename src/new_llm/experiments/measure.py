"""What an experiment measures: the validation loss while it trains, and the subject of its measures afterwards."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from new_llm.config.loading import TrainingSettings
from new_llm.data.dataset import PreparedData
from new_llm.evaluation import Subject, evaluate_sliding_window, evaluate_streaming
from new_llm.models import TransformerLM
from new_llm.processes import ALONE, Processes

Autocast = Callable[[], AbstractContextManager[Any]]


def measure_validation_loss(
    model: TransformerLM,
    data: PreparedData,
    config: TrainingSettings,
    autocast: Autocast,
    processes: Processes = ALONE,
) -> float:
    """Nats per validation token under the conditions of training.

    With `order: stream` documents are read as streams with their memory carried; with `shuffled` in samples that start
    from empty memory.
    """
    reading = _describe_reading(config, autocast, processes)
    if config.data.order == "stream":
        return evaluate_streaming(model, data.validation, **reading).loss
    length = config.data.seq_length
    return evaluate_sliding_window(model, data.validation, context=length, stride=length, **reading).loss


def make_subject(
    model: TransformerLM,
    data: PreparedData,
    config: TrainingSettings,
    autocast: Autocast,
    processes: Processes = ALONE,
) -> Subject:
    """One of a run's models as the subject of measures, on the validation documents.

    Args:
        model: with its best weights.
        data: the run's.
        config: the run's.
        autocast: the context that training ran in.
        processes: those that share the work; each of them gets the whole result.
    """
    return Subject(
        model=model,
        tokenizer=data.tokenizer,
        split=data.validation,
        settings=config.eval,
        seq_length=config.data.seq_length,
        seed=config.seed,
        device=next(model.parameters()).device,
        autocast=autocast,
        processes=processes,
        facts=data.info,
    )


def _describe_reading(config: TrainingSettings, autocast: Autocast, processes: Processes) -> dict[str, Any]:
    """What all perplexities of an experiment have in common."""
    return {
        "batch_size": config.eval.batch_size,
        "max_tokens": config.eval.max_tokens,
        "autocast": autocast,
        "processes": processes,
    }
