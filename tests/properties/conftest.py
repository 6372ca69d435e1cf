"""The properties use the cases of tests/models."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))

from model_cases import one_thread  # noqa: E402

__all__ = ["one_thread"]
