"""The memory of one layer as an immutable value, and its conversion to and from a dictionary of plain tensors.

Legend: R rows (1 if all rows of a batch share one memory), N memories or banks, H heads, K key width, V value width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

STATE_VERSION = 3
"""Version of the layer dictionaries of `get_memory_state`."""
MAX_COUNT = 2**53
"""Upper bound on counts in a memory; larger ones are rejected as corrupt."""
INDEX_KEYS = ("current_bank", "current_memory_idx")
"""The possible keys for the index of the memory to be written next."""
WHY_NOT_ADDITIVE = (
    "memories of different texts can't be added, because writes depend on what is stored (delta rule) or memory "
    "decays; memories can be added with use_delta_rule=False and without use_alibi and use_token_decay"
)
"""Error text: why a layer's memories can't be merged."""


@dataclass(frozen=True)
class LayerMemory:
    """What a layer carries from segment to segment: a frozen dataclass whose fields are tensors [R, ...] or None.

    Integer tensors must be counts; complex numbers must be stored as pairs of real ones. An empty memory is all zeros.
    Tensors are never changed in place, so a memory can be kept and shared.
    """

    can_add: ClassVar[bool] = True
    """Whether rows can share one memory, to which what each row wrote is added."""

    def tensors(self) -> dict[str, Tensor]:
        """The fields that hold a tensor."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def rows(self) -> int:
        """R."""
        return next(iter(self.tensors().values())).shape[0]

    @property
    def num_bytes(self) -> int:
        """Total bytes of the floating-point tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values() if t.is_floating_point())

    def to(self, device: torch.device) -> Self:
        """The memory on another device."""
        return map_tensors(self, lambda t: t.to(device))

    def clone(self) -> Self:
        """A detached copy."""
        return map_tensors(self, lambda t: t.detach().clone())

    def detach(self) -> Self:
        """The same values without gradients."""
        return map_tensors(self, Tensor.detach)

    def expand(self, rows: int) -> Self:
        """Expand a shared memory to `rows` rows, as views."""
        return self if self.rows == rows else map_tensors(self, lambda t: t.expand(rows, *t.shape[1:]))

    def select_rows(self, chosen: Tensor, other: Self) -> Self:
        """This memory's rows where `chosen` [R] is True, the other's elsewhere."""
        mine, others = self.tensors(), other.tensors()
        return replace(self, **{name: choose_rows(chosen, mine[name], others[name]) for name in mine})

    def emptied(self) -> Self:
        """An empty memory of the same shape."""
        return map_tensors(self, torch.zeros_like)

    def finish_call(self) -> Self:
        """The memory to hold after a call, without fields that are only needed during the call."""
        return self

    def add_changes(self, start: Self, rows: Self) -> Self:
        """This memory plus the changes from `start` to `rows`; a shared memory (R = 1) takes the sum over the rows.

        Raises:
            ValueError: memories of this kind can't be added.
        """
        if not self.can_add:
            raise ValueError(
                "this kind of memory belongs to a single text and can't be shared by several rows or streams: "
                "call reset_memory(batch_size) first, so that each row has its own"
            )
        mine, before, after = self.tensors(), start.tensors(), rows.tensors()
        changes = {name: after[name] - before[name] for name in mine}
        if self.rows != rows.rows:
            changes = {name: change.sum(0, keepdim=True) for name, change in changes.items()}
        return replace(self, **{name: mine[name] + changes[name] for name in mine})


@dataclass(frozen=True)
class MemoryState(LayerMemory):
    """N associative memories: matrices M with their normalisers z.

    Attributes:
        memories: M, [R, N, H, K, V], float32 or wider.
        norms: z, [R, N, H, K], float32 or wider; zero for an empty memory.
        num_tokens: number of tokens that each memory has seen, [R, N], int64.
        num_segments: number of segments that this layer has read, [R], int64; decides which memory is written next.
        segments_seen: number of segments written, summed over rows and merged memories, [R], int64.
        retained: share of the memory from before the call that is left after decay, [R, N, H]; None: all of it.
    """

    memories: Tensor
    norms: Tensor
    num_tokens: Tensor
    num_segments: Tensor
    segments_seen: Tensor
    retained: Tensor | None = None

    @property
    def share_left(self) -> Tensor:
        """`retained` as a tensor, 1 where it is None, [R, N, H]."""
        return self.norms.new_ones(self.norms.shape[:3]) if self.retained is None else self.retained

    def select_rows(self, chosen: Tensor, other: Any) -> Self:
        """See `LayerMemory.select_rows`; what is left of either is kept, even if only one of them has decayed."""
        if self.retained is None and other.retained is None:
            return super().select_rows(chosen, other)
        mine = replace(self, retained=self.share_left)
        return super(MemoryState, mine).select_rows(chosen, replace(other, retained=other.share_left))

    def finish_call(self) -> Self:
        """Without `retained`, which is relative to the memory before the call."""
        return replace(self, retained=None)

    def age(self, num_segments: Tensor, left: Tensor) -> Self:
        """This memory after `num_segments` [R] segments that wrote nothing; decay leaves the share `left` [R, N, H]."""
        memories, norms = left[..., None, None] * self.memories, left[..., None] * self.norms
        return replace(self, memories=memories, norms=norms, num_segments=num_segments, retained=None)

    def add_changes(self, start: Any, rows: Any) -> Self:
        """See `LayerMemory.add_changes`; this memory decays as much as in the row that decays it most.

        `num_segments` advances by the most that any row has read, not by the sum over rows. Rows of a call therefore
        advance together and memories keep being written in turn.
        """
        left, newly_read = rows.share_left, rows.num_segments - start.num_segments
        before = start.age(rows.num_segments, left)
        if self.rows != rows.rows:
            left, newly_read = left.amin(0, keepdim=True), newly_read.amax(0, keepdim=True)
        held = self.age(self.num_segments + newly_read, left)
        return super(MemoryState, held).add_changes(before, rows)


def choose_rows(chosen: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`yes` for rows where `chosen` [R] is True, else `no`; both [R, ...]."""
    return torch.where(chosen.view(-1, *[1] * (yes.dim() - 1)), yes, no)


