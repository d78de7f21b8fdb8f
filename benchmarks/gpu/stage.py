"""Parts that the stages share: settings, measured rows, and the files of both."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.markdown import markdown

Row = dict[str, Any]


class Settings(NamedTuple):
    """Device, sizes and folders of a stage.

    toy: sizes for a CPU, which show that the code runs and nothing else.
    seconds: the stage's share of the time. out: folder of all stages' files.
    photos: folders of photographs to train on; start: folder of stages' weights to go on from.
    """

    device: torch.device
    dtype: torch.dtype
    toy: bool
    seconds: float
    out: Path
    photos: Sequence[Path] = ()
    start: Path | None = None


def installed(package: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def missing(what: str, package: str) -> Row:
    """Return the row of something that is not measured, since a package is missing."""
    return {"what": what, "note": f"not measured: {package} is not installed"}


def rows_file(out: Path, stage: str) -> Path:
    """Return the file of a stage's rows, a line of JSON for each."""
    return out / f"{stage}.jsonl"


def record(out: Path, stage: str, rows: Iterable[Row]) -> None:
    """Write each row as it comes, so that a stage that is cut off keeps what it had."""
    with rows_file(out, stage).open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
            print("  " + "  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)


def read_rows(out: Path, stage: str) -> list[Row]:
    """Return the rows that a stage has written; a line that was cut off is left out."""
    file, rows = rows_file(out, stage), []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of rows, with a column for every key."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(key)) for key in head] for row in rows]
    return markdown(head, cells)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
