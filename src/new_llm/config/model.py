"""Configuration of a model's shape, with the named sizes of the Pythia suite, of caches, and of generation."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from new_llm.config.errors import UserError
from new_llm.config.sections import section, short

SIZES: dict[str, dict[str, Any]] = {
    "14m": {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512},
    "31m": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1024},
    "70m": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048},
    "160m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "410m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
"""The shapes of EleutherAI/pythia-14m to pythia-410m (arXiv:2304.01373, table 1, and their config.json)."""

MAX_SIZE = 1 << 24
"""Limit for widths, the vocabulary, numbers of heads and memories, and tokens in a segment."""
MAX_LAYERS = 1 << 10
"""Limit for layers and for passes through them."""
Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]


@section
class PythiaConfig:
    """The shape of a Pythia (GPT-NeoX) model; the defaults are EleutherAI/pythia-70m's.

    Names are those of Hugging Face's `GPTNeoXConfig`.
    """

    vocab_size: Size = 50304
    """Number of tokens: rows of the embedding and of the output head."""
    hidden_size: Size = 512
    """Width D of the residual stream."""
    num_hidden_layers: Annotated[int, Field(gt=0, le=MAX_LAYERS)] = 6
    """Number of layers, including memory layers (`memory_layers`)."""
    num_attention_heads: Size = 8
    """Number of softmax attention heads."""
    intermediate_size: Size = 2048
    """Width of the MLP."""
    max_position_embeddings: Size = 2048
    """Maximum segment length for rotary positions, in tokens."""
    rotary_pct: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Fraction of each head's width that gets rotary positions."""
    rotary_emb_base: Annotated[float, Field(gt=1)] = 10000.0
    """Base of the rotary wavelengths."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """ε of every LayerNorm."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the normal initialisation."""
    tie_word_embeddings: bool = False
    """Use the embedding as the output head, too. This saves parameters, and one mapping can copy any token."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads ({self.num_attention_heads})"
            )

    @classmethod
    def of_size(cls, size: str, **others: Any) -> "PythiaConfig":
        """The shape of a named size; other fields may be given too."""
        if size not in SIZES:
            raise UserError(f"size: {size!r} is unknown; allowed are {', '.join(SIZES)}")
        return cls(**{**SIZES[size], **others})


ADAPTER_SUFFIXES = (".safetensors", ".pt")
"""File name endings of the formats of adapters."""


def check_adapter_suffix(path: Path, what: str) -> None:
    """Reject a file name with another ending."""
    if path.suffix not in ADAPTER_SUFFIXES:
        raise UserError(f"{what}: {path} must end with {' or '.join(ADAPTER_SUFFIXES)}")


COMPONENTS = ("model", "states", "unigrams", "bigrams", "trigrams", "match")
"""The distributions that a cached model mixes."""
MAX_ORDER = 3
MATCH_BITS = (28, 42, 64)
"""Long matches have separate weights by their information; these are the borders of the ranges, in bits."""
NUM_CONTEXTS = 2 + MAX_ORDER + len(MATCH_BITS)

Weight = Annotated[float, Field(ge=0)]
Weights = Annotated[tuple[Weight, ...], Field(min_length=len(COMPONENTS), max_length=len(COMPONENTS))]


@section
class CacheConfig:
    """A cache of the text read so far: its last hidden states, its n-grams, and its longest match."""

    num_states: Annotated[int, Field(ge=0), short("--cache")] = 0
    """N: keep the last N hidden states, each with the token that followed it; 0: none."""
    ngram_order: Annotated[int, Field(ge=0, le=MAX_ORDER), short("--ngrams")] = 0
    """Highest order of the n-grams to count in the text: 1 unigrams, 2 also bigrams, 3 also trigrams; 0: none."""
    longest_match: Annotated[bool, short("--longest-match")] = False
    """Predict the token that followed the longest earlier occurrence of the text's current ending."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """How two states are compared: by the angle between them, or by their inner product."""
    theta: Annotated[float, Field(gt=0)] = 12.0
    """θ: how strongly similar states are preferred; the best value depends on the similarity."""
    weights: Annotated[tuple[Weights, ...], Field(min_length=NUM_CONTEXTS, max_length=NUM_CONTEXTS)] = (
        (0.65, 0.35, 0.0, 0.0, 0.0, 0.0),
        (0.90, 0.07, 0.03, 0.0, 0.0, 0.0),
        (0.60, 0.22, 0.02, 0.16, 0.0, 0.02),
        (0.38, 0.27, 0.02, 0.08, 0.25, 0.03),
        (0.39, 0.29, 0.01, 0.02, 0.23, 0.06),
        (0.34, 0.23, 0.02, 0.01, 0.24, 0.16),
        (0.28, 0.17, 0.01, 0.02, 0.24, 0.28),
        (0.16, 0.10, 0.01, 0.01, 0.18, 0.54),
    )
    """Mixture weights, a row per length of the longest context that has occurred before in the text: nothing read yet;
    0 tokens; 1; 2; 3 or more with less than 28 bits of information; less than 42; less than 64; more. Columns: model,
    states, unigrams, bigrams, trigrams, match. Components that are off or have nothing to predict are left out, and the
    others are scaled to sum to 1. The defaults are close to what EM finds on encyclopedia articles."""

    def __post_init__(self) -> None:
        if any(row[0] <= 0 for row in self.weights):
            raise UserError("weights: the model's must be positive, or tokens that no cache knows get probability 0")

    @property
    def is_on(self) -> bool:
        """Whether there is any cache."""
        return self.num_states > 0 or self.ngram_order > 0 or self.longest_match


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str | int) else value


TokenId = Annotated[int, Field(ge=0)]
StopString = Annotated[str, Field(min_length=1)]


@section
class GenerationConfig:
    """The settings of `generate`, with Hugging Face's names where there is a counterpart."""

    max_new_tokens: Annotated[int, Field(gt=0)] = 50
    """Maximum number of new tokens per prompt."""
    do_sample: bool = False
    """Sample each token; otherwise the most likely one is taken (greedy)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by it before sampling; below 1, likely tokens become more likely."""
    top_k: Annotated[int | None, Field(gt=0)] = None
    """Sample only from this many of the most likely tokens; None: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of most likely tokens whose probabilities reach this sum."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """For tokens already in the text, positive logits are divided and negative ones multiplied by it; 1: no penalty."""
    stop_strings: Annotated[tuple[StopString, ...], BeforeValidator(_as_tuple), short("--stop")] = ()
    """Strings that end a continuation; its text ends before them."""
    eos_token_id: Annotated[tuple[TokenId, ...], BeforeValidator(_as_tuple)] = ()
    """Ids of tokens that end a continuation; empty: none (in `new-llm generate`, the tokenizer's end-of-text token)."""
    pad_token_id: TokenId = 0
    """Fills rows that end before the others."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed for sampling; row r uses seed + r, independently of the other rows."""
    prompt_tokens_per_call: Annotated[int, Field(gt=0)] = 2048
    """Prompt tokens read per call, rounded down to whole segments (at least one)."""

    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    """A cache of each row's text, mixed with the model's probabilities."""
