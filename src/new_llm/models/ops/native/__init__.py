"""Compiled kernels for the CPU. They are optional: without them every operation has its PyTorch form.

The C files beside this one are compiled by the machine's own compiler ($CC, else cc) at the first call that wants them,
in about a second, and kept in the folder of caches under a name that says source, compiler, flags and processor. They
run on the threads of torch's own OpenMP. Where anything of that fails there are no kernels, and a debug line of
this module's logger says why. NEW_LLM_NATIVE=0 turns them off.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from new_llm.config.atomic import write_atomically

SWITCH = "NEW_LLM_NATIVE"
FLAGS = ("-O3", "-march=native", "-std=c11", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
BUILD_SECONDS = 120
"""A compiler that takes longer is given up."""
OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")
CPU_FACTS = ("model name", "flags", "Features", "CPU implementer", "CPU part")
"""Lines of /proc/cpuinfo that decide what -march=native means."""

SUFFIXES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
"""The dtypes that kernels are written for, and how their names end."""

_log = logging.getLogger(__name__)


_is_loaded = False  # for code that is being compiled, where loading itself can't be traced


def has_kernels() -> bool:
    """Whether there are kernels; in code that is being compiled: whether they have been loaded before."""
    if torch.compiler.is_compiling():
        return _is_loaded
    return load_kernels() is not None


def find_kernels(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernels, if they can take these tensors: contiguous, on the CPU, of a dtype that kernels are written for."""
    if torch.compiler.is_compiling():  # addresses can't be traced
        return None
    if all(t.device.type == "cpu" and t.dtype in SUFFIXES and t.is_contiguous() for t in tensors):
        return load_kernels()
    return None


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """Build the kernels where that has not been done, and load them; None where that is impossible."""
    global _is_loaded
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        library = _declare(ctypes.CDLL(str(build_kernels())))
        _is_loaded = True
        return library
    except (OSError, subprocess.SubprocessError, AttributeError, ValueError) as error:
        _log.debug("no compiled kernels, PyTorch's forms are used: %s", error)
        return None


def build_kernels() -> Path:
    """The shared library in the cache, compiled now unless it is there.

    Raises:
        OSError: no compiler, or a folder that can't be written.
        subprocess.SubprocessError: the compiler failed.
    """
    from new_llm.config import DataConfig
    from new_llm.data.cache import cache_folder

    compiler = shlex.split(os.environ.get("CC") or "cc")
    if not compiler or shutil.which(compiler[0]) is None:
        raise OSError(f"no C compiler {' '.join(compiler)!r}")
    sources = sorted(Path(__file__).parent.glob("*.[ch]"))
    openmp = _find_openmp()
    version = _run([*compiler, "--version"])
    facts = [version, *compiler, *FLAGS, str(openmp), _describe_processor(), *(path.read_text() for path in sources)]
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]
    path = cache_folder(DataConfig()) / "native" / f"{key}.so"
    if path.exists():
        return path
    with TemporaryDirectory() as folder:
        objects = []
        for source in sources:
            if source.suffix == ".c":
                objects.append(str(Path(folder) / f"{source.stem}.o"))
                _run([*compiler, *FLAGS, "-c", str(source), "-o", objects[-1]])
        with write_atomically(path) as temporary:
            link = ["-fopenmp"] if openmp is None else [str(openmp)]
            _run([*compiler, "-shared", *objects, *link, "-lm", "-o", str(temporary)])
    return path


def score_rows(
    kernels: ctypes.CDLL, logits: Tensor, targets: Tensor, weights: Tensor | None, *, write_gradients: bool
) -> Tensor:
    """Losses of rows of logits [n, Z], as `linear_cross_entropy.score_logits`; gradients replace the logits."""
    targets = targets.contiguous()
    losses = torch.empty(len(logits), dtype=torch.float32)
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    getattr(kernels, f"score_rows_{SUFFIXES[logits.dtype]}")(
        logits.data_ptr(),
        *logits.shape,
        targets.data_ptr(),
        None if weights is None else weights.data_ptr(),
        losses.data_ptr(),
        int(write_gradients),
        torch.get_num_threads(),
    )
    return losses


def causal_softmax(kernels: ctypes.CDLL, scores: Tensor, logsumexp: Tensor, *, first: int, scale: float) -> None:
    """softmax(scale · scores) in place of scores [n, rows, columns]; row r sees its first `first + r + 1` columns.

    Args:
        kernels: from `find_kernels`.
        scores: bfloat16.
        logsumexp: [n, rows] float32, contiguous; filled with that of the scaled scores.
        first: the place of the first row among the columns.
        scale: what the scores are multiplied by.
    """
    kernels.causal_softmax(
        scores.data_ptr(), logsumexp.data_ptr(), *scores.shape, first, scale, torch.get_num_threads()
    )


def causal_softmax_backward(
    kernels: ctypes.CDLL, scores: Tensor, gradients: Tensor, logsumexp: Tensor, *, first: int, scale: float
) -> None:
    """Probabilities in place of scores, and the scores' gradients in place of the probabilities'; see above."""
    kernels.causal_softmax_backward(
        scores.data_ptr(),
        gradients.data_ptr(),
        logsumexp.data_ptr(),
        *scores.shape,
        first,
        scale,
        torch.get_num_threads(),
    )


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Say what the functions take: pointers, 64-bit sizes and ints."""
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    for suffix in SUFFIXES.values():
        function = getattr(library, f"score_rows_{suffix}")
        function.argtypes = [pointer, size, size, pointer, pointer, pointer, number, number]
        function.restype = None
    shape = [size, size, size, size, real, number]
    library.causal_softmax.argtypes = [pointer, pointer, *shape]
    library.causal_softmax_backward.argtypes = [pointer, pointer, pointer, *shape]
    library.causal_softmax.restype = library.causal_softmax_backward.restype = None
    return library


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS, stdin=subprocess.DEVNULL
    ).stdout


def _find_openmp() -> Path | None:
    """The OpenMP library that torch has loaded; a second one would bring threads of its own."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if len(line.split(maxsplit=5)) == 6}
    found = sorted(path for path in paths if path.name.startswith(OPENMP_NAMES))
    return found[0] if found else None


def _describe_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in lines if line.startswith(CPU_FACTS))
