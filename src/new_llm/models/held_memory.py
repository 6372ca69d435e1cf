"""The stateful shell: the memory that a model holds between calls, for its users."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from new_llm.models.layers import Layer, MemoryLayer
from new_llm.models.state import MemoryState, check_settings, state_from_dict, state_to_dict

LayerMemories = list[MemoryState | None]
KeptMemory = tuple[LayerMemories, int | None]
"""The memory of every layer of a model: None for a layer without memory, or where it is known to be empty."""


class HeldMemory(nn.Module):
    """What a model offers to hold, reset, carry and describe its memory.

    The memory is one for all rows (after `reset_memory()`) or one a row (after `reset_memory(batch_size=B)`). It is
    no parameter and no buffer: it is not in the state dict, and moves to the model's device when it is used.
    """

    layers: nn.ModuleList
    segment_length: int

    def __init__(self) -> None:
        super().__init__()
        self._held: LayerMemories = []
        self._held_rows: int | None = None

    @property
    def layer_list(self) -> list[Layer]:
        """The layers, typed."""
        return cast(list[Layer], list(self.layers))

    @property
    def memory_layers(self) -> dict[int, MemoryLayer]:
        """The memory layers by their index."""
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, MemoryLayer)}

    @property
    def memory_rows(self) -> int | None:
        """Rows that hold a memory each; None: all rows share one."""
        return self._held_rows

    def reset_memory(self, batch_size: int | None = None) -> None:
        """Empty the memory; frozen banks stay as they are.

        Args:
            batch_size: give each of so many rows its own memory; None: one memory shared by all rows.

        Raises:
            ValueError: batch_size is not positive, or differs from the rows whose frozen banks differ.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is not positive")
        rows = batch_size or 1
        kept: LayerMemories = [None] * len(self.layers)
        for index, memory in enumerate(self._held):
            if memory is None or not any(memory.frozen):
                continue
            if memory.rows not in (1, rows):
                raise ValueError(
                    f"layer {index} holds frozen banks of {memory.rows} rows, which {rows} rows can't take over: "
                    "unfreeze them first"
                )
            kept[index] = memory.emptied().expand(rows)
        self._held = kept
        self._held_rows = batch_size

    def reset_rows(self, rows: Tensor) -> None:
        """Empty the memory of some rows of a per-row memory: where a stream goes on to its next document.

        Args:
            rows: [B] bool.

        Raises:
            ValueError: the memory is shared, or has another number of rows.
        """
        if self._held_rows != rows.shape[0]:
            held = "one memory shared by all rows" if self._held_rows is None else f"{self._held_rows} rows"
            raise ValueError(
                f"reset_rows of {rows.shape[0]} rows, but the model holds {held}: use reset_memory(batch_size)"
            )
        if not bool(rows.any()):
            return
        self._held = [
            None if memory is None else memory.emptied().select_rows(rows.to(memory.norms.device), memory)
            for memory in self._held
        ]

    def keep_memory(self) -> KeptMemory:
        """What is held now, for `restore_memory`. Nothing is copied: a held memory is never changed in place."""
        return self._held, self._held_rows

    def restore_memory(self, kept: KeptMemory, if_true: Tensor | None = None) -> None:
        """Hold again what was held before.

        Args:
            kept: from `keep_memory`; with a condition the rows are as many as now.
            if_true: one bool on the device, which nobody waits for: only where it is True; None: in any case.

        Raises:
            ValueError: the rows are not as many.
        """
        before, rows = kept
        if if_true is None:
            self._held, self._held_rows = kept
            return
        if rows != self._held_rows:
            raise ValueError(f"restore_memory: {rows} rows were held, now it is {self._held_rows}")
        if not before:
            before = [None] * len(self._held)
        self._held = [
            None if now is None else (now.emptied() if old is None else old).select_rows(if_true.expand(now.rows), now)
            for old, now in zip(before, self._held, strict=True)
        ]

    @contextmanager
    def fresh_memory(self, batch_size: int | None = None) -> Iterator[None]:
        """An empty memory inside the block; what the model held before is back after it."""
        before = (self._held, self._held_rows)
        try:
            self.reset_memory(batch_size)
            yield
        finally:
            self._held, self._held_rows = before

    def memory_info(self) -> dict[str, Any]:
        """`total_bytes` and `per_layer` (layer, kind, bytes) of one memory (M and z), were it shared by all rows."""
        per_layer = [
            {"layer": index, "kind": layer.kind, "bytes": layer.memory_bytes}
            for index, layer in self.memory_layers.items()
        ]
        return {"total_bytes": sum(entry["bytes"] for entry in per_layer), "per_layer": per_layer}

    def get_memory_state(self) -> dict[int, dict[str, Any]]:
        """The held memory as {layer index: plain CPU tensors, numbers and strings}.

        `torch.save` of it loads with `weights_only=True`. Tensors of a per-row memory have a row dimension in front.
        """
        per_row = self._held_rows is not None
        return {
            index: state_to_dict(self._held_or_empty(index), layer.memory_facts, per_row=per_row)
            for index, layer in self.memory_layers.items()
        }

    def set_memory_state(self, state: dict[int, dict[str, Any]]) -> None:
        """Hold a memory that `get_memory_state` returned, here or on another machine. All or nothing is set.

        Raises:
            ValueError: other memory layers, layer kinds, version, shapes or settings than this model's: says which.
        """
        if not isinstance(state, dict) or set(state) != set(self.memory_layers):
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"memory state of layers {found}: this model has memory in {sorted(self.memory_layers)}")
        held: LayerMemories = [None] * len(self.layers)
        per_row = {index: entry_is_per_row(entry) for index, entry in state.items()}
        for index, layer in self.memory_layers.items():
            empty = layer.empty_memory(1, layer.attention.gate)
            held[index] = state_from_dict(state[index], layer.memory_facts, empty, f"memory state, layer {index}")
        rows = {memory.rows for memory in held if memory is not None}
        if len(rows) > 1 or len(set(per_row.values())) > 1:
            raise ValueError("memory state: its layers hold memories of different numbers of rows")
        self._held = held
        self._held_rows = rows.pop() if rows and any(per_row.values()) else None

    def freeze_memory(self, bank_indices: Sequence[int]) -> None:
        """Keep some banks (memories) of every memory layer as they are: read, but neither written nor emptied.

        Writes rotate over the others.

        Raises:
            ValueError: a layer has no such bank.
        """
        self._set_frozen(bank_indices, True)

    def unfreeze_memory(self, bank_indices: Sequence[int] | None = None) -> None:
        """Write some frozen banks (None: all) again."""
        self._set_frozen(bank_indices, False)

    def export_memory_banks(self, bank_indices: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Some banks of every memory layer, as a state like `get_memory_state`'s with the other banks left out.

        Raises:
            ValueError: a layer has no such bank.
        """
        self._check_banks(bank_indices)
        chosen = list(bank_indices)
        state = self.get_memory_state()
        for index, layer in self.memory_layers.items():
            axis = 0 if self._held_rows is None else 1
            for key in (*layer.memory_facts.memory_keys, "token_counts"):
                state[index][key] = state[index][key].index_select(axis, torch.tensor(chosen))
            state[index]["banks"] = chosen
        return state

    def import_memory_banks(self, state: dict[int, dict[str, Any]], bank_indices: Sequence[int] | None = None) -> None:
        """Put exported banks into this model's memory, by default where they were; the other banks stay.

        Args:
            state: what `export_memory_banks` returned, of a model with the same layers.
            bank_indices: where to put them, in the order of export.

        Raises:
            ValueError: other layers, shapes or a number of banks that does not match.
        """
        held = self.get_memory_state()
        if not isinstance(state, dict) or set(state) != set(held):
            raise ValueError(f"exported banks do not fit: this model has memory in layers {sorted(held)}")
        axis = 0 if self._held_rows is None else 1
        for index, layer in self.memory_layers.items():
            check_settings(state[index], held[index], f"exported banks, layer {index}", "this model")
            banks = state[index].get("banks")
            if not isinstance(banks, list):
                raise ValueError(f"layer {index}: not a state of export_memory_banks (no banks)")
            targets = banks if bank_indices is None else list(bank_indices)
            self._check_banks(targets)
            if len(targets) != len(banks):
                raise ValueError(f"layer {index}: {len(banks)} banks were exported, {len(targets)} places are given")
            for key in (*layer.memory_facts.memory_keys, "token_counts"):
                expected, found = held[index][key], state[index].get(key)
                shape = (*expected.shape[:axis], len(banks), *expected.shape[axis + 1 :])
                if not isinstance(found, Tensor) or found.shape != shape:
                    given = tuple(found.shape) if isinstance(found, Tensor) else found
                    raise ValueError(f"layer {index}: {key} has shape {given}, {shape} is needed")
                held[index][key] = expected.index_copy(axis, torch.tensor(targets), found.to(expected.dtype))
        self.set_memory_state(held)

    def save_memory(self, path: str | Path) -> None:
        """Write the held memory to a safetensors file; see `memory_file.save_memory_file`."""
        from new_llm.models.memory_file import save_memory_file

        save_memory_file(self, Path(path))

    def load_memory(self, path: str | Path, *, force: bool = False) -> None:
        """Hold the memory of a file that `save_memory` wrote; see `memory_file.load_memory_file`."""
        from new_llm.models.memory_file import load_memory_file

        load_memory_file(self, Path(path), force=force)

    # What the model's calls use

    def _begin_call(self, batch_size: int, device: torch.device) -> tuple[LayerMemories, LayerMemories]:
        """Each row's own copy (a view) of the held memory, and the held memory itself."""
        if self._held_rows not in (None, batch_size):
            raise ValueError(
                f"a batch of {batch_size} rows, but the model holds a memory for each of {self._held_rows}: "
                "call reset_memory(batch_size) first"
            )
        for index, memory in enumerate(self._held):
            if memory is not None:
                dtype = torch.promote_types(next(self.layers[index].parameters()).dtype, torch.float32)
                if memory.memories.device != device or memory.memories.dtype != dtype:
                    self._held[index] = memory.to(device, dtype)
        rows: LayerMemories = [None if memory is None else memory.expand(batch_size) for memory in self._held]
        return rows, list(self._held)

    def _hold(self, rows: LayerMemories, start: LayerMemories) -> None:
        """Hold what rows that began from `start` have written, detached; a shared memory takes the sum over rows."""
        held = list(self._held)
        for index, memory in enumerate(rows):
            if memory is None:
                continue
            memory = memory.detach()
            now, begun = self._held[index], start[index]
            if now is begun and memory.rows == (self._held_rows or 1):
                held[index] = replace(memory, retained=None)
                continue
            empty = self.memory_layers[index].empty_memory(1, memory.norms)
            now = empty.expand(self._held_rows or 1) if now is None else now
            held[index] = now.add_changes(empty if begun is None else begun, memory)
        self._held = held

    def _held_or_empty(self, index: int) -> MemoryState:
        held = self._held[index] if self._held else None
        if held is not None:
            return held
        layer = self.memory_layers[index]
        return layer.empty_memory(self._held_rows or 1, layer.attention.gate)

    def _check_banks(self, bank_indices: Sequence[int]) -> None:
        for index, layer in self.memory_layers.items():
            number = layer.attention.num_memories
            wrong = [bank for bank in bank_indices if not 0 <= bank < number]
            if wrong:
                raise ValueError(
                    f"layer {index} ({layer.kind}) has banks 0 to {number - 1}: {wrong} are not among them"
                )

    def _set_frozen(self, bank_indices: Sequence[int] | None, frozen: bool) -> None:
        self._check_banks(bank_indices or ())
        held: LayerMemories = [None] * len(self.layers)
        for index in self.memory_layers:
            memory = self._held_or_empty(index)
            flags = list(memory.frozen)
            for bank in range(len(flags)) if bank_indices is None else bank_indices:
                flags[bank] = frozen
            held[index] = replace(memory, frozen=tuple(flags))
        self._held = held


def entry_is_per_row(entry: Any) -> bool:
    """Whether a layer's dictionary of `get_memory_state` has a row dimension."""
    counter = entry.get("segment_counter") if isinstance(entry, dict) else None
    return isinstance(counter, Tensor) and counter.dim() == 1
