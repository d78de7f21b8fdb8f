"""One fault of a fleet at a time: nothing is lost, and no request fails.

To repeat each ten times: `for n in $(seq 10); do pytest tests/drills; done`.
"""

from __future__ import annotations

import asyncio
import io
import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import skimage.data
from PIL import Image
from ray.job_submission import JobStatus

from linearsr.config import Options
from linearsr.imaging.files import encode, read
from linearsr.pipeline.upscaler import Upscaler
from linearsr.storage.location import Location, locate
from linearsr.tags import load_tagger
from linearsr.tags.base import TaggerConfig
from linearsr.training import loop
from tests.helpers.endpoint import (
    Answer,
    Case,
    Endpoint,
    answered_by,
    check,
    crowd,
    in_session,
    pixels_of,
)
from tests.helpers.processes import until
from tests.helpers.rehearsal_fleet import Fleet
from tests.helpers.runs import SMALL, reported
from tests.helpers.s3_faults import Faults, proxy

# There are enough steps that work is left after the fault.
PICTURES, SAMPLING = 24, 20
STEPS = 24
TRAINING = (
    *SMALL,
    *(f"pretrain.steps={STEPS}", "pretrain.warmup=2", "pretrain.report_every=1"),
    "pretrain.checkpoint_every=6",
)
# Two such actors do not fit on one node.
APART = "--actors 2 --actor-cpus 3"


@pytest.fixture(scope="module")
def photos(fleet: Fleet) -> str:
    """A folder of small pictures on S3."""
    folder = f"{fleet.place.storage}/photos"
    photo = Image.fromarray(np.asarray(skimage.data.chelsea()))
    for number in range(PICTURES):
        left, top = 12 * number, 8 * (number % 12)
        file = io.BytesIO()
        photo.crop((left, top, left + 160, top + 160)).save(file, "PNG")
        locate(f"{folder}/{number:02}.png").write(file.getvalue())
    return folder


@pytest.fixture(scope="module")
def model(fleet: Fleet, small_bundle: Path) -> str:
    """Weights on S3."""
    place = f"{fleet.place.storage}/model"
    locate(small_bundle).copy_to(locate(place))
    return place


def names(folder: str, suffix: str) -> dict[str, Location]:
    return {f.name: f for f in locate(folder).files() if f.name.endswith(suffix)}


def written(folder: str, suffix: str) -> dict[str, int]:
    """Return the time when each file was written."""
    files = names(folder, suffix)
    return {n: f.filesystem.get_file_info(f.path).mtime_ns for n, f in files.items()}


def test_training_continues_from_a_checkpoint_when_a_node_is_lost(
    fleet: Fleet, photos: str
) -> None:
    """The run has all steps, and none of them twice."""
    runs = f"{fleet.place.storage}/runs"
    settings = shlex.join([part for field in TRAINING for part in ("--set", field)])
    job = fleet.start(
        f"ray_jobs/pretrain.py --data {photos} --validation {photos} --storage {runs} "
        f"--name lost --workers 2 {settings}"
    )
    run = f"{runs}/lost"
    until(lambda: bool(reported(run)), "a first checkpoint")
    fleet.lose_node_of("RayTrainWorker")
    assert STEPS not in steps(run), "it had ended before"
    fleet.end(job)
    assert [metrics["step"] for metrics in reported(run)] == [6, 12, 18, 24], (
        "a checkpoint was lost"
    )
    (last,) = (progress for progress in checkpoints(run) if progress["step"] == STEPS)
    assert [point["step"] for point in last["history"]] == list(range(1, STEPS + 1))


def checkpoints(run: str) -> list[dict[str, Any]]:
    """Return the progress of each checkpoint."""
    return [json.loads(f.read()) for f in locate(run).files() if f.name == loop.PROGRESS]


def steps(run: str) -> list[int]:
    return [progress["step"] for progress in checkpoints(run)]


def test_tagging_finishes_when_a_node_is_lost(fleet: Fleet, photos: str) -> None:
    shards, tagged = f"{fleet.place.storage}/shards", f"{fleet.place.storage}/tagged"
    filters = "--min-sharpness 0 --duplicate-distance -1 --min-size 64"
    fleet.end(
        fleet.start(
            f"ray_jobs/build_shards.py --input {photos} --output {shards} --crop 64 "
            f"--rows-per-shard 1 {filters}"
        )
    )
    expected = names(shards, ".parquet")
    assert sum(len(table(shard)) for shard in expected.values()) >= PICTURES
    job = fleet.start(
        f"ray_jobs/tag_dataset.py --input {shards} --output {tagged} --threshold 0 {APART}"
    )
    until(lambda: bool(names(tagged, ".parquet")), "a first shard")
    before = written(tagged, ".parquet")
    fleet.lose_node_of("DatasetActor")
    assert len(names(tagged, ".parquet")) < len(expected), "it had ended before"
    fleet.end(job)
    after = written(tagged, ".parquet")
    assert set(after) == set(expected)
    assert {name: after[name] for name in before} == before
    tagger = load_tagger(TaggerConfig(threshold=0.0), "cpu")
    for name, file in names(tagged, ".parquet").items():
        rows, untagged = table(file), table(expected[name])
        assert [row["id"] for row in rows] == [row["id"] for row in untagged], name
        for row in rows:
            assert row["tags"] == [tag.name for tag in tagger(read(row["lr"]).pixels)], row["id"]


