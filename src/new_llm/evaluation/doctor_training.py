"""Whether the weights are trained ones: finite, gates moved, better than frequencies."""

import math

import torch

from new_llm.evaluation.diagnosis import diagnose_perplexity
from new_llm.evaluation.doctor_probe import Measured, Patient, find_vocab_size
from new_llm.evaluation.perplexity import evaluate_sliding_window, unigram_perplexity

ALPHA_MARGIN = 1e-3
"""An adapter's α nearer to 0 than this adds nothing."""
MAX_CONTEXT = 1024


def check_weights(patient: Patient) -> Measured:
    """Parameters that are NaN or infinite."""
    broken = [name for name, value in patient.model.named_parameters() if not bool(torch.isfinite(value).all())]
    count = sum(value.numel() for value in patient.model.parameters())
    largest = max(patient.tokenizer.get_vocab().values(), default=0)
    rows = find_vocab_size(patient)
    figures = {"num_parameters": count, "broken": broken[:8], "largest_token_id": largest, "vocab_size": rows}
    if broken:
        return Measured(
            "fault",
            f"{len(broken)} tensors are not finite, the first of them {broken[0]}",
            "training diverged, or the file is damaged",
            "take an earlier checkpoint, or train with a lower learning rate",
            figures,
        )
    if largest >= rows:
        return Measured(
            "fault",
            f"the tokenizer has ids up to {largest}, the model knows {rows}",
            "the tokenizer is not this model's",
            "use the tokenizer that the model was trained with",
            figures,
        )
    return Measured.ok(f"{count:,} finite parameters; {rows:,} rows for ids up to {largest:,}", **figures)


def check_gates(patient: Patient) -> Measured:
    """How far the gates are from where they began, and whether an adapter's α has left 0."""
    model = patient.own_model
    if model is None or not model.memory_layers:
        return Measured.skip("the model has no gates")
    margin = patient.config.gate_margin
    gates, stuck = model.gate_values(), list[str]()
    for index, layer in model.memory_layers.items():
        began = 1 / (1 + math.exp(-float(layer.settings.get("gate_init", 0.0))))
        values = layer.gate_values()
        if all(abs(value - began) <= margin + 1e-6 for value in values):
            stuck.append(f"layer {index} ({min(values):.3f} – {max(values):.3f}, from {began:.3g})")
    alphas = model.alpha_values()
    silent = [f"layers.{index}.alpha" for index, alpha in alphas.items() if abs(alpha) < ALPHA_MARGIN]
    figures = {"gates": gates, "alpha": alphas, "stuck": stuck, "silent_adapters": silent}
    shares = [value for values in gates.values() for value in values]
    measured = f"gates from {min(shares):.3f} to {max(shares):.3f}"
    if silent:
        return Measured(
            "warning",
            f"{measured}; α of {', '.join(silent)} is 0",
            "the adapter adds nothing: the model is the base model",
            "train the adapter, or give α a rate of its own",
            figures,
        )
    if stuck:
        return Measured(
            "warning",
            f"{measured}; not moved: {', '.join(stuck)}",
            "training has not decided how much of the memory to use",
            "give gates a learning rate of their own (train.gate_learning_rate, 0.01), no weight decay, more segments",
            figures,
        )
    return Measured.ok(measured, **figures)


def check_skill(patient: Patient) -> Measured:
    """Perplexity of the text against that of its own token frequencies, and against a guess among all tokens."""
    context = max(2, min(MAX_CONTEXT, patient.model.segment_length))
    result = evaluate_sliding_window(
        patient.model,
        patient.text,
        context=context,
        stride=context,
        batch_size=patient.config.batch_size,
        max_tokens=patient.config.max_tokens,
        device=patient.device,
        autocast=patient.autocast,
    )
    frequencies, guess = unigram_perplexity(patient.text), find_vocab_size(patient)
    verdict = diagnose_perplexity(result.perplexity)
    figures = {
        "perplexity": result.perplexity,
        "num_tokens": result.num_tokens,
        "unigram_perplexity": frequencies,
        "vocab_size": guess,
        "verdict": verdict.to_dict(),
    }
    measured = (
        f"perplexity {result.perplexity:,.1f} ({verdict.level}); token frequencies alone {frequencies:,.1f}, a guess "
        f"{guess:,}"
    )
    if result.perplexity < frequencies:
        return Measured.ok(measured, **figures)
    is_guess = not result.perplexity < guess / 2
    return Measured(
        "warning",
        measured,
        "these weights are not trained" if is_guess else "the model has learned no more than how frequent tokens are",
        "check that the trained weights were loaded" if is_guess else "train longer, or on text like this one",
        figures,
    )
