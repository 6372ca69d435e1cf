"""Feeds damaged files to readers, in a process of its own whose memory and time are bounded.

    python worker.py FOLDER COUNT SEED [TARGET ...]
    python worker.py FOLDER hostile

Prints a line of JSON for every input that did not end well, and one with the counts at the end. An input ends well
where the reader comes back or raises a UserError of one line. What it may not do: raise anything else, take more than
SECONDS or much memory, write outside the folder that it reads, start a program, open a connection.
"""

import json
import os
import random
import re
import resource
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from feeding import Watch, feed, write_files
from targets import Target, build_targets, damage

from new_llm.config import UserError

MEMORY_BYTES = 2 << 30
"""Beyond what the libraries themselves take."""


def limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))


def check_hostile(place: Path, watch: Watch, targets: dict[str, Target]) -> None:
    """Read every file of `hostile`; a line of JSON for each, with its message."""
    from hostile import build_hostile_files

    for name, hostile in build_hostile_files(targets).items():
        folder = place / "hostile"
        write_files(folder, {})
        folder.mkdir()
        hostile.make(folder)
        messages = list[str]()

        def read(folder: Path, hostile: Any = hostile, messages: list[str] = messages) -> None:
            try:
                hostile.read(folder)
            except UserError as error:
                messages.append(str(error))
                raise

        began = time.perf_counter()
        fault = feed(Target({}, (), read), folder, watch)
        if not fault and (folder / "ran").exists():
            fault = "code was executed"
        if not fault and not messages:
            fault = "it was read without complaint"
        if not fault and not re.search(hostile.message, messages[0]):
            fault = f"refused with other words: {messages[0]}"
        seconds = round(time.perf_counter() - began, 2)
        print(json.dumps({"name": name, "fault": fault, "seconds": seconds, "message": messages[:1]}), flush=True)
    print(json.dumps({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}), flush=True)


def main(place: Path, count: int | None, seed: int, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    targets = build_targets(place / "build")
    watch, folder = Watch(), place / "input"
    for name, target in targets.items():  # all of them read what is valid, and so have loaded what they need
        write_files(folder, target.files)
        if fault := feed(target, folder, watch):
            print(json.dumps({"target": name, "fault": f"a valid folder: {fault}"}), flush=True)
    limit_memory()
    if count is None:
        check_hostile(place, watch, targets)
        return
    chosen = {name: target for name, target in targets.items() if not names or name in names}
    share = count / sum(target.weight for target in chosen.values())
    done = Counter()
    for name, target in chosen.items():
        write_files(folder, target.files)
        for number in range(max(1, round(share * target.weight))):
            rng = random.Random(f"{seed} {name} {number}")
            file, raw = damage(target, rng)
            (place / "running").write_text(json.dumps([name, number, file]))
            (folder / file).write_bytes(raw)
            fault = feed(target, folder, watch)
            done[name] += 1
            if fault:
                saved = place / "faults" / f"{name}-{number}".replace(" ", "-").replace("/", "-")
                saved.mkdir(parents=True, exist_ok=True)
                (saved / Path(file).name).write_bytes(raw)
                print(json.dumps({"target": name, "number": number, "file": file, "fault": fault}), flush=True)
            if sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) != sorted(
                target.files
            ):
                write_files(folder, target.files)  # a reader that cleans up, as that of checkpoints does
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(target.files[file])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({"done": done, "total": sum(done.values()), "peak_mib": peak}), flush=True)


if __name__ == "__main__":
    if sys.argv[2] == "hostile":
        main(Path(sys.argv[1]), None, 0, [])
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
