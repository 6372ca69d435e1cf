"""Charts of evaluations made after training: long documents by distance, recall by depth and length."""

from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from new_llm.formats import WAYS, format_number, name_range
from new_llm.report.line_chart import Axis, Curve, draw_lines
from new_llm.report.points import MAX_VALUE, Point, get_between
from new_llm.report.results import compute_mean, get_entries, get_finite, get_value
from new_llm.report.series import Series
from new_llm.report.svg import Chart, View

CARRIED, RESET = "carried", "reset"
WAY_KINDS = {CARRIED: "line", RESET: "dash", "foreign": "dots"}
BASELINE_KINDS = ("thin", "thin dash", "thin dots")
FIGURES = {"exact": "greedy exact match", "first": "right answer ranked first", "mean_rank": "mean rank"}
TASKS = {"passkey": "pass key", "facts": "invented facts"}
MAX_CELLS = 40  # rows or columns of a heat map

Record = dict[str, Any]
Span = tuple[float, float]
Text = tuple[str, str]
"""A text's name for readers, and its source."""


def find_records(one: Series, kind: str) -> dict[Text, list[Record]]:
    """By text: the newest whole record of each member, or the newest partial one where no whole one is."""
    found: dict[Text, list[Record]] = {}
    for member in one.members:
        newest: dict[Text, Record] = {}
        for record in member.run.evaluations:
            if record.get("kind") == kind and get_value(record, "subject", "model") == member.entry.get("model_type"):
                text = (name_text(record), str(get_value(record, "text", "source")))
                is_worse = newest.get(text, {}).get("status") == "complete" and record.get("status") != "complete"
                if not is_worse:
                    newest[text] = record
        for text, record in newest.items():
            found.setdefault(text, []).append(record)
    return found


def name_text(record: Record) -> str:
    """What was read, in a few words."""
    text = get_value(record, "text")
    source = str(get_value(text, "source") or "text of its own")
    name = PurePath(source).name or source
    split = get_value(text, "split")
    return f"{name}, {split}" if isinstance(split, str) and split not in name else name


def plot_distances(series: Sequence[Series]) -> list[Chart]:
    """For each text: what the carried memory is worth, and the perplexities of each model."""
    by_series = [(one, find_records(one, "long")) for one in series]
    texts = list(dict.fromkeys(text for _, found in by_series for text in found))
    charts: list[Chart] = []
    for number, text in enumerate(texts):
        measured = [(one, found[text]) for one, found in by_series if text in found]
        worth = plot_worth(measured, text[0], f"distance-{number}")
        single = [plot_distance(one, records, text[0], f"distance-{number}-{one.index}") for one, records in measured]
        charts += [chart for chart in (worth, *single) if chart is not None]
    return charts


def plot_worth(measured: Sequence[tuple[Series, list[Record]]], text: str, name: str) -> Chart | None:
    """Perplexity with the memory carried against each other way, in percent, a view a way."""
    ways = [
        way
        for _, records in measured
        for record in records
        for entry in _ranges(record)
        for way in _keys(entry, "differences")
    ]
    views: list[View] = []
    for way in dict.fromkeys(ways):
        read = _read_relative(way)
        spans = _list_spans([record for _, records in measured for record in records], read)
        curves = [Curve(one.index, one.name, _points(records, spans, read)) for one, records in measured]
        curves = [curve for curve in curves if curve.points]
        if curves:
            title = f"carried against {WAYS.get(way, way)}, %"
            alt = f"Perplexity on {text}, {title}, by distance. {_say_curves(curves)}"
            x = Axis("distance from the document's start, tokens", names=_names(spans))
            views.append(
                draw_lines(curves, x, Axis(title, say="percent"), alt, label=WAYS.get(way, way), level=(0.0, ""))
            )
    if not views:
        return None
    return Chart(
        name,
        f"What the memory is worth: {text}",
        tuple(views),
        "Perplexity with the memory carried along each document, against another way on the same tokens: below 0 the "
        f"carried memory is better. {_describe_bands([record for _, records in measured for record in records])}",
        tuple(one.index for one, _ in measured),
        switch="compared with",
    )


