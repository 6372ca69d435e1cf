"""The language model: an embedding, any list of layers, a head, and the memory that it holds."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from new_llm.config import PythiaConfig
from new_llm.config.model import MAX_LAYERS
from new_llm.config.sections import section, short
from new_llm.models.generation import GenerationStatistics, generate
from new_llm.models.held_memory import HeldMemory, LayerMemories
from new_llm.models.inputs import (
    IGNORE_INDEX,
    LossStatistics,
    Packing,
    align_labels,
    check_input_ids,
    check_mask,
    check_targets,
    compute_token_losses,
    mark_valid,
    plan_packing,
)
from new_llm.models.layers import Layer, ReadTokens, Segments
from new_llm.models.layers.base import initialize_weights
from new_llm.models.ops.head_loss import linear_cross_entropy
from new_llm.models.stream import MemoryStream

SCORED_ROWS = 2048
"""Rows of logits that a head which is not a plain matrix computes at once; more would only cost memory."""


@section
class DepthOptions:
    """How many times the stack of layers runs, or how many times as deep the model is."""

    skip_interval: Annotated[int, Field(ge=0, le=MAX_LAYERS), short("--skip-interval")] = 1
    """Number of extra passes of a selective model; deep_pythia has as many layers as that model runs in all passes."""


@section
class SelectiveOptions(DepthOptions):
    """The options of selective output: extra passes over the hidden states before a token is predicted."""

    earlier_pass_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """γ: weight of each pass in the training loss relative to the next pass; 0: only the last pass counts, 1: all count
    equally."""
    projection_init: Annotated[Literal["normal", "identity"], short("--projection-init")] = "normal"
    """Initial projection between passes: random like other weights, or the identity, so that each pass starts from the
    previous one's output."""
    add_embedding: Annotated[bool, short("--add-embedding")] = False
    """Add the token embeddings to the input of each further pass."""


