"""Tokenising in several processes: bounded memory, documents in their order, and no process left behind."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tokenizers import Tokenizer

from new_llm.config import UserError
from new_llm.data.tokens import Text, TokenizedDocument, cut_chunks, encode_chunk, encode_documents

CHUNKS_PER_WORKER = 2  # tokenised or waiting at once: one is worked on, the next one lies ready

_tokenizer: Any = None  # a worker's own


def encode_in_parallel(texts: Iterable[Text], tokenizer: Tokenizer, num_workers: int) -> Iterator[TokenizedDocument]:
    """Tokenise as `encode_documents` does, in so many processes; 1: in this one, with the tokenizer's own threads.

    Raises:
        UserError: a worker was killed, as it happens where memory runs out.
    """
    if num_workers == 1:
        yield from encode_documents(texts, tokenizer)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (tokenizer.to_str(),))
    pending = deque[Future[list[TokenizedDocument]]]()
    try:
        for chunk in cut_chunks(texts):
            pending.append(pool.submit(_encode, chunk))
            if len(pending) >= num_workers * CHUNKS_PER_WORKER:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"data.num_workers: one of {num_workers} tokenizing processes was killed, as it happens where memory runs "
            f"out; fewer workers need less"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(tokenizer: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = Tokenizer.from_str(tokenizer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a parent that was killed can't end its workers, which would wait for ever


def _encode(chunk: list[Text]) -> list[TokenizedDocument]:
    return list(encode_chunk(chunk, _tokenizer))
