"""`new-llm eval` and `new-llm evaluate-wikitext`: the flags of each measurement; `cli/evaluate.py` makes it."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from tyro.conf import Suppress, arg

from new_llm.cli.command import Command, CommandGroup
from new_llm.config.errors import UserError
from new_llm.config.evaluation import (
    AllLongDocumentsConfig,
    DoctorConfig,
    EvalConfig,
    PassagesConfig,
    PerplexityConfig,
    RecallConfig,
    ReversalConfig,
    SubjectConfig,
    TextConfig,
)


@dataclasses.dataclass(kw_only=True)
class Evaluation(Command):
    """Load a model, measure it, print the result, and write a JSON file and the charts of it."""

    without_hub: ClassVar[str] = "name a folder by --run, and a local text by --data.source"
    measure: ClassVar[str] = ""
    """What is measured, by name."""
    section: ClassVar[str] = ""
    """The section of `EvalConfig` that `options` is; empty: `EvalConfig` itself takes the fields of `options`."""
    subject: Annotated[SubjectConfig, arg(name="")]
    data: TextConfig = dataclasses.field(default_factory=TextConfig)
    options: Any
    out: Path | None = None
    """The JSON file to write, with its charts beside it; None: a file in the run's folder, under evaluations."""

    @property
    def measures(self) -> tuple[str, ...]:
        """What is measured, by name."""
        return (self.measure,)

    @property
    def settings(self) -> EvalConfig:
        """The flags as an experiment's eval section."""
        values: dict[str, Any] = {self.section: self.options} if self.section else dict(vars(self.options))
        return EvalConfig(**{**values, "measures": self.measures})

    @property
    def evaluated_text(self) -> TextConfig | None:
        """The text that is read; None: none."""
        return self.data

    def execute(self) -> int:
        """Measure, write and print; 130 where the measurement was interrupted and the result is partial."""
        from new_llm.cli.evaluate import evaluate

        return evaluate(self)


@dataclasses.dataclass(kw_only=True)
class Perplexity(Evaluation):
    """Perplexity of a text: exp(total negative log-likelihood / tokens).

    The text is --data.source, or the validation documents of the run. Ctrl-C ends the measurement with the result so
    far, labelled as partial.
    """

    protocol: Literal["sliding", "streaming", "independent", "rolling"] = "sliding"
    """sliding: overlapping windows, each from an empty memory; streaming: consecutive segments, memory carried;
    independent: the same segments without the memory; rolling: the windows of lm-evaluation-harness."""
    options: Annotated[PerplexityConfig, arg(name="")] = dataclasses.field(default_factory=PerplexityConfig)

    @property
    def measures(self) -> tuple[str, ...]:
        """The protocol."""
        return (self.protocol,)


@dataclasses.dataclass(kw_only=True)
class EvaluateWikitext(Perplexity):
    """Perplexity on WikiText-2's test text in sliding windows over the whole text, as in published results.

    Examples:
      new-llm evaluate-wikitext --run EleutherAI/pythia-70m
      new-llm evaluate-wikitext --run runs/quick --model infini --data.source wiki.test.raw
      new-llm evaluate-wikitext --parallel-adapter parallel_adapter.pt

    The text comes from the hub or its local cache; --data.source can name a local wiki.test.raw instead.
    """

    without_hub: ClassVar[str] = "name a local wiki.test.raw by --data.source, and a folder by --run"
    data: TextConfig = dataclasses.field(default_factory=lambda: TextConfig(source="wikitext-2", whole_files=True))


@dataclasses.dataclass(kw_only=True)
class Positions(Evaluation):
    """Perplexity by a token's position in its sample: how much a prediction gains from the tokens before it.

    Samples are as long as in the run's training, or as --context for a model that belongs to no run.
    """

    measure: ClassVar = "positions"
    options: Annotated[PerplexityConfig, arg(name="")] = dataclasses.field(default_factory=PerplexityConfig)


@dataclasses.dataclass(kw_only=True)
class LongDocuments(Evaluation):
    """Perplexity of long documents by distance from their start, with three kinds of memory on the same weights.

    The memory is carried through the document, reset before every segment, or that of another document. The paired
    differences, with intervals over documents, show whether memory helps. The text is --data.source, or the
    validation documents of the run. Ctrl-C ends the measurement with the result so far, labelled as partial.
    """

    measure: ClassVar = "long"
    section: ClassVar = "long_documents"
    options: Annotated[AllLongDocumentsConfig, arg(name="")] = dataclasses.field(default_factory=AllLongDocumentsConfig)


@dataclasses.dataclass(kw_only=True)
class Recall(Evaluation):
    """Recall of pass keys and of facts about invented persons, hidden in real text and asked for at its end.

    Reports greedy exact match and the rank of the right answer among candidates, by the text's length in segments and
    the depth of the hidden sentence, and the same with an empty memory. The text is that of --data.source, or of the
    validation documents of the run. Ctrl-C ends the measurement with the result so far, labelled as partial.
    """

    measure: ClassVar = "recall"
    section: ClassVar = "recall"
    options: Annotated[RecallConfig, arg(name="")] = dataclasses.field(default_factory=RecallConfig)


