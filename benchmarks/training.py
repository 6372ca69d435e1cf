"""Training speed of our Pythia compared with Hugging Face's GPT-NeoX, plain and tuned, and of memory models with ours.

    python benchmarks/training.py [--shapes 8x256 1x2048] [--rounds 5] [--steps 1] [--device auto] [--output FILE]

pythia-70m's shape, bundled text, forward, backward and AdamW. Each variant has its own process, which sleeps while the
others run; in every round, all make some steps, one after the other. Read medians, ratios within a round, and peak
memory. `ceiling` is the training speed if the machine spent all its time on bfloat16 products, at the speed measured
for these in the same rounds.
"""

import argparse
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import HUGGING_FACE, Job, count_operations, count_product_operations
from rich.console import Console
from turns import Answers, compare, tabulate, take_turns

from new_llm.models import ModelType
from new_llm.training.devices import choose_device

CEILING = "bf16 products alone"
THEIRS = Job("training", HUGGING_FACE)
PLAIN, FUSED = "GPT-NeoX, float32, as it comes", "GPT-NeoX, bf16, fused AdamW"
UNTUNED = {
    PLAIN: replace(THEIRS, precision="fp32", is_fused=False, is_tuned=False),
    FUSED: replace(THEIRS, precision="bf16", is_tuned=False),
}
TUNED = {
    "GPT-NeoX, and tuned allocator": replace(THEIRS, precision="bf16"),
    "GPT-NeoX, compiled, tuned allocator": replace(THEIRS, precision="bf16", is_compiled=True),
}
PYTHIA = Job("training", precision="bf16")
OURS, COMPILED = "ours, pythia", "ours, pythia, compiled"
MEMORY = {
    f"ours, {kind}": replace(PYTHIA, model=kind)
    for kind in (ModelType.INFINI, ModelType.MULTI_MEMORY, ModelType.HIERARCHICAL)
}


def measure(console: Console, ways: dict[str, Job], shape: str, arguments: argparse.Namespace) -> Answers:
    """Measure variants of training together with the ceiling, and print their table."""
    rows, tokens = map(int, shape.split("x"))
    size = {"size": "quick"} if arguments.quick else {}
    common = {"rows": rows, "tokens": tokens, "device": arguments.device, **size}
    jobs = {name: replace(job, **common) for name, job in ways.items()}
    products = Job("products", device=arguments.device, **size)
    commands = {name: job.command for name, job in {CEILING: products, **jobs}.items()}
    answers = take_turns(commands, rounds=arguments.rounds, steps=arguments.steps, threads=arguments.threads)
    rate = count_product_operations(products, choose_device(arguments.device))
    rate /= statistics.median(answer["seconds"] for answer in answers.pop(CEILING))
    ceiling = rate / count_operations(jobs[OURS].shape, tokens)
    title = f"training, pythia-70m's shape, {rows} x {tokens}; ceiling {ceiling:,.0f} tokens/s"
    console.print(tabulate(title, answers, rows * tokens, [OURS], ceiling=ceiling))
    return answers


def judge(console: Console, what: str, value: float, least: float) -> None:
    console.print(
        f"{what}: {value:.2f}; target at least {least}: {'met' if value >= least else 'missed'}", highlight=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8x256", "1x2048"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps of each variant per round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--only", choices=("peers", "memory"), help="one of the two parts")
    parser.add_argument("--skip-compiled", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--output", type=Path, help="write every measurement as JSON")
    parser.add_argument("--quick", action="store_true", help="a tiny model, once, as a test of the program")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes, arguments.rounds, arguments.skip_compiled = ["2x32"], 1, True
    console = Console(width=130)
    everything: dict[str, Any] = {}
    for number, shape in enumerate(arguments.shapes):
        if arguments.only == "memory":
            break
        first = {COMPILED: replace(PYTHIA, is_compiled=True)} if number == 0 else {}
        ways = {**(UNTUNED if number == 0 else {}), **TUNED, OURS: PYTHIA, **first}
        ways = {name: job for name, job in ways.items() if not (job.is_compiled and arguments.skip_compiled)}
        answers = everything[shape] = measure(console, ways, shape, arguments)
        if number == 0:
            judge(console, "speed to plain float32", compare(answers, OURS, PLAIN), 3.0)
            judge(console, "speed to bf16 and fused AdamW", compare(answers, OURS, FUSED), 1.7)
        tuned = [name for name in TUNED if name in ways]
        best = min(tuned, key=lambda name: compare(answers, OURS, name))
        judge(console, f"speed to {best}", compare(answers, OURS, best), 1.05 if number == 0 else 1.15)
        least = min(max(answer["peak"] for answer in answers[name]) for name in tuned)
        own = max(answer["peak"] for answer in answers[OURS])
        verdict = "met" if own <= 0.85 * least else "missed"
        console.print(f"peak memory of the leanest of these: {own / least:.2f}; target at most 0.85: {verdict}")
    if arguments.only != "peers":
        answers = everything["memory"] = measure(console, {OURS: PYTHIA, **MEMORY}, arguments.shapes[0], arguments)
        for name in MEMORY:
            judge(console, f"speed of {name} to pythia's", compare(answers, name, OURS), 0.95)
    if arguments.output:
        arguments.output.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
