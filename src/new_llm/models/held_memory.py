"""The stateful shell around the functional layers: the memory that a model holds between calls."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from new_llm.formats import format_plural
from new_llm.models.layers import Layer
from new_llm.models.state import LayerMemory, state_from_dict, state_to_dict

LayerMemories = list[LayerMemory | None]
"""The memory of each layer; None if the layer has no memory, or its memory is known to be empty."""
KeptMemory = tuple[LayerMemories, int | None]
"""A held memory and its number of rows; see `keep_memory`."""


class HeldMemory(nn.Module):
    """A model's memory, one shared by all rows or one per row; see `reset_memory`.

    It is neither a parameter nor a buffer, so it is not in the state dict. It moves to the model's device when used.
    """

    layers: nn.ModuleList
    segment_length: int

    def __init__(self) -> None:
        super().__init__()
        self._held: LayerMemories = []
        self._held_rows: int | None = None

    @property
    def layer_list(self) -> list[Layer]:
        """The layers as a typed list."""
        return cast(list[Layer], list(self.layers))

    @property
    def memory_layers(self) -> dict[int, Any]:
        """The layers with memory, by index."""
        return {index: layer for index, layer in enumerate(self.layer_list) if layer.has_memory}

    @property
    def memory_rows(self) -> int | None:
        """Number of rows, each with its own memory; None: all rows share one."""
        return self._held_rows

    @property
    def rows_can_share(self) -> bool:
        """Whether rows of a batch can share one memory; False if a layer's memory belongs to a single text."""
        return all(self._empty(index, 1).can_add for index in self.memory_layers)

    def reset_memory(self, batch_size: int | None = None) -> None:
        """Empty the memory. With `batch_size`, each of that many rows gets its own; without it, all rows share one."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is not positive")
        self._held = [None] * len(self.layers)
        self._held_rows = batch_size

    def reset_rows(self, rows: Tensor) -> None:
        """Empty the rows of a per-row memory where `rows`, [B] bool on the CPU, is True, e.g. at a document's start."""
        if self._held_rows != rows.shape[0]:
            held = "one memory shared by all rows" if self._held_rows is None else format_plural(self._held_rows, "row")
            raise ValueError(
                f"reset_rows of {format_plural(rows.shape[0], 'row')}, but the model holds {held}: "
                "use reset_memory(batch_size)"
            )
        if not bool(rows.any()):
            return
        device = next(self.parameters()).device
        chosen = rows.to(device, non_blocking=True)
        here = [memory and memory.to(device) for memory in self._held]
        self._held = [memory and memory.emptied().select_rows(chosen, memory) for memory in here]

    def keep_memory(self) -> KeptMemory:
        """The held memory, to be restored by `restore_memory`. No copy is needed: it is never changed in place."""
        return self._held, self._held_rows

    def restore_memory(self, kept: KeptMemory, if_true: Tensor | None = None) -> None:
        """Restore a memory that `keep_memory` returned.

        Args:
            kept: the memory. With `if_true` it must have as many rows as the present one.
            if_true: restore only if this scalar bool on the device is True, without synchronising; None: always.
        """
        before, rows = kept
        if if_true is None:
            self._held, self._held_rows = kept
            return
        if rows != self._held_rows:
            raise ValueError(f"restore_memory: rows held then: {rows}, now: {self._held_rows}")
        self._held = [
            None if now is None else (now.emptied() if old is None else old).select_rows(if_true.expand(now.rows), now)
            for old, now in zip(before, self._held, strict=True)
        ]

    @contextmanager
    def fresh_memory(self, batch_size: int | None = None) -> Iterator[None]:
        """Use an empty memory inside the block, and restore the held memory afterwards."""
        before = self.keep_memory()
        try:
            self.reset_memory(batch_size)
            yield
        finally:
            self.restore_memory(before)

    def memory_info(self) -> dict[str, Any]:
        """The size of one memory, that of one row: `total_bytes`, and `per_layer` with layer, kind and bytes."""
        per_layer = [
            {"layer": index, "kind": layer.kind, "bytes": layer.memory_bytes}
            for index, layer in self.memory_layers.items()
        ]
        return {"total_bytes": sum(entry["bytes"] for entry in per_layer), "per_layer": per_layer}

    def get_memory_state(self) -> dict[int, dict[str, Any]]:
        """The held memory as {layer index: {key: CPU tensor, number or string}}.

        Saved with `torch.save`, it loads with `weights_only=True`. If each row has its own memory, tensors have a
        leading row dimension.
        """
        rows, per_row = self._held_rows or 1, self._held_rows is not None
        return {
            index: state_to_dict(self._held[index] or self._empty(index, rows), layer.memory_facts, per_row=per_row)
            for index, layer in self.memory_layers.items()
        }

    def set_memory_state(self, state: dict[int, dict[str, Any]]) -> None:
        """Replace the held memory by a state from `get_memory_state`, of this or another process.

        Raises:
            ValueError: its layers, layer kinds, version, shapes or settings differ from this model's; the message says
                which. The held memory is then unchanged.
        """
        if not isinstance(state, dict) or set(state) != set(self.memory_layers):
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"memory state of layers {found}: this model has memory in {sorted(self.memory_layers)}")
        held: LayerMemories = [None] * len(self.layers)
        rows = set[int | None]()
        for index, layer in self.memory_layers.items():
            where = f"memory state, layer {index}"
            memory = state_from_dict(state[index], layer.memory_facts, self._empty(index, 1), where)
            rows.add(memory.rows if state[index]["per_row"] else None)
            held[index] = memory
        if len(rows) > 1:
            raise ValueError("memory state: its layers have different numbers of rows")
        self._held, self._held_rows = held, rows.pop() if rows else None

    # For the model's own calls

    def _begin_call(self, batch_size: int, device: torch.device) -> tuple[LayerMemories, LayerMemories]:
        """The held memory expanded to the batch's rows, as views, and the held memory itself."""
        if self._held_rows not in (None, batch_size):
            raise ValueError(
                f"a batch of {format_plural(batch_size, 'row')}, but the model holds a memory for each of "
                f"{self._held_rows}: call reset_memory(batch_size) first"
            )
        for index, memory in enumerate(self._held):
            if memory is None:
                continue
            tensors, dtype = memory.tensors(), self._find_like(index).dtype
            wide = torch.promote_types(dtype, torch.float32)
            if any(t.device != device or (t.is_floating_point() and t.dtype != wide) for t in tensors.values()):
                plan = self.layer_list[index].plan_memory(dtype).tensors()  # a layer may choose the dtypes
                moved = {name: t.to(device, plan.get(name, t).dtype) for name, t in tensors.items()}
                memory = replace(memory, **moved)
            # tensors created under inference_mode can't be saved for backward, but a copy created outside it can
            if not torch.is_inference_mode_enabled() and any(t.is_inference() for t in memory.tensors().values()):
                memory = memory.clone()
            self._held[index] = memory
        return [memory and memory.expand(batch_size) for memory in self._held], list(self._held)

    def _hold(self, rows: LayerMemories, start: LayerMemories) -> None:
        """Add what `rows` wrote since `start` to the held memory, detached; a shared memory takes the sum over rows."""
        held = list(self._held)
        for index, memory in enumerate(rows):
            if memory is None:
                continue
            memory = memory.detach()
            now, begun = self._held[index], start[index]
            if now is begun and memory.rows == (self._held_rows or 1):
                held[index] = memory.finish_call()
                continue
            empty = self._empty(index, 1)
            held[index] = (now or empty.expand(self._held_rows or 1)).add_changes(begun or empty, memory)
        self._held = held

    def _empty(self, index: int, rows: int) -> LayerMemory:
        return self.layer_list[index].empty_memory(rows, self._find_like(index))

    def _find_like(self, index: int) -> Tensor:
        """A parameter of a layer, or the model's first one where the layer has none: its device and precision count."""
        return next(itertools.chain(self.layers[index].parameters(), self.parameters()))
