"""Shards from photographs: choice of pictures, reproducible bytes, resuming."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
from PIL import Image, ImageFilter
from ray.cluster_utils import Cluster

from linearsr.distributed.datasets.shards import scan
from linearsr.distributed.datasets.shards.build import SCHEMA, BuildResult, build_shards
from linearsr.distributed.datasets.shards.config import ShardConfig
from linearsr.distributed.datasets.shards.plan import cut
from linearsr.distributed.train.data import open_source
from linearsr.distributed.train.shards import Shards
from linearsr.errors import InputError, OptionError, OutputError
from linearsr.imaging.degradation import PRESETS, degrade
from linearsr.imaging.files import read
from linearsr.storage.location import locate
from linearsr.training.data import DataConfig, as_bytes
from tests.helpers.s3 import Server

ROOT = Path(__file__).parents[3]
USED = ("bay/astronaut.png", "bay/coffee.png", "camera.png", "chelsea.webp", "rocket.jpg")


def _photo(name: str) -> Image.Image:
    return Image.fromarray(np.asarray(getattr(skimage.data, name)()))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good photographs, and one picture for each reason to reject one."""
    folder = tmp_path_factory.mktemp("pictures") / "mixed"
    (folder / "bay").mkdir(parents=True)
    astronaut, coffee, chelsea = (_photo(name) for name in ("astronaut", "coffee", "chelsea"))
    astronaut.save(folder / "bay/astronaut.png")
    coffee.putalpha(Image.linear_gradient("L").resize(coffee.size))
    coffee.save(folder / "bay/coffee.png")
    _photo("camera").save(folder / "camera.png")
    chelsea.save(folder / "chelsea.webp", quality=90)
    _photo("rocket").save(folder / "rocket.jpg", quality=95)
    astronaut.resize((470, 470)).save(folder / "twin.jpg", quality=60)
    astronaut.resize((120, 120)).save(folder / "small.png")
    chelsea.filter(ImageFilter.GaussianBlur(6)).save(folder / "soft.png")
    whole = (folder / "rocket.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not a picture, and not named like one")
    return folder


def _config(pictures: Path, output: Path | str, **changes: object) -> ShardConfig:
    places = {"inputs": [str(pictures)], "output": str(output)}
    small = {"crop": 96, "crops_per_picture": 3, "min_size": 128, "rows_per_shard": 4, "cpus": 0.5}
    return ShardConfig.parse(**{**places, **small, **changes})


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards") / "mixed"


@pytest.fixture(scope="module")
def built(cluster: Cluster, pictures: Path, output: Path) -> BuildResult:
    return build_shards(_config(pictures, output))


@pytest.fixture(scope="module")
def rows(built: BuildResult, output: Path) -> list[dict[str, Any]]:
    return [row for shard in _shards(output) for row in pq.read_table(shard).to_pylist()]


def _shards(output: Path) -> list[Path]:
    return sorted(output.glob("shard-*.parquet"))


def _everything(output: Path) -> dict[str, bytes]:
    files = (path for path in output.rglob("*") if path.is_file())
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


# The contents of shards


def test_rows_hold_pairs_of_the_recorded_sizes(rows: list[dict[str, Any]]) -> None:
    assert len({row["id"] for row in rows}) == len(rows) == 15
    assert {row["source"] for row in rows} == {f"mixed/{name}" for name in USED}
    for row in rows:
        hr, lr = read(row["hr"]), read(row["lr"])
        assert hr.pixels.shape == (3, row["hr_height"], row["hr_width"]) == (3, 96, 96)
        assert lr.pixels.shape == (3, row["lr_height"], row["lr_width"]) == (3, 24, 24)
        assert row["id"].startswith(f"{row['source']}#") and hr.format == lr.format == "png"
        assert row["tags"] is None and row["tag_scores"] is None


def test_files_have_the_schema_and_small_row_groups(built: BuildResult, output: Path) -> None:
    for shard in _shards(output):
        assert pq.read_schema(shard).equals(SCHEMA)
    assert [pq.ParquetFile(s).metadata.num_rows for s in _shards(output)] == [4, 4, 4, 3]


def test_a_rows_seed_reproduces_lr_from_hr(rows: list[dict[str, Any]]) -> None:
    assert len({row["degradation"]["seed"] for row in rows}) == len(rows)
    for row in rows:
        preset, seed = row["degradation"]["preset"], row["degradation"]["seed"]
        lr = degrade(read(row["hr"]).pixels, 4, PRESETS[preset], np.random.default_rng(seed))
        assert preset == "seesr" and torch.equal(as_bytes(read(row["lr"]).pixels), _as_bytes(lr))


def _as_bytes(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels * 255).round().byte()


def test_hr_crops_are_lossless(rows: list[dict[str, Any]], pictures: Path) -> None:
    for name in USED:
        picture = read(pictures / name)
        whole = picture.pixels if picture.alpha is None else _over_white(picture)
        for row in rows:
            if row["source"] == f"mixed/{name}":
                assert _lies_in(as_bytes(read(row["hr"]).pixels), _as_bytes(whole)), row["id"]


