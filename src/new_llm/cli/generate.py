"""`new-llm generate`: a run's model continues texts."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction, arg

from new_llm.cli.command import Command
from new_llm.config.errors import UserError
from new_llm.config.model import GenerationConfig
from new_llm.config.terminal import make_printable

# What imports torch is imported after help and bad flags have been answered.
if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from new_llm.models import TransformerLM
    from new_llm.models.generation import GenerationStatistics


@dataclasses.dataclass(kw_only=True)
class Generate(Command):
    """Continue a text, or several at once. Texts go to stdout, statistics to stderr.

    Examples:
      new-llm generate --run runs/quick --model infini --prompt "The Congress"
      new-llm generate --run runs/quick --model infini --prompt "The Congress" --stream --do-sample --temperature 0.8
      new-llm generate --run runs/quick --model infini --memory m.safetensors --prompt "One" --prompt "Two"

    These are base models: they continue a text, and answer nothing.
    """

    run: Path
    """A run folder, or the folder of a saved model."""
    prompt: UseAppendAction[tuple[str, ...]]
    """The text to continue; given several times, the texts are continued together."""
    model: str | None = None
    """Which model of the run; not needed where there is only one."""
    memory: Path | None = None
    """A memory file to begin from; without it memory is empty."""
    force: bool = False
    """Take a memory that other weights have filled, too."""
    save_memory: Path | None = None
    """Write the memory to this file in the end, *.safetensors: what it was, and what was read and written here."""
    stream: bool = False
    """Show one prompt's text as it is made."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    generation: Annotated[GenerationConfig, arg(name="")] = dataclasses.field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("--prompt: at least one text is needed")
        if not all(self.prompt):
            raise UserError("--prompt: the prompt is empty")
        if self.stream and len(self.prompt) > 1:
            raise UserError(f"--stream: shows the text of one prompt as it is made, {len(self.prompt)} are given")

    def execute(self) -> int:
        """Generate, print the texts and write the memory that was asked for."""
        from new_llm.data.tokenizer import find_special_tokens
        from new_llm.experiments.memory_filling import check_output
        from new_llm.experiments.run_folder import load_run_model
        from new_llm.models.memory_file import load_memory_file, save_memory_file
        from new_llm.training.devices import choose_device

        device = choose_device(self.device)
        if self.save_memory is not None:
            check_output(self.save_memory, [] if self.memory is None else [self.memory])
        needs_memory = self.memory is not None or self.save_memory is not None
        model, tokenizer = load_run_model(self.run, self.model, needs_memory=needs_memory)
        model.to(device)
        if self.memory is not None:
            load_memory_file(model, self.memory, force=self.force)
        config = self.generation
        if unused := find_unused(config):
            print(f"note: {', '.join(unused)}: without effect unless --do-sample is given", file=sys.stderr)
        end = find_special_tokens(tokenizer).get("eos_token")
        if end is not None and not config.eos_token_id:
            config = dataclasses.replace(config, eos_token_id=tokenizer.get_vocab()[end])
        try:
            statistics = self.show_generation(model, tokenizer, config)
        except UserError:
            raise
        except ValueError as error:  # of the library: rows of a memory, ids outside the vocabulary
            raise UserError(str(error)) from None
        if self.save_memory is not None:
            save_memory_file(model, self.save_memory)
        describe(statistics)
        return 0

    def show_generation(
        self, model: "TransformerLM", tokenizer: "Tokenizer", config: GenerationConfig
    ) -> "GenerationStatistics":
        """Generate, and print each prompt with what follows it."""
        from new_llm.models.generation import encode_prompts, generate

        # A terminal would obey escape sequences; a file gets the text as it is.
        show = make_printable if sys.stdout.isatty() else str

        def write(_: int, piece: str) -> None:
            sys.stdout.write(show(piece))
            sys.stdout.flush()

        ids, mask = encode_prompts(tokenizer, list(self.prompt))
        if self.stream:
            write(0, self.prompt[0])
        _, statistics = generate(
            model,
            ids,
            mask,
            config=config,
            tokenizer=tokenizer,
            on_text=write if self.stream else None,
            update_memory=self.save_memory is not None,
        )
        if self.stream:
            print()
            return statistics
        for number, (prompt, text) in enumerate(zip(self.prompt, statistics.texts or (), strict=True)):
            if len(self.prompt) > 1:
                print(f"--- {number + 1} ---")
            print(show(prompt + text))
        return statistics


def find_unused(config: GenerationConfig) -> list[str]:
    """The flags of a draw that were given to a greedy generation."""
    names = () if config.do_sample else ("temperature", "top_k", "top_p", "seed")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(config, name) != getattr(GenerationConfig, name)]


def describe(statistics: "GenerationStatistics") -> None:
    """One line of statistics, on stderr."""
    passes = "1 pass" if statistics.passes == 1 else f"{statistics.passes} passes"
    print(
        f"{statistics.num_tokens:,} new tokens after {statistics.num_prompt_tokens:,} of the prompt in "
        f"{statistics.seconds:.2f} s, {statistics.tokens_per_second:,.0f} tokens/s, {passes} per token",
        file=sys.stderr,
    )
