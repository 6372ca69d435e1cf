"""Ours beside its peers, in training, evaluation and decoding: one shape, one text, in alternation.

    python benchmarks/peers.py [--size 70m] [--rows 1] [--tokens 2048] [--segment 256] [--rounds 5] [--only training]

Peers: GPT-NeoX of transformers, and infini-transformer-pytorch (`pip install 'new-llm[bench]'`; left out where it is
missing), whose layers have softmax inside the segment and memories of the same shapes. Weights are new, autocast to
bfloat16, fused AdamW, the allocator tuned for all; decoding is greedy in bfloat16 after a prompt of one segment less a
token. On a GPU with flash-linear-attention installed a layer of its is measured beside one of ours. Each model has a
process of its own, whose peak memory stands in the table.
"""

import argparse
import importlib.util
import statistics
from dataclasses import replace

import torch
from jobs import PEER, Job
from rich.console import Console
from rich.table import Table
from turns import compare, describe_spread, take_turns

NAMES = {
    "hugging_face": "GPT-NeoX",
    PEER: PEER,
    "pythia": "ours, Pythia",
    "infini": "ours, all Infini",
}


def list_models() -> list[str]:
    has_peer = importlib.util.find_spec("infini_transformer_pytorch") is not None
    return [name for name in NAMES if name != PEER or has_peer]


def print_table(console: Console, task: str, job: Job, arguments: argparse.Namespace) -> None:
    jobs = {NAMES[model]: replace(job, model=model) for model in list_models()}
    answers = take_turns(
        {name: one.command for name, one in jobs.items()},
        rounds=arguments.rounds,
        steps=1,
        threads=arguments.threads,
    )
    what = f"{job.rows} × {job.tokens:,}" if task != "decoding" else f"after {job.tokens:,} tokens"
    table = Table(title=f"{task}, pythia-{job.size}'s shape, {what}, segments of {job.segment}")
    bases = [NAMES[name] for name in ("hugging_face", PEER) if NAMES[name] in answers]
    for column in ("model", "tokens/s (median)", *(f"of {base}" for base in bases), "spread", "peak memory"):
        table.add_column(column, justify="left" if column == "model" else "right")
    tokens = job.rows if task == "decoding" else job.rows * job.tokens
    for name, values in answers.items():
        speeds = [tokens / value["seconds"] for value in values]
        ratios = (f"{compare(answers, name, base):.2f}" for base in bases)
        peak = f"{max(value['peak'] for value in values) / 2**30:.2f} GiB"
        table.add_row(name, f"{statistics.median(speeds):,.1f}", *ratios, describe_spread(speeds), peak)
    console.print(table)


def bench_flash_linear_attention(console: Console, arguments: argparse.Namespace) -> None:
    """One layer on a GPU, forward and backward: linear attention of flash-linear-attention and ours."""
    from fla.layers import LinearAttention  # pyright: ignore[reportMissingImports]

    from new_llm.models.layers import InfiniLayer, Segments

    hidden = torch.randn(1, 16384, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    theirs = LinearAttention(mode="chunk", hidden_size=512, num_heads=8).cuda().bfloat16()
    ours = InfiniLayer(512, 8, 2048, num_memory_heads=8, use_delta_rule=False).cuda().bfloat16().attention
    cut = hidden.view(1, -1, arguments.segment, 512)

    def run_theirs() -> torch.Tensor:
        out = theirs(hidden)
        return out[0] if isinstance(out, tuple) else out

    calls = {"flash-linear-attention": run_theirs, "ours": lambda: ours(cut, None, Segments(write_last=False))[0]}
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(arguments.rounds + 3):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call().sum().backward()
            end.record()
            torch.cuda.synchronize()
            if number >= 3:
                milliseconds[name].append(begin.elapsed_time(end))
    table = Table(title="linear attention of 16,384 tokens, forward and backward, 8 heads of 64")
    for column in ("layer", "ms (median)", "spread"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, values in milliseconds.items():
        table.add_row(name, f"{statistics.median(values):.2f}", describe_spread(values))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="70m")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--segment", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=("training", "evaluation", "decoding"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, once: to see that the program runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.tokens, arguments.segment, arguments.rounds = "quick", 64, 32, 1
    console = Console(width=130)
    if importlib.util.find_spec("infini_transformer_pytorch") is None:
        console.print(f"{PEER} is not installed here: left out")
    job = Job("", "", arguments.size, arguments.rows, arguments.tokens, arguments.segment, device=arguments.device)
    for task in ("training", "evaluation", "decoding"):
        if arguments.only in (None, task):
            tokens = arguments.segment - 1 if task == "decoding" else job.tokens
            print_table(console, task, replace(job, task=task, tokens=tokens), arguments)
    if torch.cuda.is_available() and arguments.device != "cpu" and importlib.util.find_spec("fla") is not None:
        bench_flash_linear_attention(console, arguments)


if __name__ == "__main__":
    main()
