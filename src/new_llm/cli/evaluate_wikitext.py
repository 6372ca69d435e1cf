"""`new-llm evaluate-wikitext`: `eval ppl` on the test text of WikiText-2, read as one document."""

from new_llm.cli.arguments import parse_flags
from new_llm.cli.evaluation.perplexity import Perplexity
from new_llm.config.measurement import SubjectConfig, TextConfig

DESCRIPTION = """Perplexity on WikiText-2's test text: sliding windows over the whole text, as published figures are.

Examples:
  new-llm evaluate-wikitext --run EleutherAI/pythia-70m
  new-llm evaluate-wikitext --run runs/quick --model infini --data.source wiki.test.raw
  new-llm evaluate-wikitext --parallel-adapter parallel_adapter.pt

The text comes from the hub or its cache here; --data.source names a local wiki.test.raw in its place."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    defaults = Perplexity(subject=SubjectConfig(), data=TextConfig(source="wikitext-2", whole_files=True))
    command = parse_flags(
        Perplexity, arguments, prog="new-llm evaluate-wikitext", description=DESCRIPTION, default=defaults
    )
    return command.run_command()
