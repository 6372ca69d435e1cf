"""The memory of one layer as a value: made, reset by rows, summed over rows, written down as plain tensors.

Legend: R rows (1 where all rows of a batch share one memory), N memories or banks, H heads, K key width, V value width.
"""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

STATE_VERSION = 1
"""Version of the layer dictionaries of `get_memory_state`."""

WHY_NOT_ADDITIVE = (
    "was written with the delta rule or with decay: such memories do not add; "
    "those of layers with use_delta_rule=False and without use_alibi do"
)
"""What is said of a layer whose memories can't merge."""


@dataclass(frozen=True)
class MemoryState:
    """One layer's memory. Tensors are never changed in place, so that a state can be kept and shared.

    Attributes:
        memories: M, [R, N, H, K, V], float32 or wider.
        norms: z, [R, N, H, K], likewise; zero means an empty memory.
        num_tokens: tokens that each memory has seen, [R, N], int64.
        num_segments: segments that this layer has read, [R], int64; says which memory is written next.
        frozen: which memories are read but not written, N booleans.
        retained: what share of the memory of before the call is left after its decay, [R, N, H]; None: all of it.
    """

    memories: Tensor
    norms: Tensor
    num_tokens: Tensor
    num_segments: Tensor
    frozen: tuple[bool, ...]
    retained: Tensor | None = None

    @classmethod
    def empty(
        cls, rows: int, shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device
    ) -> "MemoryState":
        """A state of `rows` empty memories of shape (N, H, K, V)."""
        return cls(
            memories=torch.zeros(rows, *shape, dtype=dtype, device=device),
            norms=torch.zeros(rows, *shape[:3], dtype=dtype, device=device),
            num_tokens=torch.zeros(rows, shape[0], dtype=torch.int64, device=device),
            num_segments=torch.zeros(rows, dtype=torch.int64, device=device),
            frozen=(False,) * shape[0],
        )

    @property
    def rows(self) -> int:
        """R."""
        return self.memories.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, K, V)."""
        return tuple(self.memories.shape[1:])

    @property
    def num_bytes(self) -> int:
        """Bytes of M and z."""
        return sum(t.numel() * t.element_size() for t in (self.memories, self.norms))

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "frozen"}
        return {name: value for name, value in values.items() if value is not None}

    def _map(self, function: Any) -> "MemoryState":
        return replace(self, **{name: function(tensor) for name, tensor in self._tensors().items()})

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "MemoryState":
        """The same on another device, M and z in another dtype."""
        return self._map(lambda t: t.to(device, dtype if t.is_floating_point() else None))

    def clone(self) -> "MemoryState":
        """A detached copy."""
        return self._map(lambda t: t.detach().clone())

    def detach(self) -> "MemoryState":
        """The same values without their history."""
        return self._map(lambda t: t.detach())

    def expand(self, rows: int) -> "MemoryState":
        """One shared memory as a view for every row."""
        return self if self.rows == rows else self._map(lambda t: t.expand(rows, *t.shape[1:]))

    def select_rows(self, chosen: Tensor, other: "MemoryState") -> "MemoryState":
        """Rows of this state where `chosen` [R] is True, else of the other."""
        mine, others = self._tensors(), other._tensors()
        return replace(self, **{name: choose_rows(chosen, mine[name], others[name]) for name in mine})

    def emptied(self) -> "MemoryState":
        """Every memory but the frozen ones empty; with nothing frozen the state of a new layer."""
        frozen = torch.tensor(self.frozen, device=self.norms.device)

        def keep_frozen(t: Tensor) -> Tensor:
            return torch.where(frozen.view(1, -1, *[1] * (t.dim() - 2)), t, torch.zeros_like(t))

        return replace(
            self,
            memories=keep_frozen(self.memories),
            norms=keep_frozen(self.norms),
            num_tokens=keep_frozen(self.num_tokens),
            num_segments=torch.zeros_like(self.num_segments),
        )

    @property
    def share_left(self) -> Tensor:
        """`retained`, where it is None 1: [R, N, H]."""
        return self.norms.new_ones(self.norms.shape[:3]) if self.retained is None else self.retained

    def add_changes(self, start: "MemoryState", rows: "MemoryState") -> "MemoryState":
        """This memory, as it is held now, plus what rows that began from `start` have changed.

        A shared memory (R = 1) takes the sum over the rows: what each row wrote is added once, and what was there
        decays as often as the row with the most writes let it decay. Segments are counted in time, not over rows: rows
        of one call advance together, so that memories that are written in turn stay in turn.
        """
        left = rows.share_left
        new_memories = rows.memories - left[..., None, None] * start.memories
        new_norms = rows.norms - left[..., None] * start.norms
        new_tokens, new_segments = rows.num_tokens - start.num_tokens, rows.num_segments - start.num_segments
        if self.rows != rows.rows:
            left = left.amin(0, keepdim=True)
            new_memories, new_norms = new_memories.sum(0, keepdim=True), new_norms.sum(0, keepdim=True)
            new_tokens, new_segments = new_tokens.sum(0, keepdim=True), new_segments.amax(0, keepdim=True)
        return replace(
            self,
            memories=left[..., None, None] * self.memories + new_memories,
            norms=left[..., None] * self.norms + new_norms,
            num_tokens=self.num_tokens + new_tokens,
            num_segments=self.num_segments + new_segments,
        )


def choose_rows(chosen: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`yes` where the row is chosen [R], else `no`; both [R, ...]."""
    return torch.where(chosen.view(-1, *[1] * (yes.dim() - 1)), yes, no)