def find_written_memory(num_segments: Tensor, segments_per_memory: int, num_memories: int) -> Tensor:
    """Which memory the next segment [R] is written to: (segments read // segments_per_memory) mod N."""
    return (num_segments // segments_per_memory) % num_memories


# Nested states


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dataclasses, lists, tuples and mappings with a function applied to every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(part, function) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(part, function) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{entry.name: map_tensors(getattr(value, entry.name), function) for entry in fields(value)}
        )
    return value


def list_tensors(value: Any) -> list[Tensor]:
    """The tensors of nested dataclasses, lists, tuples and mappings."""
    found: list[Tensor] = []
    map_tensors(value, lambda t: found.append(t) or t)
    return found


def keep_places(old: Any, new: Any) -> Any:
    """The new state, with values copied into the old state's tensors where shape and dtype agree, for CUDA graphs."""
    copies: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}

    def keep(old: Any, new: Any) -> Any:
        if isinstance(new, Tensor):
            if new is old or not isinstance(old, Tensor) or (old.shape, old.dtype) != (new.shape, new.dtype):
                return new
            targets, sources = copies.setdefault(new.dtype, ([], []))
            targets.append(old)
            sources.append(new)
            return old
        if type(new) in (list, tuple):
            return type(new)(keep(*pair) for pair in zip(old, new, strict=True))
        if is_dataclass(new) and not isinstance(new, type) and type(old) is type(new):
            return replace(
                new, **{entry.name: keep(*(getattr(x, entry.name) for x in (old, new))) for entry in fields(new)}
            )
        return new

    kept = keep(old, new)
    for targets, sources in copies.values():
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
    return kept


# Memories as plain dictionaries


@dataclass(frozen=True)
class MemoryFacts:
    """What the dictionary of a layer's memory holds besides tensors.

    Attributes:
        layer_kind: the layer's kind.
        settings: plain values that must match for a layer to take the memory.
        additive: whether memories of different texts can be added (no delta rule, no decay).
        keys: dictionary keys of fields whose key differs from their name.
        index_key: key for the index of the memory to be written next, for memories written in turn, whose settings
            have `num_memories` and `segments_per_memory`; None: not stored.
    """

    layer_kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    additive: bool = False
    keys: dict[str, str] = field(default_factory=dict)
    index_key: str | None = None

    def key(self, name: str) -> str:
        """A field's key in the dictionary."""
        return self.keys.get(name, name)


def state_to_dict(state: LayerMemory, facts: MemoryFacts, *, per_row: bool) -> dict[str, Any]:
    """A memory as a dictionary of CPU tensors, numbers and strings; without `per_row`, tensors have no row dimension.

    For a memory on the meta device, the tensors stay there and the result shows only the dictionary's form.
    """

    def plain(t: Tensor) -> Tensor:
        t = (t if per_row else t.squeeze(0)).detach()
        return t if t.is_meta else t.to("cpu", copy=True)

    entry: dict[str, Any] = {
        "layer_kind": facts.layer_kind,
        "version": STATE_VERSION,
        "per_row": per_row,
        **facts.settings,
        "additive": facts.additive,
        **{facts.key(name): plain(tensor) for name, tensor in state.finish_call().tensors().items()},
    }
    if facts.index_key is not None:
        entry[facts.index_key] = _find_turn(entry)
    return entry


def _find_turn(entry: dict[str, Any]) -> Tensor:
    return find_written_memory(entry["segment_counter"], entry["segments_per_memory"], entry["num_memories"])


