"""Long contexts: training on 16,384 tokens in segments, compared with softmax over all of them; streaming evaluation.

    python benchmarks/long_context.py [--tokens 16384] [--segment 256] [--layers 6] [--repeats 3]
    python benchmarks/long_context.py --only streaming [--marks 256 4096 65536 1048576]

Training is a forward and a backward pass, of a stack of layers without head and of whole models with the loss. They
alternate in one process; peak memory is measured in separate processes. The streaming curve compares, at each depth,
the time of the next tokens with that of a fresh stream's tokens, in alternation, so that other load on the machine
affects both equally. Uses the bundled text.
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
from jobs import load_text
from layers import time_alternately
from rich.console import Console
from rich.table import Table

from new_llm.config import PythiaConfig
from new_llm.models import create_model
from new_llm.models.layers import InfiniLayer, MultiMemoryLayer, PythiaLayer, Segments
from new_llm.training.devices import choose_device, choose_precision, make_autocast, read_peak_memory, reset_peak_memory

STACKS: dict[str, Callable[[], torch.nn.Module]] = {
    "softmax": lambda: PythiaLayer(512, 8, 2048),
    "infini, 1 head": lambda: InfiniLayer(512, 8, 2048),
    "infini, 1 head, no delta rule": lambda: InfiniLayer(512, 8, 2048, use_delta_rule=False),
    "infini, 8 heads": lambda: InfiniLayer(512, 8, 2048, num_memory_heads=8),
    "multi_memory": lambda: MultiMemoryLayer(512, 8, 2048),
}
CHECKPOINTED = ", gradient checkpointing"
MODELS = ("pythia", "infini", "infini, all layers", f"infini, all layers{CHECKPOINTED}")
FLAT_WITHIN = 0.05


def make_stack_step(name: str, arguments: argparse.Namespace) -> Callable[[], None]:
    """Forward and backward pass of a stack of layers over the bundled text."""
    device = choose_device(arguments.device)
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(STACKS[name]() for _ in range(arguments.layers)).to(device)
    embedding = torch.nn.Embedding(8192, 512)
    length = arguments.tokens if name == "softmax" else arguments.segment
    hidden = embedding(load_text(arguments.tokens)).detach().view(1, -1, length, 512).to(device)
    autocast = make_autocast(choose_precision("auto", device), device)

    def step() -> None:
        out = hidden
        with autocast():
            for layer in layers:
                out, _ = layer(out, None, Segments(write_last=False))
        out.float().square().mean().backward()
        layers.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def make_model_step(name: str, arguments: argparse.Namespace) -> Callable[[], None]:
    """Forward pass, loss and backward pass of a whole model of pythia-70m's shape."""
    device = choose_device(arguments.device)
    torch.manual_seed(0)
    config = PythiaConfig(max_position_embeddings=arguments.tokens, num_hidden_layers=arguments.layers)
    places = tuple(range(arguments.layers)) if "all layers" in name else (0,)
    options = {} if name == "pythia" else {"memory_layers": places}
    length = arguments.tokens if name == "pythia" else arguments.segment
    model = create_model(name.split(",")[0], config, segment_length=length, **options).to(device)
    model.gradient_checkpointing = name.endswith(CHECKPOINTED)
    labels = load_text(arguments.tokens + 1).view(1, -1).to(device)
    autocast = make_autocast(choose_precision("auto", device), device)

    def step() -> None:
        with autocast():
            loss = model.total_loss(labels[:, :-1], labels) / arguments.tokens
        loss.backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure_peak(what: str, name: str, arguments: argparse.Namespace) -> int:
    options = {"tokens": arguments.tokens, "segment": arguments.segment, "layers": arguments.layers}
    command = [sys.executable, __file__, "--child", what, name, "--device", arguments.device]
    for option, value in options.items():
        command += [f"--{option}", str(value)]
    child = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return json.loads(child.stdout)["peak"]


