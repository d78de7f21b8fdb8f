"""Folders as people have them, in every job: odd names, litter, links, and odd keys on S3."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
from PIL import Image
from ray.cluster_utils import Cluster

from linearsr.config import FileOptions, Options
from linearsr.distributed.datasets import upscale
from linearsr.distributed.datasets.evaluate import EvaluationConfig, evaluate
from linearsr.distributed.datasets.resume import JOB
from linearsr.distributed.datasets.shards.build import build_shards
from linearsr.distributed.datasets.shards.config import ShardConfig
from linearsr.distributed.datasets.shards.scan import fetcher, list_sources
from linearsr.distributed.datasets.tag import OUTSIDE, TagConfig, tag_dataset
from linearsr.distributed.datasets.upscale import UpscaleConfig, target_name, upscale_dataset
from linearsr.errors import OptionError
from linearsr.evaluation.run import Request, plan
from linearsr.evaluation.sources import list_pictures
from linearsr.imaging.files import read
from linearsr.imaging.sources import list_inputs
from linearsr.storage.location import locate
from linearsr.storage.walk import Notes
from tests.helpers.permissions import permissions_hold
from tests.helpers.s3 import Server

NOT_UTF8 = "the file's name is not UTF-8; rename it"
NOT_LISTED = "cannot be listed (Permission denied)"


def _png(seed: int = 0, size: int = 16) -> bytes:
    """A crop of a photograph, another one for each seed."""
    photo = np.asarray(skimage.data.astronaut())
    buffer = io.BytesIO()
    Image.fromarray(photo[seed * 64 :, 150:][:size, :size]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures that can be used, and all that may lie beside them."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(_png(0, 256))
    (folder / "sub" / "Mt. Everest").write_bytes(_png(2, 256))
    (folder / "b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "._a.png").write_bytes(b"\0\5\x16\7")
    (folder / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"text")
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(_png())
    (folder / "loop").symlink_to(".")
    (folder / "gone").symlink_to("nowhere")
    (folder / "lost+found").mkdir(mode=0)
    return folder


LEFT_OUT = [
    r"left out: 1 file whose name is not UTF-8 (caf\xe9.txt)",
    "left out: 1 HEIC picture (b.heic): convert to PNG or JPEG",
    "left out: 1 file that macOS made",
    "left out: 1 link that leads in a circle (loop)",
    "left out: 1 link that leads nowhere (gone)",
]


def _put(s3: Server, url: str, keys: dict[str, bytes]) -> None:
    """Write objects whose keys are exactly these."""
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3.port}")
    for key, data in keys.items():
        client.put_object(Bucket=url.removeprefix("s3://"), Key=key, Body=data)


def _errors(output: Path) -> dict[str, str]:
    rows = pq.read_table(output / "errors" / "errors.parquet").to_pylist()
    return {row["id"]: row["error"] for row in rows}


def _upscaling(source: object, output: object, model: Path, **more: Any) -> UpscaleConfig:
    places = {"input": str(source), "output": str(output), "model": str(model)}
    return UpscaleConfig(**places, device="cpu", options=Options(steps=1), **more)


# Without a cluster


def test_two_results_of_one_name_are_refused_before_the_output_is_claimed(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint of the message works afterwards in the same output."""
    monkeypatch.setattr(upscale, "map_actors", lambda *_, **__: [])
    (tmp_path / "in").mkdir()
    for name in ("p.gif", "p.png"):
        (tmp_path / "in" / name).write_bytes(_png())
    config = _upscaling(tmp_path / "in", tmp_path / "out", small_bundle)
    words = r"p\.gif and p\.png would both become p\.png; rename one, or write Parquet"
    with pytest.raises(OptionError, match=words):
        upscale_dataset(config)
    assert not (tmp_path / "out" / JOB).exists()
    (tmp_path / "in" / "p.gif").rename(tmp_path / "in" / "p.jpg")
    with pytest.raises(OptionError, match="leave out --format, rename one, or write Parquet"):
        upscale_dataset(config.model_copy(update={"files": FileOptions(format="webp")}))
    upscale_dataset(config.model_copy(update={"kind": "parquet"}))
    upscale_dataset(config.model_copy(update={"output": str(tmp_path / "other")}))


