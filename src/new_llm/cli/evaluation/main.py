"""`new-llm eval`: finds the measurement."""

import tyro

from new_llm.cli.arguments import read_errors
from new_llm.cli.evaluation.doctor import Doctor
from new_llm.cli.evaluation.long import LongDocuments
from new_llm.cli.evaluation.perplexity import Perplexity
from new_llm.cli.evaluation.recall import Recall
from new_llm.cli.evaluation.reversal import Reversal

COMMANDS = {"doctor": Doctor, "long": LongDocuments, "ppl": Perplexity, "recall": Recall, "reversal": Reversal}

DESCRIPTION = """Measure a trained model.

Every measurement writes a JSON file that says what was measured, how and by which code.

Examples:
  new-llm eval ppl --run runs/quick --model infini --protocol streaming
  new-llm eval ppl --run runs/quick --model infini --data.source my_text.txt
  new-llm eval reversal --run runs/quick --model infini --pairs-per-relation 10
  new-llm eval long --run runs/quick --model infini --min-tokens 2048 --baselines runs/quick:pythia
  new-llm eval recall --run runs/quick --model infini --lengths 1 2 4 8 --trials 20
  new-llm eval doctor --run runs/quick --model infini"""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    with read_errors():
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            args=arguments,
            prog="new-llm eval",
            description=DESCRIPTION,
            config=(tyro.conf.EnumChoicesFromValues,),
        )
    return command.run_command()
