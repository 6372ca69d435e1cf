"""The layer interface: a layer maps hidden states and memory to new hidden states and new memory, and holds no state.

A layer only has to define `forward` over whole segments; it can then be trained, streamed, used for generation and
saved. `step` and `end_segments` are an optional, faster path for streaming, with the same result. The decorator
`register_layer` gives the layer its name, which makes it available to `create_model`, the flags and the model files.

Legend: B rows, n segments per call, S tokens per segment, T tokens per step, D hidden size, Z vocabulary.
"""

import dataclasses
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from new_llm.config import PythiaConfig, UserError
from new_llm.config.sections import section
from new_llm.models.inputs import IGNORE_INDEX, mark_valid
from new_llm.models.ops.head_loss import linear_cross_entropy
from new_llm.models.ops.local_attention import add_parts, normalize
from new_llm.models.state import LayerMemory, MemoryFacts, choose_rows


@dataclass(frozen=True)
class ReadTokens:
    """A call's token ids, [B, n, S] or [B, T], and the head's weight, [Z, D], for layers that need them."""

    input_ids: Tensor
    head_weight: Tensor

    def score(self, hidden: Tensor, is_scored: Tensor) -> Tensor:
        """Mean loss of predicting the next token from `hidden` alone: −log softmax(W LN(h_t))[x_{t+1}].

        LN is a LayerNorm without weights, W the head.

        Args:
            hidden: h, [B, n, S, D].
            is_scored: which tokens count, [B, n, S]; the call's last token, which has no next one, never does.

        Returns:
            A scalar, in nats; 0 if no token counts.
        """
        targets = F.pad(self.input_ids.flatten(1)[:, 1:], (0, 1), value=IGNORE_INDEX)
        targets = targets.masked_fill(~is_scored.flatten(1), IGNORE_INDEX).flatten()
        rows = F.layer_norm(hidden, hidden.shape[-1:]).flatten(0, 2)
        total = linear_cross_entropy(rows, self.head_weight, targets, reduction="sum")
        return total / (targets != IGNORE_INDEX).sum().clamp_min(1)


@dataclass(frozen=True)
class Segments:
    """What a layer needs to know about a call's tokens besides their hidden states.

    Attributes:
        valid: padding mask, [B, n, S] bool, True at real tokens; None: no padding. Padding is on the right, so only the
            segment with a row's last token can be partly filled.
        write_last: whether to write the last segment to memory too.
        tokens: for layers that read token ids (see `Layer.reads_tokens`); None for others.
    """

    valid: Tensor | None = None
    write_last: bool = True
    tokens: ReadTokens | None = None

    def count_tokens(self, batch: int, num_segments: int, length: int, device: torch.device) -> Tensor:
        """Number of real tokens in each of the first `num_segments` segments, [batch, num_segments], int64."""
        if self.valid is None:
            return torch.full((batch, num_segments), length, device=device)
        return self.valid[:, :num_segments].sum(-1)

    def select(self, index: int, num_segments: int) -> "Segments":
        """One segment of the call."""
        only = slice(index, index + 1)
        return Segments(
            valid=None if self.valid is None else self.valid[:, only],
            write_last=self.write_last or index + 1 < num_segments,
            tokens=self.tokens and replace(self.tokens, input_ids=self.tokens.input_ids[:, only]),
        )


@dataclass(frozen=True)
class Step:
    """What a layer needs to know about new tokens that continue open segments.

    Attributes:
        offsets: number of tokens already in each row's segment, [B], int64.
        positions: positions of the new tokens within their segments, [B, T], int64.
        valid: padding mask, [B, T] bool, True at real tokens, which come first; None: no padding.
        longest: number of positions that `step` attends to: at least the length of the longest open segment after this
            step.
        segment_length: length of a full segment.
        start: the offset common to all rows if no token is masked; None: rows differ.
        tokens: for layers that stand before the head; None for others.
        shared: a cache through which layers share what is the same for all of them in this step, e.g. rotary angles.
    """

    offsets: Tensor
    positions: Tensor
    valid: Tensor | None
    longest: int
    segment_length: int
    start: int | None = None
    tokens: ReadTokens | None = None
    shared: dict[Any, Any] = field(default_factory=dict)

    def count_tokens(self) -> Tensor:
        """Number of new real tokens in each row, [B]."""
        return torch.full_like(self.offsets, self.positions.shape[1]) if self.valid is None else self.valid.sum(-1)


