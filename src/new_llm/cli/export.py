"""`new-llm export` and `new-llm lm-eval`: use the models with Hugging Face's tools and lm-evaluation-harness."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Literal, Self

from new_llm.cli.command import Command
from new_llm.config.errors import UserError
from new_llm.config.terminal import print_text


@dataclasses.dataclass(kw_only=True)
class Export(Command):
    """Write a run's model, with its tokenizer and a model card, as a folder that transformers loads.

    Examples:
      new-llm export --run runs/quick --model infini --out exported/infini
      new-llm export --run runs/quick --model pythia --out exported/pythia --format gpt_neox
      new-llm lm-eval --model hf --model_args pretrained=exported/infini --tasks lambada_openai
    """

    run: Path
    """A run folder, or the folder of a saved model."""
    out: Path
    """The folder to write; an exported model in it is replaced."""
    model: str | None = None
    """Which model of the run; not needed if there is only one."""
    format: Literal["auto", "gpt_neox"] = "auto"
    """auto: any model; Python code that loads it must import new_llm.models.hf. gpt_neox: plain Pythia models only, in
    a format that any program with GPT-NeoX support can load."""

    def execute(self) -> None:
        """Export the model."""
        from transformers.utils.logging import disable_progress_bar

        from new_llm.experiments.subject import export_run

        disable_progress_bar()
        export_run(self.run, self.model, self.out, layout=self.format)
        num_bytes = sum(file.stat().st_size for file in self.out.iterdir() if file.is_file())
        print_text(f"{self.out}: {num_bytes:,} bytes")


@dataclasses.dataclass(kw_only=True)
class LmEval(Command):
    """Run lm-evaluation-harness on any model that transformers can load, including this project's."""

    arguments: tuple[str, ...] = ()
    """The harness's own flags, passed on unchanged."""

    @classmethod
    def read(cls, arguments: list[str], prog: str) -> Self:
        """Keep all arguments for the harness."""
        return cls(arguments=tuple(arguments))

    def execute(self) -> None:
        """Pass the arguments to `lm_eval`."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("lm-evaluation-harness is not installed: pip install 'new-llm[lm-eval]'")
        import new_llm.models.hf  # noqa: F401 - registers the model type with the Auto classes

        # lm_eval reads sys.argv and changes it.
        before, sys.argv = sys.argv, ["lm_eval", *self.arguments]
        try:
            from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

            cli_evaluate()
        finally:
            sys.argv = before
