"""Manifests: the size and sha256 of every file of a folder, by which torn and changed files are found."""

import hashlib
import json
import stat
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20


def describe_file(path: Path) -> dict[str, Any]:
    """`{"num_bytes": ..., "sha256": ...}` of a file, read in pieces.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"num_bytes": file.tell(), "sha256": digest}


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """What `describe_file` says of every file of a folder and its subfolders, by relative name, but for a manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)
    return {path.relative_to(folder).as_posix(): describe_file(path) for path in files}


def find_fault(path: Path, expected: Any) -> str | None:
    """What is wrong with a file, in a few words that follow its name; None: nothing.

    Args:
        path: the file.
        expected: of `describe_file`, perhaps from a damaged file itself.
    """
    if not isinstance(expected, dict) or not {"num_bytes", "sha256"} <= expected.keys():
        return "its size and sha256 are not known"
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return "is no file"
        if found.st_size != expected["num_bytes"]:  # without reading it
            return f"has {found.st_size:,} bytes instead of {expected['num_bytes']:,}"
        if describe_file(path) != {key: expected[key] for key in ("num_bytes", "sha256")}:
            return "has changed since it was written (sha256)"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError, TypeError) as error:
        return f"can't be read: {getattr(error, 'strerror', None) or error}"
    return None


def find_faults(folder: Path, files: Any) -> list[str]:
    """What is wrong with a folder's files, "weights.safetensors is missing"; none: all is as it was written.

    Args:
        folder: the folder.
        files: of `describe_files`, perhaps from a damaged file itself. A name that leads out of the folder is a fault.
    """
    if not isinstance(files, dict):
        return ["its list of files is none"]
    faults = list[str]()
    for name, expected in files.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\0" in name:
            faults.append(f"{name!r} is not a name inside the folder")
        elif (fault := find_fault(folder / name, expected)) is not None:
            faults.append(f"{name} {fault}")
    return faults


def write_manifest(folder: Path) -> None:
    """Write `manifest.json` over the files that a folder holds by now; the last file to be written into it."""
    files = describe_files(folder)
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def check_manifest(folder: Path) -> list[str]:
    """What is wrong with a folder that `write_manifest` closed, its manifest included; none: all is as written."""
    path = folder / MANIFEST_FILE
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            return [f"{MANIFEST_FILE} is too large"]
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["files"]
    except FileNotFoundError:
        return [f"{MANIFEST_FILE} is missing"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [f"{MANIFEST_FILE} can't be read"]
    return find_faults(folder, files)