@dataclasses.dataclass(kw_only=True)
class Reversal(Evaluation):
    """The reversal curse: a model that learned "A is B" need not know "B is A".

    Reports, for each direction and with bootstrap intervals, the perplexity of sentences and of answers, and the
    accuracy and mean rank of the right answer among the answers of its relation. The pairs are built in, or read from
    --pairs: a .csv or .jsonl file with the fields relation, forward_prompt, forward_answer, backward_prompt,
    backward_answer; or relation, subject, object, forward_template, backward_template, such as "The capital of
    {subject} is {object}." With --places memory or context, the model is also asked for facts that were just stated
    in a text: the validation documents of the run, or --data.source.
    """

    measure: ClassVar = "reversal"
    section: ClassVar = "reversal"
    options: Annotated[ReversalConfig, arg(name="")] = dataclasses.field(default_factory=ReversalConfig)

    def __post_init__(self) -> None:
        if self.evaluated_text is None and self.data != TextConfig():
            raise UserError("data: a text is read only where --places names memory or context")

    @property
    def evaluated_text(self) -> TextConfig | None:
        """Fresh facts are stated in a text; the pairs are separate sentences."""
        return self.data if {"memory", "context"} & set(self.options.places) else None


@dataclasses.dataclass(kw_only=True)
class Doctor(Evaluation):
    """Look for faults that make measurements wrong: shifted labels, leaks, written memory, overlapping splits.

    The text is the validation documents of the run, or --data.source. Exit code 1: a fault was found.
    """

    measure: ClassVar = "doctor"
    section: ClassVar = "doctor"
    options: Annotated[DoctorConfig, arg(name="")] = dataclasses.field(default_factory=DoctorConfig)


@dataclasses.dataclass(kw_only=True)
class Inspect(Evaluation):
    """Write a page of your own text in which each token is shaded by what the memory was worth to it.

    A token's worth is its loss with the memory emptied minus its loss with the memory carried. The page shows first the
    passages that the memory helped and harmed most, with the likeliest tokens with and without it, the gates, and which
    of several memories was read; then continuations of documents with the memory and without.

    Examples:
      new-llm inspect --run runs/quick --model token_memory --text my_text.txt
    """

    without_hub: ClassVar[str] = "name a folder by --run"
    measure: ClassVar = "passages"
    text: Path
    """The text: .txt, .jsonl or .parquet, also packed; a .txt file is one document."""
    max_tokens_per_document: Annotated[int | None, Field(ge=2)] = None
    """Read only this many tokens of each document, from its start; None: all."""
    data: Suppress[TextConfig] = dataclasses.field(default_factory=TextConfig)
    options: Annotated[PassagesConfig, arg(name="")] = dataclasses.field(
        default_factory=lambda: PassagesConfig(num_helped=8, num_harmed=4)
    )

    def __post_init__(self) -> None:
        self.data = TextConfig(source=str(self.text), whole_files=True)

    @property
    def settings(self) -> EvalConfig:
        """Whole documents, whatever their length."""
        long = AllLongDocumentsConfig(min_tokens=2, max_tokens_per_document=self.max_tokens_per_document)
        return EvalConfig(measures=self.measures, passages=self.options, long_documents=long)


@dataclasses.dataclass(kw_only=True)
class AnyMeasures(Evaluation):
    """Any measures by name, your own included: --measures memory_usage my_module:MyMeasure.

    All flags are those of an experiment's eval section. Each measure's result is a JSON file of its own.
    """

    options: Annotated[EvalConfig, arg(name="")] = dataclasses.field(default_factory=EvalConfig)

    @property
    def measures(self) -> tuple[str, ...]:
        """Those of --measures."""
        return self.options.measures


class Eval(CommandGroup):
    """Measure a trained model.

    Every measurement writes a JSON file that says what was measured, how and by which code.

    Examples:
      new-llm eval ppl --run runs/quick --model infini --protocol streaming
      new-llm eval ppl --run runs/quick --model infini --data.source my_text.txt
      new-llm eval reversal --run runs/quick --model infini --pairs-per-relation 10
      new-llm eval long --run runs/quick --model infini --min-tokens 2048 --baselines runs/quick:pythia
      new-llm eval recall --run runs/quick --model infini --lengths 1 2 4 8 --trials 20
      new-llm eval doctor --run runs/quick --model infini
      new-llm eval measures --run runs/quick --model infini --measures my_module:MyMeasure
    """

    commands: ClassVar = {
        "doctor": Doctor,
        "long": LongDocuments,
        "measures": AnyMeasures,
        "positions": Positions,
        "ppl": Perplexity,
        "recall": Recall,
        "reversal": Reversal,
    }
