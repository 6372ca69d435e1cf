"""Checks of the model: its weights, losses and logits, and its memory between calls."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from new_llm import testing
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.tokenizer import count_ids
from new_llm.evaluation.doctor.registry import (
    NUM_ROWS,
    PROBE_SEED,
    Examination,
    Finding,
    fault,
    find_difference,
    ok,
    register_check,
    skip,
    warn,
)
from new_llm.evaluation.language_models import has_memory
from new_llm.evaluation.memory_usage import watch_token_gates
from new_llm.evaluation.perplexity import evaluate_sliding_window, evaluate_streaming
from new_llm.evaluation.reversal import evaluate_reversal_curse
from new_llm.evaluation.scoring import Reading, select_documents
from new_llm.models import TransformerLM
from new_llm.models.inputs import IGNORE_INDEX
from new_llm.models.layers import CompressiveAttention

CONTEXT = 1024  # tokens per window in check_skill
LOSS_MARGIN = 0.02  # nats by which autocast may change the mean loss
SHIFT_MARGIN = 0.05  # nats by which the losses of two label shifts must differ to count
SHIFT_WINDOW = 256
MAX_LOGITS = 1 << 24
"""The most logits to hold at once."""
MAX_COUNTED = 1 << 24
"""The most training tokens to count token frequencies from."""
SHIFT_MEANINGS = {
    -1: "it predicts the token before the one it reads",
    0: "it predicts the token it reads: labels were not shifted in training",
    2: "it predicts the token after the next: labels were shifted twice in training, by the data and by the loss",
    3: "labels were shifted three times in training",
}
NUM_PAIRS = 2
NUM_NEW_TOKENS = 12
GATE_MARGIN = 0.16
"""A gate sigmoid(β) has not moved if its β has changed by less than this, e.g. from 0.5 to within 0.46–0.54, or from
0.88 to within 0.86–0.90."""
ALPHA_MARGIN = 1e-3  # an adapter whose |α| is below this adds nothing
SCALE_TOLERANCE = 1e-3  # the relative change allowed in M / z
SEGMENTS_PER_CALL = 8
PATH_FAULTS = ("weights", "modes", "evaluation", "memory", "causality", "rows")
"""With any of these faults the parallel path is not a valid reference for streams and generation."""


@register_check("weights")
def check_weights(exam: Examination) -> Finding:
    """Weights that are NaN or infinite, or a tokenizer with more tokens than the model has embeddings."""
    broken = [name for name, value in exam.model.named_parameters() if not bool(torch.isfinite(value).all())]
    count = sum(value.numel() for value in exam.model.parameters())
    largest = count_ids(exam.subject.tokenizer) - 1
    rows = exam.model.vocab_size
    if broken:
        return fault(
            f"weights not finite ({len(broken)}), first {broken[0]}: training diverged or the file is damaged",
            "use an earlier checkpoint, or train with a lower learning rate",
        )
    if largest >= rows:
        return fault(
            f"the tokenizer has ids up to {largest}, the model only {rows} embeddings: they don't belong together",
            "use the tokenizer that the model was trained with",
        )
    return ok(f"{count:,} finite parameters; {rows:,} embeddings for token ids up to {largest:,}")


@register_check("modes", after=("weights",))
def check_modes(exam: Examination) -> Finding:
    """Random evaluation, or a training mode or autocast that computes something other than evaluation."""
    ids = exam.take_segments()

    def read(*, training: bool, seed: int) -> Tensor:
        with exam.probing(segment_tokens=exam.config.segment_tokens, training=training):
            return exam.read(ids, seed=seed)

    def mean_loss(logits: Tensor) -> float:
        return float(-logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean())

    first = read(training=False, seed=0)
    repeated = find_difference(read(training=False, seed=1), first)
    trained = max(find_difference(read(training=True, seed=seed), first) for seed in (0, 1))
    with exam.subject.autocast():
        cast = abs(mean_loss(read(training=False, seed=0)) - mean_loss(first))
    if repeated > exam.allowed(first):
        return fault(
            f"logits differ by {repeated:.2g} when the same text is read again: evaluation is random",
            "look for dropout that ignores self.training",
        )
    if trained > exam.allowed(first):
        has_dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in exam.model.modules())
        judge = warn if has_dropout and not exam.own_model else fault
        return judge(
            f"training mode changes logits by {trained:.2g}: evaluation does not measure the model that is trained",
            "don't compare training with validation losses" if has_dropout else "use the same forward pass for both",
        )
    if cast > LOSS_MARGIN:
        return warn(
            f"autocast changes the mean loss by {cast:.2g} nats: losses with and without it can't be compared",
            "measure in the precision the model was trained in",
        )
    return ok("logits are the same when read again and in training mode; autocast does not change the loss")


@register_check("labels", after=("weights",))
def check_labels(exam: Examination) -> Finding:
    """A loss that differs from the next token's loss, recomputed from the logits."""
    ids = exam.take_rows(NUM_ROWS, exam.config.segment_tokens + 2)
    ids = ids[:, : min(ids.shape[1], exam.model.segment_length + 1)]
    with exam.probing():
        logits = exam.read(ids[:, :-1])
        expected = -logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # [B, T]
        last_open, one_ignored, masked = expected.clone(), expected.clone(), ids.clone()
        last_open[:, -1] = 0  # labels of the same length give the last position no target
        one_ignored[:, 1], masked[:, 2] = 0, IGNORE_INDEX
        differences: dict[str, float] = {}
        for name, labels, wanted in (
            ("labels equal to the input", ids[:, :-1], last_open),
            ("labels with one more token", ids, expected),
            ("an ignored label", masked, one_ignored),
        ):
            with exam.model.fresh_memory():
                torch.manual_seed(PROBE_SEED)
                differences[name] = find_difference(exam.model.token_losses(ids[:, :-1], labels), wanted)
    worst = max(differences, key=lambda name: differences[name])
    if differences[worst] <= exam.allowed(logits, is_rounded=True):
        return ok(f"losses match the next token's, to {differences[worst]:.2g} nats")
    return fault(
        f"losses differ by {differences[worst]:.2g} nats from the next token's ({worst}): "
        "every perplexity of this model is wrong",
        "pass the tokens themselves as labels; only the model's loss may shift them",
    )


