"""The language model: an embedding, any list of layers, a head, and the memory it holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from new_llm.config import PythiaConfig
from new_llm.models.generation import GenerationStatistics, generate
from new_llm.models.held_memory import HeldMemory, LayerMemories
from new_llm.models.initialization import initialize_weights
from new_llm.models.inputs import check_input_ids, check_targets
from new_llm.models.layers import Layer, ParallelInfiniLayer, Segments, check_order
from new_llm.models.loss import IGNORE_INDEX, LossStatistics, align_labels, compute_token_losses
from new_llm.models.ops.head_loss import linear_cross_entropy
from new_llm.models.padding import Packing, check_mask, mark_valid, plan_packing
from new_llm.models.stream import MemoryStream
from new_llm.models.tied_embeddings import tie_embeddings

SCORED_ROWS = 2048
"""Rows of logits that a head of another kind makes at once; more would only take memory."""


class TransformerLM(HeldMemory):
    """A causal language model of any mix of Pythia and memory layers.

    A call's tokens are cut into segments of `segment_length` from the call's start. Every layer works inside the
    segment; memory is the only path from one segment to the next. One call of n segments gives the logits of n calls
    of one segment with the memory carried.

    Args:
        layers: the layers, all of one hidden size; their weights are drawn anew.
        vocab_size: rows Z of the embedding and the head.
        segment_length: tokens S in a segment.
        layer_norm_eps: ε of the final LayerNorm.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: the head's weight is the embedding's.

    Raises:
        ValueError: no layers, layers of different sizes, a token memory that is not the last, or a length that is not
            positive.
    """

    gradient_checkpointing = False
    """In training keep only what enters each layer, and run the layer once more in backward."""

    def __init__(
        self,
        layers: Sequence[Layer],
        vocab_size: int = PythiaConfig.vocab_size,
        segment_length: int = PythiaConfig.max_position_embeddings,
        *,
        layer_norm_eps: float = PythiaConfig.layer_norm_eps,
        initializer_range: float = PythiaConfig.initializer_range,
        tie_word_embeddings: bool = PythiaConfig.tie_word_embeddings,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers: at least one layer is needed")
        sizes = sorted({layer.hidden_size for layer in layers})
        if len(sizes) > 1:
            raise ValueError(f"layers: hidden sizes {sizes} differ; all layers need one")
        for name, value in (("vocab_size", vocab_size), ("segment_length", segment_length)):
            if value < 1:
                raise ValueError(f"{name}: {value} is not positive")
        check_order(layers)
        self.vocab_size = vocab_size
        self.segment_length = segment_length
        self.embed_in = nn.Embedding(vocab_size, sizes[0])
        self.layers = nn.ModuleList(layers)
        self.final_layer_norm = nn.LayerNorm(sizes[0], eps=layer_norm_eps)
        self.embed_out = nn.Linear(sizes[0], vocab_size, bias=False)
        initialize_weights(self, initializer_range)
        self.tie_word_embeddings = tie_word_embeddings
        if tie_word_embeddings:
            tie_embeddings(self)
        self.reset_memory()

    # Calls

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, update_memory: bool = False
    ) -> Tensor:
        """Logits of every position.

        Args:
            input_ids: [B, T] token ids; T may be any number of segments.
            attention_mask: [B, T], 1 or True at real tokens; the others are neither read nor written, and take no place
                in a segment. Their logits mean nothing.
            update_memory: hold what the call wrote; otherwise the held memory stays bit for bit as it was.

        Returns:
            [B, T, Z].

        Raises:
            ValueError: ids of another shape or outside the vocabulary, or a batch that does not fit the memory's rows.
        """
        return self.embed_out(self.compute_hidden(input_ids, attention_mask, update_memory=update_memory))

    def compute_hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, update_memory: bool = False
    ) -> Tensor:
        """The hidden states before the head, [B, T, D]; arguments as in `forward`."""
        return self.compute_passes(input_ids, attention_mask, update_memory=update_memory)[-1]

    def compute_passes(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, update_memory: bool = False
    ) -> list[Tensor]:
        """What the head would read after each pass through the layers, [B, T, D]; arguments as in `forward`."""
        check_input_ids(input_ids, self.vocab_size)
        memories, start = self._begin_call(input_ids.shape[0], input_ids.device)
        packing = plan_packing(attention_mask, input_ids)
        packed = input_ids if packing is None else packing.pack(input_ids)
        passes, memories = self.run_segments(packed, memories, packing, write_last=update_memory)
        if update_memory:
            self._hold(memories, start)
        return passes if packing is None else [packing.unpack(hidden) for hidden in passes]

    def run_segments(
        self, input_ids: Tensor, memories: LayerMemories, packing: Packing | None = None, *, write_last: bool
    ) -> tuple[list[Tensor], LayerMemories]:
        """The functional core: tokens and memories to hidden states and new memories. It keeps nothing.

        Args:
            input_ids: [B, T], real tokens on the left.
            memories: each layer's memory, with B rows.
            packing: how many tokens of each row are real; None: all.
            write_last: also write the last segment.

        Returns:
            Hidden states after each pass and the final LayerNorm [B, T, D], and each layer's memory.
        """
        batch, num_tokens = input_ids.shape
        num_segments = -(-num_tokens // self.segment_length)
        length = num_tokens if num_segments == 1 else self.segment_length
        missing = num_segments * length - num_tokens
        padded = F.pad(input_ids, (0, missing)) if missing else input_ids
        hidden = self.embed_in(padded)
        valid = None
        if packing is not None:
            valid = mark_valid(packing.lengths, num_segments * length)
        elif missing and write_last:
            valid = mark_valid(torch.full((batch,), num_tokens, device=input_ids.device), num_segments * length)
        segments = Segments(
            valid=None if valid is None else valid.view(batch, num_segments, length),
            write_last=write_last,
            token_rows=self.find_token_rows(padded.view(batch, num_segments, length)),
        )
        passes, memories = self.run_passes(hidden.view(batch, num_segments, length, -1), memories, segments)
        return [self.normalize_last(hidden.flatten(1, 2)[:, :num_tokens]) for hidden in passes], memories

    def run_passes(
        self, hidden: Tensor, memories: LayerMemories, segments: Segments
    ) -> tuple[list[Tensor], LayerMemories]:
        """Hidden states after each pass, [B, n, S, D], and each layer's memory after the last. Here there is one."""
        hidden, memories = self.run_layers(hidden, memories, segments)
        return [hidden], memories

    def run_layers(self, hidden: Tensor, memories: LayerMemories, segments: Segments) -> tuple[Tensor, LayerMemories]:
        """One pass through all layers, [B, n, S, D] to the same, and each layer's memory after it."""
        new_memories: LayerMemories = []
        checkpoints = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer, memory in zip(self.layer_list, memories, strict=True):
            if layer.follows_final_norm:
                hidden = self.final_layer_norm(hidden)
            if checkpoints:
                hidden, new_memory = checkpoint(
                    layer, hidden, memory, segments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden, new_memory = layer(hidden, memory, segments)
            new_memories.append(new_memory)
        return hidden, new_memories

    def find_token_rows(self, input_ids: Tensor) -> Tensor | None:
        """The head's row of each token, [..., D], for a layer before the head; None: there is none."""
        return F.embedding(input_ids, self.embed_out.weight) if self.layer_list[-1].follows_final_norm else None

    def normalize_last(self, hidden: Tensor) -> Tensor:
        """What the head reads, from what comes out of the last layer."""
        return hidden if self.layer_list[-1].follows_final_norm else self.final_layer_norm(hidden)

    @property
    def num_passes(self) -> int:
        """Passes through the layers that a call runs; a selective model has more than one."""
        return 1

    def begin_pass(self, hidden: Tensor) -> Tensor:
        """What the next pass begins from, given the hidden states after the last layer, [..., D]."""
        return hidden

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
    ) -> Tensor:
        """The loss of the token after each position, [B, T] float32 nats; 0 where there is no target.

        Args:
            input_ids: [B, T].
            labels: the tokens themselves, not shifted, [B, T] or [B, T + 1]; see `align_labels`.
            attention_mask: [B, T]; a masked token is no target either.
            update_memory: as in `forward`.
        """
        targets = self._find_targets(input_ids, labels, attention_mask)
        return self._score(self.compute_hidden(input_ids, attention_mask, update_memory=update_memory), targets)

    def total_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        label_weights: Tensor | None = None,
        update_memory: bool = False,
    ) -> Tensor:
        """The sum of `token_losses`, by the way that is the fastest to train with; arguments as there.

        Args:
            input_ids: [B, T].
            labels: [B, T] or [B, T + 1].
            attention_mask: [B, T].
            label_weights: what each label's loss is multiplied by before the sum, as wide as the labels; None: 1.
            update_memory: as in `forward`.

        Raises:
            ValueError: as there, or weights of another shape than the labels.
        """
        targets = self._find_targets(input_ids, labels, attention_mask)
        weights = None
        if label_weights is not None:
            if label_weights.shape != labels.shape:
                raise ValueError(f"label_weights: {list(label_weights.shape)} beside labels {list(labels.shape)}")
            weights = align_labels(label_weights, input_ids.shape[1])
        return self._sum_losses(input_ids, targets, attention_mask, update_memory, weights)

    def compute_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
    ) -> tuple[Tensor, LossStatistics]:
        """The mean loss of all predicted tokens, and what it was measured on; arguments as in `token_losses`.

        Raises:
            ValueError: no token is predicted.
        """
        targets = self._find_targets(input_ids, labels, attention_mask)
        num_tokens = int((targets != IGNORE_INDEX).sum())
        if num_tokens == 0:
            raise ValueError("labels: no token is predicted; at least two real tokens in a row are needed")
        total = self._sum_losses(input_ids, targets, attention_mask, update_memory)
        return total / num_tokens, LossStatistics(
            num_tokens=num_tokens, total_nll=float(total.detach()), passes=self.num_passes
        )

    def _find_targets(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        check_input_ids(input_ids, self.vocab_size)
        check_mask(attention_mask, input_ids)
        targets = align_labels(labels, input_ids.shape[1])
        check_targets(targets, input_ids, self.vocab_size)
        if attention_mask is not None:
            mask = attention_mask.to(torch.bool)
            masked = ~mask | ~F.pad(mask[:, 1:], (0, 1), value=True)  # no loss at a masked token, nor for one
            targets = targets.masked_fill(masked, IGNORE_INDEX)
        return targets

    def _sum_losses(
        self,
        input_ids: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None,
        update_memory: bool,
        weights: Tensor | None = None,
    ) -> Tensor:
        hidden = self.compute_hidden(input_ids, attention_mask, update_memory=update_memory)
        return self._score(hidden, targets, "sum", weights)

    def _score(
        self,
        hidden: Tensor,
        targets: Tensor,
        reduction: Literal["none", "sum"] = "none",
        weights: Tensor | None = None,
    ) -> Tensor:
        """Losses [B, T] of hidden states [B, T, D], or their sum, each multiplied by its weight [B, T]."""
        rows, wanted = hidden.flatten(0, 1), targets.flatten()
        head = self.embed_out
        # A head that is another module (an adapter's, a quantised one) or that has hooks is called as it is.
        if type(head) is nn.Linear and head.bias is None and not head._forward_hooks and not head._forward_pre_hooks:
            label_weights = None if weights is None else weights.flatten()
            losses = linear_cross_entropy(rows, head.weight, wanted, label_weights=label_weights, reduction=reduction)
        else:
            pieces = zip(rows.split(SCORED_ROWS), wanted.split(SCORED_ROWS), strict=True)
            losses = torch.cat([compute_token_losses(head(piece), targets) for piece, targets in pieces])
            losses = losses if weights is None else losses * weights.flatten()
            losses = losses.sum() if reduction == "sum" else losses
        return losses if reduction == "sum" else losses.view_as(targets)

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors) and structure (JSON) to a folder; see `model_file.save_model`."""
        from new_llm.models.model_file import save_model

        save_model(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> "TransformerLM":
        """Make a model again from the folder that `save` wrote; see `model_file.load_model`."""
        from new_llm.models.model_file import load_model

        return load_model(Path(folder))

    @classmethod
    def from_pythia(cls, name_or_directory: str | Path, revision: str | None = None, **options: Any) -> "TransformerLM":
        """Make a model from a GPT-NeoX checkpoint, a directory or a hub name; see `hf.convert.load_pythia`."""
        from new_llm.models.hf.convert import load_pythia

        return load_pythia(name_or_directory, revision, **options)

    def open_stream(self, batch_size: int = 1) -> MemoryStream:
        """Begin to read token by token, in pieces of any size, from the held memory; see `MemoryStream`."""
        return MemoryStream(self, batch_size)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, GenerationStatistics]:
        """Go on with each row's text: `model.generate(input_ids, max_new_tokens=50)`; see `generation.generate`."""
        return generate(self, input_ids, attention_mask, **options)

    # Facts

    def untie_embeddings(self) -> None:
        """Give the head a weight of its own, equal to the embedding's; nothing where it has one."""
        if self.tie_word_embeddings:
            self.embed_out.weight = nn.Parameter(self.embed_in.weight.detach().clone())
            self.tie_word_embeddings = False

    def num_parameters(self) -> dict[str, Any]:
        """`total`, `embedding`, `lm_head` (0 where it is the embedding), `transformer` (layers and final LayerNorm) and
        `per_layer` (a list).
        """
        per_layer = [count_parameters(layer) for layer in self.layers]
        embedding = count_parameters(self.embed_in)
        head = 0 if self.tie_word_embeddings else count_parameters(self.embed_out)
        total = count_parameters(self)
        return {
            "total": total,
            "embedding": embedding,
            "lm_head": head,
            "transformer": total - embedding - head,
            "per_layer": per_layer,
        }

    def gate_values(self) -> dict[str, list[float]]:
        """g of each memory layer's heads, by the layer's name in the state dict."""
        return {f"layers.{index}": layer.gate_values() for index, layer in self.memory_layers.items()}

    def get_alpha(self) -> float | dict[int, float]:
        """α of the parallel adapter; of several, {layer index: α}.

        Raises:
            ValueError: no layer has one.
        """
        alphas = self.alpha_values()
        if not alphas:
            raise ValueError("get_alpha: this model has no parallel adapter (create_pythia_with_parallel_infini)")
        return next(iter(alphas.values())) if len(alphas) == 1 else alphas

    def alpha_values(self) -> dict[int, float]:
        """α of each parallel adapter by its layer's index; empty where there is none."""
        layers = self.memory_layers.items()
        return {index: float(layer.alpha.detach()) for index, layer in layers if isinstance(layer, ParallelInfiniLayer)}


def count_parameters(module: nn.Module) -> int:
    """Numbers in a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
