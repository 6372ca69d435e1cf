"""Damage done to valid files: to their bytes, to the values of their JSON, to what a header says."""

import copy
import gzip
import json
import random
import re
from collections.abc import Iterator
from typing import Any

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**53, 2**63 - 1, 2**64 - 1)
WORDS = (b"NaN", b"-Infinity", b"1e999", b"null", b"9" * 400, b"../../etc/passwd", b"/dev/zero", b"\x00", b"\xff\xfe",
         b"\xed\xa0\x80", b"\\ud800", b"\r\n", b"A" * 5000, b"[" * 3000, b'{"a":' * 2000, b"\x1b[2J")  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**9, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), "",
    "x", "../../x", "\x00", "\ud800", "9" * 50, "a" * 3000, [], {}, [[]], [None] * 50, {"a": 1}, {"": {}},
    [1.5, "x", {}], "NaN", "1e999", [[[[[[[[]]]]]]]], "F32", "I64", [1, -1], [10**12, 10**12])  # fmt: skip


def damage(name: str, raw: bytes, rng: random.Random) -> bytes:
    """A file of this name, damaged: by its form where it has one, as often byte by byte."""
    if rng.random() < 0.5:
        if name.endswith(".json"):
            return damage_json(raw, rng)
        if name.endswith(".jsonl"):
            lines = raw.splitlines()
            place = rng.randrange(len(lines))
            lines[place] = damage_json(lines[place], rng)
            return b"\n".join(lines)
        if name.endswith(".gz"):
            return gzip.compress(damage_bytes(gzip.decompress(raw), rng))
        if name.endswith(".safetensors"):
            # Another header before the same tensors, with the right length or a wrong one.
            length = int.from_bytes(raw[:8], "little")
            text = damage_json(raw[8 : 8 + length], rng)
            claimed = len(text) if rng.random() < 0.9 else rng.choice(EXTREMES)
            return claimed.to_bytes(8, "little") + text + raw[8 + length :]
    return damage_bytes(raw, rng)


def damage_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Some pieces cut out, replaced or inserted: random bytes, harmful words, extreme numbers, repetitions."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        numbers = list(re.finditer(rb"-?\d+(\.\d+)?", raw[:20_000])) if rng.random() < 0.1 else []
        near = min(len(raw), 128)  # headers and footers, which are believed first, more often
        start = rng.choice((rng.randrange(len(raw) + 1), rng.randrange(near + 1), len(raw) - rng.randrange(near + 1)))
        size = rng.choice((0, 1, 1, 2, 4, 8, 100, len(raw)))
        extreme = rng.choice(EXTREMES)
        pieces = (
            b"",
            rng.randbytes(size % 5000),
            rng.choice(WORDS),
            (extreme % (1 << 8 * min(size, 8))).to_bytes(min(size, 8), rng.choice(("little", "big"))),
            raw[start : start + 64] * rng.choice((1, 20)),
        )
        piece = rng.choice(pieces)
        if numbers:
            (start, end), piece = rng.choice(numbers).span(), str(extreme).encode()
            size = end - start
        raw = raw[:start] + piece + raw[start + size :]
    return raw


def damage_json(raw: bytes, rng: random.Random) -> bytes:
    """JSON text with some entries replaced, removed, repeated or renamed, at times with a duplicate key."""
    value = json.loads(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice([*walk(value)] or [([value], 0)])
        kind = rng.random()
        if kind < 0.65:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind < 0.8:
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        else:
            holder[rng.choice(("x", "../x", "", str(key) * 2))] = copy.deepcopy(holder[key])
    text = json.dumps(value).encode("utf-8", "surrogatepass")
    return re.sub(rb'"(\w+)": ', lambda m: m[0] + b"0, " + m[0], text, count=1) if rng.random() < 0.15 else text


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry, as its holder and its key there."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries):
        yield value, key
        yield from walk(entry)
