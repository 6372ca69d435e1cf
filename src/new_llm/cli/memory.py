"""`new-llm memory`: fill a memory with texts, and show, merge and compare memory files."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import Positional, arg

from new_llm.cli.command import Command, CommandGroup
from new_llm.config.errors import UserError
from new_llm.config.evaluation import FillConfig
from new_llm.config.terminal import open_console, print_text

# The commands themselves import what imports torch, after help and bad flags have been answered.
if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from new_llm.models.memory_compare import MemoryComparison
    from new_llm.models.memory_file import MemoryFile


@dataclasses.dataclass(kw_only=True)
class Fill(Command):
    """Read texts into an empty memory of a run's model, and write it to a file.

    Where memory adds (no delta rule, no decay) each file is read from an empty memory and the memories are summed.
    Otherwise the files are read one after another, in the order given.
    """

    run: Path
    """A run folder, or the folder of a saved model."""
    text: tuple[Path, ...]
    """Text files: .txt, .raw, .tokens, .jsonl, .jsonl.zst or .parquet."""
    out: Path
    """The memory file to write, *.safetensors."""
    model: str | None = None
    """Which model of the run; not needed where only one has memory."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    reading: Annotated[FillConfig, arg(name="")] = dataclasses.field(default_factory=FillConfig)

    def execute(self) -> int:
        """Fill, with a progress bar in a terminal."""
        from new_llm.experiments.memory_filling import check_text_files, fill_memory_from_run, is_plain

        check_text_files(self.text)
        console = open_console(stderr=True)
        size = sum(path.stat().st_size for path in self.text)
        if not console.is_terminal:  # in a terminal the bar says it
            console.print(f"reading {_count(len(self.text), 'file')}, {size:,} bytes")
        progress = _make_progress()
        with progress:
            # Of formats that are packed or hold more than text, the bytes of text are not known beforehand.
            task = progress.add_task("reading", total=size if all(map(is_plain, self.text)) else None)
            result = fill_memory_from_run(
                self.run,
                self.text,
                self.out,
                model_name=self.model,
                device=self.device,
                config=self.reading,
                on_bytes=lambda num_bytes: progress.advance(task, num_bytes),
                on_note=lambda note: console.print(f"note: {note}", soft_wrap=True),
            )
        print_text(
            f"{self.out}: {_count(result.num_tokens, 'token')} in {_count(result.num_segments, 'segment')} "
            f"of {_count(result.num_files, 'file')}, {result.tokens_per_second:,.0f} tokens/s, "
            f"{self.out.stat().st_size:,} bytes"
        )
        return 0


@dataclasses.dataclass(kw_only=True)
class Show(Command):
    """Show what a memory file holds."""

    file: Positional[Path]
    """A memory file."""

    def execute(self) -> int:
        """Print the file's facts and its memories."""
        from new_llm.models.memory_file import read_memory_file

        content = read_memory_file(self.file)
        console = open_console()
        console.print(_tabulate_facts(self.file, content))
        console.print(_tabulate_memories(content))
        return 0


@dataclasses.dataclass(kw_only=True)
class Merge(Command):
    """Add memories that one model has filled from different texts, without the delta rule and decay."""

    files: Positional[tuple[Path, ...]]
    """Memory files, at least two."""
    out: Path
    """The memory file to write, *.safetensors; may be one of the files."""
    force: bool = False
    """Add memories of different weights, too."""

    def execute(self) -> int:
        """Merge and say what came out."""
        from new_llm.experiments.memory_filling import check_output
        from new_llm.models.memory_file import merge_memory_files

        check_output(self.out)
        record = merge_memory_files(self.files, self.out, force=self.force).record
        print_text(
            f"{self.out}: {_count(record.tokens_seen, 'token')} of {_count(len(self.files), 'file')}, "
            f"{self.out.stat().st_size:,} bytes"
        )
        return 0


@dataclasses.dataclass(kw_only=True)
class Compare(Command):
    """Compare two memory files memory by memory."""

    a: Positional[Path]
    """A memory file."""
    b: Positional[Path]
    """Another."""

    def execute(self) -> int:
        """Print the norms, the relative differences and the cosines of M and z."""
        from new_llm.models.memory_compare import compare_memories, list_memories
        from new_llm.models.memory_file import read_memory_file

        contents = [read_memory_file(path) for path in (self.a, self.b)]
        try:
            rows = compare_memories(*(list_memories(content.record, content.state) for content in contents))
        except ValueError as error:
            raise UserError(f"{self.a} and {self.b} can't be compared: {error}") from None
        one, two = (content.record for content in contents)
        console = open_console()
        console.print(_tabulate_comparison(rows))
        console.print(f"A = {self.a}\nB = {self.b}", soft_wrap=True)
        if one.weights_fingerprint != two.weights_fingerprint:
            console.print("note: different weights have filled them")
        return 0


class Memory(CommandGroup):
    """Fill a memory with texts, and show, merge and compare memory files."""

    commands: ClassVar = {"fill": Fill, "show": Show, "merge": Merge, "compare": Compare}


def _make_progress() -> "Progress":
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = open_console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _tabulate_facts(path: Path, content: "MemoryFile") -> "Table":
    from rich.table import Table

    record = content.record
    table = Table(title=str(path), show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    facts = {
        "tokens seen": f"{record.tokens_seen:,}",
        "segments seen": f"{record.segments_seen:,} of {record.segment_length:,} tokens",
        "memory of": "all rows together" if record.rows is None else f"each of {record.rows} rows",
        "weights": record.weights_fingerprint,
        "written": f"{record.created} by new-llm {record.program_version}",
        "file": f"{path.stat().st_size:,} bytes",
    }
    for layer in record.layers:
        decay = "no decay"
        if layer.decay is not None:
            decay = f"each write leaves {min(layer.decay):.3g} to {max(layer.decay):.3g} of the memory"
        facts[f"layer {layer.layer}"] = (
            f"{layer.kind}: {_count(layer.num_memories, 'memory', 'memories')} of "
            f"{_count(layer.num_memory_heads, 'head')}, {layer.head_size} by {layer.value_size}, "
            f"{'with' if layer.use_delta_rule else 'without'} the delta rule, {decay}"
        )
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _tabulate_memories(content: "MemoryFile") -> "Table":
    from rich.table import Table

    from new_llm.models.memory_compare import list_memories

    has_rows = content.record.rows is not None
    table = Table(*("layer", *(["row"] * has_rows), "memory", "tokens", "‖M‖", "‖z‖"))
    for memory in list_memories(content.record, content.state):
        table.add_row(
            str(memory.layer),
            *([str(memory.row)] * has_rows),
            str(memory.memory),
            f"{memory.num_tokens:,}",
            _number(float(memory.memories.double().norm())),
            _number(float(memory.norms.double().norm())),
        )
    return table


def _tabulate_comparison(rows: "list[MemoryComparison]") -> "Table":
    from rich.table import Table

    has_rows = rows[0].row is not None
    table = Table(*("layer", *(["row"] * has_rows), "memory", "", "A", "B", "‖A−B‖/‖A‖", "cosine"))
    for row in rows:
        place = (str(row.layer), *([str(row.row)] * has_rows), str(row.memory))
        for name, distance in (("‖M‖", row.memories), ("‖z‖", row.norms)):
            table.add_row(*place, name, *(_number(value) for value in dataclasses.astuple(distance)))
        table.add_row(*place, "tokens", *(f"{tokens:,}" for tokens in row.tokens), end_section=True)
    return table


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