class TransformerLM(HeldMemory):
    """A causal language model of any mix of Pythia and memory layers.

    A call's tokens are cut into segments of `segment_length` from the call's start. Every layer works within the
    segment; memory is the only path from one segment to the next. One call of n segments gives the same logits as n
    calls of one segment with the memory carried.

    With `skip_interval`, the stack runs several times: h₁ = Layers(embed(x)), h_{p+1} = Layers(W h_p + b), or with
    `add_embedding` Layers(W h_p + b + embed(x)). The head reads the last pass. Every pass is causal and parallel over
    positions. All passes read the memory from before the segment; only the last one writes it. Training, evaluation
    and generation run the same passes.

    Args:
        layers: the layers, all of the same hidden size; their weights are drawn again.
        vocab_size: Z, the number of rows of the embedding and the head.
        segment_length: S, the number of tokens in a segment.
        layer_norm_eps: ε of the final LayerNorm.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: whether the head uses the embedding's weight.
        selective: fields of `SelectiveOptions`; without `skip_interval` there is a single pass.

    Raises:
        ValueError: there are no layers, their hidden sizes differ, a layer that stands before the head is followed by
            one that does not, or a length or another setting is out of range.
    """

    gradient_checkpointing = False
    """In training, keep only each layer's input and recompute the layer in backward."""

    def __init__(
        self,
        layers: Sequence[Layer],
        vocab_size: int = PythiaConfig.vocab_size,
        segment_length: int = PythiaConfig.max_position_embeddings,
        *,
        layer_norm_eps: float = PythiaConfig.layer_norm_eps,
        initializer_range: float = PythiaConfig.initializer_range,
        tie_word_embeddings: bool = PythiaConfig.tie_word_embeddings,
        **selective: Any,
    ) -> None:
        super().__init__()
        chosen: dict[str, Any] = {"skip_interval": 0} | selective
        self.selective = SelectiveOptions(**chosen)
        if not layers:
            raise ValueError("layers: at least one layer is needed")
        sizes = sorted({layer.hidden_size for layer in layers})
        if len(sizes) > 1:
            raise ValueError(f"layers: hidden sizes {sizes} differ; all layers need the same")
        for name, value in (("vocab_size", vocab_size), ("segment_length", segment_length)):
            if value < 1:
                raise ValueError(f"{name}: {value} is not positive")
        self.vocab_size, self.segment_length = vocab_size, segment_length
        self.skip_interval = self.selective.skip_interval
        self.initializer_range = initializer_range
        self.embed_in = nn.Embedding(vocab_size, sizes[0])
        self.layers = nn.ModuleList(layers)
        check_order(self.layer_list)
        self.final_layer_norm = nn.LayerNorm(sizes[0], eps=layer_norm_eps)
        self.embed_out = nn.Linear(sizes[0], vocab_size, bias=False)
        initialize_weights(self, initializer_range)
        self.register_state_dict_post_hook(_leave_out_tied_head)
        self.register_load_state_dict_pre_hook(_add_tied_head)
        if tie_word_embeddings:
            self.tie_embeddings()
        self.pass_projection = None
        if self.skip_interval:  # drawn last, so that all other weights equal those of a plain model of the same seed
            self.pass_projection = nn.Linear(sizes[0], sizes[0])
            if self.selective.projection_init == "identity":
                nn.init.eye_(self.pass_projection.weight)
            else:
                nn.init.normal_(self.pass_projection.weight, std=initializer_range)
            nn.init.zeros_(self.pass_projection.bias)
        self.reset_memory()

    # Calls

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, update_memory: bool = False
    ) -> Tensor:
        """The logits at every position, [B, T, Z].

        Args:
            input_ids: token ids, [B, T]; T may span any number of segments.
            attention_mask: [B, T], 1 or True at real tokens. Other tokens are neither read nor written, take no
                position in a segment, and get meaningless logits. For a model on a GPU, pass a CPU tensor, which can be
                read without synchronising.
            update_memory: keep what the call wrote; otherwise the held memory stays bit for bit as it was.

        Raises:
            ValueError: ids have another shape or are outside the vocabulary, or the batch size differs from the number
                of rows in the held memory.
        """
        return self.embed_out(self.compute_hidden(input_ids, attention_mask, update_memory=update_memory))

    def compute_hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
        use_selective: bool = True,
    ) -> Tensor:
        """The head's input, [B, T, D]; arguments as in `compute_passes`."""
        passes = self.compute_passes(
            input_ids, attention_mask, update_memory=update_memory, use_selective=use_selective
        )
        return passes[-1]

    def compute_passes(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
        use_selective: bool = True,
    ) -> list[Tensor]:
        """The head's input after each pass through the layers, [B, T, D] each.

        Arguments as in `forward`; with `use_selective` False there is a single pass, with the same weights.
        """
        check_input_ids(input_ids, self.vocab_size)
        memories, start = self._begin_call(input_ids.shape[0], input_ids.device)
        packing = plan_packing(attention_mask, input_ids)
        packed = input_ids if packing is None else packing.pack(input_ids)
        num_passes = self.count_passes(use_selective)
        if self.training:
            self._take_auxiliary_losses()  # of a call whose loss was not asked for, or of one that backward ran again
        passes, memories = self.run_segments(packed, memories, packing, write_last=update_memory, num_passes=num_passes)
        if update_memory:
            self._hold(memories, start)
        return passes if packing is None else [packing.unpack(hidden) for hidden in passes]

    def run_segments(
        self,
        input_ids: Tensor,
        memories: LayerMemories,
        packing: Packing | None = None,
        *,
        write_last: bool,
        num_passes: int = 1,
    ) -> tuple[list[Tensor], LayerMemories]:
        """The functional core: maps tokens and memories to hidden states and new memories, without side effects.

        Args:
            input_ids: [B, T]; each row's real tokens come first.
            memories: each layer's memory, with B rows.
            packing: the number of real tokens in each row; None: no padding.
            write_last: whether to write the last segment to memory too.
            num_passes: number of passes through the layers.

        Returns:
            The head's input after each pass, [B, T, D] each, and each layer's new memory.
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
        shape, tokens = (batch, num_segments, length), None
        if any(layer.reads_tokens for layer in self.layer_list):
            tokens = ReadTokens(padded.view(shape), self.read_head_weight())
        segments = Segments(None if valid is None else valid.view(shape), write_last, tokens)
        passes, memories = self._run_passes(hidden.view(*shape, -1), memories, segments, num_passes)
        return [hidden.flatten(1, 2)[:, :num_tokens].contiguous() for hidden in passes], memories

    def _run_passes(
        self, hidden: Tensor, memories: LayerMemories, segments: Segments, num_passes: int
    ) -> tuple[list[Tensor], LayerMemories]:
        """The hidden states after each pass, [B, n, S, D], and each layer's memory after the last.

        With several passes and memory, a segment's first pass needs what the previous segment's last pass wrote, so
        segments run one after another. Otherwise all segments go through the layers in one call.
        """
        num_segments = hidden.shape[1]
        if num_passes > 1 and num_segments > 1 and self.memory_layers:
            parts: list[list[Tensor]] = []
            losses: dict[Layer, Tensor] = {}
            for index, part in enumerate(hidden.split(1, dim=1)):
                one = segments.select(index, num_segments)
                passes, memories = self._run_passes(part, memories, one, num_passes)
                parts.append(passes)
                for holder, loss in self._take_auxiliary_losses().items() if self.training else ():
                    losses[holder] = losses.get(holder, 0) + loss / num_segments
            for holder, loss in losses.items():
                holder.auxiliary_loss = loss
            return [torch.cat(same_pass, dim=1) for same_pass in zip(*parts, strict=True)], memories
        passes, written, embedded = [], memories, hidden
        for number in range(num_passes):
            is_last = number + 1 == num_passes
            written = list(memories)
            reading = segments if is_last else Segments(segments.valid, write_last=False, tokens=segments.tokens)

            def run(
                index: int, layer: Layer, entering: Tensor, written: Any = written, reading: Any = reading
            ) -> Tensor:
                if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                    kept: Any = checkpoint(layer, entering, memories[index], reading, use_reentrant=False)
                    entering, written[index] = kept
                else:
                    entering, written[index] = layer(entering, memories[index], reading)
                return entering

            hidden = self.run_layers(self.begin_pass(hidden, embedded) if number else hidden, run)
            passes.append(self.finish_pass(hidden))
        return passes, written

    def run_layers(self, hidden: Tensor, run: Callable[[int, Layer, Tensor], Tensor]) -> Tensor:
        """Pass hidden states through all layers, with the final LayerNorm ahead of those that stand before the head.

        Args:
            hidden: [..., D].
            run: runs one layer: takes its index, the layer and its input, and returns its output.
        """
        first = self.first_before_head
        for index, layer in enumerate(self.layer_list):
            hidden = run(index, layer, self.final_layer_norm(hidden) if index == first else hidden)
        return hidden

    @property
    def first_before_head(self) -> int | None:
        """Index of the first layer between the final LayerNorm and the head; None: there is none."""
        return next((index for index, layer in enumerate(self.layer_list) if layer.stands_before_head), None)

    def read_head_weight(self) -> Tensor:
        """The head's weight as a matrix [Z, D], even if the head is wrapped by an adapter, quantised or hooked.

        Such a head is applied to the D unit vectors instead; gradients flow through that call.
        """
        head = self.embed_out
        if is_plain_linear(head):
            return head.weight
        like = self.final_layer_norm.weight
        units = torch.eye(like.shape[0], dtype=like.dtype, device=like.device)
        return (head(units) - head(torch.zeros_like(units[:1]))).t()

    def begin_pass(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """The next pass's input, from the last layer's output and the embedding, [..., D] each."""
        entering = hidden if self.pass_projection is None else self.pass_projection(hidden)
        return entering + embedded if self.selective.add_embedding else entering

    def finish_pass(self, hidden: Tensor) -> Tensor:
        """The head's input, from the last layer's output."""
        return self.final_layer_norm(hidden) if self.first_before_head is None else hidden

    def count_passes(self, use_selective: bool = True) -> int:
        """Number of passes through the layers: 1 + skip_interval, or 1 with `use_selective` False."""
        return 1 + self.skip_interval if use_selective else 1

    # Losses

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
        use_selective: bool = True,
    ) -> Tensor:
        """The loss at each position, of predicting the token that follows, in nats, [B, T]; 0 where there is no target.

        In training, the losses of several passes are weighted by `earlier_pass_weight`.

        Args:
            input_ids: [B, T].
            labels: the tokens themselves, not shifted, [B, T] or [B, T + 1]; see `align_labels`.
            attention_mask: [B, T]; masked tokens are not targets either.
            update_memory: as in `forward`.
            use_selective: False: a single pass, with the same weights.
        """
        targets = self.find_targets(input_ids, labels, attention_mask)
        passes = self.compute_passes(
            input_ids, attention_mask, update_memory=update_memory, use_selective=use_selective
        )
        return self.score_passes(passes, targets)

    def total_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        label_weights: Tensor | None = None,
        update_memory: bool = False,
    ) -> Tensor:
        """The training objective: the sum of `token_losses`, plus the auxiliary losses times the number of targets.

        Args:
            input_ids: [B, T].
            labels: [B, T] or [B, T + 1].
            attention_mask: [B, T].
            label_weights: weight of each label's loss, in the labels' shape; None: 1.
            update_memory: as in `forward`.

        Raises:
            ValueError: `label_weights` and `labels` differ in shape, or as in `token_losses`.
        """
        targets = self.find_targets(input_ids, labels, attention_mask)
        weights = None
        if label_weights is not None:
            if label_weights.shape != labels.shape:
                raise ValueError(f"label_weights: shape {list(label_weights.shape)}, but labels {list(labels.shape)}")
            weights = align_labels(label_weights, input_ids.shape[1])
        passes = self.compute_passes(input_ids, attention_mask, update_memory=update_memory)
        return self.add_auxiliary_loss(self.score_passes(passes, targets, "sum", weights), targets)

    def compute_loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        update_memory: bool = False,
        use_selective: bool = True,
    ) -> tuple[Tensor, LossStatistics]:
        """The mean loss over all predicted tokens, and its statistics; arguments as in `token_losses`.

        In training, the layers' auxiliary losses are added to the loss, but not to the statistics. Raises ValueError if
        there is no token to predict.
        """
        targets = self.find_targets(input_ids, labels, attention_mask)
        num_tokens = int((targets != IGNORE_INDEX).sum())
        if num_tokens == 0:
            raise ValueError("labels: no token to predict; at least two real tokens in a row are needed")
        passes = self.compute_passes(
            input_ids, attention_mask, update_memory=update_memory, use_selective=use_selective
        )
        total = self.score_passes(passes, targets, "sum")
        statistics = LossStatistics(num_tokens, float(total.detach()), len(passes))
        return self.add_auxiliary_loss(total, targets) / num_tokens, statistics

    def find_targets(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The target of each position, [B, T]; -100 if there is none, or the position or its target is masked."""
        check_input_ids(input_ids, self.vocab_size)
        check_mask(attention_mask, input_ids)
        targets = align_labels(labels, input_ids.shape[1])
        check_targets(targets, input_ids, self.vocab_size)
        if attention_mask is not None:
            mask = attention_mask.to(targets.device, torch.bool, non_blocking=True)
            masked = ~mask | ~F.pad(mask[:, 1:], (0, 1), value=True)  # masked tokens neither predict nor are targets
            targets = targets.masked_fill(masked, IGNORE_INDEX)
        return targets

    def score_passes(
        self,
        passes: list[Tensor],
        targets: Tensor,
        reduction: Literal["none", "sum"] = "none",
        weights: Tensor | None = None,
    ) -> Tensor:
        """The losses [B, T], or their sum, averaged over P passes: Σ_p γ^(P − p) ℓ_p / Σ_p γ^(P − p).

        Outside training, and with γ = 0, only the last pass counts.

        Args:
            passes: from `compute_passes`, [B, T, D] each.
            targets: from `find_targets`.
            reduction: "sum" needs less memory and time.
            weights: weight of each position's loss, [B, T]; None: 1.
        """
        gamma = self.selective.earlier_pass_weight
        if len(passes) == 1 or not self.training or not gamma:
            return self._score(passes[-1], targets, reduction, weights)
        shares = [gamma ** (len(passes) - 1 - number) for number in range(len(passes))]
        losses = [self._score(hidden, targets, reduction, weights) for hidden in passes]
        return torch.stack([share / sum(shares) * loss for share, loss in zip(shares, losses, strict=True)]).sum(0)

    def add_auxiliary_loss(self, total: Tensor, targets: Tensor) -> Tensor:
        """In training, add the last call's auxiliary losses, times the number of targets, to `total`; clears them."""
        found = list(self._take_auxiliary_losses().values())
        if not self.training or not found:
            return total
        return total + torch.stack(found).sum() * (targets != IGNORE_INDEX).sum()

    def _take_auxiliary_losses(self) -> dict[Layer, Tensor]:
        """The auxiliary losses that layers and attentions hold, which hold none afterwards."""
        holders = [part for part in self.layers.modules() if isinstance(part, Layer)]
        found = {part: part.auxiliary_loss for part in holders if part.auxiliary_loss is not None}
        for part in found:
            part.auxiliary_loss = None
        return found

    def _score(
        self, hidden: Tensor, targets: Tensor, reduction: Literal["none", "sum"], weights: Tensor | None
    ) -> Tensor:
        """Weighted losses [B, T] of hidden states [B, T, D], or their sum."""
        rows, wanted, head = hidden.flatten(0, 1), targets.flatten(), self.embed_out
        weights = None if weights is None else weights.flatten()
        # A wrapped, quantised or hooked head must be called: its weight alone would not give its output.
        if is_plain_linear(head):
            losses = linear_cross_entropy(rows, head.weight, wanted, label_weights=weights, reduction=reduction)
        else:
            pieces = zip(rows.split(SCORED_ROWS), wanted.split(SCORED_ROWS), strict=True)
            losses = torch.cat([compute_token_losses(head(piece), targets) for piece, targets in pieces])
            losses = losses if weights is None else losses * weights
            losses = losses.sum() if reduction == "sum" else losses
        return losses if reduction == "sum" else losses.view_as(targets)

    # Streams and generation

    def open_stream(self, batch_size: int = 1, *, use_selective: bool = True) -> MemoryStream:
        """Open a stream that reads text in pieces of any size, starting from the held memory; see `MemoryStream`."""
        return MemoryStream(self, batch_size, use_selective=use_selective)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, GenerationStatistics]:
        """Continue each row's text: `model.generate(input_ids, max_new_tokens=50)`; see `generation.generate`."""
        return generate(self, input_ids, attention_mask, **options)

    # Facts

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether head and embedding share one parameter; a state dict then holds it once, as the embedding.

        Source: Using the Output Embedding to Improve Language Models, arXiv:1608.05859.
        """
        head = getattr(self.embed_out, "weight", None)
        return head is not None and head is getattr(self.embed_in, "weight", None)

    def tie_embeddings(self) -> None:
        """Make the head use the embedding's weight."""
        self.embed_out.weight = self.embed_in.weight
        self.embed_out.out_features = self.embed_in.num_embeddings

    def untie_embeddings(self) -> None:
        """Give a tied head its own weight, a copy of the embedding's."""
        if self.tie_word_embeddings:
            weight = self.embed_in.weight
            self.embed_out.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)

    def __setattr__(self, name: str, value: Any) -> None:
        # A wrapper around one of the two, such as a LoRA layer, must not change the other one when it is merged.
        if name in ("embed_in", "embed_out") and name in self._modules and type(value) not in (nn.Linear, nn.Embedding):
            self.untie_embeddings()
        super().__setattr__(name, value)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """See `nn.Module.load_state_dict`; tied weights stay tied even with `assign`."""
        is_tied = self.tie_word_embeddings
        found = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if is_tied:
            self.tie_embeddings()
        return found

    def num_parameters(self) -> dict[str, Any]:
        """Counts: `total`, `embedding`, `lm_head` (0 if tied), `transformer` (the rest) and `per_layer` (a list)."""

        def count(module: nn.Module) -> int:
            return sum(parameter.numel() for parameter in module.parameters())

        total, embedding = count(self), count(self.embed_in)
        head = 0 if self.tie_word_embeddings else count(self.embed_out)
        parts = {"total": total, "embedding": embedding, "lm_head": head, "transformer": total - embedding - head}
        return parts | {"per_layer": [count(layer) for layer in self.layers]}

    def gate_values(self) -> dict[str, list[float]]:
        """`Layer.gate_values` of each memory layer that has gates, by the layer's name in the state dict."""
        found = {f"layers.{index}": layer.gate_values() for index, layer in self.memory_layers.items()}
        return {name: values for name, values in found.items() if values}

    def get_alpha(self) -> float | dict[int, float]:
        """α of the parallel adapter, or {layer index: α} if there are several. Raises ValueError if there is none."""
        alphas = self.alpha_values()
        if not alphas:
            raise ValueError("get_alpha: this model has no parallel adapter (create_pythia_with_parallel_infini)")
        return next(iter(alphas.values())) if len(alphas) == 1 else alphas

    def alpha_values(self) -> dict[int, float]:
        """α of each parallel adapter, by layer index; empty if there is none."""
        alphas = {index: getattr(layer, "alpha", None) for index, layer in self.memory_layers.items()}
        return {index: float(a.detach()) for index, a in alphas.items() if isinstance(a, nn.Parameter) and a.dim() == 0}


