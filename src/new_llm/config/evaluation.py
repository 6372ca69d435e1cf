"""How a trained model is measured: the model and the text, then one section for each measurement.

`EvalConfig` is an experiment's, and its sections are the options of `new-llm eval`.
"""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.model import COMPONENTS, MAX_ORDER, CacheConfig
from new_llm.config.sections import UNIQUE, section, short

EVALUATIONS_FOLDER = "evaluations"
"""Where the records of a run's measurements stand, in its folder."""
RECORD_VERSION = 1
"""The form of these records."""
RESULTS_VERSION = 1
"""The form of a run's results.json."""
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


@section
class TunedCacheConfig(CacheConfig):
    """A cache around the measured model; its θ and weights are tuned on documents other than the measured ones.

    They are those of `tuning_source`; else the run's validation documents where --data.source names another text, or
    the end of its training documents. For a model that belongs to no run they stay as given.
    """

    tuning_source: str | None = None
    """The text to tune on, as in --data.source; None: documents of the run."""
    tuning_tokens: Annotated[int, Field(ge=2)] = 30_000
    """The last tokens of that text, at most this many, are used for tuning."""


@section
class SubjectConfig:
    """The model that is measured."""

    run: str | None = None
    """A run folder, the folder of a saved model, or a Hugging Face model: its folder or its name on the hub. Optional
    with --parallel-adapter, whose base is then measured."""
    model: str | None = None
    """Which model of a run; not needed where there is only one."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    parallel_adapter: Path | None = None
    """A file of parallel memory adapter weights to put on the model."""
    segment_length: Annotated[int | None, Field(gt=0)] = None
    """Segment length of a Hugging Face model in tokens; None: the length it was trained with."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: for a run's model the precision it was trained in, otherwise that of the weights."""
    cache: TunedCacheConfig = dataclasses.field(default_factory=TunedCacheConfig)
    """A cache added to the model and to its baselines."""


@section
class TextConfig:
    """The text that a model is measured on."""

    source: str | None = None
    """wikitext-2, pile, sotu, `hub:owner/name[:config][:field]`, my_module:function, or a path: .txt, .jsonl, .parquet,
    WikiText's .raw or .tokens, also compressed as .gz, .zst or .xz, or a folder of such files. None: the run's
    validation documents."""
    split: Literal["train", "validation", "test"] = "test"
    """Which split of a data set on the hub."""
    text_field: str = "text"
    """The field of a .jsonl or Parquet record that holds the text."""
    max_documents: Annotated[int | None, Field(gt=0)] = None
    """Maximum number of documents; None: all."""
    whole_files: bool = False
    """Read each .txt, .raw or .tokens file, or WikiText-2 from the hub, as one document instead of separate articles,
    as published results on WikiText-2 do."""


@section
class PerplexityConfig:
    """How perplexities are measured."""

    context: Annotated[int, Field(ge=2)] = 2048
    """Length of a sliding window in tokens."""
    stride: Annotated[int, Field(gt=0)] = 512
    """Distance between sliding windows in tokens; at most the context."""
    position_edges: tuple[int, ...] = (0, 16, 32, 64, 96)
    """Where the position ranges of `positions` begin; the last one ends with the sample."""
    max_tokens: Annotated[int | None, Field(gt=0)] = None
    """Maximum number of tokens to score, in whole documents; None: all."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Windows, or documents of a stream, read at once; does not affect the result."""
    segments_per_call: Annotated[int, Field(gt=0)] = 8
    """Segments of a stream read per call; does not affect the result."""


def check_edges(edges: tuple[int, ...], name: str) -> None:
    """Refuse range borders that do not begin with 0 and rise; no borders are fine."""
    if edges and (edges[0] != 0 or any(a >= b for a, b in pairwise(edges))):
        raise UserError(f"{name}: {list(edges)} must start with 0 and increase")


