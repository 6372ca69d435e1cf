"""Charts as data: a Vega-Lite specification and the rows that it plots.

Measures build charts here; `new_llm.report.figures` renders them as SVG or PNG, and `Chart.to_csv` returns the numbers.
Rows are copied under fixed field names, so that text from files is always a value and never part of the specification.

Every chart function takes

- name: for its files; title; caption.
- rows, and the names of their columns: `x`, `y`, `series` (which line or bar a row belongs to; None: there is only
  one), `low` and `high` (the ends of an interval).
- y_format: how values are printed, in d3's format language, e.g. ".1%".
- reference: the value at which to draw a dashed line.
- view: the label by which the page switches between charts with the same title.

Rows that can't be drawn (missing, not finite, ≤ 0 on a logarithmic axis) are left out. Several rows with the same x and
series, e.g. a model's seeds, become their mean with a band from the lowest to the highest.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's colours, darkened for contrast on white. The report replaces them with CSS variables for its themes.
PALETTE = ("#0072b2", "#d55e00", "#008f68", "#aa4499", "#a06f00", "#3f8fc4", "#59636d")
INK, MUTED, GRID, HEAT, HEAT_INK = "#1d2329", "#5c6670", "#e6e8ea", "#0b5c99", "#fefefe"
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "stroke")

WIDTH, HEIGHT = 480, 260
BAR_STEP, CELL_STEP = 24, 30
MAX_MARKED = 40  # a series with more points has no visible marks and about MAX_TOOLTIPS invisible ones for tooltips
MAX_TOOLTIPS = 24
MAX_LABELLED_CELLS, MAX_LABELLED_COLUMNS = 150, 12
MAX_VARIETIES = 12  # with more varieties than this, a point chart names them in tooltips only
MAX_LABEL, LETTER_WIDTH = 220, 8.6

Row = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A chart and the numbers behind it.

    Attributes:
        name: for its files; converted to lower-case letters, digits and hyphens.
        title: what it shows, in a few words.
        caption: how to read it, and what can be concluded.
        spec: the Vega-Lite specification, data included.
        rows: the plotted numbers, for the CSV file.
        view: this chart's label. Charts with the same title are views of one figure; the page switches between them.
        is_log: whether the y-axis is logarithmic.
        other: the specification with the other y-scale (linear or logarithmic); None if there is only one scale.
    """

    name: str
    title: str
    caption: str
    spec: dict[str, Any]
    rows: list[Row]
    view: str = ""
    is_log: bool = False
    other: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        # Names may contain the name of a model or a text, with any characters.
        object.__setattr__(self, "name", re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:80] or "chart")

    def to_csv(self) -> str:
        """Return the rows as CSV with a header."""
        text = io.StringIO()
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """Return the specification for Jupyter, which renders Vega-Lite itself."""
        return {"application/vnd.vegalite.v5+json": self.spec, "text/plain": f"{self.title}: {len(self.rows)} rows"}


@dataclass(frozen=True)
class ShadedToken:
    """A token's text, the value that shades it (above 0: the memory helped) and the details shown on hover."""

    text: str
    value: float
    details: list[tuple[str, str]]


@dataclass(frozen=True)
class ShadedText:
    """A passage whose tokens are shaded by a value, or several continuations of a prompt.

    Attributes:
        title: what the text is.
        before: unshaded text before the passage, or the prompt.
        tokens: the passage's tokens, in order.
        versions: (label, text) of each continuation.
        view: the name that groups texts, e.g. a model's.
    """

    title: str
    before: str
    tokens: Sequence[ShadedToken] = ()
    versions: Sequence[tuple[str, str]] = ()
    view: str = ""


