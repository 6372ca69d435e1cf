import math
import re
from typing import Any

import pytest
from report_runs import make_seed, pick, set_at

from new_llm.report.headline import describe_outcome
from new_llm.report.results import group_series, make_run


def compare(*runs: dict[str, Any]) -> str:
    said = describe_outcome(group_series([make_run(results) for results in runs]))
    return " ".join([said.text, *said.caveats])


@pytest.fixture
def outcome(four_models):
    def find(*perplexities: float | None) -> str:
        results = four_models | {"models": four_models["models"][: len(perplexities)]}
        for entry, value in zip(results["models"], perplexities, strict=True):
            entry["evaluation"] = {"sliding": entry["evaluation"]["sliding"] | {"perplexity": value}}
        return compare(results)

    return find


def test_the_headline_names_the_best_and_by_how_much(outcome):
    best = "has the lowest sliding-window perplexity: "
    assert outcome(80.0, 78.0, 76.0).startswith(
        f"multi_memory {best}76.00, 2.6% below infini (78.00) and 5.0% below pythia (80.00)."
    )
    assert outcome(80.0, 84.0).startswith(f"pythia {best}80.00, 4.8% below infini (84.00).")


def test_the_headline_claims_no_more_than_was_measured(outcome):
    assert "have the same sliding-window perplexity" in outcome(80.0, 80.01)
    assert "There is only one model, and nothing to compare it with." in outcome(80.0)
    assert outcome(None, float("nan")).startswith("No model has been evaluated")
    assert "Not evaluated: pythia." in outcome(float("inf"), 76.0)
    assert "spread between seeds is unknown" in outcome(80.0, 76.0)


def share_documents(results: dict[str, Any], *losses: list[float]) -> None:
    """Give the models documents of 1,000 tokens with these losses per token."""
    for entry, found in zip(results["models"], losses, strict=True):
        entry["evaluation"]["sliding"]["documents"] = {
            "num_tokens": [1000] * len(found),
            "total_nll": [1000 * loss for loss in found],
        }


def test_models_are_compared_in_pairs_by_document(results):
    hard = [3.0, 4.0, 5.0, 4.5, 3.5, 5.5]
    # Documents differ by far more than models do, but infini gains about a tenth of a nat on each.
    share_documents(results, hard, [loss - 0.1 - 0.002 * place for place, loss in enumerate(hard)])
    said = compare(results)
    assert re.search(r"from pythia is -10.0% \[-10.\d%, -9.\d%\] \(95% interval over 6 documents, paired by doc", said)
    assert "more than chance explains" in said
    share_documents(results, hard, [loss + 0.5 * (-1) ** place for place, loss in enumerate(hard)])
    assert "chance could explain it, so read it as a tie" in compare(results)


def test_several_seeds_are_paired_by_seed_and_document(results):
    """A gain on one document in six is no gain on others, however alike the seeds are."""
    hard = [3.0, 4.0, 5.0, 4.5, 3.5, 5.5]
    for gains, words in (
        ([0.1] * 6, "only an indication: a claim needs 5 seeds"),
        ([0.6] + [0.0] * 5, "read it as a tie (a diff"),
    ):
        seeds = [make_seed(results, seed, {"pythia": 1.0, "infini": 0.9 + 0.001 * seed}) for seed in range(3)]
        for seed, one in enumerate(seeds):
            losses = [loss + 0.2 * seed for loss in hard]  # a seed's own mean is no difference between models
            share_documents(one, losses, [loss - gain for loss, gain in zip(losses, gains, strict=True)])
        said = compare(*seeds)
        assert "(95% interval over 3 seeds and 6 documents, paired by seed and document)" in said
        assert words in said
    for one in seeds:
        share_documents(one, [3.0], [2.9])
    said = compare(*seeds)
    assert "3 seeds and 1 document: too few for an interval." in said
    assert "[" not in said


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("data", "source_fingerprint"), "other", "different texts"),
        (("data", "tokenizer", "fingerprint"), "other", "different tokenizers"),
        (("data", "split_fingerprint"), "other", "different validation documents"),
        (("models", 0, "evaluation", "sliding", "context"), 512, "their context differs"),
    ],
)
def test_models_of_different_measurements_are_not_ranked(results, path, value, words):
    one, two = pick(results, "pythia"), pick(results, "infini")
    set_at(two, path, value)
    said = compare(one, two)
    assert said.startswith("These models can't be ranked by sliding-window perplexity: ")
    assert words in said


def measure_long(results: dict[str, Any], *worths: float, cache: float = 0.0) -> None:
    """Six long documents: what the memory of each model is worth, in nats, and what a cache is."""
    hard = [4.0, 4.2, 3.8, 4.1, 4.4, 3.9]
    for entry, worth in zip(results["models"], worths, strict=True):
        losses = [loss + worth for loss in hard]
        carried = {"value": math.exp(sum(losses) / 6), "low": None, "high": None}
        ways = {"carried": 0.0, "reset": worth, "foreign": worth / 2}
        entry["evaluation"]["long"] = {
            "num_documents": 6,
            "confidence": 0.95,
            "overall": {"perplexity": {"carried": carried}, "differences": {}},
            "ranges": [],
            "range_starts": [0],
            "documents": [
                {
                    "num_tokens": {way: [10] for way in ways},
                    "total_nll": {way: [10 * (one - ways[way])] for way in ways},
                }
                for one in losses
            ],
        }
        if cache:
            totals = [{"bare": [10 * one], "+ 2,000 states": [10 * (one + cache)]} for one in losses]
            entry["evaluation"]["caches"] = {
                "caches": [{"name": "bare"}, {"name": "+ 2,000 states"}],
                "range_starts": [0],
                "documents": [{"num_tokens": [10], "total_nll": total} for total in totals],
            }


def test_the_headline_says_what_the_memory_is_worth_and_against_what(results):
    measure_long(results, 0.0, -0.1)
    said = compare(results)
    assert said.startswith(
        "On 6 long held-out documents, infini's memory lowers perplexity by 9.5 % [9.5, 9.5] against an empty one and "
        "by 4.9 % [4.9, 4.9] against another document's. Its perplexity is 9.5 % [9.5, 9.5] below that of pythia, "
    )
    assert "has the lowest sliding-window perplexity" in said
    measure_long(results, 0.0, 0.02, cache=-0.3)
    said = compare(results)
    assert "infini's memory raises perplexity by 2.0 %" in said
    assert "Against pythia with a cache of 2,000 states, which needs no training, it is 37.7 % [37.7, 37.7] ab" in said


def test_too_few_documents_and_no_memory_are_no_answer(four_models):
    results = pick(four_models, "pythia")
    measure_long(results, 0.0)
    assert "memory" not in compare(results)
    results = pick(four_models, "infini")
    measure_long(results, -0.1)
    del results["models"][0]["evaluation"]["long"]["documents"][4:]
    assert "9.5 % (no interval: too few documents or seeds) against an empty one" in compare(results)
