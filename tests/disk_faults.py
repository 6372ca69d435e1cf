"""Faults of a disk: an operation fails, or is the first that the process does not live to see; a file was edited."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from new_llm.models.tensor_files import hash_content

OPERATIONS = ("replace", "fsync", "mkdir", "chmod", "open", "rmdir", "unlink")


def stop_everywhere(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *, dies: bool) -> Iterator[int]:
    """Act once for each operation, which fails there, as on a full disk; the number after each time.

    With `dies` a child process acts each time, and ends at once before the operation.
    """
    number, done, is_whole = 0, list[str](), False

    def wrap(name: str) -> Callable:
        original = getattr(os, name)

        def operate(*args, **options):
            done.append(name)
            if len(done) == number:
                if dies:
                    os._exit(9)
                raise OSError(28, "No space left on device")
            return original(*args, **options)

        return operate

    while not is_whole:  # until nothing is left to stop
        number += 1
        if dies and (child := os.fork()):
            is_whole = os.waitpid(child, 0)[1] == 0
        else:
            done.clear()
            with monkeypatch.context() as patch, suppress(OSError):
                for name in OPERATIONS:
                    patch.setattr(os, name, wrap(name))
                act()
            if dies:
                os._exit(0)
            is_whole = len(done) < number
        yield number


def edit_tensors(record=None, tensors=None, *, digest: bool = True, **metadata: Any) -> Callable[[Path], None]:
    """A change of a memory or adapter file: another record of layer 0, other tensors, other metadata.

    A number replaces a tensor's first one; None leaves a tensor or an entry out. The digest fits, unless `digest` is
    False or another `sha256` is given.
    """

    def change(path: Path) -> None:
        if path.suffix == ".pt":
            facts, held = torch.load(path, weights_only=True).values()
        else:
            held = load_file(path)
            with safe_open(path, "pt") as file:
                facts = file.metadata()
        if record:
            layers = json.loads(facts["layers"])
            first = layers[0] if isinstance(layers, list) else layers["0"]
            for key, value in record.items():  # what the record does not have are settings
                (first if key in first else first.get("settings", first))[key] = value
            facts["layers"] = json.dumps(layers)
        for name, value in (tensors or {}).items():
            if isinstance(value, int | float):
                held[f"layers.{name}"].view(-1)[0] = value
            else:
                held[f"layers.{name}"] = value
        held = {name: t for name, t in held.items() if t is not None}
        facts = {key: value for key, value in (facts | metadata).items() if value is not None}
        if digest and "sha256" not in metadata:
            facts["sha256"] = hash_content(facts, held)
        torch.save({"metadata": facts, "tensors": held}, path) if path.suffix == ".pt" else save_file(held, path, facts)

    return change


def edit_json(name: str, *, layer: dict[str, Any] | None = None, **values: Any) -> Callable[[Path], Any]:
    """Other values in a folder's file, or in each of its layers."""

    def change(folder: Path) -> None:
        structure = json.loads((folder / name).read_text()) | values
        for entry in structure["layers"] if layer else ():
            entry |= layer
        (folder / name).write_text(json.dumps(structure))

    return change


def alter(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


tear, flip = alter(lambda raw: raw[:-3]), alter(lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
