"""Draw charts, as SVG in the page's colours or as files of their own; and define the charts of training."""

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import vl_convert

from new_llm import charts
from new_llm.charts import PALETTE, SHAPES, Chart, heat_chart, line_chart
from new_llm.config import UserError
from new_llm.config.files import read_address_limit, write_atomically, write_text_atomically
from new_llm.config.terminal import hide_home, make_printable
from new_llm.formats import format_bytes
from new_llm.report.results import Series, compute_mean, get_gates, get_value

PNG_SCALE = 2.0
ENGINE_BYTES = 80 * 10**9
"""Address space that Vega's JavaScript engine reserves, with some to spare."""
ENDINGS = (".svg", ".png", ".csv")
# The page's CSS variable for each colour of `new_llm.charts`.
VARIABLES = {color: f"--series-{place}" for place, color in enumerate(PALETTE)} | {
    charts.INK: "--ink",
    charts.MUTED: "--muted",
    charts.GRID: "--grid",
    charts.HEAT: "--heat",
    charts.HEAT_INK: "--heat-ink",
}


def find_obstacle() -> str | None:
    """Why charts can't be drawn here; None: they can. Without this check the drawing engine would end the process."""
    limit = read_address_limit()
    if limit is None or limit >= ENGINE_BYTES:
        return None
    return (
        f"charts can't be drawn: the drawing engine reserves {format_bytes(ENGINE_BYTES)} of address space (not of "
        f"memory), but this process is limited to {format_bytes(limit)} (ulimit -v)"
    )


def draw(spec: dict[str, Any]) -> str:
    """Draw a chart's specification as SVG; loads nothing, and hides home folders.

    Characters that XML does not allow, e.g. in names from other people's files, are escaped; they would crash the
    engine.
    """
    return hide_home(vl_convert.vegalite_to_svg(_make_texts_printable(spec), allowed_base_urls=[]))


def _make_texts_printable(value: Any) -> Any:
    """Escape all strings in nested dicts and lists, including keys, which are names of columns."""
    if isinstance(value, dict):
        return {make_printable(key): _make_texts_printable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_make_texts_printable(one) for one in value]
    return make_printable(value) if isinstance(value, str) else value


def write_table(chart: Chart) -> str:
    """A chart's numbers as CSV, without home folders and lone surrogates (JSON allows them, UTF-8 does not)."""
    return hide_home(chart.to_csv()).encode("utf-8", "replace").decode("utf-8")


def write_chart(chart: Chart, path: Path, svg: str | None = None) -> None:
    """Write a chart as .svg or .png, or its numbers as .csv; another ending is a `UserError`.

    `svg` is the chart if it has already been drawn.
    """
    if path.suffix not in ENDINGS:
        raise UserError(f"{path}: a chart's file must end with {', '.join(ENDINGS)}")
    if path.suffix == ".csv":
        write_text_atomically(path, write_table(chart))
        return
    if obstacle := find_obstacle():
        raise UserError(f"{path}: {obstacle}")
    svg = svg or draw(chart.spec)
    if path.suffix == ".svg":
        write_text_atomically(path, svg)
        return
    with write_atomically(path) as temporary:
        temporary.write_bytes(vl_convert.svg_to_png(svg, scale=PNG_SCALE))


def name_apart(charts: Iterable[Chart]) -> Iterator[Chart]:
    """Give charts unique names: if two have the same name, the later one gets a number."""
    taken: set[str] = set()
    for chart in charts:
        name, number = chart.name, 2
        while name in taken:
            name, number = f"{chart.name[:76]}-{number}", number + 1
        taken.add(name)
        yield dataclasses.replace(chart, name=name)


def write_charts(charts: Iterable[Chart], folder: Path) -> None:
    """Write each chart into a folder as SVG, PNG and CSV."""
    for chart in name_apart(charts):
        svg = draw(chart.spec)
        for ending in ENDINGS:
            write_chart(chart, folder / f"{chart.name}{ending}", svg)


def draw_for_page(chart: Chart, spec: dict[str, Any], places: Mapping[str, int]) -> str:
    """Draw a chart as an SVG element for the page: no legend, the page's colours, a tooltip for each mark.

    Args:
        places: the index of each model, which determines its colour and mark in all charts.
    """
    spec = copy.deepcopy(spec)
    spec["config"]["background"] = None
    _adapt_encodings(spec, list(place_series(chart, places).values()))
    return adapt_svg(draw(spec), f"{chart.title} {chart.view}".strip())


