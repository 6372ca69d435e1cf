"""Damage done to valid files: to their bytes, to their numbers, to their JSON, to what a header says."""

import copy
import json
import random
import re
from typing import Any

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**53, 2**63 - 1, 2**64 - 1)
WORDS = (b"NaN", b"-Infinity", b"-1", b"1e999", b"null", b"true", b"[]", b"{}", b'""', b"9" * 400,
         b"../../etc/passwd", b"/dev/zero", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800",
         b"\r\n", b"A" * 5000, b"[" * 3000, b'{"a":' * 2000, b"\t", b"{{7*7}}", b"<script>", b"\x1b[2J")  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**9, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), "",
    "x", "../../x", "\x00", "\ud800", "9" * 50, "a" * 3000, [], {}, [[]], [None] * 50, {"a": 1}, {"": {}},
    [1.5, "x", {}], "NaN", "1e999", [[[[[[[[]]]]]]]], "F32", "I64", [1, -1], [10**12, 10**12])  # fmt: skip


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """Damage some bytes in one to four ways."""
    if rng.random() < 0.03:
        return rng.randbytes(rng.choice((0, 1, 7, 100, 5000)))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        raw = rng.choice((_flip, _cut, _insert, _lie))(raw, rng)
    return raw


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Plain values with some entries replaced, removed, repeated or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_walk(value))
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        holder, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.65:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind < 0.8:
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        else:
            holder[rng.choice(("x", "../x", "", str(key) * 2))] = copy.deepcopy(holder[key])
    return value


def dump_json(value: Any, rng: random.Random) -> bytes:
    """JSON text, at times with a duplicate key."""
    text = json.dumps(value).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        text = re.sub(rb'"(\w+)": ', lambda m: m[0] + b"0, " + m[0], text, count=1)
    return text


def mutate_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """Another header with the right length in front of the same tensors, or a wrong length."""
    length = int.from_bytes(raw[:8], "little")
    text = dump_json(mutate_json(json.loads(raw[8 : 8 + length]), rng), rng)
    claimed = len(text) if rng.random() < 0.9 else rng.choice(EXTREMES)
    return claimed.to_bytes(8, "little") + text + raw[8 + length :]


def _walk(value: Any):
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries):
        yield value, key
        yield from _walk(entry)


def _flip(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if raw else 0):
        changed[_place(changed, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(raw: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(raw) + 1)
    return raw[:start] + raw[start + rng.choice((1, 2, 4, 8, 100, len(raw))) :]


def _insert(raw: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(raw) + 1)
    piece = raw[start : start + 64] * rng.choice((1, 20))
    return raw[:start] + rng.choice((rng.randbytes(rng.randrange(1, 40)), rng.choice(WORDS), piece)) + raw[start:]


def _lie(raw: bytes, rng: random.Random) -> bytes:
    """A number, of 1 to 8 bytes or in text, is an extreme one."""
    if found := list(re.finditer(rb"-?\d+(\.\d+)?", raw[:20_000])) if rng.random() < 0.3 else ():
        match = rng.choice(found)
        return raw[: match.start()] + str(rng.choice(EXTREMES)).encode() + raw[match.end() :]
    size = rng.choice((1, 2, 4, 8))
    if len(raw) < size:
        return raw
    start = min(_place(raw, rng), len(raw) - size)
    value = rng.choice(EXTREMES) % (1 << 8 * size)
    return raw[:start] + value.to_bytes(size, rng.choice(("little", "big"))) + raw[start + size :]


def _place(raw: bytes | bytearray, rng: random.Random) -> int:
    """Anywhere; headers and footers, which are believed first, more often."""
    near = min(len(raw), 128)
    return rng.choice((rng.randrange(len(raw)), rng.randrange(near), len(raw) - 1 - rng.randrange(near)))
