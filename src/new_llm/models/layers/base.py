"""What every layer is: x + Attention(LN1 x) + MLP(LN2 x), with a core that keeps nothing.

Legend: B rows, n segments of a call, S tokens of a segment, T tokens of a step, D hidden size.
"""

import dataclasses
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from new_llm.config import PythiaConfig
from new_llm.config.sections import section
from new_llm.models.state import MemoryState


@dataclass(frozen=True)
class Segments:
    """What a layer must know of a call's tokens beside their hidden states.

    Attributes:
        valid: real tokens, [B, n, S] bool, on the left of each segment; None: all are real.
        write_last: whether the last segment's write is wanted; without it the returned memory lacks that segment.
        token_rows: the head's rows of the tokens, [B, n, S, D]; None: no layer asks for them.
    """

    valid: Tensor | None = None
    write_last: bool = True
    token_rows: Tensor | None = None

    def count_tokens(self, batch: int, num_segments: int, length: int, device: torch.device) -> Tensor:
        """Real tokens of the first segments, which have `length` places, [batch, num_segments]."""
        if self.valid is None:
            return torch.full((batch, num_segments), length, device=device)
        return self.valid[:, :num_segments].sum(-1)


@dataclass(frozen=True)
class Step:
    """What a layer must know of tokens that continue open segments.

    Attributes:
        offsets: tokens that each row's segment already holds, [B], int64.
        positions: positions of the new tokens inside their segments, [B, T], int64.
        valid: real tokens, [B, T] bool, on the left; None: all are real.
        longest: tokens in the longest row's segment after this step.
        segment_length: tokens of a whole segment.
        start: offset of every row, where all are the same and no token is masked; None: rows differ.
        token_rows: the head's rows of the tokens, [B, T, D]; None: no layer asks for them.
        shared: what layers of one kind compute alike and share within the step.
    """

    offsets: Tensor
    positions: Tensor
    valid: Tensor | None
    longest: int
    segment_length: int
    start: int | None = None
    token_rows: Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict)

    def count_tokens(self) -> Tensor:
        """Real tokens of each row, [B]."""
        return torch.full_like(self.offsets, self.positions.shape[1]) if self.valid is None else self.valid.sum(-1)


class Attention(nn.Module, ABC):
    """The part of a layer that mixes tokens. Subclasses implement both paths with the same result."""

    @abstractmethod
    def forward(
        self, hidden: Tensor, memory: MemoryState | None, segments: Segments
    ) -> tuple[Tensor, MemoryState | None]:
        """Whole segments, [B, n, S, D], in one pass; see `Layer.forward`."""

    @abstractmethod
    def step(self, hidden: Tensor, opened: Any, memory: MemoryState | None, step: Step) -> tuple[Tensor, Any]:
        """Some more tokens, [B, T, D], of open segments; see `Layer.step`."""

    @abstractmethod
    def end_segments(self, opened: Any, memory: MemoryState | None, ended: Tensor) -> tuple[Any, MemoryState | None]:
        """Close the segments of rows `ended`; see `Layer.end_segments`."""


