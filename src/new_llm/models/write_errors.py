"""What libraries raise when a disk is full or gone, as the `OSError` that it is."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def raise_os_errors(path: Path) -> Iterator[None]:
    """Around the writing of a file by safetensors, or by `torch.save` into an open file.

    Raises:
        OSError: with the system's number and the path, where the system refused to write.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        # torch.save meets the error of the file's own write, and raises one of its own over it.
        number = int(found[1]) if found else getattr(error.__context__, "errno", None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None
