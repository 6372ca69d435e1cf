"""Speed and memory by the size of the model and by the rows of the batch.

    python benchmarks/scaling.py [--sizes 14m 31m 70m 160m 410m] [--rows 1 4 8 16] [--rounds 3] [--skip training]

Pythia's shapes with new weights, embedded text: training steps of 256 tokens a row, and greedy decoding in bfloat16
after 256. Ours and transformers' GPT-NeoX take turns, each in a process of its own. The curve over the context, to a
million tokens, is `long_context.py`'s.
"""

import argparse
import statistics
from dataclasses import replace

import torch
from jobs import SIZES, Job
from rich.console import Console
from rich.table import Table
from turns import Answers, compare, describe_spread, take_turns

TOKENS = 256
WAYS = {
    "training": {
        "GPT-NeoX": Job("training", "hugging_face"),
        "ours, Pythia": Job("training", "pythia"),
        "ours, all Infini": Job("training", "infini"),
    },
    "decoding": {
        "GPT-NeoX": Job("decoding", "hugging_face"),
        "ours, Pythia": Job("decoding", "pythia"),
        "ours, all Infini": Job("decoding", "infini"),
    },
}


def measure(task: str, size: str, rows: int, arguments: argparse.Namespace) -> Answers:
    common = {"size": size, "rows": rows, "tokens": arguments.tokens, "device": arguments.device}
    jobs = {name: replace(job, **common, segment=TOKENS) for name, job in WAYS[task].items()}
    commands = {name: job.command for name, job in jobs.items()}
    return take_turns(commands, rounds=arguments.rounds, steps=1, threads=arguments.threads)


def bench(
    console: Console, task: str, curve: str, points: dict[str, tuple[str, int]], arguments: argparse.Namespace
) -> None:
    """One table: a row for each point of a curve (its size and rows) and way."""
    table = Table(title=f"{task} by {curve}, rows of {arguments.tokens} tokens")
    for column in (curve, "model", "tokens/s (median)", "of GPT-NeoX", "spread", "peak memory"):
        table.add_column(column, justify="left" if column in (curve, "model") else "right")
    for point, (size, rows) in points.items():
        answers = measure(task, size, rows, arguments)
        tokens = rows if task == "decoding" else rows * arguments.tokens
        for name, values in answers.items():
            speeds = [tokens / value["seconds"] for value in values]
            table.add_row(
                point,
                name,
                f"{statistics.median(speeds):,.1f}",
                f"{compare(answers, name, 'GPT-NeoX'):.2f}",
                describe_spread(speeds),
                f"{max(value['peak'] for value in values) / 2**30:.2f} GiB",
            )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["14m", "31m", "70m", "160m", "410m"], choices=list(SIZES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--size", default="70m", choices=list(SIZES), help="of the curve over rows")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--skip", choices=("training", "decoding"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, once: to see that the program runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.rows, arguments.size = ["quick"], [2], "quick"
        arguments.tokens, arguments.rounds = 32, 1
    console = Console(width=120)
    for task in WAYS:
        if task != arguments.skip:
            bench(console, task, "size", {size: (size, 1) for size in arguments.sizes}, arguments)
            bench(console, task, "rows", {str(rows): (arguments.size, rows) for rows in arguments.rows}, arguments)


if __name__ == "__main__":
    main()
