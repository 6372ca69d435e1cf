"""The shape of a model and the options of its memory."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.sections import section, short


class ModelType(StrEnum):
    """A kind of model that `create_model` and the experiment know."""

    PYTHIA = "pythia"
    INFINI = "infini"
    MULTI_MEMORY = "multi_memory"
    HIERARCHICAL = "hierarchical"
    SELECTIVE = "selective"
    DEEP_PYTHIA = "deep_pythia"
    TOKEN_MEMORY = "token_memory"


TOKEN_MEMORY_HEADS = 4
"""Memory heads of a token_memory model where none are given."""

COMMON_MEMORY_OPTIONS = (
    "memory_layers",
    "use_delta_rule",
    "use_key_shift",
    "normalize_keys",
    "num_memory_heads",
    "gate_init",
    "query_key_init_scale",
    "query_key_init_bias",
    "match_query_key_init",
    "memory_epsilon",
)

# Which of `MemoryConfig`'s and `SelectiveConfig`'s options each model takes. Every model also takes `segment_length`.
MODEL_OPTIONS: dict[ModelType, tuple[str, ...]] = {
    ModelType.PYTHIA: (),
    ModelType.INFINI: (
        *COMMON_MEMORY_OPTIONS,
        "num_memory_banks",
        "segments_per_bank",
        "use_alibi",
        "alibi_scale",
    ),
    ModelType.MULTI_MEMORY: (*COMMON_MEMORY_OPTIONS, "num_memories", "selection_temperature"),
    ModelType.HIERARCHICAL: (*COMMON_MEMORY_OPTIONS, "num_memories", "selection_temperature"),
    ModelType.SELECTIVE: ("skip_interval", "earlier_pass_weight"),
    ModelType.DEEP_PYTHIA: ("skip_interval",),
    ModelType.TOKEN_MEMORY: (
        "num_memory_heads",
        "memory_key_size",
        "read_gate_init",
        "read_scale_init",
        "query_key_init_scale",
        "retention_init",
    ),
}


@section
class PythiaConfig:
    """The shape of a Pythia (GPT-NeoX) model; the defaults are EleutherAI/pythia-70m's.

    Names are those of Hugging Face's `GPTNeoXConfig`.
    """

    vocab_size: Annotated[int, Field(gt=0)] = 50304
    """Rows of the embedding and of the head."""
    hidden_size: Annotated[int, Field(gt=0)] = 512
    """Width D of the residual stream."""
    num_hidden_layers: Annotated[int, Field(gt=0)] = 6
    """Layers; in a memory model those of `memory_layers` have memory."""
    num_attention_heads: Annotated[int, Field(gt=0)] = 8
    """Heads of softmax attention."""
    intermediate_size: Annotated[int, Field(gt=0)] = 2048
    """Width of the MLP."""
    max_position_embeddings: Annotated[int, Field(gt=0)] = 2048
    """The longest segment that rotary positions are meant for, in tokens."""
    rotary_pct: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of each head's width that is rotated."""
    rotary_emb_base: Annotated[float, Field(gt=1)] = 10000.0
    """Base of the rotary wavelengths."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """ε of every LayerNorm."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the normal initialisation."""
    tie_word_embeddings: bool = False
    """The head is the embedding: fewer parameters, and to repeat a token that was read is one map for all tokens."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size: {self.hidden_size} is no multiple of num_attention_heads ({self.num_attention_heads})"
            )


@section
class MemoryConfig:
    """The options of the memory layers; which model takes which is in `MODEL_OPTIONS`."""

    memory_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], short("--memory-layers")] = (0,)
    """Which layers have memory, counted from 0; all others are Pythia layers."""
    use_delta_rule: bool = True
    """Write only what the memory does not hold yet (v − r) instead of v."""
    use_key_shift: bool = False
    """File each value under the key of the token before it, so that a query finds what followed its like."""
    normalize_keys: bool = False
    """Divide each key's features by their sum, so that every token weighs alike in what is written."""
    num_memory_heads: Annotated[int | None, Field(gt=0)] = None
    """Memory heads H; None: infini 1 (as wide as the model), token_memory 4, others num_attention_heads."""
    num_memories: Annotated[int, Field(gt=0), short("--num-memories")] = 4
    """Independent memories of multi_memory and hierarchical models."""
    selection_temperature: Annotated[float, Field(gt=0)] = 1.0
    """τ: the scores of these memories are divided by it; near 0 a token reads one memory, far above 1 all alike."""
    num_memory_banks: Annotated[int, Field(gt=0), short("--num-memory-banks")] = 1
    """Banks of an infini layer, written in turn."""
    segments_per_bank: Annotated[int, Field(gt=0), short("--segments-per-bank")] = 4
    """Segments written into one bank before the next."""
    use_alibi: Annotated[bool, short("--alibi")] = False
    """Decay an infini layer's memory at every segment's write by exp(−slope · alibi_scale)."""
    alibi_scale: Annotated[float, Field(ge=0), short("--alibi-scale")] = 1.0
    """Scale of the decay."""
    gate_init: float = 0.0
    """Initial β; the gate towards memory is sigmoid(β) a head."""
    retention_init: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Initial w of token_memory: the share of what was written that is left after a segment's write."""
    memory_key_size: Annotated[int | None, Field(gt=0)] = None
    """Width K of the keys of token_memory; None: half of hidden_size."""
    read_gate_init: float = -1.0
    """Initial β of token_memory's gates, which each token moves; far from 0 they hardly do."""
    read_scale_init: float = 30.0
    """Initial α of token_memory: what is read is added α times."""
    query_key_init_scale: Annotated[float, Field(gt=0)] = 1.0
    """W_q and W_k of memory layers begin so many times as large as other weights."""
    query_key_init_bias: float = 0.0
    """Initial bias of their q and k; below 0 few features of a token are large, and different tokens meet less."""
    match_query_key_init: bool = False
    """W_k begins as W_q, so that alike tokens find one another from the start."""
    memory_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """ε: the least divisor of a read."""

    def __post_init__(self) -> None:
        if not self.memory_layers or len(set(self.memory_layers)) < len(self.memory_layers):
            raise UserError(f"memory_layers: {list(self.memory_layers)}: one layer at least is needed, and none twice")


