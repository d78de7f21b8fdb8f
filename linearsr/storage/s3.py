"""Clients for S3 and compatible servers, with timeouts and retries for bad days.

Whole objects, listings and copies go through boto3: it notices a body that was cut, tries again,
uploads all of an object or nothing, and its errors have names. Parquet and Ray Train's checkpoints
go through pyarrow's filesystem.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from http import HTTPStatus
from typing import IO, Any, NamedTuple

import boto3  # type: ignore[import-untyped]
from boto3.s3.transfer import TransferConfig  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    ClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from pyarrow import fs

from linearsr.errors import OptionError

# Attempts of a request before it counts as failed, unless AWS_MAX_ATTEMPTS says otherwise.
ATTEMPTS = 10
CONNECT_SECONDS, READ_SECONDS = 10, 60
# Objects of at least this many bytes travel in parts, several at a time.
PART_BYTES = 32 << 20
# Errors of a body that broke off.
_CUT = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
# Time after which the writers of one new object, in the same moment, read which of them counts.
SETTLE_SECONDS = 1.0
# The most objects that one request may delete.
DELETE_BATCH = 1000


class S3FileSystem(fs.S3FileSystem):  # type: ignore[misc]
    """pyarrow's filesystem with our retries; pyarrow's own forgets them when it is pickled."""

    def __init__(self, endpoint: str | None, region: str | None) -> None:
        super().__init__(
            endpoint_override=endpoint,
            region=region,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=max_attempts()),
            connect_timeout=CONNECT_SECONDS,
            request_timeout=READ_SECONDS,
        )
        self.server = endpoint, region

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the server's address but no credentials: every process has its own."""
        return filesystem, self.server


class Object(NamedTuple):
    """An object of a listing. etag: differs for other bytes of the same key."""

    key: str
    size: int
    etag: str


class S3Path(NamedTuple):
    """An object of a bucket, or the prefix that stands for a folder, with a boto3 client for it.

    Methods raise boto3's errors; see `linearsr.storage.s3_errors`.
    """

    client: Any
    bucket: str
    key: str

    @property
    def prefix(self) -> str:
        """The beginning of the keys of all objects in this folder."""
        return f"{self.key}/" if self.key else ""

    def exists(self) -> bool:
        """Return whether there is such an object, or any object below it."""
        if self.key and self.is_object():
            return True
        page = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
        return not self.key or bool(page.get("Contents"))

    def is_object(self) -> bool:
        """Return whether there is such an object."""
        try:
            self.client.head_object(Bucket=self.bucket, Key=self.key)
        except ClientError as error:
            if error.response["Error"]["Code"] != "404":
                raise
            return False
        return True

    def read(self) -> bytes:
        """Return the bytes of an object."""
        buffer = io.BytesIO()
        self.client.download_fileobj(self.bucket, self.key, buffer, Config=_transfer())
        return buffer.getvalue()

    def head(self, size: int) -> bytes:
        """Return the first bytes of an object, at most `size`."""
        for left in reversed(range(max_attempts())):
            try:
                return self._range(size)
            except _CUT:
                if not left:
                    raise
        return b""

    def _range(self, size: int) -> bytes:
        place = {"Bucket": self.bucket, "Key": self.key}
        try:
            answer = self.client.get_object(**place, Range=f"bytes=0-{size - 1}")
        except ClientError as error:
            if error.response["Error"]["Code"] in ("InvalidRange", "416"):  # it is empty
                return b""
            raise
        with contextlib.closing(answer["Body"]) as body:
            if answer["ContentLength"] <= size:
                return bytes(body.read())
            return bytes(body.read(size))  # a server that knows no ranges sends the whole object

    def download(self, path: str) -> None:
        """Write an object to a local file."""
        self.client.download_file(self.bucket, self.key, path, Config=_transfer())

    def upload(self, file: IO[bytes]) -> None:
        """Write an object from an open file: all of it, or nothing."""
        self.client.upload_fileobj(file, self.bucket, self.key, Config=_transfer())

    def create(self, data: bytes) -> bool:
        """Write an object that does not exist yet; return whether it then holds this data.

        Some stores ignore the condition, and others check it before they begin to write. So every
        writer reads back after SETTLE_SECONDS, and the last one counts, if all began within them.
        """
        self._put_new(data)
        time.sleep(SETTLE_SECONDS)
        return self.read() == data

    def _put_new(self, data: bytes) -> None:
        """Write an object unless it exists, as far as the store knows conditions."""
        place = {"Bucket": self.bucket, "Key": self.key, "Body": data}
        try:
            self.client.put_object(**place, IfNoneMatch="*")
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == HTTPStatus.NOT_IMPLEMENTED:
                self.client.put_object(**place)
            elif status not in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT):
                raise

    def copy_from(self, source: S3Path) -> None:
        """Let the server copy an object here."""
        origin = {"Bucket": source.bucket, "Key": source.key}
        self.client.copy(origin, self.bucket, self.key, Config=_transfer())

    def delete(self) -> None:
        """Delete an object, if it exists."""
        self.client.delete_object(Bucket=self.bucket, Key=self.key)

    def objects(self, *, folders: bool = False) -> Iterator[Object]:
        """Yield all objects in this folder; each request returns a thousand.

        folders: whether to include the empty objects whose keys end with "/", which mark folders.
        """
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
            for entry in page.get("Contents", []):
                marks_folder = entry["Key"].endswith("/") and not entry["Size"]
                if folders or not marks_folder:
                    yield Object(entry["Key"], entry["Size"], entry["ETag"])

    def delete_folder(self) -> None:
        """Delete all objects in this folder."""
        keys = [{"Key": found.key} for found in self.objects(folders=True)]
        for first in range(0, len(keys), DELETE_BATCH):
            batch = {"Objects": keys[first : first + DELETE_BATCH], "Quiet": True}
            errors = self.client.delete_objects(Bucket=self.bucket, Delete=batch).get("Errors")
            if errors:
                raise ClientError({"Error": errors[0]}, "DeleteObjects")


