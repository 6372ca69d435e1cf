"""What did the memory know? Passages of held-out text, with the memory's value for each token.

A token's value is its loss with an empty memory minus its loss with the memory carried, in nats: above 0, the memory
helped. Both losses are taken from the measure `long` if it has run before, and computed otherwise.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from new_llm.charts import ShadedText, ShadedToken
from new_llm.config.model import GenerationConfig
from new_llm.evaluation.long_documents import CARRIED, RESET, score_pairs
from new_llm.evaluation.measure import Measure, ModelResult, Subject, register_measure
from new_llm.evaluation.memory_usage import watch_selections, watch_token_gates
from new_llm.evaluation.scoring import Scorer, evaluation_mode, find_device, join_scores

DIGITS = 4
UNKNOWN = "\ufffd"  # an incomplete character decodes to this


def find_passages(
    values: Sequence[NDArray[np.float64]], segment_length: int, num_helped: int, num_harmed: int
) -> list[tuple[int, int]]:
    """Find the segments that the memory helped most, then those that it harmed most, as (document, segment).

    Args:
        values: for each document the values of all tokens except the first, in nats.
        segment_length: S; segment i of a document predicts its tokens i·S + 1 to (i + 1)·S.
        num_helped: the most helped segments to return.
        num_harmed: the most harmed segments to return.
    """
    sums = [
        (float(found[begin : begin + segment_length].sum()), document, begin // segment_length)
        for document, found in enumerate(values)
        for begin in range(segment_length, len(found), segment_length)  # the first segment has no memory to read
    ]
    sums.sort(reverse=True)
    helped = [one for one in sums if one[0] > 0][:num_helped]
    harmed = [one for one in reversed(sums) if one[0] < 0][:num_harmed]
    return [(document, segment) for _, document, segment in helped + harmed]


def find_half_share(values: NDArray[np.float64]) -> float | None:
    """Return the smallest share of tokens that together account for half of the memory's total positive value."""
    helped = np.sort(values[values > 0])[::-1].cumsum()
    return None if not len(helped) else float(np.searchsorted(helped, helped[-1] / 2) + 1) / len(values)


def continue_text(tokenizer: Tokenizer, before: Sequence[int], after: Sequence[int]) -> str:
    """Decode the text that tokens add to those before them, on which a leading space may depend.

    A character spread over several tokens is attributed to the last of them.
    """
    start, whole, alone = (
        tokenizer.decode(list(ids), skip_special_tokens=False).rstrip(UNKNOWN)
        for ids in (before, [*before, *after], after)
    )
    return whole[len(start) :] if whole.startswith(start) else alone


