"""Fixtures: one S3 server for all tests that ask for one, a bucket for each, and bad days."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest

from tests.storage.faults import Proxy, proxy
from tools import s3_server as swift


class Server:
    """A running S3 server that the AWS_* variables lead to."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._names = itertools.count()

    def bucket(self) -> str:
        """A new bucket, as s3://NAME."""
        import boto3

        name = f"test-{next(self._names)}"
        # Not by the variables: the test may have them lead elsewhere.
        boto3.client(
            "s3",
            endpoint_url=f"http://{swift.HOST}:{self.port}",
            aws_access_key_id=swift.KEY,
            aws_secret_access_key=swift.SECRET,
            region_name=swift.REGION,
        ).create_bucket(Bucket=name)
        return f"s3://{name}"

    @contextlib.contextmanager
    def proxy(self, seed: int = 0) -> Iterator[Proxy]:
        """A fault-injecting proxy that AWS_ENDPOINT_URL of this process leads to meanwhile."""
        with proxy(self.port, seed) as between, pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{swift.HOST}:{between.port}")
            yield between


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Where `s3` will be, known to this process and all it starts; nothing listens there yet.

    Ray's workers have the variables that their cluster was started with. So the cluster needs
    the address, and only the tests that use S3 pay for the server.
    """
    port = swift.free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in swift.environment(port).items():
            patch.setenv(name, value)
        for name in ("ENDPOINT_URL_S3", "SESSION_TOKEN", "PROFILE", "MAX_ATTEMPTS", "RETRY_MODE"):
            patch.delenv(f"AWS_{name}", raising=False)
        yield port


@pytest.fixture(scope="session")
def s3(s3_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server; see `Server`. Its pages are small: a long listing need not be so long."""
    with swift.running(tmp_path_factory.mktemp("swift"), s3_port, page=100):
        yield Server(s3_port)