@dataclass(frozen=True)
class OpenInputs:
    """The inputs of the open segments, which a layer without a `step` of its own recomputes at each step.

    Attributes:
        hidden: [B, S, D], zero after a row's last token.
        counts: number of tokens in each row, [B].
        tokens: token ids [B, S], zero after a row's last token, and the head; None if the layer does not read them.
    """

    hidden: Tensor
    counts: Tensor
    tokens: ReadTokens | None = None

    def describe(self, longest: int, counts: Tensor, *, write_last: bool) -> Segments:
        """The first `longest` positions as the one segment of a call, with `counts` [B] real tokens per row."""
        tokens = self.tokens and replace(self.tokens, input_ids=self.tokens.input_ids[:, None, :longest])
        return Segments(mark_valid(counts, longest).unsqueeze(1), write_last, tokens)


class Layer(nn.Module, ABC):
    """Base class of all layers; most derive from `Block`. Register a subclass with `register_layer`.

    A layer with memory sets `has_memory` and defines `empty_memory`; its memory is a frozen dataclass of tensors
    derived from `LayerMemory`.
    """

    # set by `register_layer`
    kind: ClassVar[str]
    """The layer's name in configurations, reports and files."""
    options_type: ClassVar[type]
    """The dataclass of its options."""
    is_model_type: ClassVar[bool]
    """Whether the name is a model type of `create_model`."""
    settings: dict[str, Any]
    """The constructor's arguments, from which a saved model is rebuilt."""

    has_memory: bool = False
    """Whether the layer carries a memory from segment to segment."""
    passes_gradients: bool = True
    """Whether gradients flow through the memory into the segments that wrote it."""
    fills_model: ClassVar[bool] = False
    """Whether every layer of a model of this type is of this kind."""
    can_step_in_place: bool = False
    """Whether a CUDA graph can replay `step`: given a `Step` without `start` and `valid`, it must perform the same
    operations for every token and never synchronise with the device."""
    stands_before_head: ClassVar[bool] = False
    """Whether the layer stands between the final LayerNorm and the head; such layers come last in a model."""
    hidden_size: int
    auxiliary_loss: Tensor | None = None
    """A scalar that `forward` may set in training; the model adds it to its mean loss per token."""

    def __getstate__(self) -> dict[str, Any]:
        """The attributes to copy or pickle: all but the auxiliary loss, which belongs to a call's graph."""
        return {name: value for name, value in vars(self).items() if name != "auxiliary_loss"}

    @abstractmethod
    def forward(
        self, hidden: Tensor, memory: Any = None, segments: Segments | None = None
    ) -> tuple[Tensor, LayerMemory | None]:
        """Process whole segments; information passes from one to the next only through the memory.

        Args:
            hidden: [B, n, S, D].
            memory: each row's memory before the first segment (B rows); None: empty, or the layer has no memory.
            segments: the padding mask and what else is known of the tokens; None: no padding, all segments are written.

        Returns:
            The new hidden states, [B, n, S, D], and the memory after the last segment written.
        """

    # Memory

    def empty_memory(self, rows: int, like: Tensor) -> LayerMemory:
        """An empty memory for `rows` rows, on the device of `like` and in its dtype, but at least float32."""
        raise NotImplementedError(f"{type(self).__name__} has_memory, but does not define empty_memory")

    def plan_memory(self, dtype: torch.dtype) -> LayerMemory:
        """One row's memory on the meta device, which shows its shapes and dtypes, for a layer in this precision."""
        with torch.device("meta"):
            return self.empty_memory(1, torch.empty(0, dtype=dtype))

    @property
    def memory_bytes(self) -> int:
        """Bytes of one row's memory, in the layer's precision but at least float32."""
        dtype = next((parameter.dtype for parameter in self.parameters()), torch.float32)
        return self.plan_memory(dtype).num_bytes if self.has_memory else 0

    @property
    def memory_facts(self) -> MemoryFacts:
        """What the dictionary of the layer's memory holds besides tensors."""
        return MemoryFacts(layer_kind=self.kind)

    # Training

    @property
    def reads_tokens(self) -> bool:
        """Whether the layer, in its current mode, needs `Segments.tokens`."""
        return self.stands_before_head

    def gate_parameters(self) -> list[nn.Parameter]:
        """Parameters trained with the gates' learning rate and without weight decay, besides those of inner layers."""
        return []

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Weight matrices trained with the model's learning rate but without weight decay, besides inner layers'."""
        return []

    def gate_values(self) -> list[float]:
        """The share of each head's output that comes from memory; empty if the layer has no gates."""
        return []

    # Streams

    def step(self, hidden: Tensor, opened: Any, memory: Any, step: Step) -> tuple[Tensor, Any]:
        """Process further tokens of open segments, with the same result as `forward` over the whole segment.

        The default recomputes the open segment from its stored inputs; layers with a faster method override it.

        Args:
            hidden: the new tokens, [B, T, D].
            opened: the layer's state of the open segments, which may be changed in place; None: they are empty.
            memory: each row's memory before the open segment; None: empty, or the layer has no memory.
            step: where the new tokens go.

        Returns:
            The new hidden states [B, T, D] and the new state of the open segments.
        """
        if step.valid is None:
            row, column = (torch.arange(size, device=hidden.device) for size in step.positions.shape)
            row = row.unsqueeze(1)
        else:
            row, column = step.valid.nonzero(as_tuple=True)

        def store(before: Tensor | None, new: Tensor) -> Tensor:
            kept = new.new_zeros(len(new), step.segment_length, *new.shape[2:]) if before is None else before.clone()
            kept[row, step.positions[row, column]] = new[row, column]
            return kept

        tokens, before = step.tokens, opened and opened.tokens
        if tokens is not None:
            tokens = replace(tokens, input_ids=store(before and before.input_ids, tokens.input_ids))
        kept = store(opened and opened.hidden, hidden)
        opened = OpenInputs(kept, step.offsets + step.count_tokens(), tokens)
        segments = opened.describe(step.longest, opened.counts, write_last=False)
        whole, _ = self(opened.hidden[:, None, : step.longest], memory, segments)
        places = step.positions.clamp(max=step.longest - 1).unsqueeze(-1).expand_as(hidden)
        return whole[:, 0].gather(1, places), opened

    def end_segments(self, opened: Any, memory: Any, ended: Tensor) -> tuple[Any, Any]:
        """Write the segments that end here to memory, and clear them.

        Args:
            opened: the state that `step` returned; never None.
            memory: each row's memory before the open segment; None: empty, or the layer has no memory.
            ended: rows whose segment ends here, [B] bool.

        Returns:
            The new state of the open segments, and the memory after the write.
        """
        counts = opened.counts * ended
        if self.has_memory:
            longest = max(1, int(counts.max()))
            before = self.empty_memory(len(ended), opened.hidden) if memory is None else memory
            segments = opened.describe(longest, counts, write_last=True)
            _, written = self(opened.hidden[:, None, :longest], before, segments)
            assert written is not None
            memory = written.select_rows(counts > 0, before)
        kept = choose_rows(ended, torch.zeros_like(opened.hidden), opened.hidden)
        return replace(opened, hidden=kept, counts=opened.counts - counts), memory


