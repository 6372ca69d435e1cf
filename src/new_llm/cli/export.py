"""`new-llm export`: a run's model as a folder for Hugging Face's tools."""

import dataclasses
from pathlib import Path
from typing import Literal

from new_llm.cli.command import Command
from new_llm.config.terminal import print_text


@dataclasses.dataclass(kw_only=True)
class Export(Command):
    """Write a run's model, with its tokenizer and a model card, as a folder that transformers loads.

    Examples:
      new-llm export --run runs/quick --model infini --out exported/infini
      new-llm export --run runs/quick --model pythia --out exported/pythia --format gpt_neox
      new-llm lm-eval --model hf --model_args pretrained=exported/infini --tasks lambada_openai

    auto keeps every kind of model, and loads where new_llm.models.hf is imported; gpt_neox is for plain Pythia models,
    and loads in any program that knows GPT-NeoX.
    """

    run: Path
    """A run folder, or the folder of a saved model."""
    out: Path
    """The folder to write; a model in it is replaced."""
    model: str | None = None
    """Which model of the run; not needed where there is only one."""
    format: Literal["auto", "gpt_neox"] = "auto"
    """The folder's layout."""

    def execute(self) -> int:
        """Export the model."""
        from transformers.utils.logging import disable_progress_bar

        from new_llm.experiments.export import export_run

        disable_progress_bar()
        export_run(self.run, self.model, self.out, layout=self.format)
        num_bytes = sum(file.stat().st_size for file in self.out.iterdir() if file.is_file())
        print_text(f"{self.out}: {num_bytes:,} bytes")
        return 0
