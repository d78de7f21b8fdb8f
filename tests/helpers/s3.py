"""The S3 server of the tests: new buckets, and a proxy that injects faults."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest

from tests.helpers.s3_faults import Proxy, proxy
from tools import s3_server


class Server:
    """A running S3 server; the AWS_* variables of this process point to it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._names = itertools.count()

    def bucket(self) -> str:
        """Create a bucket; return its URL, s3://NAME."""
        import boto3

        name = f"test-{next(self._names)}"
        # The variables are not used here, since the test may have changed them.
        boto3.client(
            "s3",
            endpoint_url=f"http://{s3_server.HOST}:{self.port}",
            aws_access_key_id=s3_server.KEY,
            aws_secret_access_key=s3_server.SECRET,
            region_name=s3_server.REGION,
        ).create_bucket(Bucket=name)
        return f"s3://{name}"

    @contextlib.contextmanager
    def proxy(self, seed: int = 0) -> Iterator[Proxy]:
        """Yield a fault-injecting proxy; AWS_ENDPOINT_URL points to it meanwhile."""
        with proxy(self.port, seed) as between, pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{s3_server.HOST}:{between.port}")
            yield between
