"""`new-llm memory`: fill a memory with texts, and show, merge and compare memory files."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import Positional, arg

from new_llm.cli.command import Command, CommandGroup
from new_llm.config.errors import UserError
from new_llm.config.evaluation import FillConfig
from new_llm.config.terminal import open_console, print_text, show_progress
from new_llm.formats import format_plural

# Modules that import torch are imported in `execute`, so that help and flag errors appear at once.
if TYPE_CHECKING:
    from torch import Tensor

    from new_llm.models.memory_file import MemoryFile


@dataclasses.dataclass(kw_only=True)
class Fill(Command):
    """Fill the memory of a run's model by reading texts, and write it to a file.

    If the model's memories can be added (no delta rule, no decay), each file is read into an empty memory and the
    memories are summed. Otherwise all files are read into one memory, in the order given.
    """

    run: Path
    """A run folder, or the folder of a saved model."""
    text: tuple[Path, ...]
    """Text files: .txt, .raw, .tokens, .jsonl, .jsonl.zst or .parquet."""
    out: Path
    """The memory file to write, *.safetensors."""
    model: str | None = None
    """Which model of the run; not needed if only one has memory."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    reading: Annotated[FillConfig, arg(name="")] = dataclasses.field(default_factory=FillConfig)

    def execute(self) -> None:
        """Fill, with a progress bar in a terminal."""
        from new_llm.experiments.memory_filling import (
            check_output,
            check_text_files,
            fill_memory,
            is_plain,
            memory_adds,
        )
        from new_llm.experiments.run_folder import load_run_model
        from new_llm.models.memory_file import save_memory_file
        from new_llm.training.devices import choose_device

        check_text_files(self.text)
        console = open_console(stderr=True)
        size = sum(path.stat().st_size for path in self.text)
        if not console.is_terminal:  # where there is no progress bar
            console.print(f"reading {format_plural(len(self.text), 'file')}, {size:,} bytes")
        model, tokenizer = load_run_model(self.run, self.model, needs_memory=True)
        check_output(self.out, self.text)
        if len(self.text) > 1 and not memory_adds(model):
            note = "memories of this model can't be added: the files are read into one memory, in the order given"
            console.print(f"note: {note}", soft_wrap=True)
        # In compressed or structured formats the number of bytes of text is not known in advance.
        total = size if all(map(is_plain, self.text)) else None
        with show_progress("reading", total=total, in_bytes=True) as update:
            result = fill_memory(
                model.to(choose_device(self.device)),
                tokenizer,
                self.text,
                config=self.reading,
                on_bytes=lambda num_bytes: update(advance=num_bytes),
            )
        save_memory_file(model, self.out)
        print_text(
            f"{self.out}: {format_plural(result.num_tokens, 'token')} in "
            f"{format_plural(result.num_segments, 'segment')} of {format_plural(result.num_files, 'file')}, "
            f"{result.num_tokens / max(result.seconds, 1e-9):,.0f} tokens/s, {self.out.stat().st_size:,} bytes"
        )


@dataclasses.dataclass(kw_only=True)
class Show(Command):
    """Show the contents of a memory file."""

    file: Positional[Path]
    """A memory file."""

    def execute(self) -> None:
        """Print the file's metadata and each tensor's shape and norm; for a count, its value."""
        from new_llm.models.memory_file import list_tensors, read_memory_file
        from new_llm.report import ColumnTable

        content = read_memory_file(self.file)
        console, record = open_console(), content.record
        whose = "all rows together" if record.rows is None else f"each of {format_plural(record.rows, 'row')}"
        lines = [
            f"{self.file}: {self.file.stat().st_size:,} bytes, written {record.created} by new-llm "
            f"{record.program_version}",
            f"memory of {whose}: {_count_tokens(content)}segments of {format_plural(record.segment_length, 'token')}",
            f"weights: {record.weights_fingerprint}",
        ]
        for layer in record.layers:
            settings = ", ".join(f"{name} {value}" for name, value in layer.settings.items())
            merging = "can be merged" if layer.additive else "can't be merged"
            lines.append(f"layer {layer.layer}: {layer.kind}, {merging}{settings and ': '}{settings}")
        for line in lines:
            console.print(line, soft_wrap=True)

        def measure(tensor: "Tensor") -> str:
            is_count = tensor.numel() == 1 and not tensor.is_floating_point()
            return f"{int(tensor):,}" if is_count else _number(float(tensor.double().norm()))

        rows = [
            (place, {"shape": " × ".join(map(str, tensor.shape)), "norm": measure(tensor)})
            for place, tensor in list_tensors(content).items()
        ]
        console.print(ColumnTable.of_words(rows))


@dataclasses.dataclass(kw_only=True)
class Merge(Command):
    """Add memories that one model, without delta rule or decay, has filled from different texts."""

    files: Positional[tuple[Path, ...]]
    """Memory files, at least two."""
    out: Path
    """The memory file to write, *.safetensors; may be one of the inputs."""
    force: bool = False
    """Accept memories that were filled by different weights."""

    def execute(self) -> None:
        """Merge the files and print the result's size."""
        from new_llm.experiments.memory_filling import check_output
        from new_llm.models.memory_file import merge_memory_files

        check_output(self.out)
        merged = merge_memory_files(self.files, self.out, force=self.force)
        print_text(
            f"{self.out}: {_count_tokens(merged)}{format_plural(len(self.files), 'file')}, "
            f"{self.out.stat().st_size:,} bytes"
        )


@dataclasses.dataclass(kw_only=True)
class Compare(Command):
    """Compare two memory files tensor by tensor."""

    a: Positional[Path]
    """A memory file."""
    b: Positional[Path]
    """Another memory file."""

    def execute(self) -> None:
        """Print the norms, the relative differences and the cosines."""
        from new_llm.models.memory_file import compare_memories, read_memory_file
        from new_llm.report import ColumnTable

        contents = [read_memory_file(path) for path in (self.a, self.b)]
        try:
            figures = compare_memories(*contents)
        except ValueError as error:
            raise UserError(f"{self.a} and {self.b} can't be compared: {error}") from None
        one, two = (content.record for content in contents)
        console = open_console()
        titles: list[str] = ["‖A‖", "‖B‖", "‖A−B‖/‖A‖", "cosine"]
        rows = [(place, dict(zip(titles, map(_number, found), strict=True))) for place, found in figures.items()]
        console.print(ColumnTable.of_words(rows))
        console.print(f"A = {self.a}\nB = {self.b}", soft_wrap=True)
        if one.weights_fingerprint != two.weights_fingerprint:
            console.print("note: the memories were filled by different weights")


class Memory(CommandGroup):
    """Fill a memory with texts, and show, merge and compare memory files."""

    commands: ClassVar = {"fill": Fill, "show": Show, "merge": Merge, "compare": Compare}


def _count_tokens(content: "MemoryFile") -> str:
    """The tokens that a memory has seen, e.g. "12 tokens in "; empty if its layers do not count them."""
    return "" if content.tokens_seen is None else f"{format_plural(content.tokens_seen, 'token')} in "


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"
