"""The upscaling job on real pictures: deaths, damaged files, resuming."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import skimage.data
from PIL import Image
from pyarrow import fs
from ray.cluster_utils import Cluster

from linearsr import cli
from linearsr.config import FileOptions, Options
from linearsr.distributed.datasets.upscale import (
    UpscaleConfig,
    target_name,
    upscale_dataset,
)
from linearsr.errors import InputError, OptionError
from linearsr.imaging.files import read, read_provenance
from linearsr.storage.location import locate
from tests.helpers.cluster import living_actors
from tests.helpers.processes import until
from tests.helpers.s3 import Server
from tests.helpers.s3_faults import Faults

ROOT = Path(__file__).parents[3]
# A longer run by hand used 2000.
MANY = int(os.environ.get("LINEARSR_TEST_PICTURES", "80"))


def crops(folder: Path, count: int, size: int = 16) -> list[str]:
    """Write crops of a photograph into folders; return their paths below `folder`."""
    photo = Image.fromarray(np.asarray(skimage.data.astronaut()))
    rng = np.random.default_rng(0)
    names = [f"day {i % 3}/{i:04}.png" for i in range(count)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        left, top = rng.integers(0, 512 - size, 2)
        photo.crop((left, top, left + size, top + size)).save(folder / name)
    return names


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    crops(folder, MANY)
    return folder


@pytest.fixture
def config(cluster: Cluster, pictures: Path, small_bundle: Path, tmp_path: Path) -> UpscaleConfig:
    return UpscaleConfig(
        input=str(pictures),
        output=str(tmp_path / "out"),
        model=str(small_bundle),
        device="cpu",
        options=Options(steps=1),
        batch=4,
    )


@pytest.fixture(scope="module")
def bucket(s3: Server, pictures: Path) -> str:
    """A bucket with the pictures."""
    bucket = s3.bucket()
    locate(pictures).copy_to(locate(f"{bucket}/in"))
    return bucket


@pytest.fixture
def on_s3(config: UpscaleConfig, bucket: str, tmp_path: Path) -> UpscaleConfig:
    places = {"input": f"{bucket}/in", "output": f"{bucket}/{tmp_path.name}"}
    return config.model_copy(update=places)


def written(folder: str) -> dict[str, int]:
    """Return the pictures below a folder, each with the time when it was written."""
    place = locate(folder)
    selector = fs.FileSelector(place.path, recursive=True, allow_not_found=True)
    infos = place.filesystem.get_file_info(selector)
    return {
        info.path.removeprefix(f"{place.path}/"): info.mtime_ns
        for info in infos
        if info.extension in ("png", "jpg", "webp")
    }


def assert_all_there(config: UpscaleConfig) -> None:
    """Assert that every result is whole and of the right size, and that no partial file is left."""
    source, output = locate(config.input), locate(config.output)
    expected = set(written(config.input))
    assert set(written(config.output)) == expected and len(expected) == MANY
    for name in expected:
        height, width = read((source / name).read()).pixels.shape[1:]
        assert read((output / name).read()).pixels.shape[1:] == (4 * height, 4 * width)
    others = {f.name for f in output.files()} - {name.split("/")[-1] for name in expected}
    assert others == {"job.json"}


def command(config: UpscaleConfig) -> list[str]:
    places = [
        f"--{k}={getattr(config, k)}" for k in ("input", "output", "model", "batch", "device")
    ]
    return [sys.executable, "ray_jobs/upscale_dataset.py", *places, "--steps=1"]


def test_results_equal_those_of_the_command(
    config: UpscaleConfig, small_bundle: Path, tmp_path: Path
) -> None:
    """All options are used; bytes, names, folders and metadata are equal."""
    flags = ["--scale=2", "--seed=7", "--steps=2", "--format=jpg", "--quality=80", "--tile=16"]
    alone = tmp_path / "alone"
    source = tmp_path / "in"
    crops(source, 5, 24)
    model = ["--model", str(small_bundle), "--device", "cpu"]
    assert cli.main(["upscale", str(source), "-o", str(alone), *model, *flags]) == 0
    options = Options(scale=2, seed=7, steps=2, tile=16)
    files = FileOptions(format="jpg", quality=80)
    summary = upscale_dataset(
        config.model_copy(update={"input": str(source), "options": options, "files": files})
    )
    assert (summary.total, summary.done, summary.failed) == (5, 5, 0)
    names = set(written(str(alone)))
    assert len(names) == 5 and set(written(config.output)) == names
    for name in names:
        assert (Path(config.output) / name).read_bytes() == (alone / name).read_bytes()
    assert read_provenance(alone / name) is not None


def test_bad_pictures_are_listed_and_the_rest_written(
    config: UpscaleConfig, pictures: Path, tmp_path: Path
) -> None:
    source = tmp_path / "mixed"
    names = crops(source, 40)
    rng = np.random.default_rng(1)
    bad = set(rng.choice(names, 4, replace=False))
    for name, share in zip(sorted(bad), (0, 0.1, 0.4, 0.7), strict=True):
        data = (source / name).read_bytes()
        (source / name).write_bytes(data[: int(share * len(data))])
    config = config.model_copy(update={"input": str(source)})
    run = subprocess.run(
        command(config), cwd=ROOT, capture_output=True, text=True, env=_env(config)
    )
    assert run.returncode == 1, run.stderr
    assert "40 pictures: 36 upscaled, 4 failed" in run.stdout
    assert set(written(config.output)) == set(names) - bad
    errors = pq.read_table(Path(config.output) / "errors").to_pylist()
    assert {row["id"] for row in errors} == bad and len(errors) == 4
    assert all(row["stage"] == "read" and row["error"] for row in errors)

    crops(source, 40)  # With the files repaired, only they are left to do, and no error remains.
    before = written(config.output)
    summary = upscale_dataset(config)
    assert (summary.earlier, summary.done, summary.failed) == (36, 4, 0)
    after = written(config.output)
    assert {name: after[name] for name in before} == before
    assert not list((Path(config.output) / "errors").iterdir())


def _env(config: UpscaleConfig) -> dict[str, str]:
    return {
        **os.environ,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": str(ROOT),
    }


@pytest.mark.thorough
def test_failing_s3_requests_lose_nothing(on_s3: UpscaleConfig, s3: Server) -> None:
    """8% of the requests fail and 4% of the bodies break off."""
    with s3.proxy(seed=3) as proxy:
        # About 240 requests in a varying order are enough for some faults of each kind.
        proxy.faults = Faults(slow_down=0.04, internal_error=0.04, cut=0.04)
        summary = upscale_dataset(on_s3)
    assert all(proxy.injected[kind] for kind in ("SlowDown", "InternalError", "cut"))
    assert (summary.done, summary.failed) == (MANY, 0)
    assert_all_there(on_s3)


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.thorough)])
def test_a_restarted_driver_upscales_only_the_rest(on_s3: UpscaleConfig, kills: int) -> None:
    """The driver is killed at times from a seed; no result is written twice."""
    chosen = np.random.default_rng(2).choice(np.arange(5, MANY - 20), kills, replace=False)
    finished: dict[str, int] = {}
    for moment in np.sort(chosen):
        driver = _start(on_s3)
        until(lambda: len(written(on_s3.output)) >= moment, f"{moment} results")  # noqa: B023
        _kill(driver)
        now = written(on_s3.output)
        assert {name: now[name] for name in finished} == finished
        finished = now
    summary = upscale_dataset(on_s3)
    # Storage may finish writes of the killed driver, at most a batch, after the last listing.
    assert 0 <= summary.earlier - len(finished) <= on_s3.batch
    assert summary.earlier + summary.done == MANY
    now = written(on_s3.output)
    assert {name: now[name] for name in finished} == finished
    assert_all_there(on_s3)


def _start(config: UpscaleConfig) -> subprocess.Popen[bytes]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        command(config), cwd=ROOT, env=_env(config), start_new_session=True, **quiet
    )


def _kill(driver: subprocess.Popen[bytes]) -> None:
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    until(lambda: not living_actors("DatasetActor"), "the end of the dead driver's actors")


def test_a_killed_actor_is_replaced(config: UpscaleConfig) -> None:
    driver = _start(config)
    try:
        until(lambda: bool(living_actors("DatasetActor")), "a worker")
        worker = living_actors("DatasetActor")[0]
        until(lambda: len(written(config.output)) >= 10, "ten results")
        os.kill(worker, signal.SIGKILL)
        before = written(config.output)
        assert driver.wait(timeout=300) == 0
    finally:
        driver.kill()
    now = written(config.output)
    assert {name: now[name] for name in before} == before
    assert_all_there(config)


def test_parquet_inputs_give_parquet_results(
    config: UpscaleConfig, pictures: Path, tmp_path: Path
) -> None:
    """Shards have one row group or several; one row is empty."""
    files = sorted(pictures.rglob("*.png"))[:20]
    column = [file.read_bytes() for file in files]
    ids = [f"photo {i}#{i % 2}" for i in range(20)]
    shards = tmp_path / "shards"
    shards.mkdir()
    table = pa.table({"id": ids, "lr": [*column[:19], None]})
    pq.write_table(table.slice(0, 7), shards / "shard-00000.parquet")
    pq.write_table(table.slice(7), shards / "shard-00001.parquet", row_group_size=5)
    config = config.model_copy(update={"input": str(shards), "kind": "parquet"})
    for earlier in (0, 19):  # the second run finds everything done but the empty row
        summary = upscale_dataset(config)
        assert (summary.total, summary.earlier, summary.failed) == (20, earlier, 1)
        rows = pq.read_table(Path(config.output) / "data").to_pylist()
        assert sorted(row["id"] for row in rows) == sorted(ids[:19])
    for row in rows:
        shape = read(row["image"]).pixels.shape
        assert shape == (3, row["height"], row["width"]) == (3, 64, 64)
    errors = pq.read_table(Path(config.output) / "errors").to_pylist()
    assert [row["id"] for row in errors] == [ids[19]]


def test_pictures_of_unequal_sizes_are_upscaled(config: UpscaleConfig, tmp_path: Path) -> None:
    source = tmp_path / "sizes"
    source.mkdir()
    photo = Image.fromarray(np.asarray(skimage.data.coffee()))
    sizes = [(1, 1), (2, 300), (64, 48), (48, 64), (400, 20), (8000, 10)]
    for width, height in sizes:
        photo.resize((width, height)).save(source / f"{width}x{height}.png")
    summary = upscale_dataset(config.model_copy(update={"input": str(source)}))
    assert (summary.done, summary.failed) == (len(sizes), 0)
    for width, height in sizes:
        result = Image.open(Path(config.output) / f"{width}x{height}.png")
        assert result.size == (4 * width, 4 * height)


def test_other_options_in_the_same_output_are_refused(
    config: UpscaleConfig, tmp_path: Path
) -> None:
    source = tmp_path / "one"
    crops(source, 1)
    config = config.model_copy(update={"input": str(source)})
    upscale_dataset(config)
    with pytest.raises(OptionError, match=r"settings: steps \(1, now 2\); choose"):
        upscale_dataset(config.model_copy(update={"options": Options(steps=2)}))
    assert upscale_dataset(config.model_copy(update={"batch": 1})).earlier == 1


def test_wrong_requests_are_refused_before_any_work(config: UpscaleConfig, tmp_path: Path) -> None:
    source = tmp_path / "in"
    crops(source, 1)
    (source / "day 0" / "0000.jpg").write_bytes(b"")
    config = config.model_copy(update={"input": str(source)})
    with pytest.raises(OptionError, match=r"0000\.jpg and .*0000\.png would both become"):
        upscale_dataset(config.model_copy(update={"files": FileOptions(format="webp")}))
    (tmp_path / "link").symlink_to(source)
    for places in (("in", "in"), ("in", "link"), ("link", "in")):
        update = dict(zip(("input", "output"), (str(tmp_path / p) for p in places), strict=True))
        with pytest.raises(OptionError, match="same folder"):
            upscale_dataset(config.model_copy(update=update))
    with pytest.raises(InputError, match="no pictures"):
        upscale_dataset(config.model_copy(update={"input": str(tmp_path / "none")}))
    assert not (Path(config.output) / "day 0").exists()


def test_tags_for_a_model_without_tags_end_the_job(config: UpscaleConfig, tmp_path: Path) -> None:
    crops(tmp_path / "in", 3)
    with pytest.raises(OptionError, match="trained without tags"):
        upscale_dataset(
            config.model_copy(
                update={"input": str(tmp_path / "in"), "options": Options(tags=("cat",))}
            )
        )


@pytest.mark.parametrize("id", ["../up.png", "/etc/passwd", "a/../../b.png", ".."])
def test_ids_outside_the_output_are_refused(id: str) -> None:
    with pytest.raises(InputError, match="outside the output"):
        target_name(id, FileOptions())


def test_results_are_named_after_their_inputs() -> None:
    assert target_name("a/b.jpeg", FileOptions()) == "a/b.jpeg"
    assert target_name("a/b.avif", FileOptions()) == "a/b.png"
    assert target_name("a/b.jpg#3", FileOptions()) == "a/b.jpg#3.png"
    assert target_name("a.b/v1.2", FileOptions(format="webp")) == "a.b/v1.2.webp"
