"""Registers, spills and shared memory of the Triton kernels, compiled for an H100 (sm_90) on a machine without a GPU.

    python benchmarks/kernel_figures.py            # a Markdown table; --json: one object per line

The wrappers of `triton_kernels` and `triton_steps` get tensors on the device `meta`, which have shapes but no data.
Each kernel is replaced by a `Recorder`, which compiles what would have been launched, with the same tiles, warps and
stages.
Needs Triton 3.3 or newer (`pip install triton`; torch's CPU builds don't include it). TRITON_INTERPRET must not be set.
"""

import argparse
import contextlib
import functools
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from new_llm.models.layers import PythiaLayer
from new_llm.models.ops.kernels import triton_kernels, triton_steps

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}


class Figures(NamedTuple):
    """One launch: its grid, its tiles, and the resources of the compiled kernel."""

    kernel: str
    case: str
    grid: tuple[int, ...]
    warps: int
    stages: int
    tiles: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: int
    barriers: int
    unset: str
    """An instruction that reads a uniform register that was never written (a bug of ptxas 12.8); "": none."""


class Recorder:
    """Replaces a kernel: `recorder[grid](...)` calls `note` instead of launching."""

    def __init__(self, kernel: Any, note: Callable[[Any, tuple[int, ...], tuple, dict[str, Any]], None]) -> None:
        self.kernel, self.note = kernel, note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.note(self.kernel, grid, arguments, options)