def test_results_that_cannot_be_written_cost_one_row_before_the_work(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo: list[str] = []
    monkeypatch.setattr(upscale, "map_actors", lambda rows, *_, **__: todo.extend(rows) or [])
    long = f"{'x' * 251}.gif"
    for name in ("ok.png", long, "sub/locked.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(_png())
    (tmp_path / "out" / "sub").mkdir(parents=True, mode=0o555)
    files = FileOptions(format="webp")
    config = _upscaling(tmp_path / "in", tmp_path / "out", small_bundle, files=files)
    with permissions_hold():
        summary = upscale_dataset(config)
    assert [row["id"] for row in todo] == ["ok.png"] and summary.failed == 2
    errors = _errors(tmp_path / "out")
    assert "allows 255" in errors[long] and "Permission denied" in errors["sub/locked.png"]


def test_shards_cost_a_row_for_an_id_that_leads_out_of_the_output(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo: list[str] = []
    monkeypatch.setattr(upscale, "map_actors", lambda rows, *_, **__: todo.extend(rows) or [])
    (tmp_path / "in").mkdir()
    ids = ["ok.png", "../up.png", "/etc/passwd", "a//b.png"]
    table = pa.table({"id": ids, "lr": [_png()] * 4})
    pq.write_table(table, tmp_path / "in" / "0.parquet")
    summary = upscale_dataset(_upscaling(tmp_path / "in", tmp_path / "out", small_bundle))
    assert [row["id"] for row in todo] == ["ok.png"]
    assert (summary.total, summary.failed, summary.earlier) == (4, 3, 0)
    errors = _errors(tmp_path / "out")
    assert set(errors) == set(ids[1:]) and "outside the output" in errors["../up.png"]


def test_a_result_too_wide_for_its_format_fails_before_the_first_step(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("linearsr.pipeline.upscaler.Upscaler.upscale_tagged")
    Image.new("RGB", (4200, 2)).save(tmp_path / "pano.webp")
    config = _upscaling(tmp_path, tmp_path / "out", small_bundle)
    worker = upscale._Worker(config, locate(tmp_path), locate(tmp_path / "out"))
    (row,) = list_inputs(locate(tmp_path), "lr").to_pylist()
    (failure,) = worker([{**row, "target": "pano.webp"}])
    assert failure.error.startswith("16800x8 is too large for webp")


def test_keys_keep_their_empty_parts_in_the_names_of_results() -> None:
    assert target_name("/ok.gif", FileOptions(), local=False) == "/ok.png"
    assert target_name("a//v1.2", FileOptions(), local=False) == "a//v1.2.png"


def test_sources_of_shards_are_listed_by_the_same_rule(folder: Path) -> None:
    config = ShardConfig.parse(inputs=[str(folder)], output=str(folder.parent / "out"))
    notes = Notes()
    with permissions_hold():
        assert list_sources(config, notes) == ["in/a.png", "in/sub/Mt. Everest"]
    assert notes.failures == {r"in/caf\xe9.png": NOT_UTF8, "in/lost+found": NOT_LISTED}


def test_sources_of_shards_on_s3_are_themselves(s3: Server) -> None:
    bucket = s3.bucket()
    keys = ("in/ok.jpg", "in//ok.jpg", "in/../ok.jpg", "in/scan.001")
    _put(s3, bucket, {key: _png(i) for i, key in enumerate(keys)})
    config = ShardConfig.parse(inputs=[f"{bucket}/in"], output=f"{bucket}/out")
    sources = list_sources(config)
    assert sorted(sources) == sorted(keys)
    assert [fetcher(config)(key) for key in keys] == [_png(i) for i in range(4)]


def test_an_evaluation_names_what_it_leaves_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with permissions_hold():
        evaluation = plan(Request.parse(hr=str(folder), metrics=("psnr",)), list_pictures)
    assert [item.id for item in evaluation.items] == ["a.png", "sub/Mt. Everest"]
    assert evaluation.alone == {r"caf\xe9.png": NOT_UTF8, "lost+found": NOT_LISTED}
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(
        f"linearsr: {line}" for line in LEFT_OUT
    )


# With a cluster


def test_a_folder_as_people_have_it_is_upscaled(
    cluster: Cluster,
    folder: Path,
    small_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = _upscaling(folder, tmp_path / "out", small_bundle)
    for earlier in (0, 2):
        with permissions_hold():
            summary = upscale_dataset(config)
        assert (summary.total, summary.earlier, summary.failed) == (4, earlier, 2)
        lines = capsys.readouterr().err.splitlines()
        assert [line in lines for line in (f"linearsr: {line}" for line in LEFT_OUT)] == [True] * 5
    assert _errors(tmp_path / "out") == {r"caf\xe9.png": NOT_UTF8, "lost+found": NOT_LISTED}
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.png")) == ["Mt. Everest.png", "a.png"]


def test_every_key_of_a_bucket_gets_its_own_result(
    cluster: Cluster, s3: Server, small_bundle: Path
) -> None:
    bucket = s3.bucket()
    names = ("ok.png", "/ok.png", "../up.png", "scan.001", "._ok.png", "end.png/")
    _put(s3, bucket, {f"in/{name}": _png(i, 16 + i) for i, name in enumerate(names)})
    summary = upscale_dataset(_upscaling(f"{bucket}/in", f"{bucket}/out", small_bundle))
    assert (summary.total, summary.done, summary.failed) == (5, 3, 2)
    out = locate(f"{bucket}/out")
    for i, name in ((0, "ok.png"), (1, "/ok.png"), (3, "scan.001.png")):
        assert read((out / name).read()).pixels.shape == (3, 4 * (16 + i), 4 * (16 + i))
    errors = pq.read_table(pa.BufferReader((out / "errors/errors.parquet").read())).to_pylist()
    assert {row["id"]: row["stage"] for row in errors} == {"../up.png": "list", "end.png/": "list"}


def test_shards_are_built_of_a_folder_as_people_have_it(
    cluster: Cluster, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ShardConfig.parse(
        inputs=[str(folder)], output=str(tmp_path / "out"), crop=64, min_sharpness=0, cpus=0.5
    )
    with permissions_hold():
        result = build_shards(config)
    assert result.manifest["counts"]["accepted"] == 2
    assert sorted(result.unreadable) == [
        f"in/caf\\xe9.png: {NOT_UTF8}",
        f"in/lost+found: {NOT_LISTED}",
    ]
    assert set(_errors(tmp_path / "out")) == {r"in/caf\xe9.png", "in/lost+found"}
    assert "1 HEIC picture (in/b.heic)" in capsys.readouterr().err
    with (tmp_path / "out" / "rejects.csv").open() as file:
        assert not list(csv.DictReader(file))


def test_shards_with_odd_keys_are_tagged_as_themselves(
    cluster: Cluster, s3: Server, tmp_path: Path
) -> None:
    bucket = s3.bucket()
    shards = {}
    for i, key in enumerate(("in/0.parquet", "in//0.parquet")):
        buffer = io.BytesIO()
        pq.write_table(pa.table({"id": [str(i)], "lr": [_png(i, 64)]}), buffer)
        shards[key] = buffer.getvalue()
    _put(s3, bucket, shards)
    summary = tag_dataset(TagConfig(input=f"{bucket}/in", output=f"{bucket}/out"))
    assert (summary.done, summary.failed) == (2, 0)
    ids = [row["id"] for row in list_inputs(locate(f"{bucket}/out"), "lr").to_pylist()]
    assert sorted(ids) == ["0", "1"]
    summary = tag_dataset(TagConfig(input=f"{bucket}/in", output=str(tmp_path / "out")))
    assert (summary.done, summary.failed) == (1, 1)
    assert list(_errors(tmp_path / "out").values()) == [OUTSIDE]


def test_an_evaluation_of_a_folder_as_people_have_it_reports_failures(
    cluster: Cluster, folder: Path, small_bundle: Path, tmp_path: Path
) -> None:
    request = Request.parse(
        hr=str(folder), models={"small": str(small_bundle)}, steps=(1,), metrics=("psnr",)
    )
    config = EvaluationConfig(request=request, output=str(tmp_path / "out"), actor_cpus=0.5)
    with permissions_hold():
        report = evaluate(config)
    assert {score.id for score in report.scores} == {"a.png", "sub/Mt. Everest"}
    assert len(report.failures) == 2
