"""How a parallel memory adapter is trained: on which documents, and what is measured."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from new_llm.config.data import DataConfig
from new_llm.config.errors import UserError
from new_llm.config.evaluation import EvalConfig
from new_llm.config.loading import TrainingSettings
from new_llm.config.model import check_adapter_suffix
from new_llm.config.sections import section, short
from new_llm.config.train import TrainConfig
from new_llm.models.layers.parallel_infini import AdapterConfig, ParallelInfiniLayer

ADAPTER_MODELS = ("base", ParallelInfiniLayer.kind)
"""The models of an adapter's run: the base, measured as it is, and the base with the adapter."""


@section
class AdapterDataConfig(DataConfig):
    """The data section of an adapter's training: long samples, and as much gradient as they have segments."""

    num_samples: Annotated[int | None, Field(gt=0), short("--samples")] = 5000
    """Samples of training text to read from a long source; what is trained on is set by num_docs."""
    seq_length: Annotated[int, Field(ge=2), short("--seq-length")] = 2048
    """Tokens in a sample, all of one document."""
    segments_per_sample: Annotated[int, Field(gt=0), short("--segments-per-sample")] = 8
    """Segments in a sample; gradients run through all of them."""
    reversal_pairs: bool = False
    """Add the forward sentences of the reversal pairs to the training set."""


@section
class AdapterTrainConfig(TrainConfig):
    """The train section of an adapter's training."""

    num_epochs: Annotated[int, Field(gt=0), short("--epochs")] = 10
    """Passes over the training documents at most."""
    batch_size: Annotated[int, Field(gt=0), short("--batch-size")] = 4
    """Documents that are read side by side."""
    learning_rate: Annotated[float, Field(gt=0), short("--lr")] = 1e-3
    """Peak learning rate of everything but the gates and α."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decay of weight matrices; gates, α, norms and biases have none."""

    def __post_init__(self) -> None:
        if self.sharding != "ddp":
            raise UserError("train.sharding: an adapter trains with ddp: its α is one number, which can't be shared")


@section
class AdapterTrainingConfig(TrainingSettings):
    """Train a parallel memory adapter on long documents, and measure it against its base."""

    file_name: ClassVar[str] = "adapter.yaml"
    name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=100)] = None
    """The run's name and folder; None: the time."""
    base: str = "EleutherAI/pythia-70m"
    """A GPT-NeoX: its name on the hub, its directory, or a run of this project with a pythia model."""
    revision: str | None = None
    """Branch, tag or commit of a base on the hub."""
    num_docs: Annotated[int, Field(gt=0)] = 100
    """Long documents of the training split to train on, in a seeded choice (data.split_seed)."""
    min_doc_tokens: Annotated[int | None, Field(gt=1)] = None
    """Tokens that a document must have to count as long; None: a sample's (data.seq_length)."""
    max_doc_tokens: Annotated[int | None, Field(gt=1)] = None
    """Tokens of a document that are read at most, from its beginning; None: all."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the adapter's weights and of the documents' order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one. CUDA_VISIBLE_DEVICES says which."""
    runs_dir: Path = Path("runs")
    """Where run folders are made."""
    out: Path = Path("parallel_adapter.pt")
    """The adapter's file: .safetensors, or .pt as torch.save writes it (plain tensors, read with weights_only)."""
    wikitext: str | None = "wikitext-2"
    """Also measure on this text: wikitext-2 (the hub's test split) or a local file; none: do not."""
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    data: AdapterDataConfig = dataclasses.field(default_factory=AdapterDataConfig)  # pyright: ignore[reportIncompatibleVariableOverride]
    train: AdapterTrainConfig = dataclasses.field(default_factory=AdapterTrainConfig)  # pyright: ignore[reportIncompatibleVariableOverride]
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        check_adapter_suffix(self.out, "out")
        if self.segment_length < 2:
            raise UserError(
                f"data: segments of {self.segment_length} token (seq_length {self.data.seq_length} in "
                f"{self.data.segments_per_sample} segments); at least 2 are needed"
            )

    @property
    def segment_length(self) -> int:
        """Tokens in a segment."""
        return self.data.seq_length // self.data.segments_per_sample
