"""Wrappers that make other models a `LanguageModel`, so that every measure can read them.

`HuggingFaceLM` wraps any causal language model of transformers, without memory; `CachedModel` adds a cache of the text
to any model. In attention masks, the real tokens must be on the left.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from new_llm.config import UserError
from new_llm.config.model import CacheConfig
from new_llm.models.cache import TextCache, mix
from new_llm.models.inputs import align_labels, compute_token_losses
from new_llm.models.transformer import SCORED_ROWS

CHECK_STRIDE = 64
"""Distance in tokens between positions whose logits are compared with the head's output."""


class HuggingFaceLM(nn.Module):
    """Wraps a transformers model for measurements. Longer inputs are cut into segments, each read independently.

    Args:
        model: an instance of one of transformers' `...ForCausalLM` classes.
        segment_length: tokens per segment; None: max_position_embeddings of the model's configuration.

    Raises:
        ValueError: no segment length is given and the configuration has none.
    """

    def __init__(self, model: Any, segment_length: int | None = None) -> None:
        super().__init__()
        self.model = model
        length = segment_length or getattr(model.config, "max_position_embeddings", None)
        if length is None:
            raise ValueError("segment_length is required: the model's configuration has no max_position_embeddings")
        self.segment_length = int(length)

    rows_can_share = True

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, update_memory: bool = False
    ) -> Tensor:
        """Return logits, [B, T, Z]; `update_memory` has no effect."""
        return torch.cat([logits for _, logits in self._read(input_ids, attention_mask)], dim=1)

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
    ) -> Tensor:
        """Return the loss in nats of the token after each position, [B, T]; 0 where there is no target."""
        targets = align_labels(labels, input_ids.shape[1])
        losses = [
            compute_token_losses(logits.flatten(0, 1), targets[:, piece].flatten()).view_as(targets[:, piece])
            for piece, logits in self._read(input_ids, attention_mask)
        ]
        return torch.cat(losses, dim=1)

    def _read(self, input_ids: Tensor, attention_mask: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        for begin in range(0, input_ids.shape[1], self.segment_length):
            piece = slice(begin, begin + self.segment_length)
            mask = None if attention_mask is None else attention_mask[:, piece]
            yield piece, self.model(input_ids=input_ids[:, piece], attention_mask=mask, use_cache=False).logits

    # The part of TransformerLM's interface that `CachedModel` uses

    @property
    def embed_out(self) -> nn.Module:
        """The output head."""
        return self.model.get_output_embeddings()

    def compute_hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, update_memory: bool = False
    ) -> Tensor:
        """Return the head's input, [B, T, D]; arguments as in `token_losses`.

        Raises:
            UserError: the logits are not simply the head's output (e.g. they are scaled).
        """
        found, checked = list[Tensor](), list[Tensor]()
        hook = self.embed_out.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            for _, logits in self._read(input_ids, attention_mask):
                checked.append(logits[:, ::CHECK_STRIDE].clone())
        finally:
            hook.remove()
        again = self.embed_out(torch.cat([hidden[:, ::CHECK_STRIDE] for hidden in found], dim=1))
        if not torch.allclose(again, torch.cat(checked, dim=1), rtol=1e-2, atol=1e-2, equal_nan=True):
            raise UserError(f"{type(self.model).__name__} can't use a cache: its logits are not just its head's output")
        return torch.cat(found, dim=1)

    def find_targets(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the token that each position predicts, [B, T]; -100 for none."""
        return align_labels(labels, input_ids.shape[1])

    def score_passes(self, passes: list[Tensor], targets: Tensor) -> Tensor:
        """Return the losses of the last pass's hidden states, [B, T]."""
        pieces = zip(passes[-1].flatten(0, 1).split(SCORED_ROWS), targets.flatten().split(SCORED_ROWS), strict=True)
        return torch.cat([compute_token_losses(self.embed_out(h), wanted) for h, wanted in pieces]).view_as(targets)

    @contextlib.contextmanager
    def fresh_memory(self, batch_size: int | None = None) -> Iterator[None]:
        """Do nothing: there is no memory."""
        yield

    def reset_rows(self, rows: Tensor) -> None:
        """Do nothing: there is no memory."""

    def reset_memory(self, batch_size: int | None = None) -> None:
        """Do nothing: there is no memory."""


def has_memory(model: Any) -> bool:
    """Return whether a model can carry information from one call to the next."""
    return not isinstance(model, HuggingFaceLM) and bool(getattr(model, "memory_layers", True))


class CachedModel(nn.Module):
    """A model mixed with a cache of each row's text, which is carried, reset and set aside together with the memory.

    Args:
        model: a `TransformerLM` or `HuggingFaceLM`.
        config: the cache. If nothing in it is enabled, every loss is exactly the model's own.
    """

    def __init__(self, model: Any, config: CacheConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.held: list[TextCache] | None = None

    @property
    def segment_length(self) -> int:
        """Tokens per segment of the model."""
        return self.model.segment_length

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
    ) -> Tensor:
        """Return the loss in nats of the token after each position, [B, T]; 0 where there is no target.

        A token's loss depends only on the text before it, also within a call.

        Raises:
            ValueError: real tokens are not on the left, or the number of rows differs from that of the held caches.
        """
        if not self.config.is_on:
            return self.model.token_losses(input_ids, labels, attention_mask, update_memory=update_memory)
        targets = self.model.find_targets(input_ids, labels, attention_mask)
        hidden = self.model.compute_hidden(input_ids, attention_mask, update_memory=update_memory)
        losses = self.model.score_passes([hidden], targets).double()
        for row, (cache, length) in enumerate(self._open(input_ids, attention_mask, update_memory)):
            real = row, slice(length)
            if bool((is_scored := targets[real] >= 0).any()):
                found = cache.score(hidden[real], input_ids[real], targets[real])
                found.probabilities[:, 0] = (-losses[real]).exp().cpu().numpy()
                mixed = -torch.from_numpy(mix(found, self.config.weights)).log()
                losses[real] = torch.where(is_scored, mixed.to(losses), 0)
            if update_memory:
                cache.add(hidden[real], input_ids[real])
        return losses

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the log-probabilities of the mixture, [B, T, Z]; memory and cache are not updated."""
        hidden = self.model.compute_hidden(input_ids, attention_mask)
        shares = self.model.embed_out(hidden).double().softmax(-1)
        if self.config.is_on:
            for row, (cache, length) in enumerate(self._open(input_ids, attention_mask, False)):
                real = row, slice(length)
                if length:
                    shares[real] = cache.mix(hidden[real], input_ids[real], shares[real])
        return shares.log()

    @contextlib.contextmanager
    def fresh_memory(self, batch_size: int | None = None) -> Iterator[None]:
        """Use an empty memory and empty caches inside the block; restore the held ones afterwards."""
        before = self.held
        try:
            with self.model.fresh_memory(batch_size):
                self.held = None if batch_size is None else [TextCache(self.config) for _ in range(batch_size)]
                yield
        finally:
            self.held = before

    def reset_rows(self, rows: Tensor) -> None:
        """Empty the memory and the caches of the rows that are True, [B] bool."""
        self.model.reset_rows(rows)
        held = zip(self.held or (), rows.tolist(), strict=True)
        self.held = [TextCache(self.config) if is_reset else cache for cache, is_reset in held]

    def _open(self, input_ids: Tensor, attention_mask: Tensor | None, update: bool) -> list[tuple[TextCache, int]]:
        """Return each row's cache and number of real tokens."""
        lengths = [input_ids.shape[1]] * len(input_ids)
        if attention_mask is not None:
            mask = attention_mask.to(torch.bool)
            if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
                raise ValueError("attention_mask: a cached model needs the real tokens of each row on the left")
            lengths = mask.sum(1).tolist()
        caches = self.held
        if caches is None and not update:
            caches = [TextCache(self.config) for _ in lengths]
        if caches is None or len(caches) != len(lengths):
            raise ValueError(f"{len(lengths)} rows: a cached model needs fresh_memory(batch_size={len(lengths)})")
        return list(zip(caches, lengths, strict=True))