def _over_white(picture: Any) -> torch.Tensor:
    return 1 - picture.alpha * (1 - picture.pixels)


def _lies_in(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """Return whether the part occurs in the whole; its first row of pixels gives the place."""
    starts = (whole.unfold(2, part.shape[2], 1) == part[:, :1, None]).all(3).all(0)
    height, width = part.shape[1:]
    return any(
        torch.equal(whole[:, y : y + height, x : x + width], part)
        for y, x in starts.nonzero().tolist()
    )


def test_rejects_csv_names_each_reason(built: BuildResult, output: Path) -> None:
    rejected = {
        row["source"]: (row["reason"], row["detail"])
        for row in csv.DictReader((output / "rejects.csv").read_text().splitlines())
    }
    assert {source: reason for source, (reason, _) in rejected.items()} == {
        "mixed/broken.jpg": "unreadable",
        "mixed/small.png": "too small",
        "mixed/soft.png": "blurred",
        "mixed/twin.jpg": "near-duplicate",
    }
    assert "damaged or truncated" in rejected["mixed/broken.jpg"][1]
    assert "120x120" in rejected["mixed/small.png"][1]
    assert "below 20" in rejected["mixed/soft.png"][1]
    assert rejected["mixed/twin.jpg"][1] == "of mixed/bay/astronaut.png"
    assert len(built.unreadable) == 1 and "broken.jpg" in built.unreadable[0]


def test_manifest_has_counts_settings_and_versions(
    built: BuildResult, output: Path, pictures: Path
) -> None:
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest == built.manifest
    ones = {"blurred": 1, "near-duplicate": 1, "too small": 1, "unreadable": 1}
    assert manifest["counts"] == {
        "seen": 9,
        "accepted": 5,
        "rejected": ones,
        "rows": 15,
        "shards": 4,
    }
    assert manifest["settings"]["seed"] == 0 and manifest["inputs"] == {"mixed": str(pictures)}
    assert manifest["shards"] == {
        shard.name: pq.read_metadata(shard).num_rows for shard in _shards(output)
    }
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_shards_can_be_trained_on(built: BuildResult, output: Path) -> None:
    source = open_source(str(output), DataConfig(patch=32, margin=8), 0)
    assert isinstance(source, Shards) and source.rows == 15
    hr, lr = source.pair(7)[:2]
    assert hr.shape == (3, 32, 32) and lr.shape == (3, 8, 8) and hr.float().std() > 0


# Second builds


def test_a_second_build_elsewhere_gives_the_same_bytes(
    built: BuildResult, output: Path, pictures: Path, tmp_path: Path
) -> None:
    """The second build runs with other parallelism; its notes and manifest are equal too."""
    moved = shutil.copytree(pictures, tmp_path / "mixed")
    build_shards(_config(moved, tmp_path / "again", cpus=2))
    again, first = _everything(tmp_path / "again"), _everything(output)
    del again["manifest.json"], first["manifest.json"]
    assert len(first) >= 4 + 3 and again == first


def test_a_build_on_s3_gives_the_same_bytes(
    built: BuildResult, output: Path, pictures: Path, s3: Server
) -> None:
    bucket = s3.bucket()
    for name, data in _everything(pictures).items():
        (locate(f"{bucket}/mixed") / name).write(data)
    config = _config(pictures, f"{bucket}/shards", inputs=[f"{bucket}/mixed"])
    assert str(build_shards(config)) == str(built)
    shards = locate(f"{bucket}/shards")
    for shard in _shards(output):
        assert (shards / shard.name).read() == shard.read_bytes()
    assert len(shards.files()) == len(_everything(output))


def test_another_seed_gives_other_crops_and_other_lr(
    built: BuildResult, rows: list[dict[str, Any]], pictures: Path, tmp_path: Path
) -> None:
    config = _config(pictures, tmp_path, seed=1)
    for row in rows[:3]:
        boxes = scan.scan_picture(0, row["source"], scan.fetcher(config), config)["boxes"]
        before = scan.scan_picture(
            0, row["source"], scan.fetcher(config), _config(pictures, tmp_path)
        )
        assert boxes != before["boxes"]
        assert config.seed_of(row["id"]) != row["degradation"]["seed"]


def test_a_second_run_builds_only_missing_shards(
    built: BuildResult, output: Path, pictures: Path
) -> None:
    before = _everything(output)
    gone = _shards(output)[1]
    gone.unlink()
    written = {s: s.stat().st_mtime_ns for s in [*_shards(output), *output.glob("scan/*")]}
    again = build_shards(_config(pictures, output, cpus=1))
    assert _everything(output) == before and again == built
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_other_settings_or_pictures_in_the_same_output_are_refused(
    built: BuildResult, output: Path, pictures: Path, tmp_path: Path
) -> None:
    before = _everything(output)
    with pytest.raises(OptionError, match=r"settings: seed \(0, now 7\), crop \(96, now 64\)"):
        build_shards(_config(pictures, output, seed=7, crop=64))
    more = shutil.copytree(pictures, tmp_path / "mixed")
    shutil.copy(more / "rocket.jpg", more / "rocket2.jpg")
    with pytest.raises(OptionError, match="settings: pictures"):
        build_shards(_config(more, output))
    assert _everything(output) == before


def test_a_changed_picture_fails_only_its_shard(
    built: BuildResult, output: Path, pictures: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(pictures, tmp_path / "mixed")
    begun = shutil.copytree(output, tmp_path / "begun")
    for shard in _shards(begun):
        shard.unlink()
    shutil.copy(moved / "rocket.jpg", moved / "chelsea.webp")
    again = build_shards(_config(moved, begun))
    lost = {line.split(":")[0] for line in again.failed}
    assert 1 <= len(lost) <= 2 and all("chelsea.webp: has changed since" in f for f in again.failed)
    assert {s.name for s in _shards(begun)} == {s.name for s in _shards(output)} - lost
    assert set(again.manifest["failed"]) == lost


# Refusals before any work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 98}, "crop: .*multiple of the scale 4"),
        ({"output": "photos/deep/shards"}, "output: .*must be neither the input"),
        ({"output": "."}, "output: .*must be neither the input"),
        ({"inputs": ["photos", "photos/deep"]}, "inputs: .*read twice"),
        ({"inputs": []}, "inputs"),
        ({"degradation": "terrible"}, "degradation"),
        ({"duplicate_distance": 30}, "duplicate_distance"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_invalid_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ShardConfig.parse(**{"inputs": ["photos"], "output": "shards", **changes})


def test_empty_inputs_and_foreign_outputs_are_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no pictures"):
        build_shards(_config(tmp_path / "nowhere", tmp_path / "out"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("years of work")
    with pytest.raises(OptionError, match="not empty"):
        build_shards(_config(pictures, tmp_path / "other"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/shards"):
        build_shards(_config(pictures, tmp_path / "file/shards"))


def test_inputs_of_one_name_get_numbers(pictures: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place / "photos").mkdir(parents=True)
        shutil.copy(pictures / "rocket.jpg", tmp_path / place / "photos")
    both = [str(tmp_path / place / "photos") for place in ("b", "a")]
    config = _config(pictures, tmp_path / "out", inputs=both)
    assert scan.list_sources(config) == ["1-photos/rocket.jpg", "2-photos/rocket.jpg"]
    assert scan.fetcher(config)("2-photos/rocket.jpg") == (pictures / "rocket.jpg").read_bytes()


# Scan and plan


def test_crop_0_takes_whole_pictures_trimmed_to_the_scale(pictures: Path, tmp_path: Path) -> None:
    config = _config(pictures, tmp_path, crop=0)
    row = scan.scan_picture(0, "mixed/chelsea.webp", scan.fetcher(config), config)
    assert row["boxes"] == [{"left": 0, "top": 0, "width": 448, "height": 300}]


def test_a_missing_picture_is_unreadable(cluster: Cluster, pictures: Path, tmp_path: Path) -> None:
    """The picture is scanned alone, as after a part has failed; then the notes list it."""
    config = _config(pictures, tmp_path)
    sources = ["mixed/rocket.jpg", "mixed/gone.png"]
    counts: list[int] = []
    table = scan.scan_singly(0, sources, config, counts.append)
    assert table["source"].to_pylist() == sources and sum(counts) == 2
    assert table["reason"].to_pylist() == [None, "unreadable"]
    assert "there is no such file" in table["detail"][1].as_py()
    assert scan.scan(config, sources).equals(table)


def test_cut_respects_both_limits() -> None:
    assert list(cut([1] * 5, 2, 100)) == [(0, 2), (2, 4), (4, 5)]
    assert list(cut([4, 4, 9, 20, 1], 10, 10)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert list(cut([], 2, 10)) == []


# The command


@pytest.fixture
def job(cluster: Cluster) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "ray_jobs/build_shards.py"), *arguments]
        environment = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run


def test_the_job_names_failures_and_writes_the_rest(
    job: Callable[..., subprocess.CompletedProcess[str]],
    pictures: Path,
    output: Path,
    built: BuildResult,
    tmp_path: Path,
) -> None:
    small = ["--crop=96", "--crops-per-picture=3", "--min-size=128", "--rows-per-shard=4"]
    ended = job(f"--input={pictures}", f"--output={tmp_path / 'out'}", "--cpus=0.5", *small)
    assert ended.returncode == 1, ended.stderr
    assert "failed: mixed/broken.jpg: " in ended.stderr and "Traceback" not in ended.stderr
    assert ended.stdout.strip() == str(built)
    assert _everything(tmp_path / "out") == _everything(output)
