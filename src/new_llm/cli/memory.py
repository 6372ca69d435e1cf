"""`new-llm memory`: fill a memory with texts, and show, merge and compare memory files."""

import dataclasses
import math
from collections.abc import Iterator
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

    from new_llm.models.memory_file import MemoryFile, MemoryTensors


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
        from new_llm.models.memory_file import list_memories, read_memory_file
        from new_llm.report import ColumnTable

        content = read_memory_file(self.file)
        console = open_console()
        for line in _list_facts(self.file, content):
            console.print(line, soft_wrap=True)
        rows = [
            (
                _name_place(one),
                {
                    "tokens": f"{one.num_tokens:,}",
                    "‖M‖": _number(float(one.memories.double().norm())),
                    "‖z‖": _number(float(one.norms.double().norm())),
                },
            )
            for one in list_memories(content)
        ]
        console.print(ColumnTable.of_words(rows))
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
        from new_llm.evaluation import Column
        from new_llm.models.memory_file import measure_distance, pair_memories, read_memory_file
        from new_llm.report import ColumnTable

        contents = [read_memory_file(path) for path in (self.a, self.b)]
        try:
            pairs = pair_memories(*contents)
        except ValueError as error:
            raise UserError(f"{self.a} and {self.b} can't be compared: {error}") from None
        one, two = (content.record for content in contents)
        console = open_console()
        titles = {"norm_a": "A", "norm_b": "B", "relative": "‖A−B‖/‖A‖", "cosine": "cosine"}
        table: list[tuple[str, list[Column]]] = []
        for memory, other in pairs:
            columns = [
                Column(name + key, title, _number(getattr(distance, key)), group=name)
                for name, distance in (
                    ("M", measure_distance(memory.memories, other.memories)),
                    ("z", measure_distance(memory.norms, other.norms)),
                )
                for key, title in titles.items()
            ]
            for title, found in (("A", memory), ("B", other)):
                columns.append(Column(title, title, f"{found.num_tokens:,}", group="tokens"))
            table.append((_name_place(memory), columns))
        console.print(ColumnTable(table))
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


def _list_facts(path: Path, content: "MemoryFile") -> Iterator[str]:
    record = content.record
    yield f"{path}: {path.stat().st_size:,} bytes, written {record.created} by new-llm {record.program_version}"
    whose = "all rows together" if record.rows is None else f"each of {record.rows} rows"
    yield (
        f"memory of {whose}: {record.tokens_seen:,} tokens in {record.segments_seen:,} segments of "
        f"{record.segment_length:,}"
    )
    yield f"weights: {record.weights_fingerprint}"
    for layer in record.layers:
        decay = "no decay"
        if layer.decay is not None:
            decay = f"each write leaves {min(layer.decay):.3g} to {max(layer.decay):.3g} of the memory"
        yield (
            f"layer {layer.layer}: {layer.kind}: {_count(layer.num_memories, 'memory', 'memories')} of "
            f"{_count(layer.num_memory_heads, 'head')}, {layer.head_size} by {layer.value_size}, "
            f"{'with' if layer.use_delta_rule else 'without'} the delta rule, {decay}"
        )


def _name_place(memory: "MemoryTensors") -> str:
    row = "" if memory.row is None else f"row {memory.row}, "
    return f"layer {memory.layer}, {row}memory {memory.memory}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
