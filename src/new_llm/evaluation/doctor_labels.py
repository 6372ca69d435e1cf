"""Label alignment, judged without `models/loss.py`: from logits and the text alone."""

import math

import numpy as np
import torch
from torch import Tensor

from new_llm.evaluation.doctor_probe import Measured, Patient, find_difference, find_vocab_size
from new_llm.evaluation.perplexity import unigram_perplexity

SHIFTS = (-1, 0, 1, 2, 3)
WINDOW_TOKENS = 256
MAX_LOGITS = 1 << 24
"""Logits held at once."""
SHIFT_MEANINGS = {
    -1: "it predicts the token before the one it reads",
    0: "it predicts the very token it reads: labels were not shifted in training",
    2: "labels were shifted twice in training, once by the data and once by the loss",
    3: "labels were shifted three times in training",
}


def check_alignment(patient: Patient) -> Measured:
    """The model's losses against −log softmax(logits)[next token], for every form that labels may take."""
    config = patient.config
    ids = patient.take_rows(config.num_rows, config.segment_tokens + 2)
    width = min(ids.shape[1] - 1, patient.model.segment_length)
    ids = ids[:, : width + 1]
    with patient.probing():
        logits = patient.read_fresh(ids[:, :-1])
        own = -logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # [B, width]
        short = own.clone()
        short[:, -1] = 0  # without a further label the last position has no target
        ignored = ids.clone()
        ignored[:, 2] = -100
        partly = own.clone()
        partly[:, 1] = 0
        forms = {
            "labels that are the input": (ids[:, :-1], short),
            "labels with one token more": (ids, own),
            "an ignored label": (ignored, partly),
        }
        allowed = patient.allowed(logits, is_rounded=True)
        differences: dict[str, float] = {}
        for name, (labels, expected) in forms.items():
            with patient.model.fresh_memory():
                torch.manual_seed(0)
                found = patient.model.token_losses(ids[:, :-1], labels)
            differences[name] = find_difference(found, expected)
    mean = float(own.mean())
    worst = max(differences, key=lambda name: differences[name])
    figures = {"differences": differences, "allowed": allowed, "mean_loss": mean}
    measured = f"losses differ by {differences[worst]:.2g} nats from those of the next token"
    if differences[worst] <= allowed:
        return Measured.ok(measured, **figures)
    return Measured(
        "fault",
        f"{measured} ({worst})",
        "the loss is not that of the next token, so every perplexity of this model is wrong",
        "hand over labels as the tokens themselves: the model's loss shifts them, and nothing else may",
        figures,
    )


def check_shift(patient: Patient) -> Measured:
    """Mean loss of real text at several shifts: a model trained with aligned labels is best at 1."""
    losses = measure_shifts(patient)
    means = {shift: float(values.mean()) for shift, values in losses.items()}
    best, second = sorted(means, key=lambda shift: means[shift])[:2]
    lead = losses[1] - losses[second if best == 1 else best]
    error = float(lead.std() / np.sqrt(len(lead))) if len(lead) > 1 else 0.0
    figures = {"loss_by_shift": {str(shift): value for shift, value in means.items()}, "num_tokens": len(lead)}
    measured = "loss at shift " + ", ".join(f"{shift}: {value:.2f}" for shift, value in means.items())
    is_clear = abs(float(lead.mean())) > max(patient.config.shift_margin, 3 * error)
    if best == 1 and is_clear:
        return Measured.ok(measured, **figures)
    # An untrained model may prefer the token it reads, where embedding and head share weights; it knows nothing yet.
    known = unigram_perplexity(patient.text) if best == 0 else find_vocab_size(patient)
    if is_clear and best != 1 and means[best] < math.log(known):
        return Measured(
            "fault",
            f"{measured}; the least is at {best}",
            SHIFT_MEANINGS[best],
            "train again with labels that are shifted once, by the loss alone",
            figures,
        )
    return Measured(
        "warning",
        f"{measured}; no clear least",
        "the model predicts the next token no better than another one: it has hardly been trained",
        "train it, or check that these are the trained weights",
        figures,
    )


def measure_shifts(patient: Patient) -> dict[int, np.ndarray]:
    """−log p of the token that stands `shift` tokens after the one just read, at the same positions for all shifts."""
    before, after = -min(SHIFTS), max(SHIFTS)
    found: dict[int, list[np.ndarray]] = {shift: [] for shift in SHIFTS}
    width = max(before + after + 1, min(WINDOW_TOKENS, patient.model.segment_length))
    tokens = patient.tokens[: patient.config.max_tokens]
    windows = tokens[: len(tokens) // width * width].view(-1, width)
    positions = torch.arange(before, width - after, device=tokens.device)
    with patient.probing(), patient.autocast():
        for rows in windows.split(max(1, MAX_LOGITS // (width * find_vocab_size(patient)))):
            log_shares: Tensor = patient.read_fresh(rows).log_softmax(-1)[:, positions]
            for shift in SHIFTS:
                values = -log_shares.gather(-1, rows[:, positions + shift, None])
                found[shift].append(values.double().flatten().cpu().numpy())
    return {shift: np.concatenate(values) for shift, values in found.items()}