@register_check("shift", after=("weights", "labels"))
def check_shift(exam: Examination) -> Finding:
    """Training on wrongly shifted labels: some token other than the next is predicted best."""
    losses = _measure_shifts(exam)
    means = {shift: float(values.mean()) for shift, values in losses.items()}
    best, second = sorted(means, key=lambda shift: means[shift])[:2]
    lead = losses[1] - losses[second if best == 1 else best]
    error = float(lead.std() / np.sqrt(len(lead))) if len(lead) > 1 else 0.0
    is_clear = abs(float(lead.mean())) > max(SHIFT_MARGIN, 3 * error)
    found = "loss at shift " + ", ".join(f"{shift}: {value:.2f}" for shift, value in means.items())
    if best == 1 and is_clear:
        return ok(f"the next token is predicted best; {found}")
    # An untrained model with tied embeddings prefers the token it reads; that alone is not a fault.
    known = _score_frequencies(exam, exam.tokens.cpu().numpy()) if best == 0 else math.log(exam.model.vocab_size)
    if is_clear and means[best] < known:
        return fault(f"{SHIFT_MEANINGS[best]} ({found})", "train again; only the loss may shift the labels")
    return warn(
        f"the next token is predicted no better than its neighbours: the model is hardly trained ({found})",
        "train it longer, or check that the trained weights were loaded",
    )


