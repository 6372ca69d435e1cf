"""`new-llm generate`: continue texts with a run's model."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction, arg

from new_llm.cli.command import Command
from new_llm.config.errors import UserError
from new_llm.config.files import read_text_file
from new_llm.config.model import GenerationConfig
from new_llm.config.terminal import make_printable, print_text
from new_llm.formats import format_plural

# Modules that import torch are imported in `execute`, so that help and flag errors appear at once.
if TYPE_CHECKING:
    from collections.abc import Sequence

    from new_llm.models.generation import GenerationStatistics

MAX_PROMPT_BYTES = 1 << 26
"""Enough for several books, but not for a corpus."""


@dataclasses.dataclass(kw_only=True)
class Generate(Command):
    """Continue a text, or several at once. Texts go to stdout, statistics to stderr.

    Examples:
      new-llm generate --run runs/quick --model infini --prompt "The Congress"
      new-llm generate --run runs/quick --model infini --prompt "The Congress" --stream --do-sample --temperature 0.8
      new-llm generate --run runs/quick --model infini --memory m.safetensors --prompt "One" --prompt "Two"
      new-llm generate --run runs/quick --model infini --compare-memory m.safetensors --prompt-file chapter.txt
      cat chapter.txt | new-llm generate --run runs/quick --model infini --prompt-file - --json

    These are base models: they continue a text but do not answer questions.
    """

    run: Path
    """A run folder, or the folder of a saved model."""
    prompt: UseAppendAction[tuple[str, ...]]
    """The text to continue; repeat the flag to continue several texts in one batch."""
    prompt_file: Path | None = None
    """A UTF-8 file with the text to continue, read without its final line break; - reads standard input."""
    model: str | None = None
    """Which model of the run; not needed if there is only one."""
    memory: Path | None = None
    """The memory file to start from; None: an empty memory."""
    compare_memory: Path | None = None
    """Continue the text greedily with the memory of this file, and again with an empty memory."""
    force: bool = False
    """Accept a memory that was filled by other weights."""
    save_memory: Path | None = None
    """Write the final memory to this .safetensors file: the starting memory plus all text read and generated."""
    stream: bool = False
    """Show the text as it is generated (one prompt only)."""
    json: bool = False
    """Print one JSON object per continuation: prompt, memory, text, num_tokens, finish_reason, statistics."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    generation: Annotated[GenerationConfig, arg(name="")] = dataclasses.field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        if self.prompt_file is not None and self.prompt:
            raise UserError("--prompt-file: can't be combined with --prompt")
        if not self.prompt and self.prompt_file is None:
            raise UserError("--prompt: give at least one text, or use --prompt-file")
        if self.stream and len(self.prompt) > 1:
            raise UserError(f"--stream: takes a single prompt; {len(self.prompt)} are given")
        if self.stream and self.json:
            raise UserError("--stream: can't be combined with --json, which prints complete texts")
        if self.compare_memory is not None:
            others = {
                "--memory": self.memory,
                "--save-memory": self.save_memory,
                "--stream": self.stream,
                "--do-sample": self.generation.do_sample,
            }
            if given := [flag for flag, value in others.items() if value]:
                raise UserError(f"--compare-memory: can't be combined with {', '.join(given)}")

    def execute(self) -> None:
        """Generate and print the texts; with --save-memory, write the memory."""
        from new_llm.data.tokenizer import find_special_tokens
        from new_llm.experiments.memory_filling import check_output
        from new_llm.experiments.run_folder import load_run_model
        from new_llm.models.generation import encode_prompts, generate
        from new_llm.models.memory_file import load_memory_file, save_memory_file
        from new_llm.training.devices import choose_device

        prompts = self.prompt if self.prompt_file is None else (read_prompt(self.prompt_file),)
        if not all(prompts):
            raise UserError(f"{self.prompt_file or '--prompt'}: the prompt is empty")
        device = choose_device(self.device)
        if self.save_memory is not None:
            check_output(self.save_memory, [] if self.memory is None else [self.memory])
        memory = self.memory or self.compare_memory
        model, tokenizer = load_run_model(self.run, self.model, needs_memory=bool(memory or self.save_memory))
        model.to(device)
        if memory is not None:
            load_memory_file(model, memory, force=self.force)
        config = self.generation
        drawn = () if config.do_sample else ("temperature", "top_k", "top_p", "seed")
        if unused := [name for name in drawn if getattr(config, name) != getattr(GenerationConfig, name)]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            print(f"note: {flags}: no effect without --do-sample", file=sys.stderr)
        end = find_special_tokens(tokenizer).get("eos_token")
        if end is not None and not config.eos_token_id:
            config = dataclasses.replace(config, eos_token_id=tokenizer.get_vocab()[end])
        found: list[tuple[Path | None, GenerationStatistics]] = []
        try:
            ids, mask = encode_prompts(tokenizer, list(prompts))
            if self.stream:
                show_piece(0, prompts[0])
            for start in (memory,) if self.compare_memory is None else (memory, None):
                if found:
                    model.reset_memory()
                _, statistics = generate(
                    model,
                    ids,
                    mask,
                    config=config,
                    tokenizer=tokenizer,
                    on_text=show_piece if self.stream else None,
                    update_memory=self.save_memory is not None,
                )
                found.append((start, statistics))
        except ValueError as error:  # from the library: wrong number of memory rows, ids outside the vocabulary
            raise UserError(str(error)) from None
        if self.save_memory is not None:
            save_memory_file(model, self.save_memory)
        if self.stream:
            print()
        else:
            self.show(prompts, found)
        for _, statistics in found:
            print(
                f"{format_plural(statistics.num_tokens, 'new token')} after "
                f"{format_plural(statistics.num_prompt_tokens, 'prompt token')} in {statistics.seconds:.2f} s, "
                f"{statistics.tokens_per_second:,.0f} tokens/s, {format_plural(statistics.passes, 'pass')} per token",
                file=sys.stderr,
            )

    def show(self, prompts: "Sequence[str]", found: "Sequence[tuple[Path | None, GenerationStatistics]]") -> None:
        """Print each prompt with its continuation; in a comparison, with the memory file and with an empty memory."""
        texts = [statistics.texts or () for _, statistics in found]
        if self.json:
            names = ("num_tokens", "num_prompt_tokens", "seconds", "prompt_seconds", "tokens_per_second", "passes")
            for memory, statistics in found:
                for row, prompt in enumerate(prompts):
                    line = {
                        "prompt": prompt,
                        "memory": None if memory is None else str(memory),
                        "text": (statistics.texts or ())[row],
                        "num_tokens": statistics.row_tokens[row],
                        "finish_reason": statistics.finish_reasons[row],
                        "statistics": {name: getattr(statistics, name) for name in names},  # of all prompts together
                    }
                    print(json.dumps(line))
        elif self.compare_memory is not None:
            headings = ("prompt", f"with {self.compare_memory.name}", "with an empty memory")
            for parts in zip(prompts, *texts, strict=True):
                for heading, text in zip(headings, parts, strict=True):
                    print_text(f"--- {heading} ---\n{text}")
        else:
            for number, (prompt, text) in enumerate(zip(prompts, texts[0], strict=True)):
                if len(prompts) > 1:
                    print(f"--- {number + 1} ---")
                print(for_stdout(prompt + text))


def show_piece(_: int, piece: str) -> None:
    """Print text as it is generated."""
    print(for_stdout(piece), end="", flush=True)


def read_prompt(path: Path) -> str:
    """The text of a file, or of standard input for `-`, without its final line break."""
    if str(path) != "-":
        text = read_text_file(path, MAX_PROMPT_BYTES)
    else:
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt-file: standard input is not UTF-8: {error.reason}") from None
    return text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


def for_stdout(text: str) -> str:
    """A text with control characters escaped if stdout is a terminal, which would obey them; else unchanged."""
    return make_printable(text) if sys.stdout.isatty() else text
