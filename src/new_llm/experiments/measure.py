"""All that is measured of one model: the same for every model of an experiment."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from new_llm.config import ExperimentConfig
from new_llm.data.dataset import PreparedData
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.evaluation import (
    diagnose_perplexity,
    evaluate_positions,
    evaluate_reversal_curse,
    evaluate_sliding_window,
    evaluate_streaming,
)
from new_llm.evaluation.memory_usage import measure_memory_usage
from new_llm.models import TransformerLM
from new_llm.processes import ALONE, Processes

Autocast = Callable[[], AbstractContextManager[Any]]

MEMORY_USAGE_SEGMENTS = 32
"""Segments of one document that the map of memory use shows: enough to see whether memories fill up, in a second."""


def measure_validation_loss(
    model: TransformerLM,
    data: PreparedData,
    config: ExperimentConfig,
    autocast: Autocast,
    processes: Processes = ALONE,
) -> float:
    """Nats a validation token under the conditions of training.

    With `order: stream` documents are read as streams with their memory carried; with `shuffled` in samples that start
    from empty memory.
    """
    reading = _describe_reading(config, autocast, processes)
    if config.data.order == "stream":
        return evaluate_streaming(model, data.validation, **reading).loss
    length = config.data.seq_length
    return evaluate_sliding_window(model, data.validation, context=length, stride=length, **reading).loss


def measure_model(
    model: TransformerLM,
    data: PreparedData,
    config: ExperimentConfig,
    autocast: Autocast,
    say: Callable[[str], None],
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Sliding-window, streaming and position-wise perplexity, memory use, the reversal curse, a verdict: plain values.

    Args:
        model: with its best weights.
        data: the experiment's data; the validation split is read.
        config: the experiment.
        autocast: the context that training ran in.
        say: told what is measured next.
        processes: those that share the work; each of them gets the whole result.
    """
    settings = config.eval
    device = next(model.parameters()).device
    reading: dict[str, Any] = _describe_reading(config, autocast, processes)
    say("sliding-window perplexity")
    sliding = evaluate_sliding_window(
        model, data.validation, context=settings.context, stride=settings.stride, **reading
    )
    say("streaming perplexity")
    streaming = evaluate_streaming(model, data.validation, **reading)
    say("perplexity by position")
    positions = evaluate_positions(
        model, data.validation, seq_length=config.data.seq_length, edges=settings.position_edges, **reading
    )
    measured: dict[str, Any] = {
        "sliding": sliding.to_dict(),
        "streaming": streaming.to_dict(),
        "positions": positions,
        "memory_usage": measure_memory_usage(
            model, data.validation, num_segments=MEMORY_USAGE_SEGMENTS, autocast=autocast
        ),
        "reversal": None,
        "verdict": diagnose_perplexity(sliding.perplexity).to_dict(),
    }
    if settings.reversal:
        say("the reversal curse")
        reversal = evaluate_reversal_curse(
            model,
            data.tokenizer,
            get_reversal_pairs(),
            device,
            batch_size=settings.reversal_batch_size,
            num_resamples=settings.bootstrap_resamples,
            seed=config.seed,
            autocast=autocast,
            processes=processes,
        )
        measured["reversal"] = reversal.to_dict()
    return measured


def _describe_reading(config: ExperimentConfig, autocast: Autocast, processes: Processes) -> dict[str, Any]:
    """What all perplexities of an experiment have in common."""
    return {
        "batch_size": config.eval.batch_size,
        "max_tokens": config.eval.max_tokens,
        "autocast": autocast,
        "processes": processes,
    }
