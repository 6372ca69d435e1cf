"""The C library's allocator, set so that a training step finds the memory of the step before.

By default glibc takes every large block from the system and gives it back when it is freed. The next step's blocks are
then new pages, which the system fills with zeros one by one as they are touched: on a CPU up to half of a step.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # malloc.h
MMAP_THRESHOLD = 2**30
"""Bytes from which a block still comes from the system and goes back to it."""
TOP_PAD = 64 * 2**20
"""Bytes that are asked for at once beyond what is needed."""
SETTINGS_OF_USERS = ("MALLOC_", "GLIBC_TUNABLES")
"""Environment variables that begin so set the allocator already, and win."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the process's next use of it; for the rest of the process.

    Other C libraries are left as they are, as is a process whose user has set the allocator by the environment
    (MALLOC_..., GLIBC_TUNABLES) or preloads another one (LD_PRELOAD). Returns whether it has been set.
    """
    if sys.platform != "linux" or any(name.startswith(SETTINGS_OF_USERS) for name in os.environ):
        return False
    if "malloc" in os.environ.get("LD_PRELOAD", ""):  # jemalloc, tcmalloc
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  glibc alone has it
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    if not mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD) and not mallopt(M_MMAP_MAX, 0):  # old ones allow 32 MB at most
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_TOP_PAD, TOP_PAD))
