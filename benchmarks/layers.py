"""The cost of memory layers: training steps compared with our Pythia, and a single layer over a long text.

    python benchmarks/layers.py [--batch-size 8] [--tokens 256] [--long-tokens 16384] [--repeats 7]

Models take turns, each in its own process; layers alternate in one process. Read medians and ratios. Uses the bundled
text.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from jobs import Job, load_text
from rich.console import Console
from rich.table import Table
from turns import tabulate, take_turns

from new_llm.models import ModelType
from new_llm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer, PythiaLayer, Segments
from new_llm.training.devices import choose_device, choose_precision


def time_alternately(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call over rounds in which all calls run once; the first round is a warm-up and not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def bench_training(console: Console, arguments: argparse.Namespace, segment_length: int) -> None:
    """Training steps of all model types."""
    size = {"rows": arguments.batch_size, "tokens": arguments.tokens, "segment": segment_length}
    jobs = {str(kind): Job("training", str(kind), device=arguments.device, **size) for kind in ModelType}
    commands = {name: job.command for name, job in jobs.items()}
    answers = take_turns(commands, rounds=arguments.repeats, steps=1, threads=torch.get_num_threads())
    num_segments = -(-arguments.tokens // segment_length)
    title = (
        f"training step, pythia-70m's shape, {arguments.batch_size}×{arguments.tokens}, "
        f"{num_segments} segment{'s' if num_segments > 1 else ''} a row"
    )
    console.print(tabulate(title, answers, jobs["pythia"].num_tokens, ["pythia"]))


def bench_layers(console: Console, arguments: argparse.Namespace) -> None:
    """Forward pass of one layer: memory layers in segments, compared with softmax over the whole text."""
    device = choose_device(arguments.device)
    length, segment = arguments.long_tokens, arguments.long_segment
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(8192, 512)
    whole = embedding(load_text(length)).detach().to(device).view(1, 1, length, -1)  # as one segment
    cut = whole.view(1, length // segment, segment, -1)
    layers = {
        "softmax, whole text": (PythiaLayer(512, 8, 2048), whole),
        f"softmax, segments of {segment}": (PythiaLayer(512, 8, 2048), cut),
        "infini, 1 head of 512": (InfiniLayer(512, 8, 2048), cut),
        "infini, 8 heads of 64": (InfiniLayer(512, 8, 2048, num_memory_heads=8), cut),
        "infini, 1 head, no delta rule": (InfiniLayer(512, 8, 2048, use_delta_rule=False), cut),
        "multi_memory, 4 of 8 heads": (MultiMemoryLayer(512, 8, 2048), cut),
        "hierarchical, 4 of 8 heads": (HierarchicalLayer(512, 8, 2048), cut),
    }

    def make_forward(name: str, is_bf16: bool) -> Callable[[], object]:
        layer, hidden = layers[name]
        layer.to(device).eval()

        def forward() -> None:
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
                layer(hidden, None, Segments(write_last=False))
            if device.type == "cuda":
                torch.cuda.synchronize()

        return forward

    precisions = [False] + [True] * (choose_precision("auto", device) == "bf16")
    for is_bf16 in precisions:
        seconds = time_alternately({name: make_forward(name, is_bf16) for name in layers}, arguments.repeats)
        table = Table(
            title=f"one layer, forward, {length:,} tokens in segments of {segment}, {'bf16' if is_bf16 else 'fp32'}"
        )
        for column in ("layer", "seconds (median)", "of softmax over the whole text"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        base = statistics.median(seconds["softmax, whole text"])
        for name, values in seconds.items():
            middle = statistics.median(values)
            table.add_row(name, f"{middle:.3f}", f"{middle / base:.3f}")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--segments", type=int, nargs="+", default=[2048, 64])
    parser.add_argument("--long-tokens", type=int, default=16384)
    parser.add_argument("--long-segment", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args()
    console = Console(width=120)
    for segment_length in arguments.segments:
        bench_training(console, arguments, segment_length)
    bench_layers(console, arguments)


if __name__ == "__main__":
    main()
