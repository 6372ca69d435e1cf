"""Any causal language model of transformers as a `LanguageModel`: no memory, and labels aligned by the one owner."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from new_llm.config import UserError
from new_llm.models.loss import align_labels, compute_token_losses
from new_llm.models.transformer import SCORED_ROWS


class HuggingFaceLM(nn.Module):
    """Wraps a model of transformers for measurements. Longer calls are cut into segments, read alone.

    Args:
        model: an instance of one of transformers' `...ForCausalLM` classes.
        segment_length: tokens of a segment in the streaming and independent protocols; None: the configuration's
            max_position_embeddings.

    Raises:
        ValueError: no segment length is given and the configuration has none.
    """

    def __init__(self, model: Any, segment_length: int | None = None) -> None:
        super().__init__()
        self.model = model
        length = segment_length or getattr(model.config, "max_position_embeddings", None)
        if length is None:
            raise ValueError("segment_length: the model's configuration states no max_position_embeddings")
        self.segment_length = int(length)

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
    ) -> Tensor:
        """Loss in nats of the token after each position, [B, T]; 0 where there is no target.

        Args:
            input_ids: [B, T].
            labels: the tokens themselves, not shifted, [B, T] or [B, T + 1]; see `align_labels`.
            attention_mask: [B, T], real tokens on the left.
            update_memory: without effect: there is no memory.
        """
        targets = align_labels(labels, input_ids.shape[1])
        losses: list[Tensor] = []
        for begin in range(0, input_ids.shape[1], self.segment_length):
            piece = slice(begin, begin + self.segment_length)
            mask = None if attention_mask is None else attention_mask[:, piece]
            logits = self.model(input_ids=input_ids[:, piece], attention_mask=mask, use_cache=False).logits
            wanted = targets[:, piece]
            losses.append(compute_token_losses(logits.flatten(0, 1), wanted.flatten()).view_as(wanted))
        return torch.cat(losses, dim=1)

    # What a cache around the model reads; the same names as a TransformerLM's

    @property
    def embed_out(self) -> nn.Module:
        """The head."""
        return self.model.get_output_embeddings()

    def compute_hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, update_memory: bool = False
    ) -> Tensor:
        """The input of the head, [B, T, D]; arguments as in `token_losses`.

        Raises:
            UserError: the model's logits are not simply its head's output.
        """
        found, logits = list[Tensor](), input_ids
        hook = self.embed_out.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            for begin in range(0, input_ids.shape[1], self.segment_length):
                piece = slice(begin, begin + self.segment_length)
                mask = None if attention_mask is None else attention_mask[:, piece]
                logits = self.model(input_ids=input_ids[:, piece], attention_mask=mask, use_cache=False).logits
        finally:
            hook.remove()
        if not torch.allclose(self.embed_out(found[-1][:1, -1:]), logits[:1, -1:], rtol=1e-2, atol=1e-2):
            raise UserError(f"{type(self.model).__name__}: its logits are not simply its head's: it takes no cache")
        return torch.cat(found, dim=1)

    def find_targets(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The token that each position predicts, [B, T]; -100: none."""
        return align_labels(labels, input_ids.shape[1])

    def score_passes(self, passes: list[Tensor], targets: Tensor) -> Tensor:
        """The losses of the last hidden states, [B, T]."""
        pieces = zip(passes[-1].flatten(0, 1).split(SCORED_ROWS), targets.flatten().split(SCORED_ROWS), strict=True)
        return torch.cat([compute_token_losses(self.embed_out(h), wanted) for h, wanted in pieces]).view_as(targets)

    @contextlib.contextmanager
    def fresh_memory(self, batch_size: int | None = None) -> Iterator[None]:
        """Nothing to set aside."""
        yield

    def reset_rows(self, rows: Tensor) -> None:
        """Nothing to empty."""