def state_from_dict(entry: Any, facts: MemoryFacts, empty: LayerMemory, where: str) -> LayerMemory:
    """The inverse of `state_to_dict`; nothing in the dictionary is trusted.

    Args:
        entry: the dictionary.
        facts: the layer's facts.
        empty: the layer's empty memory with one row.
        where: prefix of error messages.

    Raises:
        ValueError: the version, layer kind, keys, shapes or settings differ, or a number is out of range.
    """
    per_row, rows = isinstance(entry, dict) and entry.get("per_row") is True, 1
    if per_row:
        rows = min((t.shape[0] if t.dim() else 0 for t in entry.values() if isinstance(t, Tensor)), default=1)
    if rows == 0:
        raise ValueError(f"{where}: its tensors have no rows")
    form = state_to_dict(empty.to(torch.device("meta")).expand(rows), facts, per_row=per_row)
    check_same_layer(entry, form, where, "this model")
    keys = {name: facts.key(name) for name in empty.tensors()}
    values = {name: entry[key].to(getattr(empty, name), copy=True) for name, key in keys.items()}
    check_values({keys[name]: value for name, value in values.items()}, where)
    return replace(empty, **{name: value if per_row else value.unsqueeze(0) for name, value in values.items()})


def check_values(entry: dict[str, Any], where: str) -> None:
    """Raise ValueError at the first tensor in a layer's dictionary that is not finite, or not a valid count."""
    for key, value in entry.items():
        if not isinstance(value, Tensor):
            continue
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{where}: {key} holds NaN or infinite values")
        if value.is_complex():
            raise ValueError(f"{where}: {key} holds complex numbers")
        if not value.is_floating_point() and not bool(((value >= 0) & (value < MAX_COUNT)).all()):
            raise ValueError(f"{where}: {key} holds impossible counts: negative, or 2^53 or more")


def merge_memory_states(states: list[dict[int, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """Add memories that started empty and read different texts: M = Σ M_i, z = Σ z_i.

    Works only without the delta rule and without decay. The result equals that of one machine that read all texts as
    rows of one batch with a shared memory.

    Args:
        states: the results of `get_memory_state` on each machine.

    Returns:
        A state for `set_memory_state`.

    Raises:
        ValueError: there are no states, their layers or shapes differ, their memories can't be added, or a sum is out
            of range.
    """
    if not states:
        raise ValueError("merge_memory_states needs at least one state")
    for number, state in enumerate(states):
        if not isinstance(state, dict):
            raise ValueError(f"state {number} is a {type(state).__name__}, not a memory state: pass a list of states")
        if set(state) != set(states[0]):
            raise ValueError(
                f"state {number} has memory layers {sorted(state)}, state 0 has {sorted(states[0])}: can't be merged"
            )
        for index, entry in state.items():
            where = f"layer {index} of state {number}"
            if isinstance(entry, dict) and entry.get("additive") is not True:
                raise ValueError(f"{where} ({entry.get('layer_kind')}): {WHY_NOT_ADDITIVE}")
            check_same_layer(entry, states[0][index], where, "state 0")
            check_values(entry, where)
    merged: dict[int, dict[str, Any]] = {}
    for index, first in states[0].items():
        where = f"layer {index} of the sum"
        stacks = {
            key: torch.stack([state[index][key] for state in states])
            for key, value in first.items()
            if isinstance(value, Tensor)
        }
        entry = first | {key: stack.sum(0).to(stack.dtype) for key, stack in stacks.items()}
        for key in entry.keys() & INDEX_KEYS:  # segment counters count time: take the greatest, not the sum
            try:
                entry["segment_counter"] = stacks["segment_counter"].amax(0)
                entry[key] = _find_turn(entry)
            except (KeyError, TypeError, RuntimeError):  # an untrusted file may hold anything
                raise ValueError(f"{where}: {key} does not belong to memories written in turn") from None
        check_values(entry, where)
        merged[index] = entry
    return merged


def check_same_layer(entry: Any, expected: dict[str, Any], where: str, whose: str) -> None:
    """Raise ValueError unless a layer dictionary has the expected version, kind, settings, keys and shapes."""
    if not isinstance(entry, dict) or not {"layer_kind", "version"} <= set(entry):
        raise ValueError(f"{where}: not a layer's memory state (no layer_kind or version)")
    for key, wanted in expected.items():
        found = entry.get(key)
        if not isinstance(wanted, Tensor) and (type(found) is not type(wanted) or found != wanted):
            shown = f"of type {type(found).__name__}" if isinstance(found, Tensor | dict | list) else repr(found)
            name = "layer kind" if key == "layer_kind" else key
            raise ValueError(f"{where}: {name} {shown}, {whose} has {wanted!r}")
    if set(entry) != set(expected):
        odd = sorted(str(key) for key in set(entry) ^ set(expected))
        raise ValueError(f"{where}: keys {odd} do not match {whose}")
    for key, wanted in expected.items():
        found = entry[key]
        if not isinstance(wanted, Tensor):
            continue
        if not isinstance(found, Tensor):
            raise ValueError(f"{where}: {key} is not a tensor")
        if wanted.is_floating_point() != found.is_floating_point():
            raise ValueError(f"{where}: {key} has dtype {found.dtype}, {whose} {wanted.dtype}")
        if wanted.shape != found.shape:
            raise ValueError(f"{where}: {key} has shape {tuple(found.shape)}, {whose} {tuple(wanted.shape)}")
