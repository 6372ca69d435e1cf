"""Compiling the C kernels on first use, storing the library where no other user can change it, and loading it.

The files in `c/` are compiled by the machine's compiler ($CC, else cc), which takes a few seconds. Because a loaded
library is executed, it is stored in `new-llm-kernels` in the user's cache folder, or else in
`new-llm-kernels-<user id>` in the folder for temporary files, but never in the shared data cache. Its file name has the
SHA-256 of its bytes, so a damaged or replaced file is detected, deleted and compiled again. If there is no such folder,
the library is compiled for this process only.
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

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
"""In gnu11, unlike c11, compilers may join a product and a sum to one instruction, which makes exp a quarter faster."""
BUILD_SECONDS = 120
"""Time limit for the compiler."""
OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")
CPU_FACTS = ("model name", "flags", "Features", "CPU implementer", "CPU part")
"""Lines of /proc/cpuinfo that determine the effect of -march=native."""
PRIVATE = 0o700
"""Permissions of the kernels' folder."""
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

_log = logging.getLogger(__name__)


def load_library() -> ctypes.CDLL:
    """Load the stored library, compiling it first if necessary.

    Raises:
        OSError: there is no compiler, or the disk can't be written.
        subprocess.SubprocessError: the compiler failed.
    """
    key, compiler, openmp = _describe_build()
    for place in _list_places():
        try:
            folder = make_private_folder(place)
            path = find_library(folder, key)
            if path is None:
                with tempfile.TemporaryDirectory(dir=folder) as name:
                    built = _compile(Path(name), compiler, openmp)
                    built.chmod(PRIVATE)
                    path = built.replace(folder / f"{key}-{hashlib.sha256(built.read_bytes()).hexdigest()}.so")
            return ctypes.CDLL(str(path))
        except OSError as error:
            _log.debug("kernels can't be stored in %s: %s", place, error)
    with tempfile.TemporaryDirectory() as name:  # mode 0700; once loaded, the library does not need its file
        return ctypes.CDLL(str(_compile(Path(name), compiler, openmp)))


def make_private_folder(path: Path) -> Path:
    """Make a folder that only this user can change, or check an existing one; returns its path with links resolved.

    Raises:
        OSError: the folder can't be made, is a link, or is not this user's with mode 700; or another user could replace
            it, because a parent is another user's or writable by others. Parents may be root's, and a sticky one of
            root's, such as /tmp, may be writable.
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
    """A stored library with this key whose hash is right; files that fail the check are deleted."""
    for path in sorted(folder.glob(f"{key}-*.so")):
        with suppress(OSError), open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            facts = os.fstat(file.fileno())
            is_own = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & OTHERS_WRITE
            if is_own and path.stem.endswith(f"-{hashlib.sha256(file.read()).hexdigest()}"):
                return path
        path.unlink(missing_ok=True)
    return None


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
    """A key for everything that the library depends on, the compiler command, and torch's OpenMP library."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if os.name != "posix" or not compiler or shutil.which(compiler[0]) is None:
        raise OSError(f"no C compiler {' '.join(compiler)!r}")
    version, processor = _run([*compiler, "--version"]), f"{platform.machine()} {platform.processor()}"
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        processor = "\n".join(line for line in lines if line.startswith(CPU_FACTS))
    paths: set[Path] = set()
    with suppress(OSError):
        fields = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
        paths = {Path(line[5]) for line in fields if len(line) == 6}
    # the one that torch has loaded; a second OpenMP library would start its own threads
    openmp = min((path for path in paths if path.name.startswith(OPENMP_NAMES)), default=None)
    facts = [version, *compiler, *FLAGS, str(openmp), processor, *(path.read_text() for path in _list_sources())]
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