def plot_distance(one: Series, records: list[Record], text: str, name: str) -> Chart | None:
    """Perplexity of each way and baseline by distance."""
    ways = list(
        dict.fromkeys(way for record in records for entry in _ranges(record) for way in _keys(entry, "perplexity"))
    )
    spans = _list_spans(records, _read_perplexity(CARRIED))
    curves: list[Curve] = []
    signs: list[tuple[str, str]] = []
    num_baselines = 0
    for way in ways:
        points = _points(records, spans, _read_perplexity(way))
        if not points:
            continue
        words = WAYS.get(way, way)
        if way in WAY_KINDS:
            points = points if way == CARRIED else [Point(p.x, p.y) for p in points]  # one band stands for all
            curves.append(Curve(one.index, words, points, WAY_KINDS[way], is_marked=way == CARRIED))
            signs.append(("stroke" if way == CARRIED else WAY_KINDS[way], words))
        else:
            kind = BASELINE_KINDS[num_baselines % len(BASELINE_KINDS)]
            curves.append(Curve(None, words, [Point(p.x, p.y) for p in points], kind))
            signs.append((kind, words))
            num_baselines += 1
    if not curves:
        return None
    alt = f"Perplexity of {one.name} on {text} by distance from the start. {_say_curves(curves)}"
    x = Axis("distance from the document's start, tokens", names=_names(spans))
    view = draw_lines(curves[::-1], x, Axis("perplexity", log=None), alt)
    documents = get_finite(records[0], "result", "num_documents")
    tokens = get_finite(records[0], "result", "num_tokens")
    size = f"{documents:,.0f} documents, {tokens:,.0f} tokens. " if documents is not None and tokens is not None else ""
    partial = "Interrupted: what had been measured by then. " if records[0].get("status") == "partial" else ""
    return Chart(
        name,
        f"Long documents, {one.name}: {text}",
        (view,),
        f"{partial}{size}A range holds the documents that reach it. {_describe_bands(records)}",
        (one.index,),
        tuple(signs),
    )


def _ranges(record: Record) -> list[dict[str, Any]]:
    return get_entries(record, "result", "ranges")


def _keys(entry: dict[str, Any], key: str) -> list[str]:
    found = entry.get(key)
    return list(found) if isinstance(found, dict) else []


def _read_perplexity(way: str) -> Callable[[dict[str, Any]], Point | None]:
    return lambda entry: _read_point(get_value(entry, "perplexity", way), 1.0, 1.0)


def _read_relative(way: str) -> Callable[[dict[str, Any]], Point | None]:
    return lambda entry: _read_point(get_value(entry, "differences", way, "relative"), 100.0, -MAX_VALUE)


def _read_point(found: Any, scale: float, least: float) -> Point | None:
    value, low, high = (get_between(least, MAX_VALUE, found, key) for key in ("value", "low", "high"))
    if value is None:
        return None
    if low is None or high is None:
        return Point(0.0, scale * value)
    return Point(0.0, scale * value, scale * low, scale * high)


def _span(entry: dict[str, Any]) -> Span | None:
    start, end = get_finite(entry, "start"), get_finite(entry, "end")
    return None if start is None else (start, float("inf") if end is None else end)


def _list_spans(records: Sequence[Record], read: Callable[[dict[str, Any]], Point | None]) -> list[Span]:
    return sorted({span for record in records for entry in _ranges(record) if (span := _span(entry)) and read(entry)})


def _names(spans: Sequence[Span]) -> tuple[str, ...]:
    return tuple(
        name_range({"start": int(start), "end": None if end == float("inf") else int(end)}) for start, end in spans
    )


def _points(
    records: Sequence[Record], spans: list[Span], read: Callable[[dict[str, Any]], Point | None]
) -> list[Point]:
    """The mean of the seeds with their range, or one record's value with its interval."""
    places: dict[Span, list[Point]] = {}
    for record in records:
        for entry in _ranges(record):
            span, point = _span(entry), read(entry)
            if span in spans and point is not None:
                places.setdefault(span, []).append(point)
    points: list[Point] = []
    for place, span in enumerate(spans):
        found = places.get(span, [])
        if len(found) == 1:
            points.append(found[0]._replace(x=float(place)))
        elif found:
            ys = [point.y for point in found]
            points.append(Point(float(place), compute_mean(ys), min(ys), max(ys)))
    return points


def _describe_bands(records: Sequence[Record]) -> str:
    if not records:
        return ""
    confidence = get_finite(records[0], "result", "confidence")
    share = f"{100 * confidence:g}% " if confidence is not None else ""
    return f"Bands: {share}intervals over documents; of several seeds, from the lowest to the highest."


def _say_curves(curves: Sequence[Curve]) -> str:
    return " ".join(
        f"{c.name}: {format_number(c.points[0].y, 3)} first, {format_number(c.points[-1].y, 3)} last." for c in curves
    )
