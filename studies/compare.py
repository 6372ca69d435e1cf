"""Compare any two models of a study, paired by seed and document, as the pages of docs/experiments do.

    python studies/compare.py docs/experiments/novels/losses.json gated_delta-4-three/caches/bare pythia/caches/bare

prints the difference in perplexity, in percent, with its 95 % interval, and the number of seeds. If the interval
contains 0, it is followed by the smallest difference that would have been seen. For one or two seeds, each seed's
difference is printed, with an interval over documents only. To make the file from the folders of a study's runs:

    python studies/compare.py docs/experiments/novels/losses.json --collect runs/novels
"""

import argparse
import json
from pathlib import Path
from typing import Any

from new_llm.evaluation import MEASURES
from new_llm.evaluation.statistics import MIN_SEEDS, DocumentLosses, compare_models

Losses = dict[str, dict[str, dict[str, list[Any]]]]
FAR = 16_384  # losses from this many tokens after a document's beginning are also kept separately


def collect(folders: list[Path]) -> Losses:
    """Tokens and total loss of each document, by variant, seed and measurement; of several runs, the first counts."""
    found: Losses = {}
    for file in (path for folder in folders for path in sorted(folder.glob("*-s*/results.json"))):
        results = json.loads(file.read_text(encoding="utf-8"))
        variant, _, seed = file.parent.name.rpartition("-s")
        if results.get("status") != "complete" or seed in found.get(variant, {}):
            continue
        ways = found.setdefault(variant, {}).setdefault(seed, {})
        for kind in ("long", "caches"):
            measured = results["models"][0]["evaluation"].get(kind)
            for way, losses in MEASURES[kind].losses(measured).items() if measured else ():
                parts = {f"{kind}/{way}": losses}
                if FAR in losses.range_starts and way in ("bare", "+ all"):
                    parts[f"{kind}/{way} from {FAR:,}"] = losses.select(losses.range_starts.index(FAR))
                ways |= {name: keep(part) for name, part in parts.items()}
    return found


def keep(losses: DocumentLosses) -> list[Any]:
    """Tokens and total loss of each document, as plain values."""
    whole = losses.select(None)
    return [whole.num_tokens[:, 0].tolist(), whole.total_nll[:, 0].round(2).tolist()]


def write(losses: Losses, file: Path) -> None:
    file.write_text(json.dumps(losses, separators=(",", ":")) + "\n", encoding="utf-8")


def read(losses: Losses, name: str) -> dict[str, DocumentLosses]:
    """The losses of `variant/measure/way` by seed."""
    variant, _, way = name.partition("/")
    return {seed: DocumentLosses.read(*ways[way]) for seed, ways in losses[variant].items() if way in ways}


def compare(one: dict[str, DocumentLosses], other: dict[str, DocumentLosses]) -> str:
    """The difference over all common seeds; for fewer than `MIN_SEEDS`, each seed's own."""
    seeds = [seed for seed in one if seed in other]
    groups = [seeds] if len(seeds) >= MIN_SEEDS else [[seed] for seed in seeds]
    compared = (compare_models({seed: one[seed] for seed in group}, other) for group in groups)
    texts = [found.describe() if found else "other tokens" for found in compared]
    return f"{' · '.join(texts) or 'no common seed'} ({len(seeds)})".replace("-", "−")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the file of losses")
    parser.add_argument("models", nargs="*", help="two of VARIANT/MEASURE/WAY; none: list all")
    parser.add_argument("--collect", nargs="+", type=Path, metavar="RUNS", help="make the file from these run folders")
    given = parser.parse_args()
    if given.collect:
        if not (found := collect(given.collect)):
            parser.error(f"no complete run of a study in {', '.join(map(str, given.collect))}")
        write(found, given.file)
    try:
        losses: Losses = json.loads(given.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"{given.file}: can't read losses: {error}")
    known = {variant: sorted(set().union(*seeds.values())) for variant, seeds in losses.items()}
    for name in given.models:
        variant, _, way = name.partition("/")
        if way not in known.get(variant, ()):
            parser.error(f"{name}: not in the file; allowed are {', '.join(known.get(variant, known))}")
    if len(given.models) == 2:
        print(compare(*(read(losses, name) for name in given.models)))
    elif given.models:
        parser.error("compare two models, or give none to list all")
    else:
        for variant, ways in known.items():
            print(f"{variant}: seeds {', '.join(losses[variant])}: {', '.join(ways)}")


if __name__ == "__main__":
    main()