@section
class IntervalConfig:
    """How bootstrap intervals are computed: by resampling the trials or pairs that were measured."""

    num_resamples: Annotated[int, Field(gt=0)] = 2000
    """Bootstrap resamples per interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of the intervals."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the resamples and of all other random choices."""


@section
class LongDocumentsConfig:
    """Which documents are long, in what ranges they are measured, and against what, in an experiment."""

    min_tokens: Annotated[int, Field(ge=2)] = 2048
    """Minimum length of a long document in tokens."""
    edges: Annotated[tuple[int, ...], Field(min_length=1)] = (0, *(1024 << power for power in range(8)))
    """Where the ranges of distance from the document's start begin, in tokens; the last one is open-ended."""
    max_documents: Annotated[int | None, Field(gt=0)] = 16
    """Measure only this many long documents, from the first; None: all."""
    max_tokens_per_document: Annotated[int | None, Field(ge=2)] = 4096
    """Read only this many tokens of each document, from its start; None: all."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Documents read at once, in pairs that use each other's memory as the foreign one; does not affect the result."""
    segments_per_call: Annotated[int, Field(gt=0)] = 8
    """Segments of a stream read per call when only one memory is compared; does not affect the result."""
    baselines: tuple[str, ...] = ()
    """Other models with the same tokenizer that read the same documents in consecutive segments: RUN, RUN:MODEL, or a
    Hugging Face model, which gets the measured model's segments."""
    window_baselines: tuple[str, ...] = ()
    """The same, but read in sliding windows as long as the baseline's own segment: a model without memory with its full
    context."""
    window_stride: Annotated[int | None, Field(gt=0)] = None
    """Distance between these windows in tokens; None: half a window."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of the intervals over documents."""

    def __post_init__(self) -> None:
        check_edges(self.edges, "edges")
        if self.max_tokens_per_document is not None and self.max_tokens_per_document < self.min_tokens:
            raise UserError(
                f"max_tokens_per_document: {self.max_tokens_per_document} is under min_tokens ({self.min_tokens})"
            )

    def choose_window_stride(self, window: int, where: str, name: str) -> int:
        """Tokens from one window of a baseline to the next: as configured, else half a window.

        Args:
            window: tokens in a window, the baseline's segment.
            where: what sets the stride, for the message.
            name: what the baseline is called.
        """
        stride = self.window_stride or max(1, window // 2)
        if stride > window:
            raise UserError(f"{where}: {stride} is over the window of {name} ({window})")
        return stride


@section
class AllLongDocumentsConfig(LongDocumentsConfig):
    """The same for `new-llm eval long` and studies, which read all long documents to their ends."""

    max_documents: Annotated[int | None, Field(gt=0)] = None
    """Measure only this many long documents, from the first; None: all."""
    max_tokens_per_document: Annotated[int | None, Field(ge=2)] = None
    """Read only this many tokens of each document, from its start; None: all."""


MAX_CANDIDATES = 12  # values that each relation of data/recall_facts.json has


@section
class RecallConfig(IntervalConfig):
    """What is hidden, in how long a text, and how deep."""

    tasks: Annotated[tuple[Literal["passkey", "facts", "changed"], ...], Field(min_length=1), UNIQUE] = (
        "passkey",
        "facts",
    )
    """passkey: a number of five digits; facts: one sentence about an invented person; changed: a fact that is stated
    twice with different values, and the newest is right."""
    lengths: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1), UNIQUE] = (1, 2, 4, 8, 16, 32, 64)
    """Lengths of the whole text in segments, for example up to 1000. The last segment holds the question; in a text of
    one segment, statement and question share it."""
    depths: Annotated[tuple[Share, ...], Field(min_length=1), UNIQUE] = (0, 0.25, 0.5, 0.75, 1)
    """Where the statement is hidden: 0 is the beginning of the text, 1 right before the question."""
    trials: Annotated[int, Field(gt=0)] = 20
    """Texts for each task, length and depth."""
    num_candidates: Annotated[int, Field(ge=2, le=MAX_CANDIDATES)] = 10
    """Number of answers that are ranked, including the right one."""
    part: Literal["eval", "train"] = "eval"
    """Which of two disjoint sets of names, values and keys to use; train: those that training may plant."""
    batch_size: Annotated[int, Field(gt=0)] = 16
    """Texts read at once; does not affect the result."""
    segments_per_call: Annotated[int, Field(gt=0)] = 8
    """Segments read per call; does not affect the result."""


