"""Small JSON files that carry their own checksum: a torn or changed one reads as absent."""

import hashlib
import json
from pathlib import Path
from typing import Any

from new_llm.config.atomic import write_text_atomically

MAX_SEALED_BYTES = 1 << 28  # a manifest of a million shards has fewer


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write plain values, whole or not at all, with their sha256."""
    text = json.dumps({"sha256": _digest(content), "content": content}, indent=1, ensure_ascii=False)
    write_text_atomically(path, text)


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None: it is missing, torn or was changed."""
    try:
        if path.stat().st_size > MAX_SEALED_BYTES:
            return None
        sealed = json.loads(path.read_text(encoding="utf-8"))
        content = sealed["content"]
        return content if isinstance(content, dict) and sealed["sha256"] == _digest(content) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