def read_details(subject: Subject, document: NDArray[Any], segments: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Read a document as a stream and record details of some segments.

    Returns:
        By segment, lists with an entry per token: the most likely next tokens with the memory `carried` and `emptied`;
        the `gate`, if gates are computed per token; and `selection`, for each layer that selects among memories the
        weight of each memory, averaged over heads.
    """
    model: Any = subject.model
    length, read = model.segment_length, 0
    details: dict[int, dict[str, Any]] = {}

    def list_candidates(logits: Tensor, previous: Sequence[int]) -> list[Any]:
        """Return [[text, probability], …] after each position."""
        number = min(subject.settings.passages.num_candidates, logits.shape[-1])
        top = logits.float().softmax(-1).topk(number, dim=-1)
        found = zip(previous, top.indices.tolist(), _round(top.values), strict=True)
        return [
            [[continue_text(subject.tokenizer, [last], [token]), share] for token, share in zip(*one, strict=True)]
            for last, *one in found
        ]

    with evaluation_mode(model, subject.autocast), model.fresh_memory(batch_size=1):
        for segment in sorted(segments):
            begin, end = segment * length, (segment + 1) * length
            ids = torch.from_numpy(document[read:end].astype(np.int64)).to(find_device(model)).unsqueeze(0)
            if begin > read:
                model.compute_hidden(ids[:, : begin - read], update_memory=True)
            ids, read = ids[:, begin - read :], end
            with model.fresh_memory():
                emptied = model(ids)[0]
            with watch_token_gates(model) as gates, watch_selections(model) as selections:
                carried = model(ids, update_memory=True)[0]
            shares = [found[-1][0].float().flatten(0, -3).mean(0) for found in selections.values() if found]
            previous = ids[0].tolist()
            details[segment] = {
                "carried": list_candidates(carried, previous),
                "emptied": list_candidates(emptied, previous),
                "gate": _round(torch.cat([*gates.values()], -1).mean(-1)) if gates else None,
                "selection": _round(torch.stack(shares, 1)) if shares else None,
            }
    return details


def _round(values: Tensor) -> list[Any]:
    return np.round(values.cpu().double().numpy(), DIGITS).tolist()


def continue_document(subject: Subject, document: NDArray[Any]) -> dict[str, Any] | None:
    """Continue a document from its middle, with the memory of everything before and with an empty memory, same seed.

    The prompt is half a segment and begins at a segment border, so that earlier text can only act through the memory.
    None if the document has less than two segments.
    """
    model: Any = subject.model
    length, number = model.segment_length, subject.settings.passages.continuation_tokens
    # Sampled, because greedy continuations of small models repeat themselves, whatever they remember.
    drawing = GenerationConfig(max_new_tokens=number, do_sample=True, temperature=0.8, top_p=0.9, seed=subject.seed)
    begin = len(document) // 2 // length * length
    end = begin + max(1, length // 2)
    if begin == 0 or end >= len(document):
        return None
    ids = torch.from_numpy(document[:end].astype(np.int64)).to(find_device(model)).unsqueeze(0)
    texts: dict[str, str] = {}
    with evaluation_mode(model, subject.autocast):
        for way in ("carried", "emptied"):
            with model.fresh_memory():
                if way == "carried":
                    model.compute_hidden(ids[:, :begin], update_memory=True)
                made, _ = model.generate(ids[:, begin:], config=drawing)
            texts[way] = continue_text(subject.tokenizer, document[begin:end].tolist(), made[0, end - begin :].tolist())
    true = continue_text(subject.tokenizer, document[begin:end].tolist(), document[end : end + number].tolist())
    prompt = subject.tokenizer.decode(document[begin:end].tolist(), skip_special_tokens=False)
    return {"segment": begin // length, "prompt": prompt, "true": true, **texts}


@register_measure
class Passages(Measure):
    """The passages that the memory helped and harmed most, token by token."""

    name = "passages"
    title = "what the memory knew"

    def run(self, subject: Subject) -> dict[str, Any] | None:
        """Find the passages that the memory helped and harmed most.

        - `num_tokens` and `value_nats`, the mean over all tokens of the documents; `half_share`: see `find_half_share`.
        - `passages`: each has its `document`'s index, its `segment`, `before` (the text before it), `value_nats` (the
          sum over its tokens), and `tokens`: text, losses `carried` and `emptied` in nats, the most likely tokens
          `with_memory` and `without`, `gate` and `selection` (see `read_details`).
        - `continuations`: see `continue_document`.

        Returns None if the model has no memory, no document reaches into a second segment, or the measurement was
        stopped.
        """
        model: Any = subject.model
        settings, fewest = subject.settings.passages, model.segment_length + 2
        # The first documents that `long` measures; if no document is long, the first that reach a second segment.
        long = subject.split.find_long(max(subject.settings.long_documents.min_tokens, fewest))
        found = long if len(long) else subject.split.find_long(fewest)
        chosen: list[int] = found[: settings.max_documents].tolist()
        if not chosen or not getattr(model, "memory_layers", None):
            return None
        limit = subject.settings.long_documents.max_tokens_per_document
        documents = [subject.split.document(index)[:limit] for index in chosen]
        indices, scored = subject.shared.get("long", ([], {}))
        if not {*chosen} <= {*indices}:
            how = subject.settings.long_documents
            scorer = Scorer(model, documents, subject.reading | {"batch_size": how.batch_size, "max_tokens": None})
            indices, (scored, _) = chosen, score_pairs(scorer, how.segments_per_call)
            if scorer.is_stopped:
                return None
        losses = [{way: np.full(len(document) - 1, np.nan) for way in ("carried", "emptied")} for document in documents]
        for way, name in (("carried", CARRIED), ("emptied", RESET)):
            scores = join_scores(scored[name])
            for found, index in zip(losses, chosen, strict=True):
                own = scores.documents == indices.index(index)
                found[way][scores.positions[own] - 1] = scores.losses[own]
        values = [one["emptied"] - one["carried"] for one in losses]
        length = model.segment_length
        places = find_passages(values, length, settings.num_helped, settings.num_harmed)
        details = {
            place: read_details(subject, documents[place], [segment for other, segment in places if other == place])
            for place in dict.fromkeys(place for place, _ in places)
        }
        every = np.concatenate(values)
        return {
            "documents": chosen,
            "segment_length": length,
            "num_tokens": len(every),
            "value_nats": float(every.mean()),
            "half_share": find_half_share(every),
            "passages": [
                describe_passage(
                    subject.tokenizer, documents[place], segment, length, losses[place], details[place][segment]
                )
                | {"document": chosen[place]}
                for place, segment in places
            ],
            "continuations": [
                {"document": index} | found
                for index, document in zip(chosen[: settings.num_continuations], documents, strict=False)
                if (found := continue_document(subject, document)) is not None
            ],
        }

    def texts(self, results: Sequence[ModelResult]) -> list[ShadedText]:
        """Return each passage as a shaded text, then the continuations."""
        found: list[ShadedText] = []
        for name, result in results:
            found += [shade(name, passage) for passage in result["passages"]]
            found += [compare(name, one) for one in result.get("continuations", ())]
        return found

    def describe(self, result: dict[str, Any]) -> str:
        """State the memory's mean value, and how it is concentrated."""
        value, share = result["value_nats"], result["half_share"]
        said = f"the memory was worth {value:+.3f} nats per token over {result['num_tokens']:,} tokens"
        return said if share is None else f"{said}; {share:.1%} of them account for half of its help"


