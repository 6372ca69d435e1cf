"""The interface of layers: a layer maps hidden states and memory to new hidden states and memory, and keeps nothing.

A layer only has to define `forward` over whole segments; it can then be trained, streamed, used for generation and
saved. `step` and `end_segments` are an optional fast path for streams with the same result. Its registration, by one
decorator, gives it a name, from which everything else is derived.

Legend: B rows, n segments of a call, S tokens of a segment, T tokens of a step, D hidden size, Z vocabulary.
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
from new_llm.models.state import LayerMemory, MemoryFacts, choose_rows


@dataclass(frozen=True)
class ReadTokens:
    """The tokens of a call, [B, n, S] or [B, T], and the head's weight, [Z, D], for layers that read them."""

    input_ids: Tensor
    head_weight: Tensor

    def score(self, hidden: Tensor, is_scored: Tensor) -> Tensor:
        """The mean of −log softmax(W LN(h_t))[x_{t+1}]: how well some vectors alone predict the next token.

        LN is a LayerNorm without weights, W the head.

        Args:
            hidden: h, [B, n, S, D].
            is_scored: which tokens count, [B, n, S]; the call's last one has no next token.

        Returns:
            One number, nats; 0 where no token counts.
        """
        targets = F.pad(self.input_ids.flatten(1)[:, 1:], (0, 1), value=IGNORE_INDEX)
        targets = targets.masked_fill(~is_scored.flatten(1), IGNORE_INDEX).flatten()
        rows = F.layer_norm(hidden, hidden.shape[-1:]).flatten(0, 2)
        total = linear_cross_entropy(rows, self.head_weight, targets, reduction="sum")
        return total / (targets != IGNORE_INDEX).sum().clamp_min(1)


@dataclass(frozen=True)
class Segments:
    """What a layer needs to know about a call's tokens beside their hidden states.

    Attributes:
        valid: real tokens, [B, n, S] bool, on the left of each segment; None: all are real. Segments before a row's
            last token are full.
        write_last: whether to write the last segment too; if False, the returned memory lacks it.
        tokens: for layers that read them; None for others.
    """

    valid: Tensor | None = None
    write_last: bool = True
    tokens: ReadTokens | None = None

    def count_tokens(self, batch: int, num_segments: int, length: int, device: torch.device) -> Tensor:
        """Real tokens of each of the first segments, which are `length` long, [batch, num_segments]."""
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
    """What a layer needs to know about tokens that continue open segments.

    Attributes:
        offsets: tokens that each row's segment already holds, [B], int64.
        positions: positions of the new tokens inside their segments, [B, T], int64.
        valid: real tokens, [B, T] bool, on the left; None: all are real.
        longest: tokens in the longest row's segment after this step, or more: how far `step` looks.
        segment_length: tokens of a whole segment.
        start: the offset that all rows share, where no token is masked; None: rows differ.
        tokens: for layers before the head; None for others.
        shared: values that equal layers compute once per step, such as rotary angles.
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
        """Real tokens of each row, [B]."""
        return torch.full_like(self.offsets, self.positions.shape[1]) if self.valid is None else self.valid.sum(-1)


@dataclass(frozen=True)
class OpenInputs:
    """The inputs of the open segments, which a layer without a fast path runs again at each step.

    Attributes:
        hidden: [B, S, D], zero after a row's last token.
        counts: tokens of each row, [B].
        tokens: ids [B, S], likewise, and the head; None where the layer does not read them.
    """

    hidden: Tensor
    counts: Tensor
    tokens: ReadTokens | None = None

    def describe(self, longest: int, counts: Tensor, *, write_last: bool) -> Segments:
        """The open segments as segments of a call, with `counts` tokens in each row."""
        tokens = self.tokens and replace(self.tokens, input_ids=self.tokens.input_ids[:, None, :longest])
        return Segments(mark_valid(counts, longest).unsqueeze(1), write_last, tokens)


def _leave_out_loss(self: nn.Module) -> dict[str, Any]:
    """What a copy of a layer, or a pickled one, takes: not the auxiliary loss, which belongs to a call's graph."""
    return {name: value for name, value in vars(self).items() if name != "auxiliary_loss"}


