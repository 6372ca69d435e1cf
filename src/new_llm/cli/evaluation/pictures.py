"""The picture of a measurement, beside its JSON file."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from new_llm.cli.evaluation.common import finish
from new_llm.config.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from new_llm.experiments.subject import Subject

ENDINGS = (".svg", ".png")


def check_picture(path: Path | None) -> None:
    """Refuse a picture's name before anything is measured.

    Raises:
        UserError: its ending is none that can be drawn.
    """
    if path is not None and path.suffix not in ENDINGS:
        raise UserError(f"--picture: {path} must end with {' or '.join(ENDINGS)}")


def finish_with_picture(
    record: dict[str, Any],
    subject: "Subject",
    out: Path | None,
    picture: Path | None,
    draw: Callable[[dict[str, Any]], "Figure"],
) -> int:
    """Write the record and its picture, say where they are, and return the command's exit code.

    Args:
        record: of `describe_evaluation`.
        subject: the model.
        out: the JSON file; None: as `write_evaluation` says.
        picture: the picture; None: beside the JSON file, .svg.
        draw: draws the record's result.
    """
    from new_llm.experiments.evaluation_record import write_evaluation
    from new_llm.report.picture import save_picture

    path = write_evaluation(record, subject, out)
    picture = picture or path.with_suffix(".svg")
    save_picture(draw(record["result"]), picture)
    print(f"picture: {picture}")
    return finish(record, subject, path)