class MLP(nn.Module):
    """W2 GELU(W1 x), with GPT-NeoX's parameter names and the exact GELU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden_size, intermediate_size)
        self.dense_4h_to_h = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden)))


class Layer(nn.Module):
    """x + Attention(LN1 x) + MLP(LN2 x): GPT-NeoX's parallel residual around any attention.

    Args:
        attention: the part that mixes tokens.
        hidden_size: D.
        intermediate_size: width of the MLP.
        layer_norm_eps: ε of both LayerNorms.
    """

    kind: ClassVar[str]
    """The layer's name in configurations, reports and files; set by `register_layer`."""
    options_type: ClassVar[type]
    """The dataclass of its options; set by `register_layer`."""
    is_model_type: ClassVar[bool]
    """Whether `create_model` knows the layer by its name; set by `register_layer`."""
    follows_final_norm: ClassVar[bool] = False
    """Whether the layer, which can only be the last, stands between the final LayerNorm and the head."""
    settings: dict[str, Any]
    """The constructor's arguments, from which a saved model is made again; set by `register_layer`."""

    def __init__(
        self, attention: Attention, *, hidden_size: int, intermediate_size: int, layer_norm_eps: float
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = attention
        self.mlp = MLP(hidden_size, intermediate_size)

    def forward(
        self, hidden: Tensor, memory: MemoryState | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, MemoryState | None]:
        """Read whole segments; the memory is the only path from one to the next.

        Args:
            hidden: [B, n, S, D], or [B, S, D] for one segment.
            memory: each row's memory before the first segment (rows B); None: empty, or the layer has none.
            segments: which tokens are real; None: all, and all segments are written.

        Returns:
            The new hidden states, in hidden's shape, and the memory after the last segment.
        """
        if hidden.dim() == 3:
            whole, memory = self(hidden.unsqueeze(1), memory, segments)
            return whole.squeeze(1), memory
        return self.read_segments(hidden, memory, segments or Segments())

    def read_segments(
        self, hidden: Tensor, memory: MemoryState | None, segments: Segments
    ) -> tuple[Tensor, MemoryState | None]:
        """`forward` for hidden states [B, n, S, D]."""
        mixed, memory = self.attention(self.input_layernorm(hidden), memory, segments)
        return self._add(hidden, mixed), memory

    def step(self, hidden: Tensor, opened: Any, memory: MemoryState | None, step: Step) -> tuple[Tensor, Any]:
        """Read some more tokens of open segments, with the result of `forward` for the whole segment.

        Args:
            hidden: [B, T, D].
            opened: what the layer keeps of the open segments; None: they are empty. It is used up by the call.
            memory: each row's memory before the open segment.
            step: where the tokens stand.

        Returns:
            The new hidden states [B, T, D] and what the layer keeps now.
        """
        mixed, opened = self.attention.step(self.input_layernorm(hidden), opened, memory, step)
        return self._add(hidden, mixed), opened

    def end_segments(self, opened: Any, memory: MemoryState | None, ended: Tensor) -> tuple[Any, MemoryState | None]:
        """Write and clear the open segments of some rows.

        Args:
            opened: what `step` returned.
            memory: each row's memory before the open segment.
            ended: rows whose segment ends here, [B] bool.

        Returns:
            What the layer keeps now, and the memory after the write.
        """
        return self.attention.end_segments(opened, memory, ended)

    def _add(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(hidden)) + mixed + hidden


LayerType = TypeVar("LayerType", bound=type[Layer])
LAYER_KINDS: dict[str, type[Layer]] = {}
"""The layer classes by the name they are registered with."""


@section
class NoOptions:
    """The options of a layer that has none."""


def register_layer(
    name: str, *, options: type = NoOptions, model_type: bool = True
) -> Callable[[LayerType], LayerType]:
    """Class decorator: the name becomes a model type, its options become flags, and models with the layer are saved.

    Args:
        name: the layer's kind, as `create_model` and `--models` take it.
        options: a dataclass of the keywords that the constructor takes beside the model's shape (see `build_layer`),
            with their defaults; plain values, since they are written to model files.
        model_type: whether a model of Pythia layers with some of this kind is a model type of its own.

    Raises:
        ValueError: another class has this name.
    """

    def register(layer_type: LayerType) -> LayerType:
        taken = LAYER_KINDS.setdefault(name, layer_type)
        if (taken.__module__, taken.__qualname__) != (layer_type.__module__, layer_type.__qualname__):
            raise ValueError(f"layer kind {name!r} is taken by {taken.__name__}")
        LAYER_KINDS[name] = layer_type  # a notebook's cell may define its layer again
        layer_type.kind, layer_type.options_type, layer_type.is_model_type = name, options, model_type
        _record_settings(layer_type)
        return layer_type

    return register


def _record_settings(layer_type: type[Layer]) -> None:
    """Let each new layer keep its constructor's arguments, defaults included, as `settings`."""
    initialize: Any = layer_type.__init__
    signature = inspect.signature(initialize)

    @functools.wraps(initialize)
    def __init__(self: Layer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        initialize(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        settings: dict[str, Any] = {}
        for parameter, value in list(bound.arguments.items())[1:]:
            settings |= (
                value if signature.parameters[parameter].kind == inspect.Parameter.VAR_KEYWORD else {parameter: value}
            )
        names = {field.name for field in dataclasses.fields(layer_type.options_type)}
        given = {key: value for key, value in settings.items() if key in names}
        self.settings = settings | dataclasses.asdict(cast(Any, layer_type.options_type(**given)))

    cast(Any, layer_type).__init__ = __init__


def build_layer(layer_type: type[Layer], shape: PythiaConfig, **options: Any) -> Layer:
    """A layer of a model's shape: of `shape` its constructor is given the fields that it names.

    It may name hidden_size, num_heads, intermediate_size, layer_norm_eps, rotary_pct and rotary_emb_base.
    """
    fields = {
        "hidden_size": shape.hidden_size,
        "num_heads": shape.num_attention_heads,
        "intermediate_size": shape.intermediate_size,
        "layer_norm_eps": shape.layer_norm_eps,
        "rotary_pct": shape.rotary_pct,
        "rotary_emb_base": shape.rotary_emb_base,
    }
    named = inspect.signature(layer_type).parameters
    return layer_type(**{name: value for name, value in fields.items() if name in named}, **options)


def check_order(layers: Sequence[Layer]) -> None:
    """Refuse layers of which one that follows the final LayerNorm is not the last.

    Raises:
        ValueError: there is one.
    """
    for index, layer in enumerate(layers[:-1]):
        if layer.follows_final_norm:
            raise ValueError(f"layers: {layer.kind} follows the final LayerNorm and can only be the last, not {index}")


def check_divides(what: str, number: int, hidden_size: int) -> int:
    """The width of a head.

    Raises:
        ValueError: the number of heads is not positive or does not divide the hidden size.
    """
    if number <= 0 or hidden_size % number:
        raise ValueError(f"{what}: {number} does not divide hidden_size {hidden_size}")
    return hidden_size // number
