"""Charts of perplexity: where the models stand, and what they gain from the tokens before."""

from collections.abc import Sequence
from typing import Any

from new_llm.formats import format_number
from new_llm.report.line_chart import Axis, Curve, draw_lines
from new_llm.report.outcome import mean_unigram
from new_llm.report.points import MAX_VALUE, Point, average, get_perplexity, shorten
from new_llm.report.results import get_entries, get_finite
from new_llm.report.runs import Run
from new_llm.report.scale import make_scale
from new_llm.report.series import Series
from new_llm.report.svg import WIDTH, Canvas, Chart, View

ROW, FOOT = 50.0, 46.0
MAX_NAME = 40
EDGE = 60.0  # room right of the greatest value


def plot_overview(series: Sequence[Series], runs: Sequence[Run]) -> Chart | None:
    """Where the models stand between perfect prediction and token frequencies alone."""
    rows: list[tuple[Series, dict[str, list[float]]]] = []
    for one in series:
        found = {key: one.collect("evaluation", key, "perplexity") for key in ("sliding", "streaming")}
        values = {key: [v for v in some if 1 <= v <= MAX_VALUE] for key, some in found.items()}
        if any(values.values()):
            rows.append((one, {key: some for key, some in values.items() if some}))
    if not rows:
        return None
    unigram = mean_unigram(runs)
    unigram = unigram if unigram is not None and 1 <= unigram <= MAX_VALUE else None
    known = [value for _, values in rows for some in values.values() for value in some] + ([unigram] if unigram else [])
    said = [f"{one.name} {_mean_text(values.get('sliding'))}" for one, values in rows]
    alt = f"Validation perplexity: {', '.join(said)}" + (f"; unigram {format_number(unigram)}." if unigram else ".")
    canvas = Canvas(height=ROW * len(rows) + FOOT, left=10.0, right=WIDTH - EDGE, top=0.0, bottom=ROW * len(rows))
    across = make_scale(known, canvas.left, canvas.right, log=True, low=min(known) / 1.3, high=max(known) * 1.05)
    for value, text in across.ticks:
        canvas.line(across(value), 0, across(value), canvas.bottom, "grid")
        canvas.text(across(value), canvas.bottom + 18, text, anchor="middle")
    canvas.text(WIDTH / 2, canvas.height - 4, "perplexity", anchor="middle")
    if unigram:
        canvas.line(across(unigram), 0, across(unigram), canvas.bottom, "level")
    for place, (one, values) in enumerate(rows):
        top = place * ROW
        canvas.open_series(one.index)
        canvas.text(canvas.left, top + 17, shorten(one.name, MAX_NAME), kind="name")
        for protocol, kind in (("streaming", "ring"), ("sliding", "mark")):
            if protocol in values:
                point = average(0.0, values[protocol])
                tip = f"{one.name}, {protocol}: {format_number(point.y)}"
                if point.low is not None and point.high is not None:
                    canvas.line(across(point.low), top + 32, across(point.high), top + 32, "line")
                    tip += f", seeds {format_number(point.low)} – {format_number(point.high)}"
                canvas.mark(one.index, across(point.y), top + 32, size=14, kind=kind, tip=tip)
        right = max(across(max(some)) for some in values.values())
        canvas.text(right + 13, top + 37, _mean_text(values.get("sliding"), 3), kind="value")
        canvas.close()
    signs = (
        (("dot", "sliding window"), any("sliding" in values for _, values in rows)),
        (("ring", "streaming"), any("streaming" in values for _, values in rows)),
        (("dash", f"unigram, {format_number(unigram, 3)}"), unigram is not None),
    )
    return Chart(
        "overview",
        "Where the models stand",
        (View(canvas.to_svg(alt)),),
        "Further left is better. The unigram guesses each token by its frequency alone: a model near it has learned "
        "little.",
        tuple(one.index for one, _ in rows),
        tuple(sign for sign, is_shown in signs if is_shown),
    )


def _mean_text(values: list[float] | None, digits: int = 4) -> str:
    return format_number(sum(values) / len(values) if values else None, digits)


def plot_positions(series: Sequence[Series]) -> Chart | None:
    """Perplexity by the token's position in its sample."""
    measured = [(one, _read_ranges(one)) for one in series]
    spans = sorted({span for _, ranges in measured for span in ranges})
    if not spans:
        return None
    curves: list[Curve] = []
    for one, ranges in measured:
        points = [average(float(spans.index(span)), ranges[span]) for span in sorted(ranges)]
        if points:
            curves.append(Curve(one.index, one.name, points))
    said = " ".join(f"{c.name}: {_say(c.points[0])} first, {_say(c.points[-1])} last." for c in curves)
    x = Axis("position in the sample, tokens", names=tuple(f"{start:g}–{end:g}" for start, end in spans))
    view = draw_lines(curves, x, Axis("perplexity", log=None), f"Perplexity by position in the sample. {said}")
    return Chart(
        "positions",
        "Perplexity by position",
        (view,),
        "A line that keeps falling is a model that uses what it read before. Where models cut text into segments, "
        "tokens beyond the first segment can gain from earlier ones through memory alone.",
        tuple(curve.series for curve in curves if curve.series is not None),
    )


def _say(point: Point) -> str:
    return format_number(point.y, 3)


def _read_ranges(one: Series) -> dict[tuple[float, float], list[float]]:
    ranges: dict[tuple[float, float], list[float]] = {}
    for member in one.members:
        for item in get_entries(member.entry, "evaluation", "positions", "ranges"):
            start, end = get_finite(item, "start"), get_finite(item, "end")
            value: Any = get_perplexity(item, "perplexity")
            if start is not None and end is not None and value is not None:
                ranges.setdefault((start, end), []).append(value)
    return ranges
