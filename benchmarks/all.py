"""Run all benchmarks one after the other, and write a page of their tables; this is what `make bench` does.

    python benchmarks/all.py [--quick] [--only training peers ...] [--skip ...] [--page docs/benchmarks/measured.md]

The full run takes hours. Each program runs in its own process; if one fails, the page says so, and the others continue.
The page gives the date, the machine and its load.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "benchmarks" / "measured.md"
PROGRAMS = {  # with the arguments of a quick run, whose figures mean nothing
    "training": ["--quick"],
    "peers": ["--quick"],
    "generation": ["--quick"],
    "scaling": ["--quick"],
    "layers": ["--batch-size=1", "--tokens=64", "--segments", "64", "--long-tokens=512", "--repeats=1"],
    "long_context": ["--tokens=512", "--layers=1", "--repeats=1", "--marks", "256", "--piece=256", "--rounds=1"],
    "memory_fill": ["--quick"],
    "processes": ["--quick"],
    "study_costs": ["--only", "pythia_single", "gated_delta-4", "--rounds=1"],
}


def describe_machine() -> list[str]:
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    has_bf16 = any("avx512_bf16" in line for line in lines)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        f"- Measured {datetime.now(UTC):%Y-%m-%d}, {' '.join(sys.argv[1:]) or 'all programs at full length'}.",
        f"- Processor: {processor}, {os.cpu_count()} cores{', AVX-512 bf16' if has_bf16 else ''}; GPU: {gpu}.",
        f"- {platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
        f"- Load average at the start: {os.getloadavg()[0]:.1f}.",
    ]


def run_child(program: str, output: Path, arguments: list[str]) -> None:
    """Run a program in this process, and write its output to a file, with tables as Markdown."""
    import runpy

    from rich.console import Console
    from rich.table import Table

    parts: list[str] = []
    show = Console.print

    def keep(console: Console, *things: object, **options: object) -> None:
        show(console, *things, **options)  # pyright: ignore[reportArgumentType]
        parts.extend(format_table(thing) if isinstance(thing, Table) else f"{thing}\n" for thing in things)
        output.write_text(json.dumps(parts))

    Console.print = keep
    sys.argv = [program, *arguments]
    runpy.run_path(str(FOLDER / f"{program}.py"), run_name="__main__")


def format_table(table) -> str:
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    header, *rows = zip(*columns, strict=True)
    marks = ("---:" if column.justify == "right" else "---" for column in table.columns)
    lines = [f"| {' | '.join(cells)} |" for cells in (header, tuple(marks), *rows)]
    return "\n".join([*([f"**{table.title}**", ""] if table.title else []), *lines, ""])


def run_program(program: str, is_quick: bool) -> str:
    arguments = PROGRAMS[program] if is_quick else []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "parts.json"
        command = [sys.executable, __file__, "--child", program, str(output), *arguments]
        code = subprocess.run(command, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}).returncode
        parts = json.loads(output.read_text()) if output.exists() else []
    minutes = (time.monotonic() - begin) / 60
    ending = f"`benchmarks/{program}.py`, {minutes:.1f} min." if code == 0 else f"It FAILED (exit code {code})."
    return "\n".join([f"## {program.replace('_', ' ').capitalize()}", "", *parts, ending, ""])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--skip", nargs="+", choices=list(PROGRAMS), default=[])
    parser.add_argument("--quick", action="store_true", help="tiny runs to test the programs; figures mean nothing")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    page = ["# Measured", "", "Written by `make bench`; see [Benchmarks](../benchmarks.md) for what it means.", ""]
    page += [*describe_machine(), ""]
    if arguments.quick:
        page += ["A QUICK RUN: these figures mean nothing.", ""]
    failed = []
    for program in arguments.only:
        if program in arguments.skip:
            continue
        page.append(run_program(program, arguments.quick))
        if "It FAILED" in page[-1]:
            failed.append(program)
        arguments.page.parent.mkdir(parents=True, exist_ok=True)
        arguments.page.write_text("\n".join(page))
    print(f"written: {arguments.page}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
