"""The flags of `new-llm eval`, `evaluate-wikitext` and `inspect`; `cli/run_measures.py` runs them."""

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
    """Load a model, measure it, print the result, and write it to a JSON file with charts."""

    without_hub: ClassVar[str] = "use a local folder (--run) and a local text (--data.source)"
    measure: ClassVar[str] = ""
    """The measure's name."""
    section: ClassVar[str] = ""
    """The section of `EvalConfig` that `options` fills; empty: the fields of `options` are `EvalConfig`'s own."""
    subject: Annotated[SubjectConfig, arg(name="")]
    data: TextConfig = dataclasses.field(default_factory=TextConfig)
    options: Any
    out: Path | None = None
    """The JSON file to write; charts are written next to it. None: a file under evaluations/ in the run's folder."""

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures to run."""
        return (self.measure,)

    @property
    def settings(self) -> EvalConfig:
        """The flags as an experiment's eval section."""
        values: dict[str, Any] = {self.section: self.options} if self.section else dict(vars(self.options))
        return EvalConfig(**{**values, "measures": self.measures})

    @property
    def evaluated_text(self) -> TextConfig | None:
        """The text to read; None: the measures need none."""
        return self.data

    def execute(self) -> int:
        """See `run_measures`."""
        from new_llm.cli.run_measures import run_measures

        return run_measures(self)


@dataclasses.dataclass(kw_only=True)
class Perplexity(Evaluation):
    """Perplexity of a text: exp(total negative log-likelihood / tokens).

    The text is --data.source, or the run's validation documents. Ctrl-C stops early and keeps the result so far, marked
    as partial.
    """

    protocol: Literal["sliding", "streaming", "independent", "rolling"] = "sliding"
    """sliding: overlapping windows, each starting with an empty memory; streaming: consecutive segments, with the
    memory carried from one to the next; independent: the same segments, each with an empty memory; rolling: the windows
    of lm-evaluation-harness."""
    options: Annotated[PerplexityConfig, arg(name="")] = dataclasses.field(default_factory=PerplexityConfig)

    @property
    def measures(self) -> tuple[str, ...]:
        """Each protocol is a measure of the same name."""
        return (self.protocol,)


@dataclasses.dataclass(kw_only=True)
class EvaluateWikitext(Perplexity):
    """Sliding-window perplexity on WikiText-2's test split, read as one text, as in published results.

    Examples:
      new-llm evaluate-wikitext --run EleutherAI/pythia-70m
      new-llm evaluate-wikitext --run runs/quick --model infini --data.source wiki.test.raw
      new-llm evaluate-wikitext --parallel-adapter parallel_adapter.pt

    The text comes from the hub or its local cache; --data.source can name a local wiki.test.raw instead.
    """

    without_hub: ClassVar[str] = "use a local wiki.test.raw (--data.source) and a local folder (--run)"
    data: TextConfig = dataclasses.field(default_factory=lambda: TextConfig(source="wikitext-2", whole_files=True))


@dataclasses.dataclass(kw_only=True)
class Positions(Evaluation):
    """Perplexity by token position in a sample: how much predictions gain from the tokens before them.

    Samples are as long as in the run's training; for a model without a run, --context tokens.
    """

    measure: ClassVar = "positions"
    options: Annotated[PerplexityConfig, arg(name="")] = dataclasses.field(default_factory=PerplexityConfig)


@dataclasses.dataclass(kw_only=True)
class LongDocuments(Evaluation):
    """Perplexity of long documents by distance from their start, with the same weights and three kinds of memory.

    The memory is carried through the document, reset before every segment, or taken from another document. The paired
    differences, with confidence intervals over documents, show whether the memory helps. The text is --data.source, or
    the run's validation documents. Ctrl-C stops early and keeps the result so far, marked as partial.
    """

    measure: ClassVar = "long"
    section: ClassVar = "long_documents"
    options: Annotated[AllLongDocumentsConfig, arg(name="")] = dataclasses.field(default_factory=AllLongDocumentsConfig)