def line_chart(
    name: str,
    title: str,
    caption: str,
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    series: str | None = None,
    low: str | None = None,
    high: str | None = None,
    x_title: str = "",
    y_title: str = "",
    y_log: bool = False,
    y_format: str = "",
    reference: float | None = None,
    view: str = "",
) -> Chart:
    """Draw one line per series, with a band where rows have an interval. `x` holds numbers, or text in row order."""
    is_ordinal = any(isinstance(row.get(x), str) for row in rows)
    found = []
    for row in rows:
        height = _number(row.get(y), is_log=y_log)
        place = str(row.get(x)) if is_ordinal else _number(row.get(x))
        if height is not None and place is not None:
            ends = _find_ends(row, low, high, is_log=y_log)
            found.append({"x": place, "y": height, "series": _name(row, series), **ends})
    drawn = _average(found, ("series", "x"))
    for point in drawn:
        where = point["x"] if is_ordinal else _say(point["x"])
        point["tip"] = f"{point['series']}: " * (series is not None) + _say_value(point, y_format)
        point["tip"] += f" at {where} {x_title}".rstrip()
    lines: dict[str, list[Row]] = {}
    for point in drawn:
        lines.setdefault(point["series"], []).append(point)
    for own in lines.values():
        step = 1 if len(own) <= MAX_MARKED else math.ceil(len(own) / MAX_TOOLTIPS)
        for place, point in enumerate(own):
            point["mark"] = (len(own) - 1 - place) % step == 0
    is_long = any(len(own) > MAX_MARKED for own in lines.values())
    across = _make_axis("x", x_title, [] if is_ordinal else [point["x"] for point in drawn])
    if is_ordinal:
        across |= {"type": "ordinal", "sort": None, "axis": {"labelAngle": 0}}
    marks = {"type": "point", "filled": True, "size": 50, "opacity": 0 if is_long else 1}
    shape = _encode_series([*lines], SHAPES, is_shown=series is not None)
    encoding = {"x": across, "color": _encode_series([*lines], PALETTE, is_shown=series is not None), **_TIP}

    def draw(is_log: bool) -> Row:
        up = _make_axis("y", y_title, [point["y"] for point in drawn], y_format, is_log=is_log)
        layers = _draw_intervals(drawn, {"y": up}, {"type": "area", "opacity": 0.15, "aria": False})
        layers += [] if reference is None else [_draw_reference("y", reference)]
        layers.append({"mark": {"type": "line", "strokeWidth": 2.2, "aria": False}, "encoding": {"y": up}})
        marked = {"transform": [{"filter": "datum.mark"}], "mark": marks, "encoding": {"y": up, "shape": shape}}
        return _make_spec(drawn, HEIGHT, encoding, [*layers, marked])

    has_log = y_log or (bool(drawn) and min(point.get("low", point["y"]) for point in drawn) > 0 and reference is None)
    other = draw(not y_log) if has_log else None
    return Chart(name, title, caption, draw(y_log), list(rows), view, y_log, other)