class Attention(Layer):
    """The part of an `AttentionLayer` that mixes tokens, a layer without a name of its own.

    If it defines `initialize_features`, `initialize_weights` calls that after drawing the weights.
    """

    @abstractmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden: Tensor, memory: Any, segments: Segments
    ) -> tuple[Tensor, LayerMemory | None]:
        """See `Layer.forward`; all arguments are given."""


class AttentionLayer(Layer):
    """x + Attention(x); subclasses override `enter` (the attention's input) and `add` (the layer's output)."""

    attention: Any

    def enter(self, hidden: Tensor) -> Tensor:
        """The attention's input, from the layer's input."""
        return hidden

    def add(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The layer's output, from its input and the attention's output."""
        return hidden + mixed

    def forward(
        self, hidden: Tensor, memory: Any = None, segments: Segments | None = None
    ) -> tuple[Tensor, LayerMemory | None]:
        """See `Layer.forward`."""
        mixed, memory = self.attention(self.enter(hidden), memory, segments or Segments())
        return self.add(hidden, mixed), memory

    def step(self, hidden: Tensor, opened: Any, memory: Any, step: Step) -> tuple[Tensor, Any]:
        """See `Layer.step`."""
        mixed, opened = self.attention.step(self.enter(hidden), opened, memory, step)
        return self.add(hidden, mixed), opened

    def end_segments(self, opened: Any, memory: Any, ended: Tensor) -> tuple[Any, Any]:
        """See `Layer.end_segments`."""
        return self.attention.end_segments(opened, memory, ended)

    def empty_memory(self, rows: int, like: Tensor) -> LayerMemory:
        """See `Layer.empty_memory`."""
        return self.attention.empty_memory(rows, like)


class MLP(nn.Module):
    """W2 GELU(W1 x), with GPT-NeoX's parameter names and the exact GELU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden_size, intermediate_size)
        self.dense_4h_to_h = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden)))