def run_child(arguments: argparse.Namespace) -> None:
    what, name = arguments.child
    device = choose_device(arguments.device)
    reset_peak_memory(device)
    step = (make_stack_step if what == "stack" else make_model_step)(name, arguments)
    for _ in range(2):
        step()
    print(json.dumps({"peak": read_peak_memory(device)}))


def bench_training(console: Console, arguments: argparse.Namespace, what: str) -> None:
    make_step, names = (make_stack_step, tuple(STACKS)) if what == "stack" else (make_model_step, MODELS)
    names = [name for name in names if name == names[0] or name in (arguments.names or names)]
    seconds = time_alternately({name: make_step(name, arguments) for name in names}, arguments.repeats)
    peaks = {name: measure_peak(what, name, arguments) for name in names}
    base, base_peak = statistics.median(seconds[names[0]]), peaks[names[0]]
    table = Table(
        title=f"{what}, {arguments.layers} layers, forward and backward over {arguments.tokens:,} tokens: "
        f"memory in segments of {arguments.segment}, {names[0]} over all of them"
    )
    for column in (what, "tokens/s (median)", f"speed, of {names[0]}", "spread", "peak memory", f"of {names[0]}"):
        table.add_column(column, justify="left" if column == what else "right")
    for name, values in seconds.items():
        middle = statistics.median(values)
        table.add_row(
            name,
            f"{arguments.tokens / middle:,.0f}",
            f"{base / middle:.2f}",
            f"±{(max(values) - min(values)) / 2 / middle:.0%}",
            f"{peaks[name] / 2**30:.2f} GiB",
            f"{peaks[name] / base_peak:.3f}",
        )
    console.print(table)


@torch.inference_mode()
def bench_streaming(console: Console, arguments: argparse.Namespace) -> None:
    """Time per token by depth in a stream, for an all-Infini model, including logits."""
    device = choose_device(arguments.device)
    torch.manual_seed(0)
    config = PythiaConfig(
        vocab_size=8192, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
    )
    model = create_model("infini", config, segment_length=arguments.segment, memory_layers=(0, 1)).to(device).eval()
    text = load_text(arguments.piece * 8).view(8, 1, -1).to(device)

    def read(stream, number: int) -> float:
        begin = time.perf_counter()
        stream.feed(text[number % len(text)])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    stream, depth = model.open_stream(), 0
    table = Table(title=f"streaming evaluation, pieces of {arguments.piece:,} tokens, segments of {arguments.segment}")
    for column in ("depth", "µs a token", "of a fresh stream's"):
        table.add_column(column, justify="right")
    ratios = []
    for mark in arguments.marks:
        while depth < mark:
            read(stream, depth // arguments.piece)
            depth += arguments.piece
        deep, fresh = [], []
        for number in range(arguments.rounds):
            deep.append(read(stream, number))
            depth += arguments.piece
            fresh.append(read(model.open_stream(), number))
        ratios.append(statistics.median(one / two for one, two in zip(deep, fresh, strict=True)))
        table.add_row(f"{mark:,}", f"{statistics.median(deep) / arguments.piece * 1e6:.1f}", f"{ratios[-1]:.3f}")
    console.print(table)
    apart = max(abs(ratio - 1) for ratio in ratios)
    verdict = "met" if apart <= FLAT_WITHIN else "missed"
    console.print(f"furthest {apart:.1%}; target: flat within {FLAT_WITHIN:.0%}: {verdict}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--segment", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--marks", type=int, nargs="+", default=[256, 4096, 65536, 1048576])
    parser.add_argument("--piece", type=int, default=4096, help="tokens per call in the streaming curve")
    parser.add_argument("--rounds", type=int, default=41, help="pieces measured at each depth")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=["stack", "model", "streaming"])
    parser.add_argument("--names", nargs="+", help="measure only these rows of the table, and the first")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments)
        return
    console = Console(width=120)
    for what in ("stack", "model"):
        if arguments.only in (None, what):
            bench_training(console, arguments, what)
    if arguments.only in (None, "streaming"):
        bench_streaming(console, arguments)


if __name__ == "__main__":
    main()
