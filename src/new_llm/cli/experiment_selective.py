"""`new-llm experiment-selective`: selective output against baselines of equal parameters and of equal compute."""

from new_llm.cli.experiment import ExperimentArguments, parse_arguments, run_parsed

BASELINES = ("pythia", "deep_pythia")
DESCRIPTION = """Compare selective output (1 + skip_interval passes through the layers) with its baselines.

`--models baseline selective`: the baseline stands for two models, a Pythia with the same layers (equal parameters, but
for the projection between passes) and a Pythia with as many layers as the selective model runs (equal compute).
Perplexities stand beside tokens a second. All options are those of `new-llm experiment`.

Examples:
  new-llm experiment-selective --skip-interval 2
  new-llm experiment-selective --config configs/quick.yaml --models baseline selective"""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    return run_parsed(parse_selective_arguments(arguments))


def parse_selective_arguments(arguments: list[str]) -> ExperimentArguments:
    """As `parse_arguments`, with `baseline` for both baselines.

    Raises:
        UserError: as `parse_arguments`.
    """
    expanded: list[str] = []
    for argument in arguments:
        expanded += BASELINES if argument == "baseline" else [argument]
    return parse_arguments(
        expanded,
        models=(*BASELINES, "selective"),
        command="experiment-selective",
        description=DESCRIPTION,
    )
