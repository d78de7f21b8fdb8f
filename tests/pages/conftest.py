"""The fixture of the user who follows all pages."""

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
    """A user with everything that the pages presuppose: clone, pictures, cluster, S3, shell."""
    home = Path(tempfile.mkdtemp(prefix="lsr-"))  # a short path, for it holds sockets
    reader = User(home)
    make_clone(reader)
    install_programs(reader)
    with serve_bucket(reader), pytest.MonkeyPatch.context() as patch:
        there = {**swift.environment(int(reader.places["s3"]))}
        there |= {"RAY_TMPDIR": str(home), "OMP_NUM_THREADS": "1"}
        there["PATH"] = f"{reader.bin}:{os.environ['PATH']}"
        reader.environment |= swift.environment(int(reader.places["s3"]))
        for name, value in there.items():
            patch.setenv(name, value)
        for bucket in BUCKETS:
            boto3.client("s3").create_bucket(Bucket=bucket)
        place_belongings(reader, small_bundle)
        cluster = start_cluster(cpus=16)
        reader.places["dashboard"] = cluster.webui_url
        reader.environment["RAY_ADDRESS"] = cluster.address
        reader.environment["RAY_DASHBOARD_ADDRESS"] = f"http://{cluster.webui_url}"
        yield reader
        end_serving(home / "done" / "serving")
        cluster.shutdown()
    shutil.rmtree(home, ignore_errors=True)
