from typing import Any

import pytest
from report_runs import make_results, make_seed

from new_llm.report.outcome import describe_outcome, describe_series
from new_llm.report.runs import Run
from new_llm.report.series import group_series


def outcome(*perplexities: float | None, unigram: float | None = 530.0, error: float | None = 0.5) -> str:
    models = [
        {
            "model_type": name,
            "evaluation": {"sliding": {"perplexity": value, "standard_error": error}},
        }
        for name, value in zip(("pythia", "infini", "multi_memory"), perplexities, strict=False)
    ]
    said = describe_outcome({"models": models, "unigram_perplexity": unigram})
    return " ".join([said.headline, *said.caveats])


def test_the_headline_names_the_best_and_by_how_much():
    assert outcome(80.0, 76.0).startswith(
        "infini has the lowest validation perplexity: 76.00, 5.0% below pythia (80.00)."
    )
    assert outcome(80.0, 84.0).startswith("pythia has the lowest validation perplexity: 80.00, 4.8% below infini")
    assert "2.6% below infini (78.00) and 5.0% below pythia (80.00)" in outcome(80.0, 78.0, 76.0)


def test_the_headline_claims_no_more_than_was_measured():
    assert "The gap is 5.7 standard errors" in outcome(80.0, 76.0)
    assert "read it as a tie" in outcome(80.0, 79.0)
    assert "have the same validation perplexity" in outcome(80.0, 80.01)
    assert "standard error" not in outcome(80.0, 76.0, error=None)
    for said in (outcome(80.0, 76.0), outcome(80.0, 79.0), outcome(80.0, 80.0), outcome(80.0)):
        assert "spread between seeds is unmeasured" in said
    assert "No model beats the unigram perplexity" in outcome(600.0, 700.0)
    assert outcome(None, float("nan")).startswith("No model has been evaluated")
    assert "Not evaluated: pythia." in outcome(float("inf"), 76.0)


def compare(*runs: dict[str, Any]) -> str:
    found = [Run(results) for results in runs]
    said = describe_series(group_series(found), found)
    return " ".join([said.headline, *said.caveats])


def test_a_gap_beyond_the_seeds_spread_is_told_from_one_within():
    # Both models move together from seed to seed: in pairs their gap is nearly constant, 83.93 − 78.26 = 5.67.
    together = [make_seed(seed, {"pythia": 1 + 0.1 * seed, "infini": 1 + 0.1 * seed}) for seed in range(3)]
    said = compare(*together)
    assert said.startswith("infini has the lowest validation perplexity: 86.08, 6.8% below pythia (92.32).")
    assert "3 seeds in pairs): it exceeds the spread between seeds." in said
    assert "Figures are means over 3 seeds a model." in said
    apart = [make_seed(seed, {"pythia": 1 + 0.1 * seed, "infini": 1.2 - 0.1 * seed}) for seed in range(3)]
    assert "it does not exceed the spread between seeds, so read it as a tie" in compare(*apart)


def test_seeds_with_huge_perplexities_are_no_error():
    runs = [make_seed(seed, {"pythia": 1e306, "infini": 1.0}) for seed in range(2)]
    assert "too large to compare seeds" in compare(*runs)


def test_seeds_that_are_not_shared_are_not_paired():
    runs = [make_seed(seed, {"pythia": 1 + 0.001 * seed}) for seed in (0, 1)]
    runs += [make_seed(seed, {"infini": 1 + 0.001 * seed}) for seed in (2, 3)]
    assert "2 and 2 seeds, not in pairs): it exceeds" in compare(*runs)
    assert "infini was trained with one seed, so whether" in compare(*runs[:3])


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("data", "source_fingerprint"), "other", "different texts"),
        (("data", "tokenizer", "fingerprint"), "other", "different tokenizers"),
        (("data", "split_fingerprint"), "other", "different validation documents"),
        (("models", 0, "evaluation", "sliding", "context"), 512, "their context differs"),
    ],
)
def test_models_of_different_measurements_are_not_ranked(path: tuple[Any, ...], value: Any, words: str):
    one, two = make_results("pythia"), make_results("infini")
    entry: Any = two
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    said = compare(one, two)
    assert said.startswith("These models can't be ranked by perplexity: ")
    assert words in said