def point_chart(
    name: str,
    title: str,
    caption: str,
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    series: str,
    owner: str | None = None,
    low: str | None = None,
    high: str | None = None,
    x_title: str = "",
    y_title: str = "",
    x_log: bool = False,
    view: str = "",
) -> Chart:
    """Draw one numbered point per row, an error bar where the row has an interval, and a legend of names by number.

    A row whose `owner` is another row's name is a variety of it: a smaller point of the same colour, joined to the
    owner's point by a thin line and labelled with what its name adds. With many varieties, the labels appear only in
    tooltips. A logarithmic x-axis has base 10.
    """
    is_crowded = sum(bool(_name(row, owner)) for row in rows) > MAX_VARIETIES
    owners = list(dict.fromkeys(_name(row, owner) or _name(row, series) for row in rows))
    drawn: list[Row] = []
    known: dict[str, Row] = {}
    for row in rows:
        place, height = _number(row.get(x), is_log=x_log), _number(row.get(y))
        if place is None or height is None:
            continue
        named, owned = _name(row, series), _name(row, owner)
        number = str(owners.index(owned or named) + 1)
        point = {"x": place, "y": height, "number": number, "size": 70, **_find_ends(row, low, high, is_log=False)}
        if owned:
            point |= {"number": "" if is_crowded else named.removeprefix(owned).strip(" +"), "size": 25}
            point |= {"from_x": known[owned]["x"], "from_y": known[owned]["y"]} if owned in known else {}
        known[named] = point
        point["series"] = f"{number} {owned or named}"
        drawn.append(point | {"tip": f"{named}: {_say_value(point, '')} at {_say(place)} {x_title}"})
    places = {point["series"]: int(point["series"].split()[0]) - 1 for point in drawn}
    across = _make_axis("x", x_title, [point["x"] for point in drawn], "~s", is_log=x_log, padding=30)
    up = _make_axis("y", y_title, [point["y"] for point in drawn])
    layers: list[Row] = []
    if any("from_x" in point for point in drawn):
        ends = {"x": across | {"field": "from_x"}, "x2": {"field": "x"}, "y": up | {"field": "from_y"}}
        mark = {"type": "rule", "strokeWidth": 1, "opacity": 0.4, "aria": False}
        joined = {"transform": [{"filter": "isValid(datum.from_x)"}], "mark": mark}
        layers.append(joined | {"encoding": ends | {"y2": {"field": "y"}}})
    shown = {"transform": [{"filter": "datum.size > 25"}]}
    layers += [shown | layer for layer in _draw_intervals(drawn, {"y": up}, _RULE)]
    # Hollow marks remain visible where they overlap, and a filled "stroke" (the last shape) would be invisible.
    marks = {"type": "point", "filled": False, "strokeWidth": 2, "opacity": 1}
    size: Row = {"field": "size", "type": "quantitative", "scale": None, "legend": None}
    legend = {"legend": {"columns": 3, "orient": "bottom", "labelLimit": 220}}
    shape = _encode_series([*places], SHAPES, is_shown=True, places=places.values()) | legend
    layers.append({"mark": marks, "encoding": {"y": up, "shape": shape, "size": size}})
    text = {"type": "text", "align": "left", "baseline": "bottom", "dx": 6, "dy": -3, "aria": False}
    layers.append({"mark": text, "encoding": {"y": up, "text": {"field": "number"}, "color": {"value": INK}}})
    color = _encode_series([*places], PALETTE, is_shown=True, places=places.values()) | legend
    encoding = {"x": across, "color": color, **_TIP}
    spec = _make_spec(drawn, HEIGHT + 22 * -(-len(places) // 3), encoding, layers)
    return Chart(name, title, caption, spec, list(rows), view)


def bar_chart(
    name: str,
    title: str,
    caption: str,
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    series: str | None = None,
    low: str | None = None,
    high: str | None = None,
    y_title: str = "",
    y_format: str = "",
    reference: float | None = None,
    is_dotted: bool = False,
    view: str = "",
) -> Chart:
    """Draw horizontal bars with their values beside them, or dots with intervals.

    `x` holds the labels. Without `series` each label has its own colour. `is_dotted` draws dots, on an axis that need
    not begin at zero.
    """
    found = []
    for row in rows:
        value = _number(row.get(y))
        if value is not None:
            place = {"label": _name(row, x), "series": _name(row, series or x)}
            found.append(place | {"y": value, **_find_ends(row, low, high, is_log=False)})
    drawn = _average(found, ("label", "series"))
    for bar in drawn:
        bar["text"] = _format(bar["y"], y_format)
        what = bar["label"] if series is None else f"{bar['label']}, {bar['series']}"
        bar["tip"] = f"{what}: {_say_value(bar, y_format)} {y_title}".rstrip()
        bar["end"] = bar["y"] if is_dotted else bar.get("high", bar["y"])
    names = list(dict.fromkeys(bar["series"] for bar in drawn))
    labels = list(dict.fromkeys(bar["label"] for bar in drawn))
    across = _make_axis("y", y_title, [bar["y"] for bar in drawn], y_format, zero=not is_dotted, padding=24)
    down: Row = {"field": "label", "type": "nominal", "sort": None, "title": None, "scale": {"paddingInner": 0.3}}
    color = _encode_series(names, PALETTE, is_shown=series is not None)
    encoding: Row = {"y": down | {"axis": _make_room(labels)}, "color": color, **_TIP}
    if series is not None:
        encoding["yOffset"] = {"field": "series", "sort": names}
    mark = {"type": "point", "filled": True, "size": 90, "opacity": 1} if is_dotted else {"type": "bar"}
    layers: list[Row] = [] if reference is None else [_draw_reference("x", reference)]
    layers.append({"mark": mark, "encoding": {"x": across}})
    layers += _draw_intervals(drawn, {"x": across, "color": {"value": INK}}, _RULE)
    text = {"type": "text", "align": "left", "baseline": "middle", "dx": 8, "dy": -9 if is_dotted else 0, "aria": False}
    beside = {"x": across | {"field": "end"}, "text": {"field": "text"}, "color": {"value": INK}}
    layers.append({"mark": text, "encoding": beside})
    height = BAR_STEP * len(labels) * (1 if series is None else max(1, len(names))) + 80
    return Chart(name, title, caption, _make_spec(drawn, height, encoding, layers), list(rows), view)


def heat_chart(
    name: str,
    title: str,
    caption: str,
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    value: str,
    x_title: str = "",
    value_title: str = "",
    value_format: str = "",
    low: float | None = None,
    high: float | None = None,
    view: str = "",
) -> Chart:
    """Draw a heat map: one cell per row of the data, shaded by `value`.

    `low` is the value with the weakest shade and `high` the one with the strongest; None: the smallest and largest.
    """
    known = ((row, _number(row.get(value))) for row in rows)
    found = [{"x": _name(row, x), "column": _name(row, y), "y": shown} for row, shown in known if shown is not None]
    drawn = _average(found, ("x", "column"))
    values = [cell["y"] for cell in drawn]
    least = min(values, default=0.0) if low is None else low
    most = max(values, default=1.0) if high is None else high
    span = most / 2 - least / 2 or 0.5  # halved, because the difference of two huge numbers overflows
    for cell in drawn:
        share = min(1.0, max(0.0, (cell["y"] / 2 - least / 2) / span))
        # Cells differ in opacity only, so that a theme can replace their one colour.
        cell |= {"shade": 0.06 + 0.94 * share, "ink": HEAT_INK if share > 0.5 else INK}
        cell["text"] = _format(cell["y"], value_format)
        cell["tip"] = f"{cell['column']}, {x_title} {cell['x']}: {value_title} {cell['text']}"
    axis = {"type": "ordinal", "sort": None, "scale": {"paddingInner": 0.06}}
    labels = {"labelAngle": 0, "labelOverlap": "greedy", "labelSeparation": 6}
    across = axis | {"field": "x", "title": x_title or None, "axis": labels}
    down = axis | {"field": "column", "title": None, "axis": _make_room([cell["column"] for cell in drawn])}
    shade = {"fillOpacity": {"field": "shade", "type": "quantitative", "scale": None}, "color": {"value": HEAT}}
    layers: list[Row] = [{"mark": {"type": "rect"}, "encoding": shade}]
    if len(drawn) <= MAX_LABELLED_CELLS and len({cell["x"] for cell in drawn}) <= MAX_LABELLED_COLUMNS:
        ink = {"field": "ink", "type": "nominal", "scale": None}
        layers.append({"mark": {"type": "text", "aria": False}, "encoding": {"text": {"field": "text"}, "color": ink}})
    height = CELL_STEP * len({cell["column"] for cell in drawn}) + 80
    spec = _make_spec(drawn, height, {"x": across, "y": down, **_TIP}, layers)
    return Chart(name, title, caption, spec, list(rows), view)


_TIP = {"description": {"field": "tip"}}
_RULE = {"type": "rule", "strokeWidth": 1.3, "aria": False}

_CONFIG: Row = {
    "font": "Liberation Sans, Arial, Helvetica, sans-serif",
    "background": "#ffffff",
    "view": {"stroke": None},
    "axis": {
        "domainColor": MUTED,
        "gridColor": GRID,
        "labelColor": MUTED,
        "labelFontSize": 12,
        "labelLimit": MAX_LABEL,
        "tickColor": GRID,
        "titleColor": MUTED,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
    },
    # A horizontal title above the y-axis is easier to read, and leaves room for larger labels on a phone.
    "axisY": {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "start", "titleX": -30, "titleY": -12},
    "legend": {
        "orient": "top",
        "title": None,
        "labelColor": INK,
        "labelFontSize": 12,
        "labelLimit": 240,
        "offset": 26,
        "symbolOpacity": 1,
    },
    "text": {"fontSize": 12},
}


def _make_spec(values: list[Row], height: int, encoding: Row, layers: list[Row]) -> Row:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": WIDTH,
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        "padding": {"left": 8, "top": 6, "right": 12, "bottom": 6},
        "data": {"values": values},
        "encoding": encoding,
        "layer": layers,
        "config": _CONFIG,
    }


def _encode_series(
    names: Sequence[str], options: Sequence[str], *, is_shown: bool, places: Iterable[int] | None = None
) -> Row:
    """Give each series the colour or shape at its place in the options; None: the places are 0, 1, 2, …."""
    chosen = [options[place % len(options)] for place in (range(len(names)) if places is None else places)]
    scale = {"domain": list(names), "range": chosen}
    columns = max(1, min(4, int(WIDTH / (40 + LETTER_WIDTH * max(map(len, names), default=0)))))
    return {"field": "series", "type": "nominal", "scale": scale, "legend": {"columns": columns} if is_shown else None}


def _draw_reference(axis: str, value: float) -> Row:
    """A dashed reference line, outside the chart's data and legend."""
    mark = {"type": "rule", "color": MUTED, "strokeDash": [5, 4], "aria": False}
    encoding: Row = {axis: {"datum": value}, "color": {"value": MUTED}, "description": {"value": None}}
    encoding |= {"y": None, "yOffset": None} if axis == "x" else {"x": None}
    return {"data": {"values": [{"level": value}]}, "mark": mark, "encoding": encoding}


def _draw_intervals(drawn: list[Row], encoding: Row, mark: Row) -> list[Row]:
    """Draw each interval as a mark along the first axis of the encoding, if any row has one."""
    axis, *_ = encoding
    ends = encoding | {axis: encoding[axis] | {"field": "low"}, f"{axis}2": {"field": "high"}}
    return [{"mark": mark, "encoding": ends}] if any("low" in row for row in drawn) else []


def _make_axis(
    field: str, title: str, values: list[float], format_spec: str = "", *, is_log: bool = False, **scale: Any
) -> Row:
    """A numeric axis with about five ticks; a long logarithmic one has them at powers of ten, or also at 2 and 5."""
    default = ",~r" if is_log else "~s" if max(map(abs, values), default=0) >= 10_000 else ",~g"
    ticks: Row = {"tickCount": 5}
    if is_log and values and max(values) >= 5 * min(values):
        first, last = (math.floor(math.log10(end)) for end in (min(values), max(values)))
        powers, steps = range(first, last + 2, 1 + (last - first) // 6), (1, 2, 5) if last - first < 3 else (1,)
        ticks = {"values": [step * 10.0**power for power in powers for step in steps]}
    kind: Row = {"type": "log", "base": 10, "nice": False} if is_log else {"zero": False}
    axis = ticks | {"labelExpr": f"format(datum.value, '{format_spec or default}')"}
    return {"field": field, "type": "quantitative", "title": title or None, "scale": kind | scale, "axis": axis}


def _make_room(labels: Sequence[str]) -> Row:
    """Reserve room left of the axis for the labels, in the larger letters of a narrow page."""
    return {"minExtent": min(MAX_LABEL, LETTER_WIDTH * max(map(len, labels), default=0))}


def _name(row: Row, key: str | None) -> str:
    return " ".join(str(row.get(key, "")).split()) if key is not None else ""


def _number(value: Any, *, is_log: bool = False) -> float | None:
    """The value as a float if it can be drawn, else None."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e300 < value < 1e300:
        return None
    return None if is_log and value <= 0 else float(value)


def _find_ends(row: Row, low: str | None, high: str | None, *, is_log: bool) -> Row:
    ends = [_number(row.get(end), is_log=is_log) if end is not None else None for end in (low, high)]
    return {"low": ends[0], "high": ends[1]} if None not in ends else {}


def _average(rows: list[Row], keys: tuple[str, ...]) -> list[Row]:
    """Average rows with equal keys, e.g. a model's seeds; the interval runs from the lowest to the highest."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    averaged = []
    for same in groups.values():
        heights = [row["y"] for row in same]
        ends = {"y": math.fsum(y / len(same) for y in heights), "low": min(heights), "high": max(heights)}
        averaged.append(same[0] if len(same) == 1 else same[0] | ends)
    return averaged


def _say_value(point: Row, format_spec: str) -> str:
    text = _format(point["y"], format_spec)
    if "low" in point:
        text += f" [{_format(point['low'], format_spec)}, {_format(point['high'], format_spec)}]"
    return text


def _format(value: float, format_spec: str) -> str:
    """Format a number as d3 would; Python reads the same format language."""
    return format(value, format_spec) if format_spec else _say(value)


def _say(value: float) -> str:
    """Four significant digits, thousands separated."""
    if value and not 1e-3 <= abs(value) < 1e9:
        return f"{value:.3e}"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
