"""The cache of `generate()`: a `MemoryStream`, which carries memory, running sums and key-value state together."""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from new_llm.models.stream import MemoryStream
from new_llm.models.transformer import TransformerLM


class StreamCache(Cache):
    """What a model has read so far, row by row, of constant size beyond a segment; rows begin with the model's held
    memory.

    Rows can be selected and repeated (beam search), and the cache can be copied (`copy.deepcopy`, for several
    continuations of one prompt). It can't be shortened: a memory does not forget its last tokens.
    """

    is_compileable = False  # pyright: ignore
    is_croppable = False  # pyright: ignore

    def __init__(self, model: TransformerLM, batch_size: int) -> None:
        if issubclass(Cache, nn.Module):  # up to transformers 4.48
            super().__init__()
        self.layers = []
        self.stream = MemoryStream(model, batch_size)
        self.num_columns = 0
        self.last_hidden: Tensor | None = None

    def feed(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Hidden states [B, T, D] of the next columns [B, T]; a masked one has those of the last real token before."""
        hidden = self.stream.feed_hidden(input_ids, attention_mask)
        hidden = hold_over_padding(hidden, attention_mask, self.last_hidden)
        self.last_hidden = hidden[:, -1]
        self.num_columns += input_ids.shape[1]
        return hidden

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read, padding included."""
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest text."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int | None:
        """None: there is no longest text."""
        return None

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return self.stream.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.num_columns > 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what row `beam_idx[i]` has read."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices, in this order; one may come several times."""
        self.stream = select_stream_rows(self.stream, indices)
        if self.last_hidden is not None:
            self.last_hidden = pick_rows(self.last_hidden, indices, {})

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, one after another."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Begin anew from the model's held memory."""
        self.__init__(self.stream.model, self.batch_size)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what a memory took in can't be taken out again."""
        raise ValueError("the cache of a memory model can't be shortened: copy it before the tokens are read")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the model's own layers write the cache."""
        raise ValueError("StreamCache holds no keys and values of other layers: pass it as past_key_values")

    def __deepcopy__(self, memo: dict[int, Any]) -> "StreamCache":
        """A copy that reads on by itself, with the same model."""
        copied = StreamCache(self.stream.model, self.batch_size)
        copied.num_columns, copied.last_hidden = self.num_columns, self.last_hidden
        copied.stream = select_stream_rows(self.stream, torch.arange(self.batch_size))
        return copied


def hold_over_padding(hidden: Tensor, attention_mask: Tensor | None, before: Tensor | None = None) -> Tensor:
    """Give masked columns of [B, T, D] the hidden state of the last real token before them, perhaps in `before`, [B,
    D].

    Generation continues from the last column. Where prompts are padded on the right that is padding, which has no
    meaning of its own; with this the row continues from its last real token.
    """
    if attention_mask is None or bool(attention_mask[:, -1].all()):
        return hidden
    before = torch.zeros_like(hidden[:, 0]) if before is None else before
    columns = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    last = torch.where(attention_mask.to(hidden.device, torch.bool), columns, 0).cummax(dim=1).values
    held = torch.cat((before.unsqueeze(1), hidden), dim=1)
    return held.gather(1, last.unsqueeze(-1).expand(-1, -1, hidden.shape[2]))


def select_stream_rows(stream: MemoryStream, indices: Tensor) -> MemoryStream:
    """A stream of copies of some rows of another, which stays as it is."""
    selected = copy.copy(stream)
    seen: dict[int, Any] = {}
    selected.batch_size = len(indices)
    for name in ("memories", "opened", "offsets", "num_tokens"):
        setattr(selected, name, pick_rows(getattr(stream, name), indices, seen))
    return selected


def pick_rows(value: Any, indices: Tensor, seen: dict[int, Any]) -> Any:
    """Copy rows of all tensors in nested dataclasses, lists, tuples and mappings; other values stay.

    `seen` holds copies by the id of what they were made from: one tensor in two places stays one, since layers write
    theirs in place.
    """
    if id(value) in seen:
        return seen[id(value)]
    picked: Any
    if isinstance(value, Tensor):
        picked = value.index_select(0, indices.to(value.device)) if value.dim() else value.clone()
    elif isinstance(value, dict):
        picked = {key: pick_rows(part, indices, seen) for key, part in value.items()}
    elif type(value) in (list, tuple):
        picked = type(value)([pick_rows(part, indices, seen) for part in value])
    elif dataclasses.is_dataclass(value):
        whole: Any = value
        names = [field.name for field in dataclasses.fields(whole)]
        picked = dataclasses.replace(whole, **{name: pick_rows(getattr(whole, name), indices, seen) for name in names})
    else:
        return value
    seen[id(value)] = picked
    return picked
