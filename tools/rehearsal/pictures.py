"""A picture of each job's results, read from storage."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq
import requests
from PIL import Image, ImageOps

from linearsr.evaluation.drawing import Row, sheet
from linearsr.imaging.files import read, to_pil
from linearsr.storage.location import Location, locate

PANEL, ROWS = 320, 4


def pairs(shards: str) -> Image.Image:
    """Draw LR and HR of the first rows."""
    rows = []
    for row in _rows(shards):
        labels = [f"LR {row['lr_width']}x{row['lr_height']}", f"HR of {row['id'].split('/')[-1]}"]
        rows.append(Row(labels, [_panel(row["lr"]), _panel(row["hr"])]))
    return sheet(rows, PANEL)


def tags(shards: str) -> Image.Image:
    """Draw LR of the first rows with the tagger's tags."""
    rows = []
    for row in _rows(shards, column="tags"):
        scored = zip(row["tags"], row["tag_scores"], strict=True)
        named = ", ".join(f"{name} {score:.2f}" for name, score in scored) or "no tags"
        rows.append(Row([named], [_panel(row["lr"])]))
    return sheet(rows, PANEL)


def reports(run: str) -> Image.Image:
    """Draw the curves of a run, or of all runs in a folder: loss, metrics, and the knee."""
    files = [file for file in locate(run).files() if file.name == "report.png"]
    curves = [Image.open(io.BytesIO(file.read())).convert("RGB") for file in files]
    names = [file.path.rsplit("/", 2)[-2] for file in files]
    width = max(curve.width for curve in curves)
    return sheet([Row([name], [curve]) for name, curve in zip(names, curves, strict=True)], width)


def contact(report: str) -> Image.Image:
    """Return the evaluation's contact sheet."""
    return Image.open(io.BytesIO((locate(report) / "contact.jpg").read())).convert("RGB")


def before_and_after(small: str, large: str) -> Image.Image:
    """Draw pictures of one folder, bicubic, beside their results in another."""
    results = {file.name: file for file in locate(large).files()}
    both = [(file, results[file.name]) for file in _pictures(small) if file.name in results]
    return beside([(f.name, f.read(), result.read()) for f, result in both[:ROWS]])


def answers(small: str, endpoint: str) -> Image.Image:
    """Draw pictures of a folder, bicubic, beside the endpoint's answers."""
    return beside([(f.name, f.read(), _ask(endpoint, f)) for f in list(_pictures(small))[:ROWS]])


def _ask(endpoint: str, file: Location) -> bytes:
    token = os.environ.get("LINEARSR_TOKEN")
    answer = requests.post(
        f"{endpoint}/v1/upscale",
        files={"image": (file.name, file.read())},
        headers={"Authorization": f"Bearer {token}"} if token else {},
        timeout=300,
    )
    answer.raise_for_status()
    return answer.content


def beside(named: Sequence[tuple[str, bytes, bytes]]) -> Image.Image:
    """Draw encoded pictures, bicubic, beside their encoded results."""
    rows = [
        Row([f"{name}, bicubic", "LinearSR"], [_panel(small), _panel(large)])
        for name, small, large in named
    ]
    return sheet(rows, PANEL)


def _pictures(folder: str) -> Iterator[Location]:
    return (file for file in locate(folder).files() if file.name.endswith((".png", ".jpg")))


def _rows(shards: str, column: str = "id") -> list[dict[str, Any]]:
    """Return rows of the first shard; those with a value in `column` come first."""
    shard = next(file for file in locate(shards).files() if file.name.endswith(".parquet"))
    rows = pq.read_table(shard.path, filesystem=shard.filesystem).to_pylist()
    return sorted(rows, key=lambda row: not row[column])[:ROWS]


def _panel(encoded: bytes) -> Image.Image:
    """Return the middle square of a picture, at the size of a panel."""
    picture = to_pil(read(encoded)).convert("RGB")
    return ImageOps.fit(picture, (PANEL, PANEL), Image.Resampling.BICUBIC)
