"""One user for all pages: a clone with pictures in it, a cluster, S3, and a shell."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from tests.helpers.cluster import start_cluster
from tests.helpers.pages.program import end_serving
from tests.helpers.pages.user import (
    BUCKETS,
    User,
    install_programs,
    make_clone,
    place_belongings,
    serve_bucket,
)
from tools import s3_server as swift


@pytest.fixture(scope="module")
def user(small_bundle: Path) -> Iterator[User]:
    """Has all that a page takes for granted."""
    home = Path(tempfile.mkdtemp(prefix="lsr-"))  # a short path, for it holds sockets
    made = User(home)
    make_clone(made)
    install_programs(made)
    with serve_bucket(made), pytest.MonkeyPatch.context() as patch:
        there = {**swift.environment(int(made.places["s3"]))}
        there |= {"RAY_TMPDIR": str(home), "OMP_NUM_THREADS": "1"}
        there["PATH"] = f"{made.bin}:{os.environ['PATH']}"
        made.environment |= swift.environment(int(made.places["s3"]))
        for name, value in there.items():
            patch.setenv(name, value)
        for bucket in BUCKETS:
            boto3.client("s3").create_bucket(Bucket=bucket)
        place_belongings(made, small_bundle)
        cluster = start_cluster(cpus=16)
        made.places["dashboard"] = cluster.webui_url
        made.environment["RAY_ADDRESS"] = cluster.address
        made.environment["RAY_DASHBOARD_ADDRESS"] = f"http://{cluster.webui_url}"
        yield made
        end_serving(home / "done" / "serving")
        cluster.shutdown()
    shutil.rmtree(home, ignore_errors=True)
