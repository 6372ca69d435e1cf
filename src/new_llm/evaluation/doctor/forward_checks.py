"""Checks of weights, losses and logits: what every language model must pass, with or without memory."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from new_llm.evaluation.doctor.registry import (
    PROBE_SEED,
    Examination,
    Finding,
    fault,
    find_difference,
    ok,
    register_check,
    warn,
)
from new_llm.evaluation.perplexity import evaluate_sliding_window
from new_llm.evaluation.scoring import Reading, select_documents
from new_llm.models.inputs import IGNORE_INDEX

CONTEXT = 1024  # tokens in a window of the check of skill
LOSS_MARGIN = 0.02  # nats by which autocast may change the mean loss
SHIFT_MARGIN = 0.05  # nats by which the losses of two label shifts must differ to count
SHIFT_WINDOW = 256
MAX_LOGITS = 1 << 24
"""Logits held at once."""
MAX_COUNTED = 1 << 24
"""Training tokens from which token frequencies are counted."""
SHIFT_MEANINGS = {
    -1: "it predicts the token before the one it reads",
    0: "it predicts the token it reads: labels were not shifted in training",
    2: "it predicts the token after the next: labels were shifted twice in training, by the data and by the loss",
    3: "labels were shifted three times in training",
}


@register_check("weights")
def check_weights(exam: Examination) -> Finding:
    """Weights that are NaN or infinite, or a tokenizer with more tokens than the model has embeddings."""
    broken = [name for name, value in exam.model.named_parameters() if not bool(torch.isfinite(value).all())]
    count = sum(value.numel() for value in exam.model.parameters())
    largest = max(exam.subject.tokenizer.get_vocab().values(), default=0)
    rows = exam.vocab_size
    if broken:
        return fault(
            f"{len(broken)} tensors are not finite, the first is {broken[0]}: training diverged or the file is damaged",
            "use an earlier checkpoint, or train with a lower learning rate",
        )
    if largest >= rows:
        return fault(
            f"the tokenizer has ids up to {largest}, the model only {rows} embeddings: it is another model's tokenizer",
            "use the tokenizer that the model was trained with",
        )
    return ok(f"{count:,} finite parameters; {rows:,} embeddings for token ids up to {largest:,}")


@register_check("modes", after=("weights",))
def check_modes(exam: Examination) -> Finding:
    """Evaluation that is random, or a training mode or autocast that computes another model."""
    ids = exam.take_segments()

    def read(*, training: bool, seed: int) -> Tensor:
        with exam.probing(segment_tokens=exam.config.segment_tokens, training=training):
            return exam.compute_logits(ids, seed=seed)

    def mean_loss(logits: Tensor) -> float:
        return float(-logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean())

    first = read(training=False, seed=0)
    repeated = find_difference(read(training=False, seed=1), first)
    trained = max(find_difference(read(training=True, seed=seed), first) for seed in (0, 1))
    with exam.subject.autocast():
        cast = abs(mean_loss(read(training=False, seed=0)) - mean_loss(first))
    if repeated > exam.allowed(first):
        return fault(
            f"logits differ by {repeated:.2g} when the same text is read again: the model is random in evaluation",
            "look for dropout that ignores self.training",
        )
    if trained > exam.allowed(first):
        has_dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in exam.model.modules())
        judge = warn if has_dropout and not exam.own_model else fault
        return judge(
            f"training mode changes logits by {trained:.2g}: training fits another model than evaluation measures",
            "don't compare training with validation losses" if has_dropout else "use one forward pass for both",
        )
    if cast > LOSS_MARGIN:
        return warn(
            f"autocast changes the mean loss by {cast:.2g} nats: losses with and without it can't be compared",
            "measure in the precision the model was trained in",
        )
    return ok("the same logits when read again and in training mode; autocast keeps the loss")


@register_check("labels", after=("weights",))
def check_labels(exam: Examination) -> Finding:
    """A loss that is not that of the next token, judged from the logits alone."""
    ids = exam.take_rows(exam.config.num_rows, exam.config.segment_tokens + 2)
    ids = ids[:, : min(ids.shape[1], exam.model.segment_length + 1)]
    with exam.probing():
        logits = exam.read_fresh(ids[:, :-1])
        expected = -logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # [B, T]
        last_open, one_ignored, masked = expected.clone(), expected.clone(), ids.clone()
        last_open[:, -1] = 0  # without a further label the last position has no target
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
        return ok(f"losses are those of the next token, to {differences[worst]:.2g} nats")
    return fault(
        f"losses differ by {differences[worst]:.2g} nats from those of the next token ({worst}): "
        "every perplexity of this model is wrong",
        "pass the tokens themselves as labels; the model's loss shifts them, and nothing else may",
    )


@register_check("shift", after=("weights", "labels"))
def check_shift(exam: Examination) -> Finding:
    """A model trained on wrongly shifted labels: another token than the next one is predicted best."""
    losses = _measure_shifts(exam)
    means = {shift: float(values.mean()) for shift, values in losses.items()}
    best, second = sorted(means, key=lambda shift: means[shift])[:2]
    lead = losses[1] - losses[second if best == 1 else best]
    error = float(lead.std() / np.sqrt(len(lead))) if len(lead) > 1 else 0.0
    is_clear = abs(float(lead.mean())) > max(SHIFT_MARGIN, 3 * error)
    found = "loss at shift " + ", ".join(f"{shift}: {value:.2f}" for shift, value in means.items())
    if best == 1 and is_clear:
        return ok(f"the next token is predicted best; {found}")
    # An untrained model whose head is its embedding prefers the token it reads; that alone is no fault.
    known = _score_frequencies(exam, exam.tokens.cpu().numpy()) if best == 0 else math.log(exam.vocab_size)
    if is_clear and means[best] < known:
        return fault(f"{SHIFT_MEANINGS[best]} ({found})", "train again; only the loss may shift the labels")
    return warn(
        f"the next token is predicted no better than its neighbours: the model has hardly been trained ({found})",
        "train it longer, or check that the trained weights were loaded",
    )


def _measure_shifts(exam: Examination) -> dict[int, NDArray[np.float64]]:
    """−log p of the token `shift` places after the one just read, at the same positions for every shift."""
    shifts = (*SHIFT_MEANINGS, 1)
    before, after = -min(shifts), max(shifts)
    width = max(before + after + 1, min(SHIFT_WINDOW, exam.model.segment_length))
    tokens = exam.tokens[: exam.config.max_tokens]
    windows = tokens[: len(tokens) // width * width].view(-1, width)
    positions = torch.arange(before, width - after, device=tokens.device)
    found: dict[int, list[NDArray[np.float64]]] = {shift: [] for shift in sorted(shifts)}
    with exam.probing(), exam.subject.autocast():
        for rows in windows.split(max(1, MAX_LOGITS // (width * exam.vocab_size))):
            log_shares = exam.read_fresh(rows).log_softmax(-1)[:, positions]
            for shift, values in found.items():
                losses = -log_shares.gather(-1, rows[:, positions + shift, None])
                values.append(losses.double().flatten().cpu().numpy())
    return {shift: np.concatenate(values) for shift, values in found.items()}


@register_check("causality", after=("weights",))
def check_causality(exam: Examination) -> Finding:
    """Logits that depend on later tokens, within a segment, across segments or through a filled memory."""
    native = exam.model.segment_length
    length = min(exam.config.segment_tokens, native)
    ids = exam.take_segments(1)
    places = {1, length // 2, length - 1, length, length + length // 2, 2 * length, ids.shape[1] - 1}
    inside = sorted(place for place in places if 0 < place < ids.shape[1])
    probes: list[tuple[int, Tensor, Tensor | None, list[int]]] = [(length, ids, None, inside)]
    if exam.has_memory:
        probes.append((length, ids, exam.take_rows(1, 2 * length, start=ids.shape[1]), inside))
    if exam.own_model and native > length:  # once at the segment length of training
        probes.append((native, exam.take_rows(1, native + length), None, [native // 2, native]))
    earlier, later, leak = 0.0, 0.0, ""
    for segment_tokens, tokens, fill, changed in probes:
        with exam.probing(segment_tokens=segment_tokens):
            before = exam.read_fresh(tokens, fill=fill)
            for place in changed:
                after = exam.read_fresh(_change_token(tokens, place), fill=fill)
                moved = (after[0, :place].double() - before[0, :place].double()).abs().amax(-1).nan_to_num(math.inf)
                if float(moved.max()) > exam.allowed(before):
                    seen_at = int((moved > exam.allowed(before)).nonzero()[-1])
                    leak = leak or f"token {place} changes the logits at {seen_at}"
                earlier = max(earlier, float(moved.max()))
                later = max(later, find_difference(after[0, place:], before[0, place:]))
    if leak:
        return fault(
            f"{leak} (by up to {earlier:.2g}): the model sees tokens it is to predict, so its perplexity is worthless",
            "check the layers' masks, and sums, means and norms over time",
        )
    if later == 0:
        return warn(
            "changed tokens change no logits at all: the model ignores what it reads",
            "check that the trained weights were loaded",
        )
    return ok(f"changed tokens move earlier logits by {earlier:.2g}, later ones by up to {later:.2g}")


def _change_token(ids: Tensor, place: int) -> Tensor:
    """The same row with another token of the text at one place."""
    changed = ids.clone()
    others = ids[0][ids[0] != ids[0, place]]
    changed[:, place] = others[place % len(others)] if len(others) else (ids[0, place] + 1) % 2
    return changed


@register_check("rows", after=("weights",))
def check_rows(exam: Examination) -> Finding:
    """Rows of a batch that influence one another, in a call, through their memories or through padding."""
    ids = exam.take_segments()
    rows, width = ids.shape
    other = exam.take_segments(start=width + 7)
    differences: dict[str, float] = {}

    def compare(name: str, a: Tensor, b: Tensor) -> None:
        differences[name] = max(differences.get(name, 0.0), find_difference(a, b))

    def write(tokens: Tensor) -> Tensor:
        with exam.model.fresh_memory(exam.count_rows(tokens)):
            return exam.compute_logits(tokens, update_memory=True)

    def read_masked(tokens: Tensor, mask: Tensor) -> Tensor:
        with exam.model.fresh_memory():
            return exam.compute_logits(tokens, attention_mask=mask)

    with exam.probing(segment_tokens=exam.config.segment_tokens):
        alone = exam.read_fresh(ids)
        for kept in (0, rows - 1):
            mixed = other.clone()
            mixed[kept] = ids[kept]
            compare("in one call", alone[kept], exam.read_fresh(mixed)[kept])
            if exam.has_memory:
                compare("in a call that writes memory", write(ids)[kept], write(mixed)[kept])
                per_row = [exam.read_fresh(ids, fill=fill, per_row=True)[kept] for fill in (ids, mixed)]
                compare("through per-row memories", per_row[0], per_row[1])
            if exam.own_model:
                mask = torch.ones_like(ids, dtype=torch.bool)
                mask[kept, width // 2 :] = False
                padded = [read_masked(tokens, mask)[kept, : width // 2] for tokens in (ids, mixed)]
                compare("beside padding", padded[0], padded[1])
    worst = max(differences, key=lambda name: differences[name])
    if differences[worst] <= exam.allowed(alone):
        return ok(f"other rows move a row's logits by {differences[worst]:.2g}")
    return fault(
        f"other rows move a row's logits by {differences[worst]:.2g} ({worst}): unrelated texts mix, and results "
        "depend on what shares the batch",
        "let each row work on its own copy of the memory, and sum the rows' writes at the end of the call",
    )


@register_check("skill", after=("weights", "labels", "shift"))
def check_skill(exam: Examination) -> Finding:
    """A model that predicts no better than token frequencies do, on the same tokens."""
    config = exam.config
    scored = np.concatenate([tokens[1:] for tokens in select_documents(exam.subject.split, config.max_tokens).tokens])
    context = CONTEXT if exam.own_model else max(2, min(CONTEXT, exam.model.segment_length))
    reading: Reading = {**exam.subject.reading, "max_tokens": config.max_tokens, "on_progress": None}
    result = evaluate_sliding_window(exam.model, exam.subject.split, context=context, stride=context, **reading)
    unigram = math.exp(_score_frequencies(exam, scored))
    whose = "the training text" if exam.subject.training else "this text"
    found = f"perplexity {result.perplexity:,.1f}; the token frequencies of {whose} alone give {unigram:,.1f}"
    if result.perplexity < unigram:
        return ok(found)
    is_guess = result.perplexity >= exam.vocab_size / 2
    return warn(
        f"{found}: " + ("these weights are not trained" if is_guess else "it has learned no more than frequencies"),
        f"{'check that the trained weights were loaded, or ' if is_guess else ''}train more epochs, with a higher "
        "learning rate, or on text like this",
    )


def _score_frequencies(exam: Examination, tokens: NDArray[np.integer]) -> float:
    """Mean −log p of tokens under the frequencies of the training text (or else of the examined one), in nats.

    Frequencies are smoothed by one count per token. They are not those of the scored tokens themselves, which a
    predictor could not know.
    """
    known = exam.subject.training.train if exam.subject.training else exam.subject.split
    counts = np.bincount(known.tokens[:MAX_COUNTED].astype(np.int64), minlength=exam.vocab_size) + 1
    return float(np.log(counts.sum()) - np.log(counts[tokens]).mean())