class SelectiveOutputLM(TransformerLM):
    """A `TransformerLM` with one extra pass by default."""

    def __init__(self, layers: Sequence[Layer], *arguments: Any, skip_interval: int = 1, **options: Any) -> None:
        super().__init__(layers, *arguments, skip_interval=skip_interval, **options)


def check_order(layers: Sequence[Layer]) -> None:
    """Raise ValueError if a layer that stands before the head is followed by one that does not."""
    for index, (layer, following) in enumerate(itertools.pairwise(layers)):
        if layer.stands_before_head and not following.stands_before_head:
            raise ValueError(f"layers: {layer.kind} stands before the head and must be among the last, not at {index}")


def is_plain_linear(head: nn.Module) -> bool:
    """Whether a head only computes x Wᵀ."""
    forward: Any = vars(head).get("forward")  # `decoding` replaces it by a faster product with the same weight
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and (forward is None or getattr(forward, "multiplies_weight", False))
    )


def _leave_out_tied_head(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    if module.tie_word_embeddings:
        state.pop(f"{prefix}embed_out.weight", None)


def _add_tied_head(module: Any, state: dict[str, Any], prefix: str, *others: Any) -> None:
    embedding = state.get(f"{prefix}embed_in.weight")
    if module.tie_word_embeddings and embedding is not None:
        state.setdefault(f"{prefix}embed_out.weight", embedding)
