"""How full a model's memories are along a document."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from new_llm.charts import Chart, heat_chart
from new_llm.data.tokenizer import TokenSplit
from new_llm.evaluation.measure import Measure, ModelResult, Subject, register_measure
from new_llm.evaluation.scoring import Autocast, Row, evaluation_mode, find_device, score_rows
from new_llm.models import TransformerLM

DIGITS = 5


def measure_memory_usage(
    model: TransformerLM,
    split: TokenSplit,
    *,
    num_segments: int,
    device: torch.device | str | None = None,
    autocast: Autocast = contextlib.nullcontext,
) -> dict[str, Any] | None:
    """‖M‖, the Frobenius norm of each memory and head, after each segment of one document.

    The first document that is long enough is read from an empty memory, else the longest one as far as it goes. What
    the model holds is back afterwards.

    Args:
        model: evaluated in evaluation mode.
        split: the documents.
        num_segments: segments to read at most.
        device: where the model lies; None: where its weights are.
        autocast: makes the context in which the model computes.

    Returns:
        `document` (its index), `num_segments`, `segment_length`, and `layers`: for each memory layer its index
        `layer`, its `kind` and `norms` [num_segments, num_memories, num_memory_heads]. None: the model has no
        memory matrices, or no document has a whole segment.
    """
    length = model.segment_length
    layers = {
        index: layer
        for index, layer in model.memory_layers.items()
        if "memories" in layer.empty_memory(1, model.embed_in.weight).tensors()
    }
    if not layers or split.num_documents == 0:
        return None
    lengths = np.diff(split.offsets)
    needed = num_segments * length + 1  # the last segment's last target
    enough = np.flatnonzero(lengths >= needed)
    document = int(enough[0] if len(enough) else lengths.argmax())
    tokens = split.document(document)[:needed]
    count = (len(tokens) - 1) // length
    if count == 0:
        return None
    norms: dict[int, list[list[list[float]]]] = {index: [] for index in layers}
    place = find_device(model, device)
    with evaluation_mode(model, autocast), model.fresh_memory():
        for segment in range(count):
            row = Row(tokens[segment * length : (segment + 1) * length + 1])
            score_rows(model, [row], place, update_memory=True)
            state = model.get_memory_state()
            for index, layer in layers.items():
                memories = state[index][layer.memory_facts.key("memories")]  # [M, H, K, V]
                sizes = memories.float().flatten(2).norm(dim=-1).tolist()
                norms[index].append([[float(f"{value:.{DIGITS}g}") for value in heads] for heads in sizes])
    found = [{"layer": index, "kind": layer.kind, "norms": norms[index]} for index, layer in layers.items()]
    return {"document": document, "num_segments": count, "segment_length": length, "layers": found}


@register_measure
class MemoryUsage(Measure):
    """How full each memory is after each segment of one document."""

    name = "memory_usage"
    title = "memory usage"

    def run(self, subject: Subject) -> dict[str, Any] | None:
        """See `measure_memory_usage`; None for a model without memory."""
        if not isinstance(subject.model, TransformerLM):
            return None
        return measure_memory_usage(
            subject.model,
            subject.split,
            num_segments=subject.settings.memory_usage_segments,
            device=subject.device,
            autocast=subject.autocast,
        )

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """A heat map per model: segments across, memories and heads down."""
        charts: list[Chart] = []
        for name in dict.fromkeys(one.name for one in results):
            rows = [
                {
                    "segment": segment + 1,
                    "memory": f"layer {layer['layer']}, memory {memory + 1}, head {head + 1}",
                    "norm": value,
                }
                for one in results
                if one.name == name
                for layer in one.result["layers"]
                for segment, memories in enumerate(layer["norms"])
                for memory, heads in enumerate(memories)
                for head, value in enumerate(heads)
            ]
            caption = "Norm of each memory after each segment of one document: does it fill up, and are all written?"
            axes: dict[str, Any] = {"x": "segment", "y": "memory", "value": "norm", "x_title": "segment", "view": name}
            charts.append(heat_chart(f"memory-usage-{name}", "Memory usage", caption, rows, **axes))
        return charts
