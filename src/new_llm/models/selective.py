"""Selective output: the whole stack runs several times over the hidden states before a token is predicted."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from new_llm.config import PythiaConfig
from new_llm.config.sections import section, short
from new_llm.models.held_memory import LayerMemories
from new_llm.models.layers import Layer, Segments
from new_llm.models.loss import LossStatistics
from new_llm.models.transformer import TransformerLM


@section
class DepthOptions:
    """How many times as many layers run."""

    skip_interval: Annotated[int, Field(ge=0), short("--skip-interval")] = 1
    """Extra passes of selective models; deep_pythia has as many layers as such a model runs."""


@section
class SelectiveOptions(DepthOptions):
    """The options of selective output: extra passes over the hidden states before a token."""

    earlier_pass_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """γ: a pass weighs γ times the next one in the training loss; 0: the last pass alone, 1: all the same."""


class SelectiveOutputLM(TransformerLM):
    """h₁ = Layers(embed(x)), h_{p+1} = Layers(W h_p + b); the head reads the last pass, 1 + skip_interval.

    Every pass is parallel over positions and causal: pass p of position t depends on positions ≤ t alone. All passes
    read the memory as it was before the segment; the last alone writes it. Training, evaluation and generation run the
    same passes. With `skip_interval=0` it is the plain model, with the same parameters.

    Args:
        layers: the layers, all of one hidden size; their weights are drawn anew.
        vocab_size: rows Z of the embedding and the head.
        segment_length: tokens S in a segment.
        skip_interval: extra passes.
        earlier_pass_weight: γ; in training pass p of P weighs γ^(P − p) / Σ γ^(P − q). 0: the last pass alone.
        layer_norm_eps: ε of the final LayerNorm.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: the head's weight is the embedding's.

    Raises:
        ValueError: as `TransformerLM`, or a negative skip_interval, or a weight outside 0 … 1.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        vocab_size: int = PythiaConfig.vocab_size,
        segment_length: int = PythiaConfig.max_position_embeddings,
        *,
        skip_interval: int = SelectiveOptions.skip_interval,
        earlier_pass_weight: float = SelectiveOptions.earlier_pass_weight,
        layer_norm_eps: float = PythiaConfig.layer_norm_eps,
        initializer_range: float = PythiaConfig.initializer_range,
        tie_word_embeddings: bool = PythiaConfig.tie_word_embeddings,
    ) -> None:
        SelectiveOptions(skip_interval=skip_interval, earlier_pass_weight=earlier_pass_weight)
        super().__init__(
            layers,
            vocab_size,
            segment_length,
            layer_norm_eps=layer_norm_eps,
            initializer_range=initializer_range,
            tie_word_embeddings=tie_word_embeddings,
        )
        self.skip_interval = skip_interval
        self.earlier_pass_weight = earlier_pass_weight
        self._runs_one_pass = False
        self.pass_projection = None
        if skip_interval:  # drawn last, so that a seed gives the plain model's weights to all the rest
            self.pass_projection = nn.Linear(self.layer_list[0].hidden_size, self.layer_list[0].hidden_size)
            nn.init.normal_(self.pass_projection.weight, std=initializer_range)
            nn.init.zeros_(self.pass_projection.bias)

    @property
    def num_passes(self) -> int:
        """Passes of a call: 1 + skip_interval, or 1 inside `one_pass`."""
        return 1 if self._runs_one_pass else 1 + self.skip_interval

    def begin_pass(self, hidden: Tensor) -> Tensor:
        """W h + b."""
        return hidden if self.pass_projection is None else self.pass_projection(hidden)

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Inside the block a call runs one pass with the same weights."""
        before, self._runs_one_pass = self._runs_one_pass, True
        try:
            yield
        finally:
            self._runs_one_pass = before

    def _choose_passes(self, use_selective: bool) -> AbstractContextManager[None]:
        return nullcontext() if use_selective else self.one_pass()

    def run_passes(
        self, hidden: Tensor, memories: LayerMemories, segments: Segments
    ) -> tuple[list[Tensor], LayerMemories]:
        """The hidden states after every pass, [B, n, S, D] each, and each layer's memory after the last.

        With memory, a segment's first pass needs what the last pass of the segment before has written: segments then
        run one after another. Without memory all segments run at once.
        """
        if self.num_passes == 1 or hidden.shape[1] == 1 or not self.memory_layers:
            return self._run_segment_passes(hidden, memories, segments)
        parts: list[list[Tensor]] = []
        num_segments = hidden.shape[1]
        for index, part in enumerate(hidden.split(1, dim=1)):
            valid, rows = segments.valid, segments.token_rows
            segment = Segments(
                valid=None if valid is None else valid[:, index : index + 1],
                write_last=segments.write_last or index + 1 < num_segments,
                token_rows=None if rows is None else rows[:, index : index + 1],
            )
            passes, memories = self._run_segment_passes(part, memories, segment)
            parts.append(passes)
        return [torch.cat(same_pass, dim=1) for same_pass in zip(*parts, strict=True)], memories

    def _run_segment_passes(
        self, hidden: Tensor, memories: LayerMemories, segments: Segments
    ) -> tuple[list[Tensor], LayerMemories]:
        passes: list[Tensor] = []
        reading = replace(segments, write_last=False)
        for number in range(self.num_passes):
            if number:
                hidden = self.begin_pass(hidden)
            is_last = number + 1 == self.num_passes
            hidden, written = self.run_layers(hidden, memories, segments if is_last else reading)
            passes.append(hidden)
            if is_last:
                memories = written
        return passes, memories

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
        use_selective: bool = True,
    ) -> Tensor:
        """As `TransformerLM.token_losses`; in training the passes' losses are weighted by `earlier_pass_weight`.

        Args:
            input_ids: [B, T].
            labels: as `TransformerLM.token_losses`.
            attention_mask: [B, T].
            update_memory: as in `forward`.
            use_selective: False: one pass with the same weights.
        """
        with self._choose_passes(use_selective):
            if not self._weighs_passes:
                return super().token_losses(input_ids, labels, attention_mask, update_memory=update_memory)
            losses = self.pass_losses(input_ids, labels, attention_mask, update_memory=update_memory)
        return self._weigh_passes(losses)

    def _sum_losses(
        self,
        input_ids: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None,
        update_memory: bool,
        weights: Tensor | None = None,
    ) -> Tensor:
        if not self._weighs_passes:
            return super()._sum_losses(input_ids, targets, attention_mask, update_memory, weights)
        passes = self.compute_passes(input_ids, attention_mask, update_memory=update_memory)
        return self._weigh_passes([self._score(hidden, targets, "sum", weights) for hidden in passes])

    @property
    def _weighs_passes(self) -> bool:
        return self.training and self.earlier_pass_weight > 0 and self.num_passes > 1

    def _weigh_passes(self, losses: list[Tensor]) -> Tensor:
        """Σ γ^(P − p) ℓ_p / Σ γ^(P − q) over the passes."""
        weights = [self.earlier_pass_weight ** (len(losses) - 1 - number) for number in range(len(losses))]
        total = sum(weights)
        return torch.stack([weight / total * loss for weight, loss in zip(weights, losses, strict=True)]).sum(0)

    def compute_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
        use_selective: bool = True,
    ) -> tuple[Tensor, LossStatistics]:
        """As `TransformerLM.compute_loss`; the loss is that of `token_losses`, and the statistics count the passes.

        Args:
            input_ids: [B, T].
            labels: as `TransformerLM.token_losses`.
            attention_mask: [B, T].
            update_memory: as in `forward`.
            use_selective: False: one pass with the same weights.
        """
        with self._choose_passes(use_selective):
            return super().compute_loss(input_ids, labels, attention_mask, update_memory=update_memory)

    def pass_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
    ) -> list[Tensor]:
        """The losses of `token_losses` after every pass, as if it were the last: the logit lens over passes.

        Returns:
            One [B, T] a pass, nats; 0 where there is no target.
        """
        targets = self._find_targets(input_ids, labels, attention_mask)
        passes = self.compute_passes(input_ids, attention_mask, update_memory=update_memory)
        return [self._score(hidden, targets) for hidden in passes]