def place_series(chart: Chart, places: Mapping[str, int]) -> dict[str, int]:
    """The index of each of a chart's series, by name in the order of the legend: the model's, else the chart's own.

    Empty if the chart has no legend.
    """
    color = chart.spec.get("encoding", {}).get("color", {})
    if color.get("legend") is None:
        return {}
    named = zip(color["scale"]["domain"], color["scale"]["range"], strict=True)
    return {name: places.get(name, PALETTE.index(own) if own in PALETTE else 0) for name, own in named}


def _adapt_encodings(part: Any, places: Sequence[int]) -> None:
    """Remove the legends, and set colours and shapes by the models' indices."""
    for channel, options in (("color", PALETTE), ("shape", SHAPES)):
        encoding = part.get("encoding", {}).get(channel)
        if encoding and encoding.get("legend") is not None:
            encoding["legend"] = None
            encoding["scale"]["range"] = [options[place % len(options)] for place in places]
    for layer in part.get("layer", ()):
        _adapt_encodings(layer, places)


_COLOR = re.compile(r'\b(fill|stroke)="(#[0-9a-f]{6})"')
_NOISE = re.compile(
    r' (?:role|aria-roledescription|aria-hidden|pointer-events|stroke-miterlimit|class|version|font-family)="[^"]*"'
)
_GROUP_LABEL = re.compile(r'(<g\b[^>]*?) aria-label="[^"]*"')
_MARK_LABEL = re.compile(r'<(path|text|line|rect) aria-label="([^"]*)"([^>]*?)/>')
_UNSEEN = re.compile(r'<path(?: [\w-]+="[^"]*")*? d="(?:M0,0h0v0h0Z)?"[^>]*/>|<g></g>')
_ROOT = re.compile(r'<svg [^>]*?width="([\d.]+)" height="([\d.]+)"[^>]*>')


def adapt_svg(svg: str, label: str) -> str:
    """Turn Vega's SVG into an element of the page, with its colours and fonts, and with labels of marks as tooltips."""
    svg = _NOISE.sub("", svg)
    svg = _GROUP_LABEL.sub(r"\1", svg)
    svg = _MARK_LABEL.sub(r"<\1\3><title>\2</title></\1>", svg)
    for _ in range(3):  # an element that contains only empty ones is empty, too
        svg = _UNSEEN.sub("", svg)
    svg = _COLOR.sub(lambda m: f'{m[1]}="var({VARIABLES[m[2]]})"' if m[2] in VARIABLES else m[0], svg)
    return _ROOT.sub(rf'<svg viewBox="0 0 \1 \2" role="img" aria-label="{escape(label)}">', svg, count=1)


# Charts of training


TRAINING_FLOPS = 3  # of a training step relative to its forward pass; the backward pass takes about twice as many
MAX_POINTS = 160  # of a curve; more can't be distinguished
SMOOTHING_SHARE = 0.08  # the training loss is averaged over about this share of its points
MAX_LOSS, MAX_PERPLEXITY = 1e3, 1e9  # beyond these a model diverged, and would flatten the others' curves

Line = dict[str, Any]
AXES = (
    ("tokens", "training tokens"),
    ("seconds", "training time in seconds"),
    ("compute", "training FLOPs (3 forward passes per step)"),
)


