"""Compile the C kernels, keep them where only this user can write, and load nothing else.

The files in `c/` are compiled by the machine's own compiler ($CC, else cc) in a few seconds. What is loaded is run, so
the library is kept in a folder of the user's own: `new-llm-kernels` in the user's cache folder, or else
`new-llm-kernels-<user id>` in the folder for temporary files, whichever nobody else can change. It is never in the
shared cache of data. A file's name holds the SHA-256 of its bytes: a damaged or replaced file is removed and compiled
again. Where no such folder can be had, the library is compiled for this process alone.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-std=c11", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
BUILD_SECONDS = 120
"""A compiler that takes longer is stopped."""
OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")
CPU_FACTS = ("model name", "flags", "Features", "CPU implementer", "CPU part")
"""Lines of /proc/cpuinfo that decide what -march=native means."""
PRIVATE = 0o700
"""The mode of the kernels' folder."""
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

_log = logging.getLogger(__name__)


def load_library() -> ctypes.CDLL:
    """The compiled kernels: from the user's folder, or compiled now.

    Raises:
        OSError: no compiler, or a disk that can't be written.
        subprocess.SubprocessError: the compiler failed.
    """
    key, compiler, openmp = _describe_build()
    for place in _list_places():
        try:
            folder = make_private_folder(place)
            path = find_library(folder, key) or _keep_library(folder, key, compiler, openmp)
            return ctypes.CDLL(str(path))
        except OSError as error:
            _log.debug("no kernels are kept in %s: %s", place, error)
    with tempfile.TemporaryDirectory() as name:  # mode 0700; a loaded library needs its file no longer
        return ctypes.CDLL(str(_compile(Path(name), compiler, openmp)))


def make_private_folder(path: Path) -> Path:
    """Make a folder that only this user can change, or make sure that one is; returns its path without links.

    Raises:
        OSError: it can't be made; it or a parent is a link, belongs to another user, or others may write to it. A
            parent that is sticky (as /tmp is) and root's may be written to by all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.parent.resolve() / path.name
    with suppress(FileExistsError):
        path.mkdir(mode=PRIVATE)
    mine = os.geteuid()
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != mine or stat.S_IMODE(facts.st_mode) != PRIVATE:
        raise PermissionError(f"{path} is not a folder of mode 700 that belongs to user {mine}")
    for parent in path.parents:
        facts = parent.lstat()
        is_sticky = facts.st_mode & stat.S_ISVTX and facts.st_uid == 0
        if facts.st_uid not in (0, mine) or (facts.st_mode & OTHERS_WRITE and not is_sticky):
            raise PermissionError(f"other users may change {parent}")
    return path


def find_library(folder: Path, key: str) -> Path | None:
    """A kept library of this key whose bytes are those that were written; what fails the check is removed."""
    for path in sorted(folder.glob(f"{key}-*.so")):
        if _is_intact(path):
            return path
        path.unlink(missing_ok=True)
    return None


def _is_intact(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    with open(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        is_own = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & OTHERS_WRITE
        return is_own and path.stem.endswith(f"-{hashlib.sha256(file.read()).hexdigest()}")


def _keep_library(folder: Path, key: str, compiler: list[str], openmp: Path | None) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        built = _compile(Path(name), compiler, openmp)
        built.chmod(PRIVATE)
        path = folder / f"{key}-{hashlib.sha256(built.read_bytes()).hexdigest()}.so"
        return built.replace(path)


def _compile(folder: Path, compiler: list[str], openmp: Path | None) -> Path:
    objects = []
    for source in _list_sources():
        if source.suffix == ".c":
            objects.append(str(folder / f"{source.stem}.o"))
            _run([*compiler, *FLAGS, "-c", str(source), "-o", objects[-1]])
    path = folder / "kernels.so"
    link = ["-fopenmp"] if openmp is None else [str(openmp)]
    _run([*compiler, *FLAGS, "-shared", *objects, *link, "-lm", "-o", str(path)])
    return path


def _describe_build() -> tuple[str, list[str], Path | None]:
    """A key of all that decides the library's bytes, the compiler's command, and torch's OpenMP library."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if os.name != "posix" or not compiler or shutil.which(compiler[0]) is None:
        raise OSError(f"no C compiler {' '.join(compiler)!r}")
    openmp = _find_openmp()
    version = _run([*compiler, "--version"])
    sources = (path.read_text() for path in _list_sources())
    facts = [version, *compiler, *FLAGS, str(openmp), _describe_processor(), *sources]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32], compiler, openmp


def _list_places() -> Iterator[Path]:
    try:
        yield Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "new-llm-kernels"
    except RuntimeError:
        _log.debug("this user has no home folder")
    yield Path(tempfile.gettempdir()) / f"new-llm-kernels-{os.geteuid()}"


def _list_sources() -> list[Path]:
    return sorted((Path(__file__).parent / "c").glob("*.[ch]"))


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
