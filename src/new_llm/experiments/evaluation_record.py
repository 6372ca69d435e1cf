"""What a measurement leaves behind: one JSON file that says what was measured, how, on what and by which code."""

import dataclasses
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from new_llm.config.evaluation import EVALUATIONS_FOLDER, RECORD_VERSION
from new_llm.experiments.record import describe_code, describe_command, describe_environment, write_json
from new_llm.experiments.subject import Subject


def describe_evaluation(
    kind: str,
    subject: Subject,
    text: dict[str, Any] | None,
    settings: dict[str, Any],
    result: dict[str, Any],
    *,
    is_complete: bool = True,
) -> dict[str, Any]:
    """A measurement with all that is needed to repeat it.

    Args:
        kind: perplexity, reversal, long, recall or doctor.
        subject: the model.
        text: what it was measured on; None: text of the measurement's own.
        settings: the options of the measurement, the seed of its random choices among them.
        result: plain values.
        is_complete: False: it was interrupted, and the result holds what had been measured by then.
    """
    import torch

    return {
        "record_version": RECORD_VERSION,
        "kind": kind,
        "status": "complete" if is_complete else "partial",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": describe_command(),
        "code": describe_code(),
        "environment": describe_environment(str(subject.device), subject.precision, torch.get_num_threads()),
        "subject": subject.facts,
        "text": text,
        "settings": settings,
        "result": result,
    }


def write_evaluation(record: dict[str, Any], subject: Subject, out: Path | None) -> Path:
    """Write a record, by default into the folder of the run; the same measurement made again takes the same name.

    Args:
        record: of `describe_evaluation`.
        subject: the model.
        out: the file; None: `<run>/evaluations/<kind>-<model>-<hash of model, text and settings>.json`, under runs/
            for a model that belongs to no run.
    """
    if out is None:
        identity = {key: record[key] for key in ("subject", "text", "settings", "status")}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        folder = (subject.folder or Path("runs")) / EVALUATIONS_FOLDER
        out = folder / f"{record['kind']}-{subject.label}-{digest[:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record)
    return out


def plain_settings(*sections: Any) -> dict[str, Any]:
    """The fields of some configuration sections as plain values."""
    values: dict[str, Any] = {}
    for section in sections:
        values |= {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(section).items()
        }
    return values
