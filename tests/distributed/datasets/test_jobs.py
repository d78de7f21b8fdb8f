"""The dataset jobs lead from a bucket of photographs to a report, by `ray job submit`."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray.job_submission import JobStatus

from linearsr.imaging.files import read
from linearsr.storage.location import locate
from tests.helpers.cluster import Jobs
from tests.helpers.s3 import Server


@pytest.mark.thorough
def test_dataset_jobs_lead_from_photos_to_a_report(
    jobs: Jobs, s3: Server, photos: Path, small_bundle: Path
) -> None:
    """Each job reads from S3 what the previous one wrote."""

    def run(job: str, *flags: str) -> str:
        status, code, output = jobs.end(jobs.submit([sys.executable, f"ray_jobs/{job}.py", *flags]))
        assert (status, code) == (JobStatus.SUCCEEDED, 0), output
        return output

    bucket = s3.bucket()
    small, shards, large, report = (f"{bucket}/{n}" for n in ("small", "shards", "large", "report"))
    locate(photos).copy_to(locate(small))
    cutting = ("--crop=64", "--min-size=64", "--min-sharpness=0", "--crops-per-picture=1")
    output = run("build_shards", f"--input={small}", f"--output={shards}", *cutting)
    assert "2 pictures: 2 used, rejected: none; 2 rows in 1 shards" in output
    output = run("tag_dataset", f"--input={shards}", f"--output={shards}", "--threshold=0")
    assert "2 pictures: 2 processed, 0 failed; 2 have tags, in 1 shards" in output
    (shard,) = (file for file in locate(shards).files() if file.name.endswith(".parquet"))
    rows = pq.read_table(shard.path, filesystem=shard.filesystem).to_pylist()
    assert all(len(row["tags"]) == len(row["tag_scores"]) == 5 for row in rows)

    model = (f"--model={small_bundle}", "--device=cpu", "--steps=1")
    output = run("upscale_dataset", f"--input={shards}", f"--output={large}", *model)
    assert "2 pictures: 2 upscaled, 0 failed" in output
    results = [file for file in locate(large).files() if file.name.endswith(".png")]
    assert [read(file.read()).pixels.shape for file in results] == [(3, 64, 64)] * 2

    measuring = ("--metrics", "psnr", "piqe", "--steps", "1", "--models", f"small={small_bundle}")
    output = run("evaluate", f"--hr={shards}", f"--output={report}", *measuring)
    assert "bicubic" in output and "small, 1 step" in output
    written = {file.name for file in locate(report).files()}
    assert {"metrics.parquet", "report.md", "contact.jpg"} <= written
