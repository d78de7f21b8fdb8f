"""`linearsr job --submit` on the local cluster: results, exit codes, and what the job was sent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from PIL import Image
from ray._private.runtime_env.packaging import create_package

from tests.helpers.cluster import ROOT, Jobs


def _submit(
    jobs: Jobs, folder: Path, name: str, *flags: object
) -> subprocess.CompletedProcess[str]:
    words = ("job", name, "--submit", "--address", jobs.client.get_address(), *flags)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LINEARSR_TOKEN": "hush"}
    return subprocess.run(
        [sys.executable, "-m", "linearsr.cli", *map(str, words)],
        cwd=folder,
        env={**environment, "AWS_SECRET_ACCESS_KEY": "hush", "RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_submitted_job_prints_its_log_and_writes_where_the_user_said(
    jobs: Jobs, photos: Path, small_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").symlink_to(photos)
    flags = ("--input", "in", "--output", "out", "--model", small_bundle, "--steps", 1)
    done = _submit(jobs, tmp_path, "upscale-dataset", *flags, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "2 pictures: 2 upscaled, 0 failed" in done.stdout
    assert Image.open(tmp_path / "out" / "astronaut.png").size == (640, 480)
    (job,) = set(re.findall(r"raysubmit_\w+", done.stderr))
    info = jobs.client.get_job_info(job)
    assert "hush" not in info.json() and set(info.runtime_env) <= {"working_dir", "_ray_commit"}
    assert "--model=files/model/" in info.entrypoint


def test_submitted_job_that_fails_gives_its_exit_code(
    jobs: Jobs, photos: Path, tmp_path: Path
) -> None:
    flags = ("--input", photos, "--output", tmp_path / "out", "--steps", 99)
    done = _submit(jobs, tmp_path, "upscale-dataset", *flags)
    assert done.returncode == 2
    assert "steps: Input should be less than or equal to 50" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_the_code_and_nothing_else_is_sent_from_a_clone(tmp_path: Path) -> None:
    """`ray job submit --working-dir .` leaves out what .rayignore names."""
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    with zipfile.ZipFile(package) as file:
        names = set(file.namelist())
    assert {name.split("/")[0] for name in names} == {"linearsr", "ray_jobs"}
    assert {f"ray_jobs/{path.name}" for path in (ROOT / "ray_jobs").glob("*.*")} <= names
    assert "linearsr/weights/linearsr-tiny/structure.safetensors" in names