class Layer(nn.Module, ABC):
    """The interface of a layer; `Block` is a base around an attention. Register a kind with `register_layer`.

    A layer with memory sets `has_memory` and defines `empty_memory`; its memory is a frozen dataclass of tensors
    derived from `LayerMemory`.
    """

    kind: ClassVar[str]
    """The layer's name in configurations, reports and files."""
    options_type: ClassVar[type]
    """The dataclass of its options."""
    is_model_type: ClassVar[bool]
    """Whether the name is a model type of `create_model`."""
    settings: dict[str, Any]
    """The constructor's arguments, from which a saved model is rebuilt; like the three above of `register_layer`."""
    has_memory: bool = False
    """Whether the layer carries a memory from segment to segment."""
    passes_gradients: bool = True
    """Whether gradients flow through the memory into the segments that wrote it."""
    fills_model: ClassVar[bool] = False
    """Whether the models of its type are made of such layers alone."""
    can_step_in_place: bool = False
    """Whether `step`, given a `Step` without `start` and `valid`, does the same operations for every token and reads
    nothing back from the device, so that a CUDA graph can replay it."""
    stands_before_head: ClassVar[bool] = False
    """Whether the layer stands between the final LayerNorm and the head; such layers come last."""
    hidden_size: int
    auxiliary_loss: Tensor | None = None
    """A scalar loss that `forward` may set in training; the model adds it to the loss of each token."""
    __getstate__ = _leave_out_loss

    @abstractmethod
    def forward(
        self, hidden: Tensor, memory: Any = None, segments: Segments | None = None
    ) -> tuple[Tensor, LayerMemory | None]:
        """Read whole segments; memory is the only path from one to the next.

        Args:
            hidden: [B, n, S, D].
            memory: each row's memory before the first segment (rows B); None: empty, or the layer has none.
            segments: which tokens are real; None: all, and all segments are written.

        Returns:
            The new hidden states, in hidden's shape, and the memory after the last segment.
        """

    # Memory

    def empty_memory(self, rows: int, like: Tensor) -> LayerMemory:
        """Empty memories for `rows` rows, on the device of `like` and in its dtype, float32 at least."""
        raise NotImplementedError(f"{type(self).__name__} has_memory, but does not define empty_memory")

    def plan_memory(self, dtype: torch.dtype) -> LayerMemory:
        """The shapes and dtypes of one memory of a layer in this precision, on the meta device."""
        with torch.device("meta"):
            return self.empty_memory(1, torch.empty(0, dtype=dtype))

    @property
    def memory_bytes(self) -> int:
        """Bytes of one memory in the layer's precision, float32 at least."""
        dtype = next((parameter.dtype for parameter in self.parameters()), torch.float32)
        return self.plan_memory(dtype).num_bytes if self.has_memory else 0

    @property
    def memory_facts(self) -> MemoryFacts:
        """What the layer's memory dictionary holds beside its tensors."""
        return MemoryFacts(layer_kind=self.kind)

    # Training

    @property
    def reads_tokens(self) -> bool:
        """Whether `Segments.tokens` is wanted now."""
        return self.stands_before_head

    def gate_parameters(self) -> list[nn.Parameter]:
        """Parameters trained at the gates' learning rate, without weight decay."""
        return []

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Matrices trained at the model's learning rate, but without weight decay."""
        return []

    def gate_values(self) -> list[float]:
        """The share of memory in each head's output; empty where there are no gates."""
        return []

    # Streams

    def step(self, hidden: Tensor, opened: Any, memory: Any, step: Step) -> tuple[Tensor, Any]:
        """Read more tokens of open segments, with the same result as `forward` over the whole segment.

        This default runs the open segment again from its stored inputs; layers with a faster way override it.

        Args:
            hidden: [B, T, D].
            opened: the layer's state of the open segments; None: they are empty. The call may change it in place.
            memory: each row's memory before the open segment.
            step: the positions of the tokens.

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
        """Write and clear the open segments of some rows.

        Args:
            opened: what `step` returned; not None.
            memory: each row's memory before the open segment.
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


class Attention(nn.Module, ABC):
    """The part of a layer that mixes tokens.

    With memory it also defines `empty_memory`, and for fast streams `step` and `end_segments`, as a `Layer` does. Its
    `initialize_features`, if any, adjusts freshly drawn weights.
    """

    auxiliary_loss: Tensor | None = None
    """As `Layer.auxiliary_loss`."""
    __getstate__ = _leave_out_loss
    has_step: ClassVar[bool] = False
    """Whether there are `step` and `end_segments`, as in a class that defines `step`; without them the layer runs open
    segments again."""
    step: Any
    end_segments: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.has_step = vars(cls).get("has_step", cls.has_step or "step" in vars(cls))

    @abstractmethod
    def forward(self, hidden: Tensor, memory: Any, segments: Segments) -> tuple[Tensor, LayerMemory | None]:
        """Whole segments, [B, n, S, D], in one pass; see `Layer.forward`."""

    def gate_parameters(self) -> list[nn.Parameter]:
        """As `Layer.gate_parameters`."""
        return []

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """As `Layer.undecayed_parameters`."""
        return []


