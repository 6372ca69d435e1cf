"""Pictures that stand alone: what they share, and writing them as SVG or PNG."""

from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text

from new_llm.config import UserError
from new_llm.config.files import write_atomically

# Okabe and Ito's colours, which the colour-blind can tell apart, on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CANVASES = {".svg": FigureCanvasSVG, ".png": FigureCanvasAgg}
PNG_DOTS_PER_INCH = 160


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure that makes room for its own labels."""
    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure; an SVG holds its letters as outlines, so that it looks the same everywhere.

    Raises:
        UserError: the ending is neither .svg nor .png.
    """
    if path.suffix not in CANVASES:
        raise UserError(f"{path}: a picture's name ends with {' or '.join(CANVASES)}")
    CANVASES[path.suffix](figure)
    for text in figure.findobj(Text):
        cast(Text, text).set_parse_math(False)  # a dollar sign in a name is a dollar sign
    options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": PNG_DOTS_PER_INCH}
    # The salt makes the same figure the same file.
    style: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": path.stem}
    with matplotlib.rc_context(style), write_atomically(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], facecolor="white", **options)
