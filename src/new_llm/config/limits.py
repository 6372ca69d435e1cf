"""How much a file from elsewhere may ask for before it is refused with one line."""

from typing import Annotated

from pydantic import Field

from new_llm.config.sections import section


@section
class ReadLimits:
    """Bounds of memory and time while text is read; a file beyond one is refused, and the line names the field."""

    max_line_bytes: Annotated[int, Field(ge=1024)] = 1 << 26
    """Of one line of JSON lines, one article of WikiText, or one text in a Parquet file."""
    max_text_bytes: Annotated[int, Field(ge=1024)] = 1 << 28
    """Of a .txt file, which is one document."""
    max_zstd_window_bytes: Annotated[int, Field(ge=1024, le=1 << 31)] = 1 << 27
    """Memory that a .zst file may ask for; files packed with zstd --long=28 and above need more."""
    max_compression_ratio: Annotated[float, Field(ge=1)] = 1000.0
    """Bytes of text for each byte of a .zst or Parquet file."""
