"""How texts are read into a memory."""

from typing import Annotated

from pydantic import Field

from new_llm.config.sections import section, short


@section
class FillConfig:
    """What bounds the memory that reading takes, whatever the length of the text."""

    tokens_per_call: Annotated[int, Field(gt=0)] = 1024
    """Tokens that the model reads at once, rounded down to whole segments; one segment at least."""
    block_bytes: Annotated[int, Field(gt=0)] = 1 << 16
    """Bytes of a file that are decoded and tokenised at once."""
    max_run_characters: Annotated[int, Field(gt=0)] = 1 << 20
    """A run without white space that is longer is cut here for the tokenizer."""
    text_field: Annotated[str, short("--data.text-field")] = "text"
    """The field of a .jsonl or Parquet record that holds the text."""