Opened = TypeVar("Opened", bound="DataclassInstance")


def clear_rows(chosen: Tensor, opened: Opened) -> Opened:
    """What a layer keeps of open segments, tensors [R, ...], with 0 in the chosen rows [R]."""
    kept = {one.name: getattr(opened, one.name) for one in fields(opened)}
    return replace(
        opened, **{name: choose_rows(chosen, torch.zeros_like(value), value) for name, value in kept.items()}
    )


@dataclass(frozen=True)
class MemoryFacts:
    """What a layer's memory dictionary says beside its tensors.

    Attributes:
        layer_kind: the layer's kind.
        key_prefix: what stands before `memories` in the dictionary's keys.
        index_key: the key of the memory that is written next.
        use_delta_rule: whether writes subtract what the memory holds.
        additive: whether memories of different texts add (no delta rule, no decay).
        segments_per_memory: segments written into one memory before the next.
    """

    layer_kind: str
    key_prefix: str
    index_key: str
    use_delta_rule: bool
    additive: bool
    segments_per_memory: int

    @property
    def memory_keys(self) -> tuple[str, str]:
        """The keys of M and z."""
        return f"{self.key_prefix}memories", f"{self.key_prefix}memory_norms"


def find_written_memory(num_segments: Tensor, segments_per_memory: int, frozen: tuple[bool, ...]) -> Tensor:
    """Which memory the next segment is written to: (segments read // segments_per_memory) mod N.

    Frozen memories are left out of the turn. With all frozen the answer is 0, and nothing may be written.

    Args:
        num_segments: [R], int64.
        segments_per_memory: segments before the next memory's turn.
        frozen: N booleans.

    Returns:
        [R], int64.
    """
    open_memories = [n for n, is_frozen in enumerate(frozen) if not is_frozen] or [0]
    turn = (num_segments // segments_per_memory) % len(open_memories)
    if len(open_memories) == len(frozen):
        return turn
    return torch.tensor(open_memories, device=num_segments.device)[turn]


def state_to_dict(state: MemoryState, facts: MemoryFacts, *, per_row: bool) -> dict[str, Any]:
    """Plain CPU tensors, numbers and strings; tensors of a shared memory have no row dimension."""

    def plain(t: Tensor) -> Tensor:
        return (t if per_row else t.squeeze(0)).detach().to("cpu", copy=True)

    memories_key, norms_key = facts.memory_keys
    return {
        "layer_kind": facts.layer_kind,
        "version": STATE_VERSION,
        "use_delta_rule": facts.use_delta_rule,
        "additive": facts.additive,
        "segments_per_memory": facts.segments_per_memory,
        memories_key: plain(state.memories),
        norms_key: plain(state.norms),
        facts.index_key: plain(find_written_memory(state.num_segments, facts.segments_per_memory, state.frozen)),
        "segment_counter": plain(state.num_segments),
        "token_counts": plain(state.num_tokens),
        "frozen": torch.tensor(state.frozen),
    }


def state_from_dict(entry: dict[str, Any], facts: MemoryFacts, empty: MemoryState, where: str) -> MemoryState:
    """Read `state_to_dict`'s result for a layer whose empty memory is `empty` (one row).

    Raises:
        ValueError: another version, layer kind, set of keys, shape or setting, or values that are not finite.
    """
    memories_key, norms_key = facts.memory_keys
    memories = entry.get(memories_key) if isinstance(entry, dict) else None
    per_row = isinstance(memories, Tensor) and memories.dim() == 5
    rows = memories.shape[0] if isinstance(memories, Tensor) and per_row else 1
    if rows == 0:
        raise ValueError(f"{where}: {memories_key} has no rows")
    check_same_layer(entry, state_to_dict(empty.expand(rows), facts, per_row=per_row), where, "this model")

    def restore(key: str, like: Tensor) -> Tensor:
        value = entry[key].to(like.device, like.dtype, copy=True)
        return value if per_row else value.unsqueeze(0)

    state = MemoryState(
        memories=restore(memories_key, empty.memories),
        norms=restore(norms_key, empty.norms),
        num_tokens=restore("token_counts", empty.num_tokens),
        num_segments=restore("segment_counter", empty.num_segments),
        frozen=tuple(bool(value) for value in entry["frozen"]),
    )
    for key, value in ((memories_key, state.memories), (norms_key, state.norms)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{where}: {key} holds NaN or infinite values")
    if bool((state.num_tokens < 0).any()) or bool((state.num_segments < 0).any()):
        raise ValueError(f"{where}: negative token or segment counts")
    return state


def merge_memory_states(states: list[dict[int, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """Add the memories of machines that read different texts from empty: M = Σ M_i, z = Σ z_i.

    Exact where memories add, that is without the delta rule and without decay: the result equals one machine that read
    all texts as rows of one batch with a shared memory.

    Args:
        states: what `get_memory_state` returned on each machine.

    Returns:
        A state for `set_memory_state`.

    Raises:
        ValueError: no states, different layers or shapes, or a memory that does not add.
    """
    if not states:
        raise ValueError("merge_memory_states needs at least one state")
    for number, state in enumerate(states):
        if set(state) != set(states[0]):
            raise ValueError(
                f"state {number} has memory layers {sorted(state)}, state 0 has {sorted(states[0])}: they can't merge"
            )
        for index, entry in state.items():
            where = f"layer {index} of state {number}"
            check_same_layer(entry, states[0][index], where, "state 0")
            if not entry["additive"]:
                raise ValueError(f"{where} {WHY_NOT_ADDITIVE}")
    return {index: _merge_layer([state[index] for state in states]) for index in states[0]}


def _merge_layer(entries: list[dict[str, Any]]) -> dict[str, Any]:
    first = entries[0]
    merged = dict(first)
    frozen = first["frozen"]
    counter = torch.stack([entry["segment_counter"] for entry in entries]).amax(0)
    merged["segment_counter"] = counter
    for key in first:
        if key.endswith(("memories", "memory_norms")) or key == "token_counts":
            values = torch.stack([entry[key] for entry in entries])
            # Frozen memories are the same knowledge on every machine, which counts once.
            axis = 0 if first["segment_counter"].dim() == 0 else 1
            kept = frozen.view(*[1] * axis, -1, *[1] * (first[key].dim() - axis - 1))
            if not bool(((values == values[0]) | ~kept).all()):
                raise ValueError(f"{key}: the states hold different frozen memories: they can't merge")
            merged[key] = torch.where(kept, values[0], values.sum(0))
        elif key.startswith("current_"):
            merged[key] = find_written_memory(counter, first["segments_per_memory"], tuple(frozen.tolist()))
    return merged


def check_settings(entry: Any, expected: dict[str, Any], where: str, whose: str) -> None:
    """Refuse a layer dictionary of another version, layer kind or setting.

    Raises:
        ValueError: says which of them differs and what was expected.
    """
    if not isinstance(entry, dict) or not {"layer_kind", "version"} <= set(entry):
        raise ValueError(f"{where}: not a memory state of a layer (no layer_kind and version)")
    names = {"layer_kind": "layer kind"}
    for key in ("version", "layer_kind", "use_delta_rule", "additive", "segments_per_memory"):
        found, wanted = entry.get(key), expected[key]
        if type(found) is not type(wanted) or found != wanted:
            raise ValueError(f"{where}: {names.get(key, key)} {_name(found)}, {whose} has {wanted!r}")


def check_same_layer(entry: Any, expected: dict[str, Any], where: str, whose: str) -> None:
    """Refuse a layer dictionary of other settings, keys or shapes.

    Raises:
        ValueError: says which of them differs and what was expected.
    """
    check_settings(entry, expected, where, whose)
    if set(entry) != set(expected):
        odd = sorted(str(key) for key in set(entry) ^ set(expected))
        raise ValueError(f"{where}: keys {odd} do not match {whose}")
    for key, value in expected.items():
        found = entry[key]
        if not isinstance(value, Tensor):
            continue
        if not isinstance(found, Tensor):
            raise ValueError(f"{where}: {key} is no tensor")
        if value.shape != found.shape:
            raise ValueError(f"{where}: {key} has shape {tuple(found.shape)}, {whose} {tuple(value.shape)}")
        if value.is_floating_point() != found.is_floating_point():
            raise ValueError(f"{where}: {key} has dtype {found.dtype}, {whose} {value.dtype}")
        if key == "frozen" and whose == "state 0" and not torch.equal(value, found):
            raise ValueError(f"{where}: other memories are frozen than in {whose}")


def _name(value: Any) -> str:
    return f"of type {type(value).__name__}" if isinstance(value, Tensor | dict | list) else repr(value)