@section
class ReversalConfig(IntervalConfig):
    """The options of `new-llm eval reversal`."""

    pairs: Path | None = None
    """A .csv or .jsonl file of pairs; None: the built-in pairs."""
    pairs_per_relation: Annotated[int | None, Field(gt=0)] = None
    """Draw at most this many pairs of each relation; None: all. Only the answers of drawn pairs compete."""
    batch_size: Annotated[int, Field(gt=0)] = 128
    """Short sentences read at once; does not affect the result."""
    max_sentences: Annotated[int, Field(gt=0)] = 1_000_000
    """Maximum number of prompt-answer sentences to score; each relation needs about twice the square of its number of
    pairs."""
    num_resamples: Annotated[int, Field(gt=0)] = 1000
    """Bootstrap resamples per interval."""
    places: Annotated[tuple[Literal["weights", "memory", "context"], ...], UNIQUE] = ()
    """Places of knowledge to test: weights, the pairs; memory and context, invented facts that the text has just stated
    and that were never in training."""
    fresh_texts: Annotated[int, Field(ge=5, le=64)] = 50
    """Number of texts with such facts."""
    facts_per_text: Annotated[int, Field(ge=2, le=4)] = 4
    """Facts in each of these texts; their answers compete."""
    one_relation: bool = True
    """Whether all facts of a text have the same relation, so that only their names tell them apart; otherwise each has
    a different one."""
    part: Literal["eval", "train"] = "eval"
    """Which names and words to use: eval, those never in training; train, those that training may plant, but in new
    facts."""


@section
class CacheMeasureConfig:
    """The caches that the measure `caches` adds to a model, and the values of θ that it tries."""

    sizes: Annotated[tuple[Annotated[int, Field(gt=0)], ...], UNIQUE] = (254, 2000)
    """Numbers of states N, one cache each. 254 states of width 128 hold as many numbers as the token memory of a model
    of that width with four heads."""
    ngram_orders: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_ORDER)], ...], UNIQUE] = (2, 3)
    """Maximum n-gram orders, one cache each."""
    longest_match: bool = True
    """Also measure a cache with the longest n-grams and the longest match. The last cache combines all, with the most
    states."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """How two states are compared: by the angle between them, or by their inner product."""
    thetas: Annotated[tuple[Positive, ...], Field(min_length=1), UNIQUE] = (4, 6, 8, 12, 16, 24, 32)
    """Values of θ to choose from; inner products need smaller ones."""
    segments_per_call: Annotated[int, Field(gt=0)] = 8
    """Segments read per call; does not affect the result."""

    def list_caches(self) -> dict[str, CacheConfig]:
        """Each cache by name, the bare model first; weights and θ are not tuned yet."""
        order = max(self.ngram_orders, default=0)
        found: dict[str, dict[str, Any]] = {"bare": {}}
        found |= {f"+ {size:,} states": {"num_states": size} for size in self.sizes}
        found |= {f"+ {COMPONENTS[1 + order]}": {"ngram_order": order} for order in self.ngram_orders}
        text = {"ngram_order": order, "longest_match": self.longest_match}
        if self.longest_match:
            found["+ longest match"] = text
        if self.sizes and any(text.values()):
            found["+ all"] = {"num_states": max(self.sizes), **text}
        return {name: CacheConfig(similarity=self.similarity, **one) for name, one in found.items()}


@section
class PassagesConfig:
    """Which passages of the long documents show what the memory knew."""

    max_documents: Annotated[int, Field(gt=0)] = 4
    """Read only this many documents, the first ones of `long`."""
    num_helped: Annotated[int, Field(ge=0)] = 4
    """Number of segments to show that the memory helped most."""
    num_harmed: Annotated[int, Field(ge=0)] = 2
    """Number of segments to show that the memory harmed most."""
    num_candidates: Annotated[int, Field(gt=0)] = 4
    """Most likely tokens to list for each token, with the memory and without."""
    num_continuations: Annotated[int, Field(ge=0)] = 3
    """Number of documents to continue, with the memory and without."""
    continuation_tokens: Annotated[int, Field(gt=0)] = 32
    """Length of each continuation in tokens."""


@section
class DoctorConfig:
    """The options of `new-llm eval doctor`."""

    checks: Annotated[tuple[str, ...], UNIQUE] = ()
    """Run only these checks; empty: all."""
    segment_tokens: Annotated[int, Field(ge=4)] = 32
    """Segment length during the checks, in tokens. It is short so that few tokens suffice to carry memory across
    segments; one check of causality keeps the model's own length."""
    max_tokens: Annotated[int, Field(ge=64)] = 8192
    """Maximum number of tokens on which losses are measured."""
    fill_segments: Annotated[int, Field(ge=2)] = 64
    """Number of segments to read into a memory before it is examined."""