class Block(AttentionLayer):
    """x + Attention(LN1 x) + MLP(LN2 x): GPT-NeoX's parallel residual around any attention.

    Args:
        hidden_size: D.
        num_heads: number of attention heads.
        intermediate_size: width of the MLP.
        rotary_pct: fraction of each head's dimensions that get rotary positions.
        rotary_emb_base: base of the rotary wavelengths.
        layer_norm_eps: ε of both LayerNorms.
        options: fields of the layer's `options_type`.

    Raises:
        ValueError: the heads do not divide the hidden size, the number of rotated dimensions is odd, or an option is
            out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        rotary_pct: float = PythiaConfig.rotary_pct,
        rotary_emb_base: float = PythiaConfig.rotary_emb_base,
        layer_norm_eps: float = PythiaConfig.layer_norm_eps,
        **options: Any,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        chosen = self.options_type(**options)
        self.attention = self.make_attention(chosen, hidden_size, num_heads, rotary_pct, rotary_emb_base)
        self.mlp = MLP(hidden_size, intermediate_size)

    @abstractmethod
    def make_attention(
        self, options: Any, hidden_size: int, num_heads: int, rotary_pct: float, rotary_emb_base: float, /
    ) -> Attention:
        """Build the attention for these options."""

    def enter(self, hidden: Tensor) -> Tensor:
        """LN1 x."""
        return self.input_layernorm(hidden)

    def add(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Attention(LN1 x) + MLP(LN2 x) + x."""
        return add_parts(self.mlp(normalize(self.post_attention_layernorm, hidden)), mixed, hidden)


def check_divides(what: str, number: int, hidden_size: int) -> int:
    """Width of a head: hidden_size / number. Raises ValueError unless that is a positive integer."""
    if number <= 0 or hidden_size % number:
        raise ValueError(f"{what}: {number} does not divide hidden_size {hidden_size}")
    return hidden_size // number


VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD
LayerType = TypeVar("LayerType", bound=type[Layer])
LAYER_KINDS: dict[str, type[Layer]] = {}
"""Layer classes by registered name."""


@section
class NoOptions:
    """For layers without options."""


def register_layer(
    name: str, *, options: type = NoOptions, model_type: bool = True
) -> Callable[[LayerType], LayerType]:
    """Class decorator: makes the name a model type and the options flags, and lets models with the layer be saved.

    Args:
        name: the layer's kind, as in `create_model` and `--models`.
        options: a dataclass of the keywords that the constructor takes besides the model's shape (see `build_layer`),
            with their defaults. Only plain values, since they are written to model files.
        model_type: whether the name is also a model type.

    Raises:
        ValueError: another class is already registered under this name.
    """

    def register(layer_type: LayerType) -> LayerType:
        taken = LAYER_KINDS.setdefault(name, layer_type)
        if (taken.__module__, taken.__qualname__) != (layer_type.__module__, layer_type.__qualname__):
            raise ValueError(f"layer kind {name!r} is already registered by {taken.__name__}")
        LAYER_KINDS[name] = layer_type  # a notebook cell that is run again redefines its layer
        layer_type.kind, layer_type.options_type, layer_type.is_model_type = name, options, model_type
        initialize: Any = layer_type.__init__
        signature = inspect.signature(initialize)

        @functools.wraps(initialize)
        def __init__(self: Layer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            initialize(self, *args, **kwargs)
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            _, *given = bound.arguments.items()
            named = {key: value for key, value in given if signature.parameters[key].kind != VAR_KEYWORD}
            settings = named | {key: value for key, value in bound.kwargs.items() if key not in named}
            names = {field.name for field in dataclasses.fields(options)}
            chosen = options(**{key: value for key, value in settings.items() if key in names})
            self.settings = settings | dataclasses.asdict(chosen)

        cast(Any, layer_type).__init__ = __init__
        return layer_type

    return register


def build_layer(layer_type: type[Layer], shape: PythiaConfig, **options: Any) -> Layer:
    """Build a layer that fits a model's shape.

    Of hidden_size, num_heads, intermediate_size, layer_norm_eps, rotary_pct and rotary_emb_base, the constructor gets
    those that it has as parameters. `options` are passed as well and take precedence.

    Raises:
        UserError: a required parameter of the constructor is neither of these nor an option.
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
    required = [
        name
        for name, one in named.items()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, VAR_KEYWORD)
    ]
    if unknown := sorted(set(required) - set(fields) - set(options)):
        raise UserError(
            f"{layer_type.__name__}: its constructor needs {', '.join(unknown)}, which is neither an option nor one of "
            f"{', '.join(fields)}"
        )
    return layer_type(**({name: value for name, value in fields.items() if name in named} | options))


def initialize_weights(model: nn.Module, initializer_range: float) -> None:
    """Draw a model's initial weights, in module order, from torch's global generator.

    Models that differ only in parameters that are not random, such as gates, get the same weights from the same seed.

    | parameter | initial value |
    |---|---|
    | weights of linear layers, embedding, head | normal(0, initializer_range), as in GPT-NeoX |
    | biases | 0 |
    | LayerNorm, RMSNorm | weight 1, bias 0 |
    | memory gate β | gate_init (set in the layer's constructor) |
    | W_q, W_k of a memory layer | drawn, then times query_key_init_scale; with match_query_key_init W_k = W_q |
    | q and k biases of a memory layer | query_key_init_bias |
    | bank weights | 0: all banks have equal weight (set in the layer's constructor) |
    | convolution over s tokens | uniform(−1/√s, 1/√s) |
    | decay of Gated DeltaNet | exp(A) uniform in 1 … 16, softplus(b) log-uniform in 0.001 … 0.1 |
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if hasattr(module, "initialize_features"):
            cast(Any, module).initialize_features()