@contextlib.contextmanager
def recording(note: Callable[[Any, tuple[int, ...], tuple, dict[str, Any]], None]) -> Iterator[None]:
    """In the block, every Triton kernel only calls `note(kernel, grid, arguments, options)`."""
    modules = (triton_kernels, triton_steps)
    kernels = [(module, *entry) for module in modules for entry in vars(module).items() if entry[0].endswith("_kernel")]
    for module, name, kernel in kernels:
        setattr(module, name, Recorder(kernel, note))
    try:
        yield
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def compile_launch(kernel: Any, arguments: tuple, options: dict[str, Any]) -> tuple[Any, str]:
    """Compile a launch; returns the kernel, and its resources and instructions as listed by cuobjdump.

    Arguments that are 1 or a multiple of 16 are specialised, as in a real launch.
    """
    signature, constants, attributes = {}, {}, {}
    settings = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    constants |= {name: value for name, value in options.items() if name not in settings}
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not kernel.params[i].do_not_specialize:
            constants[name] = 1
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not kernel.params[i].do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    for name in constants:
        signature[name] = "constexpr"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGET, options=settings)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [str(cuobjdump), "-res-usage", "-sass", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return compiled, done.stdout


def find_unset_register(listing: str) -> str:
    """The first instruction that reads a uniform register which no instruction writes, "" where there is none."""
    written: set[int] = set()
    read: dict[int, str] = {}
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([^;/]+?) *;", listing):
        name, _, rest = instruction.partition(" ")
        operands = rest.split(",")
        if target := re.fullmatch(r" *UR(\d+)", operands[0]):
            width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            written.update(range(int(target[1]), int(target[1]) + width))
            operands = operands[1:]
        for is_pair_of_pairs, first in re.findall(r"(gdesc\[)?\bUR(\d+)\b", ",".join(operands)):
            for register in range(int(first), int(first) + (4 if is_pair_of_pairs else 1)):
                read.setdefault(register, instruction)
    return next((instruction for register, instruction in read.items() if register not in written), "")


def measure(case: str, call: Callable[[], object]) -> list[Figures]:
    """The figures of all launches that a call would make."""
    found: list[Figures] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> None:
        compiled, report = compile_launch(kernel, arguments, options)
        registers, stack = (int(re.search(rf"{name}:(\d+)", report).group(1)) for name in ("REG", "STACK"))
        tiles = " ".join(f"{k[6:].lower() or 'n'}{v}" for k, v in options.items() if k.startswith("BLOCK"))
        found.append(
            Figures(
                kernel.__name__.strip("_"), case, grid, options["num_warps"], options.get("num_stages", 3), tiles,
                registers, stack, compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async"),
                len(re.findall(r"^ *\S+\.barrier\b", compiled.asm["ttgir"], re.MULTILINE)),
                find_unset_register(report),
            )
        )  # fmt: skip

    with recording(note):
        call()
    return found


def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def write_delta(
    batch: int,
    heads: int,
    width: int,
    length: int,
    *,
    backward: bool,
    chunks: bool = False,
    num_writes: int = 4,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a chain of segments with the delta rule, as in Infini layers; or a chain of chunks, token by token."""
    k = make(batch, num_writes, heads, length, width, dtype=dtype)
    decay = make(batch, num_writes, heads, dtype=torch.float32)
    slots = make(batch, num_writes, dtype=torch.int64)
    state = make(batch, heads, 1, width, width, dtype=torch.float32)
    states = make(batch, num_writes, heads, *(() if backward else (1,)), width, width, dtype=dtype)
    added = make(batch, num_writes, heads, 1, width, width, dtype=dtype) if backward else None
    scales = None if chunks else make(batch, num_writes, heads, length, dtype=torch.float32)
    values, written = None if backward else k, k if chunks else None
    triton_kernels.write_with_delta(state, states, k, written, scales, values, decay, slots, added=added)


def write_sums(num_memories: int, *, backward: bool) -> None:
    """The chain of 4 segments without the delta rule."""
    memories = () if backward else (num_memories,)
    state = make(1, 1, num_memories, 512, 512, dtype=torch.float32)
    states, added = make(1, 4, 1, *memories, 512, 512), make(1, 4, 1, num_memories, 512, 512) if backward else None
    products = None if backward else make(1, 4, 1, 512, 512, dtype=torch.float32)
    decay, slots = make(1, 4, 1, dtype=torch.float32), make(1, 4, dtype=torch.int64)
    triton_kernels.write_sums(state, states, products, decay, slots, added=added)


def attend(groups: int, width: int, length: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Forward with sums of earlier chunks, and the three sums of backward."""
    x = make(groups, length, width, dtype=dtype)
    row = make(groups, length, dtype=torch.float32)
    initial = make(groups, width, width, dtype=dtype), row
    triton_kernels.sum_causally(x, x, x, initial=initial, epsilon=1e-6)
    triton_kernels.sum_causally(x, x, x, row=row)
    triton_kernels.sum_causally(x, x, x, col=row, from_ahead=True)


def make_token(rows: int, hidden_size: int, heads: int) -> None:
    """One token of a Pythia and of an Infini layer."""
    with torch.device("meta"):
        layer = PythiaLayer(hidden_size, heads, 4 * hidden_size).bfloat16()
    x, width, wide = make(rows, 1, hidden_size), hidden_size // heads, torch.float32
    cache, places = make(rows, heads, 385, width), make(rows, dtype=torch.int64)
    attention: Any = layer.attention
    mixed, inner = triton_steps.project(
        *(x, layer.input_layernorm, attention.query_key_value, layer.post_attention_layernorm, layer.mlp.dense_h_to_4h)
    )
    angles, done = (make(384, 16, dtype=wide),) * 2, make(rows * heads, dtype=torch.int32)
    triton_steps.attend(mixed, cache, cache, places, angles, 16, done)
    sums, keys = make(rows, heads, width, width, dtype=wide), make(rows, heads, width, dtype=wide)
    memory = sums.unsqueeze(1), keys.unsqueeze(1), make(heads)
    triton_steps.recall(mixed, sums, keys, sums, places, *memory, epsilon=1e-6, use_delta_rule=True)
    triton_steps.merge(x, x, attention.dense, inner, layer.mlp.dense_4h_to_h)


def measure_all() -> Iterator[Figures]:
    for width, heads in ((64, 8), (128, 4), (256, 2), (512, 1)):
        for direction in ("forward", "backward"):
            write = functools.partial(write_delta, 8, heads, width, 256, backward=direction == "backward")
            yield from measure(f"K={width}, {direction}", write)
            chain = functools.partial(write_delta, 1, 8, width, 64, backward=direction == "backward", chunks=True)
            yield from measure(f"K={width}, chunks, {direction}", chain)
        yield from measure(f"K={width}", functools.partial(attend, 64, width, 256))
    for (width, length), backward, chunks in itertools.product(((64, 64), (96, 33)), (False, True), (False, True)):
        one = functools.partial(write_delta, 1, 8, width, length, backward=backward, chunks=chunks, num_writes=1)
        yield from measure(f"K={width}, one {'chunk' if chunks else 'segment'}", one)
    for memories, backward in itertools.product((1, 2), (False, True)):
        write = functools.partial(write_sums, memories, backward=backward)
        yield from measure(f"{memories} memories, {'backward' if backward else 'forward'}", write)
    yield from measure("chunks of 64", lambda: triton_kernels.invert(make(2048, 64, 64, dtype=torch.float32)))
    logits, targets = make(1024, 50_304), make(1024, dtype=torch.int64)
    score = functools.partial(triton_kernels.score_rows, logits, targets, None, write_gradients=True)
    yield from measure("50,304 words", score)
    for rows, (hidden_size, heads) in itertools.product((1, 8), ((512, 8), (1024, 16), (2048, 16))):
        token = functools.partial(make_token, rows, hidden_size, heads)
        yield from measure(f"token of {rows} rows, D={hidden_size}, K={hidden_size // heads}", token)
    # more heads and chunks than the second and third axis of a grid allow
    yield from measure("70,000 groups", functools.partial(write_delta, 8_750, 8, 64, 64, backward=False))
    yield from measure("70,000 groups", functools.partial(attend, 70_000, 64, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per launch")
    arguments = parser.parse_args()
    names = Figures._fields
    if not arguments.json:
        print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for figures in measure_all():
        row = json.dumps(figures._asdict()) if arguments.json else "| " + " | ".join(map(str, figures)) + " |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
