"""Decoding speed: against Hugging Face's `generate` at one context, and after many tokens.

    python benchmarks/generation.py [--context 1024] [--tokens 128] [--rounds 5] [--long-tokens 100000] [--threads 2]

One text, greedy. A model's time a token is that of `tokens` more new tokens in one call; models take turns in every
round, and medians are what to read. The long part lets one small model go on to the end of `long-tokens`, and then
times it there in turns with the same model near its beginning.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from turns import describe_spread

from new_llm import TransformerLM, create_model
from new_llm.config import DataConfig, PythiaConfig
from new_llm.config.model import GenerationConfig
from new_llm.data.dataset import prepare_data
from new_llm.data.sources import load_documents
from new_llm.experiments.run_folder import load_run_model
from new_llm.models.generation import GenerationRun
from new_llm.models.layers import InfiniLayer, PythiaLayer

QUALITY_TOKENS = 16384
LONG_SHAPE = (128, 4, 512)  # hidden size, heads, width of the MLP
LONG_VOCAB, LONG_SEGMENT, EARLY_TOKENS, BLOCK_TOKENS = 8192, 64, 1000, 200


def load_text(num_tokens: int) -> torch.Tensor:
    """[1, num_tokens] of the embedded text."""
    data = prepare_data(DataConfig(source="sotu", tokenizer_vocab_size=8192, num_samples=None))
    return torch.from_numpy(data.train.tokens[:num_tokens].astype("int64")).unsqueeze(0)


def make_pair() -> tuple[TransformerLM, GPTNeoXForCausalLM]:
    """pythia-70m's shape with the same random weights, ours and Hugging Face's."""
    shape = PythiaConfig()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    torch.manual_seed(0)
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **{name: getattr(shape, name) for name in names},
            max_position_embeddings=shape.max_position_embeddings,
            rotary_pct=shape.rotary_pct,
            tie_word_embeddings=False,
        )
    )
    ours = create_model("pythia", shape)
    weights = theirs.state_dict().items()
    ours.load_state_dict({n.removeprefix("gpt_neox.").replace("lm_head", "embed_out"): value for n, value in weights})
    return ours.eval(), theirs.eval()


def time_tokens(calls: dict[str, Callable[[int], object]], num_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a token of each call; the first round warms up and is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            times = []
            for count in (1, num_tokens + 1):
                begin = time.perf_counter()
                call(count)
                times.append(time.perf_counter() - begin)
            if number:
                seconds[name].append((times[1] - times[0]) / num_tokens)
    return seconds


def bench_against_hugging_face(console: Console, arguments: argparse.Namespace) -> None:
    prompt = load_text(arguments.context)
    ours, theirs = make_pair()
    stacks = {
        "all Infini, 1 head of 512": [InfiniLayer(512, 8, 2048) for _ in range(6)],
        "all Infini, 8 heads of 64": [InfiniLayer(512, 8, 2048, num_memory_heads=8) for _ in range(6)],
    }
    models = {"ours, Pythia": ours, **{name: TransformerLM(layers) for name, layers in stacks.items()}}

    def make_hugging_face(model: GPTNeoXForCausalLM) -> Callable[[int], torch.Tensor]:
        mask = torch.ones_like(prompt)
        return lambda count: model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )

    def make_ours(model: TransformerLM) -> Callable[[int], torch.Tensor]:
        return lambda count: model.generate(prompt, max_new_tokens=count)[0]

    same = torch.equal(make_hugging_face(theirs)(16), make_ours(ours)(16))
    for dtype in (torch.bfloat16, torch.float32):
        base = "Hugging Face, Pythia"
        calls: dict[str, Callable[[int], object]] = {base: make_hugging_face(theirs.to(dtype))}
        for name, model in models.items():
            calls[name] = make_ours(model.to(dtype))
        seconds = time_tokens(calls, arguments.tokens, arguments.rounds)
        table = Table(title=f"one text after {arguments.context:,} tokens, pythia-70m's shape, {dtype}")
        for column in ("model", "ms a token (median)", "tokens/s", "of Hugging Face", "spread"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for name, values in seconds.items():
            middle = statistics.median(values)
            ratio = statistics.median(one / two for one, two in zip(seconds[base], values, strict=True))
            table.add_row(name, f"{middle * 1e3:.2f}", f"{1 / middle:,.0f}", f"{ratio:.2f}", describe_spread(values))
        console.print(table)
        if dtype == torch.bfloat16 and not arguments.quick:
            for name, least in (("ours, Pythia", 2.0),):
                value = statistics.median(one / two for one, two in zip(seconds[base], seconds[name], strict=True))
                verdict = "met" if value >= least else "missed"
                console.print(f"{name}: {value:.2f}; target at least {least}: {verdict}", highlight=False)
    console.print(f"both Pythias made the same 16 tokens in float32: {'yes' if same else 'no'}")


@torch.no_grad()
def bench_quality(console: Console, run: Path) -> None:
    """Perplexity of a run's models on embedded text, and what bfloat16 changes."""
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
    """A generation that is taken token by token."""
    config = GenerationConfig(max_new_tokens=num_tokens, do_sample=True)
    return GenerationRun(model, load_text(32), None, config, None, update_memory=False).run()


def take(steps: Iterator[None], count: int) -> float:
    """Seconds a token of the next `count`."""
    begin = time.perf_counter()
    for _ in range(count):
        next(steps)
    return (time.perf_counter() - begin) / count


def read_resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not say."""
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
        model = TransformerLM(layers, LONG_VOCAB, LONG_SEGMENT).eval()
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
    parser.add_argument("--threads", type=int, default=None, help="torch's threads; default: as torch chooses")
    parser.add_argument("--run", type=Path, help="a run folder: also measure what bfloat16 costs in perplexity")
    parser.add_argument("--quick", action="store_true", help="few tokens, once: to see that the program runs")
    parser.add_argument("--skip", choices=("short", "long"), help="leave one of the two parts out")
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
