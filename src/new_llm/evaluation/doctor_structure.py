"""What may depend on what: causality, rows, cuts into calls, and generation; found by changing tokens."""

from typing import Any

import torch
from torch import Tensor

from new_llm.evaluation.doctor_probe import Measured, Patient, find_difference


def check_causality(patient: Patient) -> Measured:
    """Change one token and look at the logits before it: inside a segment, in earlier ones, with a filled memory."""
    length, count = patient.config.segment_tokens, patient.config.num_segments
    own = patient.own_model is not None
    native = patient.model.segment_length
    length = min(length, native)
    num_tokens = length * count if own else min(length * count, native)
    ids = patient.take_rows(1, num_tokens)
    fill = patient.take_rows(1, 2 * length, start=num_tokens)
    places = sorted({1, length // 2, length - 1, length, length + length // 2, 2 * length, num_tokens - 1})
    places = [place for place in places if 0 < place < num_tokens]
    leak: dict[str, Any] = {"difference": 0.0, "changed": None, "seen_at": None}
    reach = 0.0
    with patient.probing(segment_tokens=length):
        cases = [(ids, None), (ids, fill)] if patient.has_memory else [(ids, None)]
        for tokens, filled in cases:
            reach = max(reach, _look_ahead(patient, tokens, filled, places, leak))
    num_probes = len(cases) * len(places)
    if own and native > length:  # once in segments of the length that the model was trained with
        tokens = patient.take_rows(1, native + length)
        with patient.probing():
            reach = max(reach, _look_ahead(patient, tokens, None, [native // 2, native], leak))
        num_probes += 2
    figures = leak | {"num_probes": num_probes, "largest_later_change": reach}
    measured = f"{num_probes} changed tokens moved earlier logits by {leak['difference']:.2g}"
    if leak["changed"] is not None:
        return Measured(
            "fault",
            f"{measured}: the token at {leak['changed']} is seen at {leak['seen_at']}",
            "the model sees tokens that it is to predict: its perplexity is worth nothing",
            "look at the mask of the layers, and at statistics over time: sums, means and norms that run past a token",
            figures,
        )
    if reach == 0:
        return Measured(
            "warning",
            f"{measured}, and later ones not at all",
            "the model does not react to what it reads",
            "check that its weights are the trained ones",
            figures,
        )
    return Measured.ok(f"{measured}, later ones by up to {reach:.2g}", **figures)


def _look_ahead(patient: Patient, ids: Tensor, fill: Tensor | None, places: list[int], leak: dict[str, Any]) -> float:
    """Note the largest leak; returns the largest change of a later logit."""
    before = patient.read_fresh(ids, fill=fill)
    reach = 0.0
    for place in places:
        after = patient.read_fresh(change_token(ids, place), fill=fill)
        seen = (after[0, :place].double() - before[0, :place].double()).abs().amax(-1).nan_to_num(torch.inf)
        difference = float(seen.max())
        if difference > patient.allowed(before) and difference > leak["difference"]:
            first = int((seen > patient.allowed(before)).nonzero()[-1])
            leak |= {"changed": place, "seen_at": first}
        leak["difference"] = max(leak["difference"], difference)
        reach = max(reach, find_difference(after[0, place:], before[0, place:]))
    return reach


def change_token(ids: Tensor, place: int) -> Tensor:
    """Another token of the same text at one place of every row."""
    changed = ids.clone()
    others = ids[0][ids[0] != ids[0, place]]
    changed[:, place] = others[place % len(others)] if len(others) else (ids[0, place] + 1) % 2
    return changed


def check_rows(patient: Patient) -> Measured:
    """Change the other rows of a batch and look at one row, in one call and through memories of the rows' own."""
    config = patient.config
    rows, width = config.num_rows, config.segment_tokens * config.num_segments
    if patient.own_model is None:
        width = min(width, patient.model.segment_length)
    ids, other = patient.take_rows(rows, width), patient.take_rows(rows, width, start=width + 7)
    differences: dict[str, float] = {}
    with patient.probing(segment_tokens=config.segment_tokens):
        allowed = patient.allowed(patient.read_fresh(ids))
        for kept in (0, rows - 1):
            mixed = other.clone()
            mixed[kept] = ids[kept]
            pairs = {"in one call": (patient.read_fresh(ids), patient.read_fresh(mixed))}
            if patient.has_memory:
                pairs["in one call that writes"] = (_write(patient, ids), _write(patient, mixed))
                pairs["through a memory of its own"] = (
                    patient.read_fresh(ids, fill=ids, per_row=True),
                    patient.read_fresh(ids, fill=mixed, per_row=True),
                )
            if patient.own_model is not None:
                mask = torch.ones_like(ids, dtype=torch.bool)
                mask[kept, width // 2 :] = False
                masked = [_read_masked(patient, tokens, mask, kept, width // 2) for tokens in (ids, mixed)]
                pairs["beside longer rows"] = (masked[0], masked[1])
            for name, (a, b) in pairs.items():
                a, b = (a, b) if name == "beside longer rows" else (a[kept], b[kept])
                differences[name] = max(differences.get(name, 0.0), find_difference(a, b))
    worst = max(differences, key=lambda name: differences[name])
    figures = {"differences": differences, "allowed": allowed}
    measured = f"other rows moved a row's logits by {differences[worst]:.2g}"
    if differences[worst] <= allowed:
        return Measured.ok(measured, **figures)
    return Measured(
        "fault",
        f"{measured} ({worst})",
        "rows of a batch see one another: unrelated texts mix, and readings depend on what shares the batch",
        "each row must work on its own copy of the memory; sum what rows wrote into a shared one at the call's end",
        figures,
    )


def _write(patient: Patient, ids: Tensor) -> Tensor:
    with patient.model.fresh_memory():
        return patient.compute_logits(ids, update_memory=True)


def _read_masked(patient: Patient, ids: Tensor, mask: Tensor, row: int, length: int) -> Tensor:
    with patient.model.fresh_memory():
        return patient.compute_logits(ids, attention_mask=mask)[row, :length]


def check_calls(patient: Patient) -> Measured:
    """The same text in one call, in a call for each segment, and as a stream in pieces of odd lengths."""
    model = patient.own_model
    if model is None:
        return Measured.skip("the model has no segments")
    config = patient.config
    with patient.probing(segment_tokens=config.segment_tokens):
        length = model.segment_length
        ids = patient.take_rows(config.num_rows, length * config.num_segments)
        whole = patient.read_fresh(ids, per_row=True)
        allowed = patient.allowed(whole, is_rounded=True)
        with model.fresh_memory(batch_size=len(ids)):
            calls = torch.cat([patient.compute_logits(part, update_memory=True) for part in ids.split(length, 1)], 1)
        with model.fresh_memory(batch_size=len(ids)):
            stream = model.open_stream(len(ids))
            pieces = torch.cat([stream.feed(part) for part in ids.split(max(1, length // 3 + 1), 1)], 1)
    figures = {
        "calls": find_difference(calls, whole),
        "stream": find_difference(pieces.float(), whole.float()),
        "allowed": allowed,
    }
    measured = f"calls of one segment differ by {figures['calls']:.2g}, a stream by {figures['stream']:.2g}"
    if max(figures["calls"], figures["stream"]) <= allowed:
        return Measured.ok(measured, **figures)
    return Measured(
        "fault",
        measured,
        "the result depends on how a text is cut into calls, so streaming readings can't be compared with others",
        "memory must be the only path from one segment to the next, and be written at a segment's end alone",
        figures,
    )


def check_generation(patient: Patient) -> Measured:
    """Greedy tokens against the likeliest ones of the whole text, prompt and all."""
    model = patient.own_model
    if model is None:
        return Measured.skip("generation is that of transformers")
    config = patient.config
    with patient.probing(segment_tokens=config.segment_tokens):
        num_prompt = model.segment_length + max(1, model.segment_length // 2)
        prompt = patient.take_rows(config.num_rows, num_prompt)
        torch.manual_seed(0)
        made, _ = model.generate(prompt, max_new_tokens=config.num_new_tokens)
        has_prompt = made.shape[1] > num_prompt and torch.equal(made[:, :num_prompt], prompt)
        new = made[:, num_prompt:] if has_prompt else made[:, -config.num_new_tokens :]
        whole = torch.cat([prompt, new], 1)
        logits = patient.read_fresh(whole)[:, num_prompt - 1 : -1]
        chosen = logits.gather(-1, new.unsqueeze(-1)).squeeze(-1)
        lost = (logits.amax(-1) - chosen).amax(0)
        allowed = patient.allowed(logits, is_rounded=True)
        bare = patient.read_fresh(new)[:, :-1]
        depends = bool((bare.argmax(-1) != new[:, 1:]).any()) if new.shape[1] > 1 else False
    figures = {
        "prompt_returned": has_prompt,
        "largest_loss_of_logit": float(lost.max()),
        "allowed": allowed,
        "prompt_matters": depends,
    }
    measured = f"{new.numel()} greedy tokens are at most {figures['largest_loss_of_logit']:.2g} below the likeliest"
    if has_prompt and figures["largest_loss_of_logit"] <= allowed:
        return Measured.ok(measured, **figures)
    return Measured(
        "fault",
        measured if has_prompt else f"the prompt does not stand before the new tokens; {measured}",
        "generation is not that of the model that was trained: it drops the prompt, the memory or a pass",
        "let generation read the whole prompt and use the forward pass of training",
        figures,
    )