def describe_passage(
    tokenizer: Tokenizer,
    document: NDArray[Any],
    segment: int,
    length: int,
    losses: dict[str, NDArray[np.float64]],
    details: dict[str, Any],
) -> dict[str, Any]:
    """Make one entry of `passages`."""
    begin = segment * length
    end = min(begin + length, len(document) - 1)
    ids = document[max(0, begin + 1 - length) : end + 1].tolist()
    first = len(ids) - (end - begin)
    carried, emptied = (losses[way][begin:end] for way in ("carried", "emptied"))
    tokens = [
        {
            "text": continue_text(tokenizer, ids[max(0, at - 16) : at], ids[at : at + 1]),
            "carried": float(carried[place]),
            "emptied": float(emptied[place]),
            "with_memory": details["carried"][place],
            "without": details["emptied"][place],
            "gate": details["gate"] and details["gate"][place],
            "selection": details["selection"] and details["selection"][place],
        }
        for place, at in enumerate(range(first, len(ids)))
    ]
    return {
        "segment": segment,
        "before": tokenizer.decode(ids[:first], skip_special_tokens=False).rstrip(UNKNOWN)[-160:],
        "value_nats": float((emptied - carried).sum()),
        "tokens": tokens,
    }


def shade(model: str, passage: dict[str, Any]) -> ShadedText:
    """Turn a passage into a shaded text for the report."""

    def say(candidates: list[Any]) -> str:
        return ", ".join(f"{text!r} {share:.0%}" for text, share in candidates)

    tokens = [
        ShadedToken(
            token["text"],
            token["emptied"] - token["carried"],
            [
                ("worth", f"{token['emptied'] - token['carried']:+.2f} nats"),
                ("loss with the memory", f"{token['carried']:.2f}"),
                ("loss without it", f"{token['emptied']:.2f}"),
                ("most likely with it", say(token["with_memory"])),
                ("most likely without it", say(token["without"])),
                *([("gate", f"{token['gate']:.2f}")] if token["gate"] is not None else []),
                *(("memories read", say_selection(shares)) for shares in token.get("selection") or ()),
            ],
        )
        for token in passage["tokens"]
    ]
    value = passage["value_nats"]
    word = "helped" if value > 0 else "harmed"
    title = f"{word} by {abs(value):.1f} nats: document {passage['document']}, segment {passage['segment'] + 1}"
    return ShadedText(title, passage["before"], tokens, view=model)


def say_selection(shares: Sequence[float]) -> str:
    """List the memories that a token read and their weights, largest first."""
    ranked = sorted(enumerate(shares, 1), key=lambda one: -one[1])
    return ", ".join(f"{place}: {share:.0%}" for place, share in ranked if share > 0)


def compare(model: str, found: dict[str, Any]) -> ShadedText:
    """Turn a continuation into a text for the report."""
    title = f"continued: document {found['document']}, from segment {found['segment'] + 1}"
    names = {"carried": "with the memory", "emptied": "with an empty memory", "true": "the document itself"}
    versions = [(label, found[way]) for way, label in names.items()]
    return ShadedText(title, found["prompt"], versions=versions, view=model)