class AttentionLayer(Layer):
    """x + Attention(x); subclasses change what the attention reads and what is added."""

    attention: Any

    def enter(self, hidden: Tensor) -> Tensor:
        """What the attention reads."""
        return hidden

    def add(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The layer's output from its input and the attention's output."""
        return hidden + mixed

    def forward(
        self, hidden: Tensor, memory: Any = None, segments: Segments | None = None
    ) -> tuple[Tensor, LayerMemory | None]:
        """As `Layer.forward`."""
        mixed, memory = self.attention(self.enter(hidden), memory, segments or Segments())
        return self.add(hidden, mixed), memory

    def step(self, hidden: Tensor, opened: Any, memory: Any, step: Step) -> tuple[Tensor, Any]:
        """As `Layer.step`."""
        if not self.attention.has_step:
            return super().step(hidden, opened, memory, step)
        mixed, opened = self.attention.step(self.enter(hidden), opened, memory, step)
        return self.add(hidden, mixed), opened

    def end_segments(self, opened: Any, memory: Any, ended: Tensor) -> tuple[Any, Any]:
        """As `Layer.end_segments`."""
        closer = self.attention if self.attention.has_step else super()
        return closer.end_segments(opened, memory, ended)

    def empty_memory(self, rows: int, like: Tensor) -> LayerMemory:
        """As `Layer.empty_memory`."""
        return self.attention.empty_memory(rows, like)

    def gate_parameters(self) -> list[nn.Parameter]:
        """Those of the attention."""
        return self.attention.gate_parameters()

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Those of the attention."""
        return self.attention.undecayed_parameters()


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
        num_heads: heads of softmax attention.
        intermediate_size: width of the MLP.
        rotary_pct: share of each head that is rotated.
        rotary_emb_base: base of the rotary wavelengths.
        layer_norm_eps: ε of both LayerNorms.
        options: fields of the kind's options.

    Raises:
        ValueError: heads that do not divide the hidden size, an odd number of dimensions to rotate, or an option out of
            range.
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
        """The attention of a layer with these options."""

    def enter(self, hidden: Tensor) -> Tensor:
        """LN1 x."""
        return self.input_layernorm(hidden)

    def add(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Attention(LN1 x) + MLP(LN2 x) + x."""
        return self.mlp(self.post_attention_layernorm(hidden)) + mixed + hidden


def check_divides(what: str, number: int, hidden_size: int) -> int:
    """The width of a head; a ValueError unless the number of heads is positive and divides the hidden size."""
    if number <= 0 or hidden_size % number:
        raise ValueError(f"{what}: {number} does not divide hidden_size {hidden_size}")
    return hidden_size // number


VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD
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
    """A layer of a model's shape: its constructor is given the fields that it names, which `options` override.

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
    required = [
        name
        for name, one in named.items()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, VAR_KEYWORD)
    ]
    if unknown := sorted(set(required) - set(fields) - set(options)):
        raise UserError(
            f"{layer_type.__name__}: its constructor needs {', '.join(unknown)}: neither an option nor one of "
            f"{', '.join(fields)}"
        )
    return layer_type(**({name: value for name, value in fields.items() if name in named} | options))


def initialize_weights(model: nn.Module, initializer_range: float) -> None:
    """Draw the weights of a model, in the order of its modules, from torch's global generator.

    With the same seed, models that differ only in parameters that are not drawn (gates) get the same weights.

    | parameter | initial value |
    |---|---|
    | weights of linear layers, embedding, head | normal(0, initializer_range), as GPT-NeoX |
    | biases | 0 |
    | LayerNorm, RMSNorm | weight 1, bias 0 |
    | memory gate β | gate_init (set by the layer) |
    | W_q, W_k of a memory layer | as drawn, times query_key_init_scale; with match_query_key_init W_k = W_q |
    | its biases of q and k | query_key_init_bias |
    | bank weights | 0: all banks weigh the same (set by the layer) |
    | a convolution of s tokens | uniform(−1/√s, 1/√s) |
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
