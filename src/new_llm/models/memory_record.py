"""What a memory file says beside its tensors, as the string metadata of a safetensors file.

```
format               new-llm-memory
format_version       1
weights_fingerprint  sha256 of the weights that filled the memory
segment_length       64
tokens_seen          1048576
segments_seen        16384
rows                 shared, or the number of rows that have a memory each
program_version      0.1.0
created              2026-01-31T12:00:00+00:00
layers               [{"layer": 0, "kind": "infini", "version": 1, "num_memories": 1, ...}]
sha256               of all of this and the tensors
```
"""

import dataclasses
import datetime
import json
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from new_llm import __version__
from new_llm.config import UserError
from new_llm.config.files import shorten
from new_llm.config.sections import describe_validation_error, section
from new_llm.models.layers import LAYER_KINDS, MemoryLayer
from new_llm.models.state import STATE_VERSION, MemoryFacts, entry_is_per_row

FORMAT = "new-llm-memory"
FORMAT_VERSION = 1
SHARED = "shared"
"""What `rows` says where all rows share one memory."""
MAX_COUNT = 2**53
"""Sizes and counts beyond this are nonsense."""

Size = Annotated[int, Field(gt=0, lt=MAX_COUNT)]
Count = Annotated[int, Field(ge=0, lt=MAX_COUNT)]
ShortText = Annotated[str, Field(max_length=100)]


@section
class LayerRecord:
    """One layer's memory: its kind, shape and the settings that wrote it."""

    layer: Count
    """Index in the model."""
    kind: ShortText
    """The layer kind."""
    version: Count
    """Version of the layer's state."""
    num_memories: Size
    """N."""
    num_memory_heads: Size
    """H."""
    head_size: Size
    """K."""
    value_size: Size
    """V."""
    segments_per_memory: Size
    """Segments written into one memory before the next."""
    use_delta_rule: bool
    """Whether writes subtract what the memory holds."""
    decay: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None
    """w of each head, fixed or learned: what a segment's write leaves of the memory; None: all of it."""

    def __post_init__(self) -> None:
        if self.decay is not None and len(self.decay) != self.num_memory_heads:
            raise UserError(f"layer {self.layer}: decay has {len(self.decay)} entries, not {self.num_memory_heads}")
        if self.version != STATE_VERSION:
            raise UserError(f"layer {self.layer}: state version {self.version}, this program reads {STATE_VERSION}")
        kind = LAYER_KINDS.get(self.kind)
        if kind is None or not issubclass(kind, MemoryLayer):
            known = ", ".join(sorted(name for name, layer in LAYER_KINDS.items() if issubclass(layer, MemoryLayer)))
            raise UserError(f"layer {self.layer}: unknown kind of memory layer {self.kind!r}; known are {known}")

    @property
    def facts(self) -> MemoryFacts:
        """What the layer's state dictionary repeats of this."""
        layer_type: Any = LAYER_KINDS[self.kind]
        return layer_type.make_facts(
            use_delta_rule=self.use_delta_rule,
            has_decay=self.decay is not None,
            segments_per_memory=self.segments_per_memory,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """As `describe_memory_options` gives them."""
        names = (
            "num_memories",
            "num_memory_heads",
            "head_size",
            "value_size",
            "segments_per_memory",
            "use_delta_rule",
        )
        decay = None if self.decay is None else list(self.decay)
        return {name: getattr(self, name) for name in names} | {"decay": decay}

    def tensor_shapes(self, rows: int | None) -> dict[str, tuple[int, ...]]:
        """The tensors of this layer in the state dictionary: name → shape."""
        lead = () if rows is None else (rows,)
        shape = (self.num_memories, self.num_memory_heads, self.head_size)
        facts = self.facts
        return {
            facts.key("memories"): (*lead, *shape, self.value_size),
            facts.key("norms"): (*lead, *shape),
            "token_counts": (*lead, self.num_memories),
            "segment_counter": lead,
            "segments_seen": lead,
        }


@section
class MemoryRecord:
    """A memory file's metadata."""

    program_version: ShortText
    """The program that wrote the file."""
    created: ShortText
    """When, UTC, ISO 8601."""
    weights_fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Sha256 of the weights that filled the memory."""
    segment_length: Size
    """Tokens in a segment of the model that filled it."""
    rows: Size | None
    """Rows that have a memory each; None: all share one."""
    tokens_seen: Count
    """Tokens in the memory, all rows together."""
    segments_seen: Count
    """Segments in the memory, all rows and merged files together."""
    layers: Annotated[tuple[LayerRecord, ...], Field(min_length=1)]
    """The memory layers, by their index."""

    def __post_init__(self) -> None:
        indices = [layer.layer for layer in self.layers]
        if indices != sorted(set(indices)):
            raise UserError(f"layers {indices} are not in order, each once")


def make_record(
    state: dict[int, dict[str, Any]],
    *,
    settings: dict[int, dict[str, Any]],
    weights_fingerprint: str,
    segment_length: int,
) -> MemoryRecord:
    """Describe a state of `get_memory_state` whose layers have the settings of `describe_memory_options`."""
    per_row = [entry["segment_counter"].shape[0] for entry in state.values() if entry_is_per_row(entry)]
    tokens, segments = count_seen(state)
    return MemoryRecord(
        program_version=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        weights_fingerprint=weights_fingerprint,
        segment_length=segment_length,
        rows=per_row[0] if per_row else None,
        tokens_seen=tokens,
        segments_seen=segments,
        layers=tuple(
            LayerRecord(
                layer=index,
                kind=entry["layer_kind"],
                version=entry["version"],
                **settings[index],
            )
            for index, entry in sorted(state.items())
        ),
    )


def count_seen(state: dict[int, dict[str, Any]]) -> tuple[int, int]:
    """Tokens and segments in the memory, all rows and merged files together, of the layer that has seen most."""
    # Python's integers: a broken file's counts can't overflow here.
    tokens = max(sum(entry["token_counts"].flatten().tolist()) for entry in state.values())
    segments = max(sum(entry["segments_seen"].flatten().tolist()) for entry in state.values())
    return tokens, segments


def format_record(record: MemoryRecord) -> dict[str, str]:
    """The record as metadata."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    layers = [dataclasses.asdict(layer) for layer in values.pop("layers")]
    values["rows"] = SHARED if record.rows is None else record.rows
    return {name: str(value) for name, value in values.items()} | {
        "layers": json.dumps(layers, separators=(",", ":"), allow_nan=False)
    }


_RECORD = TypeAdapter(MemoryRecord)
_LAYERS = TypeAdapter(tuple[LayerRecord, ...])


def parse_record(metadata: dict[str, str], where: str) -> MemoryRecord:
    """Read what `format_record` wrote; nothing in it is trusted.

    Raises:
        UserError: a key is missing, unknown or of the wrong form, or a version or layer kind is unknown here.
    """
    values: dict[str, Any] = dict(metadata)
    try:
        values["layers"] = _LAYERS.validate_json(values.get("layers", ""), strict=True)
        if values.get("rows") == SHARED:
            values["rows"] = None
        return _RECORD.validate_python(values)
    except ValidationError as error:
        message = str(describe_validation_error(error, where))
    except UserError as error:
        message = f"{where}: {error}"
    raise UserError(shorten(message))
