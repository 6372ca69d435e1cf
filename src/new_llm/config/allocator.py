"""Set up glibc's allocator so that a training step reuses the memory of the step before.

By default glibc gets every large block from the system and returns it when it is freed. The next step's blocks are then
new pages, which the system zeroes one by one as they are touched: on a CPU this takes up to half of a step.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # malloc.h
MMAP_THRESHOLD = 2**30
"""Blocks of at least this many bytes still come from the system and are returned to it."""
TOP_PAD = 64 * 2**20
"""Bytes to request from the system beyond what is needed."""
SETTINGS_OF_USERS = ("MALLOC_", "GLIBC_TUNABLES")
"""Prefixes of environment variables by which users set the allocator; these win."""


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for reuse, until the process ends; returns whether it does.

    Nothing is changed for other C libraries, or if the user has configured the allocator by the environment
    (MALLOC_..., GLIBC_TUNABLES) or preloads another one (LD_PRELOAD).
    """
    if sys.platform != "linux" or any(name.startswith(SETTINGS_OF_USERS) for name in os.environ):
        return False
    if "malloc" in os.environ.get("LD_PRELOAD", ""):  # jemalloc, tcmalloc
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  only glibc has it
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    if not mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD) and not mallopt(M_MMAP_MAX, 0):  # old glibc: 32 MB at most
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_TOP_PAD, TOP_PAD))
