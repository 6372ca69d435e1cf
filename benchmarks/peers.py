"""Our models compared with peers in training, evaluation and decoding: same shape, same text, in alternation.

    python benchmarks/peers.py [--size 70m] [--rows 1] [--tokens 2048] [--segment 256] [--rounds 5] [--only training]

Peers are transformers' GPT-NeoX and infini-transformer-pytorch (`pip install 'new-llm[bench]'`; left out if it is not
installed), whose layers have softmax inside the segment and memories of the same shapes. All have fresh weights,
bfloat16 autocast, fused AdamW and the tuned allocator; decoding is greedy in bfloat16 after a prompt of one segment
minus a token. On a GPU, a layer of flash-linear-attention, if installed, is compared with one of ours. Each model has
its own process, whose peak memory is in the table.
"""

import argparse
import importlib.util
import statistics
from dataclasses import replace

import torch
from jobs import HUGGING_FACE, PEER, Job, make_all_infini
from rich.console import Console
from rich.table import Table
from turns import describe_spread, tabulate, take_turns

GPT_NEOX, HAS_PEER = "GPT-NeoX", importlib.util.find_spec("infini_transformer_pytorch") is not None


def list_jobs(job: Job) -> dict[str, Job]:
    jobs = {GPT_NEOX: replace(job, model=HUGGING_FACE)}
    if HAS_PEER:
        jobs[PEER] = replace(job, model=PEER)
    # as many heads as the peer, so that both have memories of the same size
    all_infini = replace(job, model="infini", options=make_all_infini(job.size))
    return jobs | {"ours, Pythia": replace(job, model="pythia", segment=None), "ours, all Infini": all_infini}


def print_table(console: Console, task: str, job: Job, arguments: argparse.Namespace) -> None:
    commands = {name: one.command for name, one in list_jobs(job).items()}
    answers = take_turns(commands, rounds=arguments.rounds, steps=1, threads=arguments.threads)
    what = f"{job.rows} × {job.tokens:,}" if task != "decoding" else f"after {job.tokens:,} tokens"
    title = f"{task}, pythia-{job.size}'s shape, {what}, segments of {job.segment}"
    console.print(tabulate(title, answers, job.num_tokens, [base for base in (GPT_NEOX, PEER) if base in answers]))


def bench_flash_linear_attention(console: Console, arguments: argparse.Namespace) -> None:
    """Forward and backward pass of one layer on a GPU: flash-linear-attention's linear attention, and ours."""
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
    parser.add_argument("--quick", action="store_true", help="a tiny model, once, as a test of the program")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.tokens, arguments.segment, arguments.rounds = "quick", 64, 32, 1
    console = Console(width=130)
    if not HAS_PEER:
        console.print(f"{PEER} is not installed: left out")
    size = {"size": arguments.size, "rows": arguments.rows, "tokens": arguments.tokens}
    job = Job("", segment=arguments.segment, device=arguments.device, **size)
    for task in ("training", "evaluation", "decoding"):
        if arguments.only in (None, task):
            tokens = arguments.segment - 1 if task == "decoding" else job.tokens
            print_table(console, task, replace(job, task=task, tokens=tokens), arguments)
    if torch.cuda.is_available() and arguments.device != "cpu" and importlib.util.find_spec("fla") is not None:
        bench_flash_linear_attention(console, arguments)


if __name__ == "__main__":
    main()