@section
class EvalConfig(PerplexityConfig):
    """The eval section of an experiment."""

    measures: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "streaming",
        "long",
        "caches",
        "passages",
        "sliding",
        "positions",
        "memory_usage",
        "reversal",
    )
    """The measures to run, by name; `my_module:MyMeasure` is a measure of your own."""
    checkpoints: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Shares of training, e.g. 0.25 0.5, after which the model is measured in its current state. The learning rate has
    not decayed by then, so perplexities are higher than those of a run that ends there."""
    checkpoint_measures: Annotated[tuple[str, ...], Field(min_length=1)] = ("streaming",)
    """The measures to run at these checkpoints, by name."""
    max_tokens: Annotated[int | None, Field(gt=0)] = 100_000
    """Maximum number of validation tokens to score, in whole documents; None: all."""
    memory_usage_segments: Annotated[int, Field(gt=0)] = 32
    """Segments of one document to read before the memories' norms are measured."""
    reversal: ReversalConfig = dataclasses.field(default_factory=ReversalConfig)
    caches: CacheMeasureConfig = dataclasses.field(default_factory=CacheMeasureConfig)
    long_documents: LongDocumentsConfig = dataclasses.field(default_factory=LongDocumentsConfig)
    passages: PassagesConfig = dataclasses.field(default_factory=PassagesConfig)
    recall: RecallConfig = dataclasses.field(default_factory=RecallConfig)
    doctor: DoctorConfig = dataclasses.field(default_factory=DoctorConfig)

    def __post_init__(self) -> None:
        if "sliding" in self.measures and self.stride > self.context:
            raise UserError(
                f"eval.stride: {self.stride} is over eval.context ({self.context}): tokens would be skipped"
            )
        if not self.position_edges:
            raise UserError("eval.position_edges: at least one range is needed; [0] is all positions")
        check_edges(self.position_edges, "eval.position_edges")


@section
class FillConfig:
    """What bounds the memory that reading takes, whatever the length of the text."""

    tokens_per_call: Annotated[int, Field(gt=0)] = 1024
    """Tokens read per call, rounded down to whole segments (at least one)."""
    block_bytes: Annotated[int, Field(gt=0)] = 1 << 16
    """Bytes of a file that are decoded and tokenised at once."""
    max_run_characters: Annotated[int, Field(gt=0)] = 1 << 20
    """Longer runs of characters without white space are cut here for the tokenizer."""
    text_field: Annotated[str, short("--data.text-field")] = "text"
    """The field of a .jsonl or Parquet record that holds the text."""