def read_curve(entry: Line, log: str, find: Callable[[Line], float | None]) -> list[tuple[Line, float]]:
    """(position on each x-axis, value) for the lines of a log that have a value, thinned to about `MAX_POINTS`."""
    flops = get_value(entry, "cost", "flops_per_token")
    found = []
    for line in get_value(entry, "training", log) or ():
        value, tokens, seconds = find(line), line.get("tokens"), line.get("seconds")
        compute = TRAINING_FLOPS * flops * tokens if flops is not None and tokens is not None else None
        if value is not None:
            found.append(({"tokens": tokens, "seconds": seconds, "compute": compute}, value))
    step = -(-len(found) // MAX_POINTS) or 1
    return found[:-1][::step] + found[-1:]


def smooth(values: Sequence[float]) -> list[float]:
    """A centred running mean over `SMOOTHING_SHARE` of the values; the window narrows at both ends."""
    reach = round(SMOOTHING_SHARE * len(values) / 2)
    sides = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [compute_mean(values[i - side : i + side + 1]) for i, side in enumerate(sides)]


def draw_curves(
    series: Sequence[Series],
    name: str,
    title: str,
    caption: str,
    *,
    log: str,
    find: Callable[[Line], float | None],
    y_title: str,
    y_log: bool = False,
    is_smooth: bool = False,
) -> Iterator[Chart]:
    """Draw a curve against tokens, time and compute, one view each."""
    rows: list[Line] = []
    for one in series:
        for member in one.members:
            curve = read_curve(member.entry, log, find)
            values = [value for _, value in curve]
            values = smooth(values) if is_smooth else values
            known = zip(curve, values, strict=True)
            rows += [{"model": one.name, "seed": member.seed, **place, y_title: y} for (place, _), y in known]
    if any(len(one.members) > 1 for one in series):
        caption += " Lines are means over seeds; bands reach from the lowest to the highest seed."
    for axis, x_title in AXES:
        # A model's seeds share tokens and compute but not seconds, over which there is no mean: show the first seed.
        shown = [row for row in rows if row[axis] is not None]
        if axis == "seconds":
            first = {row["model"]: row["seed"] for row in reversed(shown)}
            shown = [row for row in shown if row["seed"] == first[row["model"]]]
        if len({row[axis] for row in shown}) > 1:
            chart_name = name if axis == "tokens" else f"{name}-{axis}"
            axes: dict[str, Any] = {"x": axis, "y": y_title, "series": "model", "x_title": x_title, "y_title": y_title}
            yield line_chart(chart_name, title, caption, shown, **axes, y_log=y_log, view=axis)


def draw_training(series: Sequence[Series]) -> list[Chart]:
    """Validation and training loss."""

    def between(key: str, least: float, most: float) -> Callable[[Line], float | None]:
        def find(line: Line) -> float | None:
            value = line.get(key)
            return value if value is not None and least <= value <= most else None

        return find

    return [
        *draw_curves(
            series,
            "validation",
            "Validation perplexity",
            "Measured after each epoch on documents that are not in training. A curve that rises again shows "
            "overfitting.",
            log="epochs_log",
            find=between("validation_perplexity", 1.0, MAX_PERPLEXITY),
            y_title="perplexity",
            y_log=True,
        ),
        *draw_curves(
            series,
            "training-loss",
            "Training loss",
            "Running mean. All models of a run read the same samples in the same order.",
            log="steps_log",
            find=between("loss", -MAX_LOSS, MAX_LOSS),
            y_title="loss, nats per token",
            is_smooth=True,
        ),
    ]


def draw_memory(series: Sequence[Series]) -> list[Chart]:
    """The gates of memory layers after and during training, and the adapter's α during training."""
    cells = [
        {"layer": f"{one.name}, {layer.replace('layers.', 'layer ')}", "head": head + 1, "gate": gate}
        for one in series
        for member in one.members
        for layer, gates in get_gates(member.entry).items()
        for head, gate in enumerate(gates)
    ]
    charts: list[Chart] = []
    if cells:
        caption = (
            "1: the head reads only the memory; 0: only the current segment. A gate that still has its initial value "
            "has not been trained."
        )
        axes = {"x": "head", "y": "layer", "value": "gate", "x_title": "memory head", "value_title": "gate"}
        charts.append(
            heat_chart("gates", "Gates after training", caption, cells, **axes, value_format=".2f", low=0, high=1)
        )
    charts += draw_curves(
        series,
        "gates-training",
        "Gates during training",
        "Mean over the gates of all memory heads.",
        log="steps_log",
        find=lambda line: _mean(gate for gates in get_gates(line).values() for gate in gates),
        y_title="mean gate",
    )
    charts += draw_curves(
        series,
        "alpha-training",
        "Strength α of the adapter during training",
        "α times the adapter's output is added to that of the base model's layer; at 0 the base model is unchanged.",
        log="steps_log",
        find=lambda line: _mean(alpha for alpha in line.get("alpha", {}).values() if alpha is not None),
        y_title="mean α",
    )
    return charts


def _mean(values: Any) -> float | None:
    found = list(values)
    return compute_mean(found) if found else None