def table(shard: Location) -> list[dict[str, Any]]:
    return list(pq.read_table(shard.path, filesystem=shard.filesystem).to_pylist())


@pytest.fixture(scope="module")
def results(photos: str, small_bundle: Path) -> dict[str, np.ndarray]:
    """The expected results, made in this process."""
    upscaler, options = Upscaler.load(small_bundle, "cpu"), Options(steps=SAMPLING)
    return {
        name: pixels_of(encode(upscaler.upscale(read(file.read()), options), "png"))
        for name, file in names(photos, ".png").items()
    }


def upscaling(photos: str, model: str, output: str, pool: str = "--actors 1") -> str:
    return (
        f"ray_jobs/upscale_dataset.py --input {photos} --output {output} --model {model} "
        f"--device cpu --steps {SAMPLING} --batch 1 {pool}"
    )


def assert_complete(output: str, results: dict[str, np.ndarray], before: dict[str, int]) -> None:
    """Assert that all results are right, and that those of `before` were not written again."""
    after = written(output, ".png")
    assert set(after) == set(results)
    assert {name: after[name] for name in before} == before
    for name, file in names(output, ".png").items():
        assert np.abs(pixels_of(file.read()) - results[name]).max() <= 1


def test_upscaling_finishes_when_a_node_is_lost(
    fleet: Fleet, photos: str, model: str, results: dict[str, np.ndarray]
) -> None:
    output = f"{fleet.place.storage}/lost-node"
    job = fleet.start(upscaling(photos, model, output, APART))
    until(lambda: len(names(output, ".png")) > 2, "three results")
    before = written(output, ".png")
    fleet.lose_node_of("DatasetActor")
    assert len(names(output, ".png")) < PICTURES, "it had ended before"
    fleet.end(job)
    assert_complete(output, results, before)


def test_upscaling_finishes_when_the_driver_is_killed(
    fleet: Fleet, photos: str, model: str, results: dict[str, np.ndarray]
) -> None:
    output = f"{fleet.place.storage}/lost-driver"
    job = fleet.start(upscaling(photos, model, output))
    until(lambda: len(names(output, ".png")) > 2, "three results")
    driver = psutil.Process(int(fleet.jobs.client.get_job_info(job).driver_info.pid))
    driver.kill()
    status, _, _ = fleet.jobs.end(job)
    assert status == JobStatus.FAILED
    before = written(output, ".png")
    assert len(before) < PICTURES, "it had ended before"
    fleet.end(fleet.start(upscaling(photos, model, output)))
    assert_complete(output, results, before)


def test_upscaling_finishes_when_storage_is_slow(
    fleet: Fleet, photos: str, model: str, results: dict[str, np.ndarray]
) -> None:
    """Every request takes 0.2 s longer, and one in ten gets a 503 SlowDown."""
    output = f"{fleet.place.storage}/slow"
    with proxy(fleet.place.s3_port, seed=1) as between:
        between.faults = Faults(slow_down=0.1, delay=0.2)
        endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{between.port}"}
        fleet.end(fleet.start(upscaling(photos, model, output), endpoint))
        assert between.injected["SlowDown"]
    assert_complete(output, results, {})


@pytest.fixture(scope="module")
def endpoint(fleet: Fleet, model: str) -> Endpoint:
    """Two replicas of each expert, too many for one node; the ingress is on the head."""
    port = fleet.place.endpoint.rsplit(":", 1)[1]
    fleet.end(
        fleet.start(
            f"ray_jobs/deploy.py --on-head --port {port} --set model={model} device=cpu "
            "replicas=[2,2,2,2] expert_cpus=0.5 router_cpus=0.5 routers=2"
        )
    )
    return Endpoint(fleet.place.endpoint, None)


@pytest.fixture(scope="module")
def cases(small_bundle: Path) -> list[Case]:
    return answered_by(small_bundle)


def test_serving_fails_no_request_when_a_node_is_lost(
    fleet: Fleet, endpoint: Endpoint, cases: list[Case]
) -> None:
    """Every request gets its own picture."""

    async def work(session: aiohttp.ClientSession) -> list[Answer]:
        answers = await crowd(session, endpoint, cases, len(cases))
        lost = asyncio.create_task(asyncio.to_thread(fleet.lose_node_of, "linearsr:texture"))
        while not lost.done() or len(answers) < 10 * len(cases):
            answers += await crowd(session, endpoint, cases, 2 * len(cases))
        await lost
        return answers

    check(in_session(work), cases)


def test_serving_fails_no_request_when_the_object_store_is_full(
    fleet: Fleet, endpoint: Endpoint, cases: list[Case]
) -> None:
    """Another job holds all object stores, so latents are passed through the disk."""
    fleet.settle()
    job = fleet.start("-m tests.drills.fill")
    output = partial(fleet.jobs.client.get_job_logs, job)
    until(lambda: "all are full" in output() or fleet.jobs.has_ended(job), "full object stores")
    assert not fleet.jobs.has_ended(job), output()
    try:
        answers = in_session(lambda session: crowd(session, endpoint, cases, 2 * len(cases)))
        check(answers, cases)
    finally:
        fleet.jobs.client.stop_job(job)
        until(lambda: fleet.jobs.has_ended(job), "the end of it")
