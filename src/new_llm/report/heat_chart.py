"""Heat maps: one hue, from the page's ground to full; numbers in the cells where they fit."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from new_llm.report.scale import thin_labels
from new_llm.report.svg import WIDTH, Canvas, View

MAX_WIDTH = 92.0  # of a cell
DARK_FROM = 0.55  # strength of the hue from which letters change their colour
LEAST = 0.05  # strength of the weakest cell that has a value, so that it is seen to have one
TITLE, FOOT = 24.0, 44.0
MIN_ROW = 15.0  # height of a row that has its own name
LETTER = 9.5


@dataclass(frozen=True)
class HeatCell:
    """One value: its strength from 0 to 1, its words, and those of its read-out."""

    strength: float
    text: str
    tip: str


def draw_heat(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[HeatCell | None]],
    titles: tuple[str, str],
    alt: str,
    *,
    label: str = "",
    row_height: float = 38.0,
) -> View:
    """A heat map.

    Args:
        rows: names, from above.
        columns: names, from the left.
        cells: by row and column; None: nothing was measured. Cells side by side that are equal are drawn as one.
        titles: of the rows, above them, and of the columns, below them.
        alt: what the picture shows, for who does not see it.
        label: the view's.
        row_height: of a row.
    """
    left = 14.0 + LETTER * max((len(name) for name in rows), default=0)
    width = min((WIDTH - left - 4) / max(1, len(columns)), MAX_WIDTH if len(columns) < 12 else WIDTH)
    canvas = Canvas(height=TITLE + row_height * len(rows) + FOOT, left=left, right=left + width * len(columns))
    bottom = TITLE + row_height * len(rows)
    every = max(1, round(MIN_ROW / row_height + 0.49)) if row_height < MIN_ROW else 1
    canvas.text(0, 14, titles[0])
    canvas.text((left + canvas.right) / 2, canvas.height - 4, titles[1], anchor="middle")
    for y, (name, line) in enumerate(zip(rows, cells, strict=True)):
        top = TITLE + y * row_height
        if y % every == 0:
            canvas.text(left - 8, top + row_height / 2 + 4.5, name, anchor="end")
        x = 0
        for cell, group in groupby(line):
            length = len(list(group))
            if cell is not None:
                _draw_cell(canvas, cell, left + x * width, top, length * width, row_height)
            x += length
    for x, name in enumerate(thin_labels(columns, canvas.right - left)):
        if name:
            canvas.text(left + (x + 0.5) * width, bottom + 18, name, anchor="middle")
    return View(canvas.to_svg(alt), label)


def _draw_cell(canvas: Canvas, cell: HeatCell, x: float, y: float, width: float, height: float) -> None:
    strength = LEAST + (1 - LEAST) * min(1.0, max(0.0, cell.strength))
    gap = 2.0 if cell.text else 0.6
    more = f' fill-opacity="{strength:.2f}"'
    canvas.box(x, y, width - gap, height - gap, "heat", tip=cell.tip, more=more)
    if cell.text and len(cell.text) * LETTER <= width:
        kind = "on-dark" if strength >= DARK_FROM else "on-light"
        canvas.text(x + (width - gap) / 2, y + height / 2 + 4, cell.text, anchor="middle", kind=kind)
