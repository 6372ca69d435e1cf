"""Going on with a text: the prompt read whole, then one token a step, in constant memory at any length."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from new_llm.config.generation import GenerationConfig
from new_llm.models.generation_run import GenerationRun, GenerationStatistics
from new_llm.models.padding import mark_valid

if TYPE_CHECKING:
    from new_llm.models.transformer import TransformerLM

OnToken = Callable[[list[int | None]], None]
"""Told of each step's tokens, one a row; None for a row that has ended."""
OnText = Callable[[int, str], None]
"""Told of a row and the text that is new in it."""


def generate(
    model: "TransformerLM",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    config: GenerationConfig | None = None,
    tokenizer: Tokenizer | None = None,
    on_token: OnToken | None = None,
    on_text: OnText | None = None,
    update_memory: bool = False,
    **options: Any,
) -> tuple[Tensor, GenerationStatistics]:
    """Go on with each row's text from the held memory; at a segment's end a scratch copy of it is written.

    Rows go on as each would alone, wherever their padding stands: masked tokens take no place.

    Args:
        model: any model of the family.
        input_ids: the prompts, [B, T].
        attention_mask: [B, T], 1 or True at real tokens.
        config: the settings; None: the defaults, which are greedy.
        tokenizer: needed for stop strings and `on_text`; with it the statistics hold the texts.
        on_token: called after each step.
        on_text: called with text as it is made, whole characters only.
        update_memory: hold what was read, prompts and all new tokens, as `model(ids, update_memory=True)` does.
        options: fields of `GenerationConfig` that override the config's, such as `max_new_tokens`.

    Returns:
        Ids [B, T + N], N the new tokens of the longest row: columns 0 … T − 1 are `input_ids` as they were given, every
        row's new tokens begin in column T, and `pad_token_id` stands after a row's end. And the statistics.

    Raises:
        ValueError: an empty prompt, a row without real tokens, ids outside the vocabulary, a setting out of range,
            stop strings or `on_text` without a tokenizer, or rows that do not fit the held memory's.
    """
    config = dataclasses.replace(config or GenerationConfig(), **options)
    if tokenizer is None and on_text is not None:
        raise ValueError("on_text: a tokenizer is needed to make text")
    run = GenerationRun(model, input_ids, attention_mask, config, tokenizer, update_memory=update_memory)
    for _ in run.run(tracks_tokens=on_token is not None):
        if on_token is not None:
            on_token(run.step_tokens)
        for row, piece in enumerate(run.pieces):
            if piece and on_text is not None:
                on_text(row, piece)
    return run.collect_ids(), run.describe()


def stream_text(
    model: "TransformerLM",
    tokenizer: Tokenizer,
    prompt: str,
    *,
    config: GenerationConfig | None = None,
    update_memory: bool = False,
    **options: Any,
) -> Iterator[str]:
    """The text that follows a prompt, piece by piece as it is made; the pieces hold whole characters.

    With `update_memory` the memory is held when the last piece has been taken. Arguments and errors as in `generate`.
    """
    config = dataclasses.replace(config or GenerationConfig(), **options)
    run = GenerationRun(
        model, encode_prompts(tokenizer, [prompt])[0], None, config, tokenizer, update_memory=update_memory
    )
    return (run.pieces[0] for _ in run.run() if run.pieces[0])


def encode_prompts(tokenizer: Tokenizer, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids [B, T], padded by 0 on the right, and the mask of the real tokens [B, T] bool.

    Raises:
        ValueError: no prompt, or one without tokens.
    """
    rows = [torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64) for text in prompts]
    if not rows or not all(map(len, rows)):
        raise ValueError("the prompt is empty: at least one token is needed to go on from")
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, mark_valid(torch.tensor([len(row) for row in rows]), ids.shape[1])
