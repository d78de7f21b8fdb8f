"""The rules of the upscaling job that need no cluster: names of results, and what a worker does."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from linearsr.config import Options
from linearsr.distributed.datasets.upscale import UpscaleConfig, _targets, _todo, _Worker
from linearsr.errors import OptionError
from linearsr.imaging.sources import INPUTS, list_inputs
from linearsr.storage.location import Location, locate
from linearsr.storage.s3 import S3FileSystem
from linearsr.storage.targets import check_collisions
from tests.helpers.s3 import Server


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def _config(folder: Location, output: Location, model: Path) -> UpscaleConfig:
    prefix = "" if folder.is_local else "s3://"
    return UpscaleConfig(
        input=prefix + folder.path,
        output=prefix + output.path,
        model=str(model),
        device="cpu",
        options=Options(steps=1),
    )


def _row(id: str, target: str) -> dict[str, Any]:
    return {"id": id, "file": id, "group": -1, "row": -1, "target": target}


@pytest.mark.parametrize("id", ["a/.", "a/..", "a/", "."])
def test_a_key_that_can_be_no_files_name_costs_one_row(small_bundle: Path, id: str) -> None:
    source = locate("/in")
    config = _config(source, source / "out", small_bundle)
    ids = ["b.png", id]
    inputs = pa.table([ids, ids, [-1, -1], [-1, -1]], schema=INPUTS)
    for output in (source / "out", Location(S3FileSystem(None, None), "bucket/out")):
        targets, faults = _targets(inputs, output, config)
        assert targets == {"b.png": "b.png"} and "outside the output" in faults[id]


def test_a_result_with_the_name_of_another_ones_folder_is_refused(
    small_bundle: Path, tmp_path: Path
) -> None:
    for name in ("a.bmp", "a.png/b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(_png())
    source, output = locate(tmp_path / "in"), locate(tmp_path / "out")
    inputs = list_inputs(source, "lr")
    with pytest.raises(OptionError, match=r"a\.bmp would become a\.png, which is the folder of"):
        _targets(inputs, output, _config(source, output, small_bundle))


def test_a_key_on_s3_may_be_the_beginning_of_another() -> None:
    targets = [("a", "a.png"), ("b", "a.png/b.png")]
    check_collisions(targets, targets, "", nested=True)
    with pytest.raises(OptionError, match="would both become"):
        check_collisions([*targets, ("c", "a.png")], targets, "", nested=True)


def test_a_folder_with_the_name_of_a_result_is_not_taken_for_one(
    small_bundle: Path, tmp_path: Path
) -> None:
    source, output = locate(tmp_path / "in"), locate(tmp_path / "out")
    (source / "a.png").write(_png())
    (output / "a.png" / "b.png").write(_png())
    worker = _Worker(_config(source, output, small_bundle), source, output)
    (outcome,) = worker([_row("a.png", "a.png")])
    assert outcome.stage == "write" and "a.png" in outcome.error


def test_a_prefix_with_the_name_of_a_result_is_not_taken_for_one(
    s3: Server, small_bundle: Path
) -> None:
    folder = locate(s3.bucket())
    source, output = folder / "in", folder / "out"
    for id in ("a.png", "a.png/b.png"):
        (source / id).write(_png())
    config = _config(source, output, small_bundle)
    inputs = list_inputs(source, "lr")
    targets, faults = _targets(inputs, output, config)
    rows = _todo(inputs, targets, output, config)
    outcomes = _Worker(config, source, output)(rows[::-1])  # a.png/b.png is first
    assert (faults, [outcome.error for outcome in outcomes]) == ({}, ["", ""])
    assert _todo(inputs, targets, output, config) == []
    assert (output / "a.png").is_file() and not (folder / "out").is_file()
