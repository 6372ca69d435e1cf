"""Speed and memory by model size and by rows per batch.

    python benchmarks/scaling.py [--sizes 14m 31m 70m 160m 410m] [--rows 1 4 8 16] [--rounds 3] [--skip training]

Pythia's shapes with fresh weights, on the bundled text: training steps with rows of 256 tokens, and greedy decoding in
bfloat16 after 256 tokens. Our models and transformers' GPT-NeoX take turns, each in its own process. `long_context.py`
measures by context, up to a million tokens.
"""

import argparse
from dataclasses import replace

import torch
from jobs import HUGGING_FACE, Job, make_all_infini
from rich.console import Console
from turns import tabulate, take_turns

from new_llm.config.model import SIZES

TOKENS = 256
GPT_NEOX = "GPT-NeoX"


def bench(
    console: Console, task: str, curve: str, points: dict[str, tuple[str, int]], arguments: argparse.Namespace
) -> None:
    for point, (size, rows) in points.items():
        job = Job(task, size=size, rows=rows, tokens=arguments.tokens, device=arguments.device)
        jobs = {
            GPT_NEOX: replace(job, model=HUGGING_FACE),
            "ours, Pythia": job,
            "ours, all Infini": replace(job, model="infini", options=make_all_infini(size), segment=TOKENS),
        }
        commands = {name: one.command for name, one in jobs.items()}
        answers = take_turns(commands, rounds=arguments.rounds, steps=1, threads=arguments.threads)
        title = f"{task} by {curve}: {point}, rows of {arguments.tokens} tokens"
        console.print(tabulate(title, answers, job.num_tokens, [GPT_NEOX]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["14m", "31m", "70m", "160m", "410m"], choices=list(SIZES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--size", default="70m", choices=list(SIZES), help="model size in the curve over rows")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--skip", choices=("training", "decoding"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, once, as a test of the program")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.rows, arguments.size = ["quick"], [2], "quick"
        arguments.tokens, arguments.rounds = 32, 1
    console = Console(width=120)
    for task in ("training", "decoding"):
        if task != arguments.skip:
            bench(console, task, "size", {size: (size, 1) for size in arguments.sizes}, arguments)
            bench(console, task, "rows", {str(rows): (arguments.size, rows) for rows in arguments.rows}, arguments)


if __name__ == "__main__":
    main()