@dataclasses.dataclass(kw_only=True)
class Recall(Evaluation):
    """Recall of pass keys and of facts about invented people, hidden in real text and asked for at its end.

    Reports exact match under greedy decoding and the rank of the right answer among candidates, by text length in
    segments and by depth of the hidden sentence, each also with an empty memory. The text is --data.source, or the
    run's validation documents. Ctrl-C stops early and keeps the result so far, marked as partial.
    """

    measure: ClassVar = "recall"
    section: ClassVar = "recall"
    options: Annotated[RecallConfig, arg(name="")] = dataclasses.field(default_factory=RecallConfig)


@dataclasses.dataclass(kw_only=True)
class Reversal(Evaluation):
    """The reversal curse: a model that learned "A is B" need not know "B is A".

    Reports for each direction, with bootstrap intervals: the perplexity of sentences and of answers, how often the
    right answer ranks first among the answers of its relation, and its mean rank.

    The pairs are built in or read from a .csv or .jsonl file (--pairs). Its fields are relation, forward_prompt,
    forward_answer, backward_prompt, backward_answer; or relation, subject, object, forward_template, backward_template,
    with templates such as "The capital of {subject} is {object}."

    With --places memory or context, the model is also asked for facts that a text has just stated. The text is
    --data.source, or the run's validation documents.
    """

    measure: ClassVar = "reversal"
    section: ClassVar = "reversal"
    options: Annotated[ReversalConfig, arg(name="")] = dataclasses.field(default_factory=ReversalConfig)

    def __post_init__(self) -> None:
        if self.evaluated_text is None and self.data != TextConfig():
            raise UserError("data: a text is only read with --places memory or context")

    @property
    def evaluated_text(self) -> TextConfig | None:
        """Only fresh facts need a text; the pairs are separate sentences."""
        return self.data if {"memory", "context"} & set(self.options.places) else None


@dataclasses.dataclass(kw_only=True)
class Doctor(Evaluation):
    """Check for faults that make measurements wrong, such as shifted labels, leaks, or overlapping splits.

    Also checks that evaluation does not write to the memory. The text is --data.source, or the run's validation
    documents. Exits with code 1 if it finds a fault.
    """

    measure: ClassVar = "doctor"
    section: ClassVar = "doctor"
    options: Annotated[DoctorConfig, arg(name="")] = dataclasses.field(default_factory=DoctorConfig)


@dataclasses.dataclass(kw_only=True)
class Inspect(Evaluation):
    """Write a page that shades each token of your own text by how much the memory helped to predict it.

    This is the token's loss with the memory emptied minus its loss with the memory carried. The page first shows the
    passages that the memory helped and harmed most, with the most likely tokens with and without memory, the gates and,
    in models with several memories, which one was read. Then it continues documents with and without the memory.

    Examples:
      new-llm inspect --run runs/quick --model token_memory --text my_text.txt
    """

    without_hub: ClassVar[str] = "use a local folder (--run)"
    measure: ClassVar = "passages"
    text: Path
    """The text: .txt, .jsonl or .parquet, also compressed (.gz, .zst, .xz); a .txt file is one document."""
    max_tokens_per_document: Annotated[int | None, Field(ge=2)] = None
    """Read only the first N tokens of each document; None: all."""
    data: Suppress[TextConfig] = dataclasses.field(default_factory=TextConfig)
    options: Annotated[PassagesConfig, arg(name="")] = dataclasses.field(
        default_factory=lambda: PassagesConfig(num_helped=8, num_harmed=4)
    )

    def __post_init__(self) -> None:
        self.data = TextConfig(source=str(self.text), whole_files=True)

    @property
    def settings(self) -> EvalConfig:
        """The flags as an eval section that includes short documents."""
        long = AllLongDocumentsConfig(min_tokens=2, max_tokens_per_document=self.max_tokens_per_document)
        return EvalConfig(measures=self.measures, passages=self.options, long_documents=long)


@dataclasses.dataclass(kw_only=True)
class AnyMeasures(Evaluation):
    """Run any measures by name, including your own: --measures memory_usage my_module:MyMeasure.

    The flags are those of an experiment's eval section. Each measure writes its own JSON file.
    """

    options: Annotated[EvalConfig, arg(name="")] = dataclasses.field(default_factory=EvalConfig)

    @property
    def measures(self) -> tuple[str, ...]:
        """The names given by --measures."""
        return self.options.measures


class Eval(CommandGroup):
    """Measure a trained model.

    Every measurement writes a JSON file that records what was measured, how, and with which version of the code.

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
