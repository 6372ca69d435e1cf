"""The norm of a model's memories as it reads a document, and how sharply tokens select among memories."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from new_llm.charts import Chart, heat_chart
from new_llm.evaluation.measure import Column, Measure, ModelResult, Subject, register_measure
from new_llm.evaluation.scoring import Row, evaluation_mode, score_rows
from new_llm.models import TransformerLM
from new_llm.models.layers.multi_memory import SelectingAttention, measure_entropy, watch_selection

DIGITS = 5


@contextlib.contextmanager
def watch_token_gates(model: TransformerLM) -> Iterator[dict[int, Tensor]]:
    """Record inside the block the gates of the last call, [tokens, H] by layer, where layers compute them per token."""
    found: dict[int, Tensor] = {}

    def note(module: Any, inputs: tuple[Any, ...], index: int) -> None:
        found[index] = module.compute_gates(inputs[0]).flatten(0, -2).float().cpu()

    with contextlib.ExitStack() as stack:
        for index, attention in list_attentions(model):
            if getattr(attention, "token_gate", None) is not None:
                hook = attention.register_forward_pre_hook(functools.partial(note, index=index))
                stack.callback(hook.remove)
        yield found


def list_attentions(model: TransformerLM) -> list[tuple[int, Any]]:
    """Return (index, attention) of each memory layer; attention is None for layers without one."""
    return [(index, getattr(layer, "attention", None)) for index, layer in model.memory_layers.items()]


@contextlib.contextmanager
def watch_selections(model: TransformerLM) -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
    """Record inside the block, by layer, each call's selection among memories; see `watch_selection`."""
    selecting = {index: one for index, one in list_attentions(model) if isinstance(one, SelectingAttention)}
    with contextlib.ExitStack() as stack:
        yield {index: stack.enter_context(watch_selection(attention)) for index, attention in selecting.items()}


@register_measure
class MemoryUsage(Measure):
    """The norm of each memory after each segment of one document."""

    name = "memory_usage"
    title = "memory usage"

    def run(self, subject: Subject) -> dict[str, Any] | None:
        """Measure ‖M‖, the Frobenius norm of each memory and head, after each segment of one document.

        The document is the first that has `memory_usage_segments` segments or, if there is none, the longest one. It is
        read from an empty memory.

        The result has `document` (its index), `num_segments`, `segment_length`, and `layers`: for each memory layer its
        index `layer`, its `kind`, `norms` [num_segments, num_memories, num_memory_heads] and, if it selects among
        memories, `selection_entropy`: the mean over tokens and heads, relative to the maximum entropy (0: each token
        reads one memory; 1: all memories equally). It is None if no layer has associative memories, or no document has
        a whole segment.
        """
        model, split = subject.model, subject.split
        if not isinstance(model, TransformerLM):
            return None
        length = model.segment_length
        keys = {
            index: layer.memory_facts.key("memories")
            for index, layer in model.memory_layers.items()
            if "memories" in layer.empty_memory(1, model.embed_in.weight).tensors()
        }
        if not keys or split.num_documents == 0:
            return None
        needed = subject.settings.memory_usage_segments * length + 1  # the last segment's last target
        enough = split.find_long(needed)
        document = int(enough[0] if len(enough) else split.lengths.argmax())
        tokens = split.document(document)[:needed]
        count = (len(tokens) - 1) // length
        if count == 0:
            return None
        norms: dict[int, list[list[list[float]]]] = {index: [] for index in keys}
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluation_mode(model, subject.autocast))
            stack.enter_context(model.fresh_memory())
            selections = stack.enter_context(watch_selections(model))
            for segment in range(count):
                row = Row(tokens[segment * length : (segment + 1) * length + 1])
                score_rows(model, [row], update_memory=True)
                state = model.get_memory_state()
                for index, key in keys.items():
                    found = state[index][key].float().flatten(2).norm(dim=-1).tolist()  # of [M, H, K, V]
                    norms[index].append([[float(f"{value:.{DIGITS}g}") for value in heads] for heads in found])
        layers: list[dict[str, Any]] = []
        for index in keys:
            layers.append({"layer": index, "kind": model.layer_list[index].kind, "norms": norms[index]})
            selected = torch.cat([measure_entropy(*one) for one in selections.get(index, ())] or [torch.empty(0)])
            if len(selected):
                layers[-1]["selection_entropy"] = float(selected.mean())
        return {"document": document, "num_segments": count, "segment_length": length, "layers": layers}

    def columns(self, result: dict[str, Any]) -> list[Column]:
        """Return the selection entropy, averaged over the layers that select among memories."""
        layers = result["layers"]
        found = {one["layer"]: one["selection_entropy"] for one in layers if "selection_entropy" in one}
        if not found:
            return []
        each = ", ".join(f"layer {index}: {entropy:.3f}" for index, entropy in found.items())
        mean, hint = sum(found.values()) / len(found), f"0: each token reads one memory; 1: all equally. {each}"
        return [Column("selection_entropy", "selection entropy", mean, hint=hint)]

    def charts(self, results: Sequence[ModelResult]) -> list[Chart]:
        """Draw a heat map per model: segments across, memories and heads down."""
        charts: list[Chart] = []
        for name in dict.fromkeys(one.name for one in results):
            rows = [
                {"segment": segment, "memory": f"layer {layer['layer']}, memory {memory}, head {head}", "norm": value}
                for one in results
                if one.name == name
                for layer in one.result["layers"]
                for segment, memories in enumerate(layer["norms"], start=1)
                for memory, heads in enumerate(memories, start=1)
                for head, value in enumerate(heads, start=1)
            ]
            caption = "Norm of each memory after each segment of one document: does it saturate, and are all written?"
            axes: dict[str, Any] = {"x": "segment", "y": "memory", "value": "norm", "x_title": "segment", "view": name}
            charts.append(heat_chart(f"memory-usage-{name}", "Memory usage", caption, rows, **axes))
        return charts
