"""A cache around any model, as a `LanguageModel`: every measurement reads it as it reads the model itself."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from new_llm.config.cache import CacheConfig
from new_llm.models.cache import TextCache, mix


class CachedModel(nn.Module):
    """A model and a cache of each row's text, mixed; the cache is carried, emptied and set aside with the memory.

    Args:
        model: a `TransformerLM` or a `HuggingFaceLM`.
        config: the cache. With nothing in it every loss is the model's own, bit for bit.
    """

    def __init__(self, model: Any, config: CacheConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.held: list[TextCache] | None = None

    @property
    def segment_length(self) -> int:
        """Tokens in a segment of the model."""
        return self.model.segment_length

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
    ) -> Tensor:
        """Loss in nats of the token after each position, [B, T]; 0 where there is no target.

        A token's loss rests on the text before it alone, also within the call.

        Args:
            input_ids: [B, T].
            labels: as for the model's own `token_losses`.
            attention_mask: [B, T], real tokens on the left.
            update_memory: keep what was read, in the model's memory and in the cache.

        Raises:
            ValueError: real tokens that are not on the left, or more rows than caches.
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
                found[:, 0] = (-losses[real]).exp().cpu().numpy()
                mixed = -torch.from_numpy(mix(found, self.config.weights)).log()
                losses[real] = torch.where(is_scored, mixed.to(losses), 0)
            if update_memory:
                cache.add(hidden[real], input_ids[real])
        return losses

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logarithms of the mixture's probabilities, [B, T, Z]; nothing is kept.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], real tokens on the left.
        """
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
        """An empty memory and empty caches inside the block, those that were held afterwards."""
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
        """Each row's cache and number of real tokens."""
        lengths = [input_ids.shape[1]] * len(input_ids)
        if attention_mask is not None:
            mask = attention_mask.to(torch.bool)
            if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
                raise ValueError("attention_mask: a cached model reads rows whose real tokens are on the left")
            lengths = mask.sum(1).tolist()
        caches = self.held
        if caches is None and not update:
            caches = [TextCache(self.config) for _ in lengths]
        if caches is None or len(caches) != len(lengths):
            raise ValueError(f"{len(lengths)} rows: a cached model needs fresh_memory(batch_size={len(lengths)})")
        return list(zip(caches, lengths, strict=True))