def _measure_shifts(exam: Examination) -> dict[int, NDArray[np.float64]]:
    """Measure −log p of the token `shift` places after the last one read, at the same positions for every shift."""
    shifts = (*SHIFT_MEANINGS, 1)
    before, after = -min(shifts), max(shifts)
    width = max(before + after + 1, min(SHIFT_WINDOW, exam.model.segment_length))
    tokens = exam.tokens[: exam.config.max_tokens]
    windows = tokens[: len(tokens) // width * width].view(-1, width)
    positions = torch.arange(before, width - after, device=tokens.device)
    found: dict[int, list[NDArray[np.float64]]] = {shift: [] for shift in sorted(shifts)}
    with exam.probing(), exam.subject.autocast():
        for rows in windows.split(max(1, MAX_LOGITS // (width * exam.model.vocab_size))):
            log_shares = exam.read(rows).log_softmax(-1)[:, positions]
            for shift, values in found.items():
                losses = -log_shares.gather(-1, rows[:, positions + shift, None])
                values.append(losses.double().flatten().cpu().numpy())
    return {shift: np.concatenate(values) for shift, values in found.items()}


@register_check("skill", after=("weights", "labels", "shift"))
def check_skill(exam: Examination) -> Finding:
    """Predictions no better than token frequencies, on the same tokens."""
    config = exam.config
    scored = np.concatenate([tokens[1:] for tokens in select_documents(exam.subject.split, config.max_tokens).tokens])
    context = CONTEXT if exam.own_model else max(2, min(CONTEXT, exam.model.segment_length))
    reading: Reading = {**exam.subject.reading, "max_tokens": config.max_tokens, "on_progress": None}
    result = evaluate_sliding_window(exam.model, exam.subject.split, context=context, stride=context, **reading)
    unigram = math.exp(_score_frequencies(exam, scored))
    whose = "the training text" if exam.subject.training else "this text"
    found = f"perplexity {result.perplexity:,.1f}; token frequencies of {whose} alone give {unigram:,.1f}"
    if result.perplexity < unigram:
        return ok(found)
    is_guess = result.perplexity >= exam.model.vocab_size / 2
    return warn(
        f"{found}: " + ("these weights are not trained" if is_guess else "it has learned no more than frequencies"),
        f"{'check that the trained weights were loaded, or ' if is_guess else ''}train for more epochs, with a higher "
        "learning rate, or on text like this",
    )


def _score_frequencies(exam: Examination, tokens: NDArray[np.integer]) -> float:
    """Return the mean −log p, in nats, of tokens under the frequencies of the training text (or the examined text).

    Frequencies are add-one smoothed. Those of the scored tokens themselves would be unfair, as no predictor knows them.
    """
    known = exam.subject.training.train if exam.subject.training else exam.subject.split
    counts = np.bincount(known.tokens[:MAX_COUNTED].astype(np.int64), minlength=exam.model.vocab_size) + 1
    return float(np.log(counts.sum()) - np.log(counts[tokens]).mean())


@register_check("evaluation", after=("weights",))
def check_evaluation(exam: Examination) -> Finding:
    """Evaluation that writes memory or changes the model's mode."""
    model, own = exam.model, exam.own_model
    ids = exam.take_segments()
    split, reading = exam.subject.split, Reading(batch_size=NUM_ROWS, max_tokens=ids.numel())
    actions: dict[str, Callable[[], Any]] = {
        "token_losses": lambda: model.token_losses(ids, ids),
        "sliding-window perplexity": lambda: evaluate_sliding_window(model, split, context=16, stride=8, **reading),
        "streaming perplexity": lambda: evaluate_streaming(model, split, **reading),
        "the reversal curse": lambda: evaluate_reversal_curse(
            model, exam.subject.tokenizer, get_reversal_pairs()[:NUM_PAIRS], num_resamples=1
        ),
    }
    if own:
        actions |= {
            "a call": lambda: own(ids),
            "compute_loss": lambda: own.compute_loss(ids, ids),
            "generate": lambda: own.generate(ids, max_new_tokens=2),
        }
    for training in (False, True):
        with exam.probing(segment_tokens=exam.config.segment_tokens, training=training):
            list(model.modules())[-1].training = not training  # one module in the other mode, which must be kept
            if own and has_memory(own):
                own.reset_memory(None if own.rows_can_share else len(ids))
                own(ids, update_memory=True)
            held = copy.deepcopy(own.get_memory_state()) if own else {}
            modes = [module.training for module in model.modules()]
            for name, act in actions.items():
                act()
                if own and not _is_same_state(own.get_memory_state(), held):
                    return fault(
                        f"the held memory was changed by {name}: each result depends on what was read before",
                        "write memory only if update_memory=True",
                    )
                if [module.training for module in model.modules()] != modes:
                    return fault(
                        f"the mode was changed by {name}: evaluating during training changes the training",
                        "restore each module's mode after evaluation",
                    )
    kept = "memory and mode" if has_memory(model) else "the mode"
    return ok(f"{len(actions)} ways of reading left {kept} unchanged")


def _is_same_state(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_is_same_state(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


@register_check("memory", after=("weights", "modes"))
def check_memory(exam: Examination) -> Finding:
    """A memory that overflows, miscounts its tokens, or has M and z in different scales.

    One token repeated n times writes M = n σ(k)ᵀv and z = n σ(k), so M / z must not depend on n. With shifted keys, a
    segment's first token is not written, so that n is one less, but the ratio is the same.
    """
    model = exam.own_model
    if model is None or not model.memory_layers:
        return skip("the model has no memory")
    with exam.probing(segment_tokens=exam.config.segment_tokens):
        num_tokens, largest, faults = _fill_memory(exam, model)
        for index, layer in model.memory_layers.items():
            attention = getattr(layer, "attention", None)
            if isinstance(attention, CompressiveAttention) and attention.use_normalizer:
                error = _compare_scales(layer, model.embed_in(exam.tokens[:1]), model.segment_length)
                if not error <= SCALE_TOLERANCE:
                    faults.append(f"layer {index}: M and z are in different scales (M / z changes by {error:.2g})")
    found = f"the memory's norm is {largest:.3g} after {num_tokens:,} tokens"
    if not faults:
        return ok(f"{found}; it is finite, tokens are counted, and M and z are in the same scale")
    return fault(
        f"{'; '.join(faults)}; {found}: values are not read at the scale at which they were written",
        "scale and decay M and z alike, and keep both in float32",
    )


def _fill_memory(exam: Examination, model: TransformerLM) -> tuple[int, float, list[str]]:
    """Read many segments into one memory; return the tokens read, the largest norm of a tensor, and the faults."""
    faults, largest = list[str](), 0.0
    ids = exam.take_rows(1, model.segment_length * exam.config.fill_segments)
    with model.fresh_memory():
        for part in ids.split(model.segment_length * SEGMENTS_PER_CALL, 1):
            model(part, update_memory=True)
        state = model.get_memory_state()
    for index, entry in state.items():
        held = {
            key: value.double()
            for key, value in entry.items()
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
        }
        divides = getattr(getattr(model.memory_layers[index], "attention", None), "use_normalizer", True)
        norms = [value for key, value in held.items() if key.endswith("memory_norms")] if divides else []
        if not all(bool(torch.isfinite(value).all()) for value in held.values()):
            faults.append(f"layer {index}: the memory is not finite")
        elif any(bool((value < 0).any()) for value in norms):
            faults.append(f"layer {index}: z is negative")
        counted = int(entry["token_counts"].sum()) if "token_counts" in entry else ids.numel()
        if counted != ids.numel():
            faults.append(f"layer {index}: counts {counted:,} of {ids.numel():,} tokens")
        largest = max(largest, *(float(value.norm()) for value in held.values()), 0.0)
    return ids.numel(), largest, faults


def _compare_scales(layer: Any, token: Tensor, length: int) -> float:
    """Return the relative change of M / z between one token repeated `length` and 2 · `length` times in a segment."""
    ratios: list[Tensor] = []
    for count in (length, 2 * length):
        _, memory = layer(token.expand(1, 1, count, -1))  # one segment
        memories, norms = memory.memories[:, 0].double(), memory.norms[:, 0].double()  # written by the first segment
        ratios.append(memories / norms.unsqueeze(-1).clamp_min(1e-30))
    return float((ratios[1] - ratios[0]).norm() / ratios[0].norm().clamp_min(1e-30))


@register_check("causality", after=("weights", "modes", "evaluation"))
def check_causality(exam: Examination) -> Finding:
    """Logits that depend on later tokens: within a segment, across segments or through a filled memory."""
    length, native = exam.config.segment_tokens, exam.model.segment_length
    places = [1, length // 2, length - 1, length, length + length // 2, 2 * length]
    check = functools.partial(testing.check_causality, places=places)

    def check_filled(model: Any, ids: Tensor) -> None:
        model.reset_memory(len(ids))
        model(ids, update_memory=True)
        check(model, ids)

    leak = exam.try_out(check, check_filled)
    if not leak and native > length:  # once at the segment length of training
        at_borders = functools.partial(testing.check_causality, places=[native // 2, native])
        leak = exam.try_out(at_borders, ids=exam.take_rows(1, native + length))
    if not leak:
        return ok("changing a token changes its own logits but no earlier ones")
    return fault(
        f"{leak}: the model sees the tokens it should predict, or ignores its input; its perplexity is meaningless",
        "check the layers' masks, and sums, means and norms over time, and that the trained weights were loaded",
    )


@register_check("rows", after=PATH_FAULTS[:-1])
def check_rows(exam: Examination) -> Finding:
    """Rows of a batch that influence one another within a call, through their memories or through padding."""
    if mixed := exam.try_out(testing.check_rows, *([testing.check_padding] if exam.own_model else [])):
        return fault(
            f"{mixed}: unrelated texts mix, and results depend on the other rows of the batch",
            "let each row work on its own copy of the memory, and sum the rows' writes at the end of the call",
        )
    return ok("a row has the same logits and memory alone, in a batch and padded")


@register_check("calls", after=PATH_FAULTS)
def check_calls(exam: Examination) -> Finding:
    """Results that depend on how a text is split into calls or streamed."""
    if exam.own_model is None:
        return skip("the model has no segments")
    if apart := exam.try_out(testing.check_cuts, testing.check_streams):
        return fault(
            f"{apart}: results depend on how the text is split",
            "let memory be the only path between segments, and write it only at a segment's end",
        )
    return ok("calls of one segment and streams give the same logits and memory as one long call")


@register_check("generation", after=(*PATH_FAULTS, "calls"))
def check_generation(exam: Examination) -> Finding:
    """Generation that drops the prompt, the memory or a pass, so that greedy tokens are not the most likely."""
    model = exam.own_model
    if model is None:
        return skip("this model generates through transformers")
    with exam.probing(segment_tokens=exam.config.segment_tokens):
        length = model.segment_length + max(1, model.segment_length // 2)
        prompt = exam.take_rows(NUM_ROWS, length)
        torch.manual_seed(PROBE_SEED)
        made, _ = model.generate(prompt, max_new_tokens=NUM_NEW_TOKENS)
        has_prompt = made.shape[1] > length and torch.equal(made[:, :length], prompt)
        new = made[:, length:] if has_prompt else made[:, -NUM_NEW_TOKENS:]
        logits = exam.read(torch.cat([prompt, new], 1))[:, length - 1 : -1]
        lost = float((logits.amax(-1) - logits.gather(-1, new.unsqueeze(-1)).squeeze(-1)).max())
    if has_prompt and lost <= exam.allowed(logits, is_rounded=True):
        return ok(f"{new.numel()} greedy tokens are the most likely given the whole text, to {lost:.2g}")
    dropped = "" if has_prompt else "the prompt is not returned; "
    return fault(
        f"{dropped}logits of greedy tokens are up to {lost:.2g} below the highest given the whole text: generation "
        "does not use the trained model",
        "let generation read the whole prompt with the forward pass of training",
    )


@register_check("gates", after=("weights",))
def check_gates(exam: Examination) -> Finding:
    """Gates that training has not moved, or an adapter whose α is still 0.

    A gate sigmoid(β) has moved if its β differs from that of a new layer with the same settings; for gates that depend
    on the token, the change is averaged over the text's tokens. β is compared instead of the gate, because a gate that
    begins near 1 can hardly move.
    """
    model = exam.own_model
    gates = {index: layer.gate_values() for index, layer in model.memory_layers.items()} if model else {}
    gates = {index: values for index, values in gates.items() if values}
    if model is None or not gates:
        return skip("the model has no gates")
    with watch_token_gates(model) as by_token, exam.probing():
        exam.read(exam.take_rows(1, min(model.segment_length, len(exam.tokens))))
    stuck, lowest, highest = list[str](), 1.0, 0.0
    for index, values in gates.items():
        layer = model.memory_layers[index]
        shares = by_token.get(index, torch.tensor([values]))  # [tokens, H]
        begun = torch.tensor(type(layer)(**layer.settings).gate_values())
        low, high = shares.quantile(0.01).item(), shares.quantile(0.99).item()
        move = float((shares.logit(eps=1e-6) - begun.logit(eps=1e-6)).abs().mean(0).max())
        lowest, highest = min(lowest, low), max(highest, high)
        if move <= GATE_MARGIN:
            stuck.append(f"layer {index} ({low:.3f} to {high:.3f}, began at {begun[0]:.3f})")
    silent = [index for index, alpha in model.alpha_values().items() if abs(alpha) < ALPHA_MARGIN]
    found = f"gates range from {lowest:.3f} to {highest:.3f}"
    if silent:
        return warn(
            f"{found}; α of layer {', '.join(map(str, silent))} is 0: the adapter adds nothing to the base model",
            "train the adapter, or raise the gates' learning rate, which α shares",
        )
    if stuck:
        return warn(
            f"gates have not moved: {'; '.join(stuck)}: training has not decided how much memory to use",
            "raise train.gate_learning_rate (0.01, without weight decay) or train with more segments per sample",
        )
    return ok(f"{found}, and have moved since training began")
