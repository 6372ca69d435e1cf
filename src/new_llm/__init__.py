"""New-LLM: a laboratory for language models with compressive memory.

`create_model` and `TransformerLM` are re-exported lazily, so that `import new_llm` and the command's help do not wait
for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from new_llm.models import TransformerLM, create_model

__version__ = "0.1.0"
__all__ = ["TransformerLM", "__version__", "create_model"]


def __getattr__(name: str) -> Any:
    if name in ("create_model", "TransformerLM"):
        import new_llm.models

        return getattr(new_llm.models, name)
    raise AttributeError(f"module 'new_llm' has no attribute {name!r}")
