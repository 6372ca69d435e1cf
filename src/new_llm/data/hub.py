"""The Hugging Face hub: probing it, and reading a data set from it or from the local cache.

Without a network, `datasets` retries for 23 seconds before it gives up. A short probe comes first, so that an offline
machine gets the cached data or a clear error at once.
"""

import contextlib
import functools
import os
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

from new_llm.config.errors import HubError
from new_llm.config.files import shorten

HUB_NAME = re.compile(r"(?!.*\.\.)\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
"""The name of a model or data set on the hub: owner/name, or name alone."""


def hub_endpoint() -> str:
    """Return the hub's address: $HF_ENDPOINT, else https://huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_answers(path: str, timeout_seconds: float) -> bool:
    """Return whether the hub answers in time, at its root and at this path; False if HF_HUB_OFFLINE or the like is set.

    Any status below 500 counts as an answer, so that a missing or gated file gets the library's own error message. Each
    address is probed once per process.
    """
    settings = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in settings):
        return False
    addresses = (hub_endpoint(), f"{hub_endpoint()}/{urllib.parse.quote(path)}")
    return all(_address_answers(address, timeout_seconds) for address in addresses)


@functools.lru_cache
def _address_answers(address: str, timeout_seconds: float) -> bool:
    from huggingface_hub.utils import get_session

    statuses = list[int]()

    def ask() -> None:
        with contextlib.suppress(Exception):  # the exception depends on the transport
            statuses.append(get_session().head(address, timeout=timeout_seconds).status_code)

    # A thread, because looking up the host's name ignores the timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return any(status < 500 for status in statuses)


def describe_failure(error: BaseException) -> str:
    """Shorten a library's error to one line."""
    return shorten(f"{type(error).__name__}: {error}".removesuffix(": "))


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Make huggingface_hub and datasets use only their caches. They read HF_HUB_OFFLINE at import, so patch both."""
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def read_hub_dataset(
    name: str, subset: str | None, *, split: str, streaming: bool, timeout_seconds: float
) -> Iterator[dict[str, Any]]:
    """Yield the records of one split of a hub data set, from the hub or from this machine's cache.

    `streaming` reads records as they are needed instead of downloading the whole split first.

    Raises:
        HubError: the hub is unreachable and nothing is cached, or loading fails, possibly midway.
    """
    wanted = f"data set {name}" + (f" ({subset})" if subset else "")
    reachable = hub_answers(f"datasets/{name}/resolve/main/README.md", timeout_seconds)
    import datasets

    datasets.disable_progress_bars()
    try:
        with contextlib.nullcontext() if reachable else _offline():
            records: Any = datasets.load_dataset(name, subset, split=split, streaming=streaming and reachable)
        for record in records:
            yield dict(record)
    except Exception as error:  # datasets can raise almost anything
        if not reachable:
            raise HubError(f"{wanted} is not cached here and the hub at {hub_endpoint()} is out of reach") from None
        raise HubError(f"{wanted} could not be loaded: {describe_failure(error)}") from None