def open_path(system: fs.S3FileSystem, path: str) -> S3Path:
    """Return BUCKET/KEY on the server of a pyarrow filesystem as an `S3Path`."""
    own = isinstance(system, S3FileSystem)
    endpoint, region = system.server if own else (_endpoint(), system.region)
    bucket, _, key = path.partition("/")
    return S3Path(_client(endpoint, region), bucket, key)


def max_attempts() -> int:
    """Return AWS_MAX_ATTEMPTS or its default. Raises OptionError if it is not a number."""
    text = os.environ.get("AWS_MAX_ATTEMPTS") or str(ATTEMPTS)
    if not text.isdecimal() or int(text) < 1:
        raise OptionError(f"AWS_MAX_ATTEMPTS must be a whole number of at least 1, not {text!r}")
    return int(text)


def default_filesystem() -> S3FileSystem:
    """Return the filesystem of the server and region that the AWS_* variables name."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    system: S3FileSystem = filesystem(_endpoint(), region)
    return system


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _once_per_process(make: Callable[..., Any]) -> Callable[..., Any]:
    """Keep one result per server for all threads, until an AWS_* variable changes."""
    cached = lru_cache(maxsize=8)(lambda _, *server: make(*server))

    @wraps(make)
    def get(*server: str | None) -> Any:
        variables = [item for item in os.environ.items() if item[0].startswith("AWS_")]
        return cached(tuple(sorted(variables)), *server)

    return get


@_once_per_process
def filesystem(endpoint: str | None, region: str | None) -> S3FileSystem:
    """Return the pyarrow filesystem of a server."""
    return S3FileSystem(endpoint, region)


@_once_per_process
def _client(endpoint: str | None, region: str | None) -> Any:
    mode = os.environ.get("AWS_RETRY_MODE") or "standard"
    config = Config(
        retries={"mode": mode, "total_max_attempts": max_attempts()},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=32,
        # As pyarrow does: not every server knows its buckets by host name.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    # A session of its own, because boto3's default session is not safe among threads.
    session = boto3.session.Session()
    client = session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
    client.meta.events.register_last("before-parameter-build.s3", _refuse_redirection)
    return client


def _refuse_redirection(context: dict[str, Any], **_: Any) -> None:
    """Make boto3 as strict about regions as pyarrow, which follows no redirection.

    Otherwise a job would read its data, train, and fail at its first checkpoint.
    """
    context.setdefault("s3_redirect", {})["redirected"] = True


def _transfer() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=PART_BYTES,
        # Attempts for bodies that break off; requests that fail have their own.
        num_download_attempts=max_attempts(),
        preferred_transfer_client="classic",
    )