@section
class SelectiveConfig:
    """The options of selective output: extra passes over the hidden states before a token."""

    skip_interval: Annotated[int, Field(ge=0), short("--skip-interval")] = 1
    """Extra passes of selective models; deep_pythia has as many layers as such a model runs."""
    earlier_pass_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """γ: a pass weighs γ times the next one in the training loss; 0: the last pass alone, 1: all the same."""


@section
class ModelConfig(PythiaConfig, MemoryConfig, SelectiveConfig):
    """The model section of an experiment: one shape and one set of options for all compared models.

    Where they differ from those of `MemoryConfig`, its defaults are the recipe under which memory helped most:
    docs/experiments/memory.md.
    """

    vocab_size: Annotated[int | None, Field(gt=0)] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Rows of the embedding and the head; None: the tokenizer's size, rounded up to a multiple of 128."""
    segment_length: Annotated[int | None, Field(gt=0), short("--segment-length")] = None
    """Tokens in a segment; None: data.seq_length / data.segments_per_sample."""
    memory_layers: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]
        tuple[Annotated[int, Field(ge=0)], ...] | None, short("--memory-layers")
    ] = None
    """Which layers have memory, counted from 0; all others are Pythia layers. None: the last one."""
    gate_init: float = 2.0
    """Initial β; the gate towards memory is sigmoid(β) a head. It begins open, at 0.88: that is where gates go."""
    use_key_shift: bool = True
    """File each value under the key of the token before it, so that a query finds what followed its like."""
    query_key_init_scale: Annotated[float, Field(gt=0)] = 6.0
    """W_q and W_k of memory layers begin so many times as large as other weights."""
    query_key_init_bias: float = -3.0
    """Initial bias of their q and k; below 0 few features of a token are large, and different tokens meet less."""
    match_query_key_init: bool = True
    """W_k begins as W_q, so that alike tokens find one another from the start."""

    def __post_init__(self) -> None:
        PythiaConfig.__post_init__(self)
        if self.memory_layers is None:
            return
        MemoryConfig.__post_init__(self)
        if max(self.memory_layers) >= self.num_hidden_layers:
            raise UserError(
                f"memory_layers: {list(self.memory_layers)}: the layers are 0 to {self.num_hidden_layers - 1}"
            )

    def shape(self, vocab_size: int) -> PythiaConfig:
        """The shape that all models of the experiment share."""
        names = PythiaConfig.__dataclass_fields__
        values: dict[str, Any] = {name: getattr(self, name) for name in names} | {
            "vocab_size": self.vocab_size or vocab_size
        }
        return PythiaConfig(**values)

    def options(self, model_type: ModelType) -> dict[str, Any]:
        """The options that one model type takes, as keywords of `create_model`."""
        values = {name: getattr(self, name) for name in MODEL_OPTIONS[model_type]}
        if "memory_layers" in values and self.memory_layers is None:
            values["memory_layers"] = (self.num_hidden_layers - 1,)
        return values
