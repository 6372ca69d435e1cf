"""What all tests of models share."""

from model_cases import one_thread

__all__ = ["one_thread"]
