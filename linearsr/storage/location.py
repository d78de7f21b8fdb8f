"""Paths on shared storage: local folders and s3:// prefixes by one interface.

An S3-compatible endpoint and credentials come from the standard AWS variables (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_MAX_ATTEMPTS).

Whole objects, listings and copies go through boto3: it notices a body that was cut, tries again,
uploads whole or not at all, and its errors have names. The pyarrow filesystem of a location is
for what takes one: Parquet, and Ray Train's checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import boto3  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
from boto3.exceptions import RetriesExceededError as BrokenOff  # type: ignore[import-untyped]
from boto3.s3.transfer import TransferConfig  # type: ignore[import-untyped]
from botocore import exceptions as boto  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from pyarrow import fs
from s3transfer.exceptions import RetriesExceededError  # type: ignore[import-untyped]

from linearsr.errors import (
    Denied,
    InputError,
    LinearSRError,
    MissingBucket,
    MissingFile,
    OptionError,
    OutputError,
    StorageError,
    Throttled,
    Unreachable,
    WrongRegion,
    one_line,
)

# How often a request is sent before it counts as failed, unless AWS_MAX_ATTEMPTS says otherwise.
ATTEMPTS = 10
CONNECT_SECONDS, READ_SECONDS = 10, 60
# From this size on an object travels in parts, side by side.
PART = 32 << 20
# Files that are copied side by side.
COPIES = 8
# What one request deletes.
BATCH = 1000
# Where Ray unpacks the folder that a job came with (`ray job submit --working-dir`), on each node.
UNPACKED = "/runtime_resources/working_dir_files/"
# How the hidden name of a local file ends that is not complete yet.
UNFINISHED = ".part"


@dataclass(frozen=True)
class Location:
    """A file or folder on a filesystem.

    Whatever it does raises StorageError when the storage is to blame, by its subclasses.
    """

    filesystem: fs.FileSystem
    path: str

    def __hash__(self) -> int:
        return hash(self.path)

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        with explained(self):
            if at := _on_s3(self):
                return at.exists()
            return bool(self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound)

    def read(self) -> bytes:
        """A file's bytes, all of them. Raises InputError; MissingFile when there is no file."""
        with explained(self):
            if at := _on_s3(self):
                buffer = io.BytesIO()
                at.client.download_fileobj(at.bucket, at.key, buffer, Config=_transfer())
                return buffer.getvalue()
            with self.filesystem.open_input_stream(self.path) as file:
                return bytes(file.read())

    def write(self, data: bytes) -> None:
        """A whole file, complete before it gets its name. Raises OutputError."""
        with explained(self, OutputError):
            if at := _on_s3(self):
                at.client.upload_fileobj(io.BytesIO(data), at.bucket, at.key, Config=_transfer())
                return
            with _renamed(self) as path, self.filesystem.open_output_stream(path) as file:
                file.write(data)

    def sizes(self) -> dict[Location, int]:
        """All files below a folder, sorted, and their sizes; none when it does not exist.

        A request per thousand files. What a killed process left unfinished is not there.
        """
        with explained(self):
            if at := _on_s3(self):
                found = {f"{at.bucket}/{key}": size for key, size in at.objects()}
            else:
                selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
                infos = self.filesystem.get_file_info(selector)
                found = {i.path: i.size for i in infos if _is_finished(i)}
        return {Location(self.filesystem, path): found[path] for path in sorted(found)}

    def files(self) -> list[Location]:
        """All files below a folder, sorted; none when it does not exist."""
        return list(self.sizes())

    def copy_to(self, target: Location) -> None:
        """Copy a folder and what is in it; every file appears whole. Raises OutputError.

        Raises InputError before any is copied for an object that would lie outside a local target.
        """
        self._copy_files(self.files(), target)

    def delete(self) -> None:
        """Delete a folder and what is in it, if it exists. Raises OutputError."""
        with explained(self, OutputError):
            if at := _on_s3(self):
                at.delete_below()
            elif self.exists():
                self.filesystem.delete_dir(self.path)

    def delete_file(self) -> None:
        """Delete a file, if it exists. Raises OutputError."""
        with explained(self, OutputError), contextlib.suppress(FileNotFoundError):
            if at := _on_s3(self):
                at.client.delete_object(Bucket=at.bucket, Key=at.key)
            else:
                self.filesystem.delete_file(self.path)

    @contextlib.contextmanager
    def local(self, suffix: str = "") -> Iterator[Path]:
        """What is in the folder (files ending in `suffix`) as a local folder, while in use.

        Raises InputError for an object that would lie outside of it.
        """
        if isinstance(self.filesystem, fs.LocalFileSystem):
            yield Path(self.path)
            return
        with tempfile.TemporaryDirectory() as folder:
            some = [file for file in self.files() if file.name.endswith(suffix)]
            self._copy_files(some, locate(folder))
            yield Path(folder)

    def _copy_files(self, files: list[Location], target: Location) -> None:
        names = [file.path.removeprefix(f"{self.path}/") for file in files]
        if _on_s3(target) is None:
            for name in names:
                _check_inside(name, self)
        with ThreadPoolExecutor(COPIES) as pool:
            list(pool.map(_copy, files, [target / name for name in names]))


def locate(path: str | Path) -> Location:
    """A local path (made absolute: workers run elsewhere) or an s3:// URL. Raises InputError."""
    text = str(path)
    if not text.startswith("s3://"):
        if "://" in text:
            raise InputError(f"{text}: only local paths and s3:// are supported")
        return Location(fs.LocalFileSystem(), os.path.abspath(text))
    inside = text.removeprefix("s3://").rstrip("/")
    if not inside or inside.startswith("/"):
        raise InputError(f"{text}: names no bucket; it should be s3://BUCKET/PREFIX")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return Location(_filesystem(_endpoint(), region), inside)


def url(location: Location) -> str:
    """What `locate` would turn back into the location, from any working folder."""
    return location.path if location.path.startswith("/") else f"s3://{location.path}"


def write_table(target: Location, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """A whole Parquet file of the rows. Raises OutputError."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
    target.write(buffer.getvalue())


def part_name(ids: Iterable[str]) -> str:
    """A name for a part of a result that what is in it alone decides: the same for a retry."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def check_writable(folder: Location) -> None:
    """Write and delete a probe. Raises OutputError naming the folder.

    OptionError for one that Ray deletes with the job: a submitted job was given a relative path.
    """
    if UNPACKED in folder.path:
        raise OptionError(
            f"{folder.path}: in the job's temporary copy of its folder, where results are lost; "
            "give `ray job submit` s3:// or a path from / that all nodes see"
        )
    probe = folder / ".linearsr-write-test"
    try:
        probe.write(b"")
        probe.delete_file()
    except OutputError as error:
        kind = type(error) if isinstance(error, StorageError) else OutputError
        raise kind(
            f"{url(folder)}: storage cannot be written to; check its permissions "
            f"({one_line(error)})"
        ) from error


def _copy(source: Location, target: Location) -> None:
    """One file; between buckets the server copies it."""
    here, there = _on_s3(source), _on_s3(target)
    # The source has just been listed; what fails is the target, unless that is a local one.
    with explained(target if there else source, OutputError):
        if here and there:
            copied = {"Bucket": here.bucket, "Key": here.key}
            there.client.copy(copied, there.bucket, there.key, Config=_transfer())
        elif there:
            with source.filesystem.open_input_file(source.path) as file:
                there.client.upload_fileobj(file, there.bucket, there.key, Config=_transfer())
        elif here:
            with _renamed(target) as path:
                here.client.download_file(here.bucket, here.key, path, Config=_transfer())
        else:
            with _renamed(target) as path:
                fs.copy_files(
                    source.path,
                    path,
                    source_filesystem=source.filesystem,
                    destination_filesystem=target.filesystem,
                )


def _check_inside(name: str, folder: Location) -> None:
    """Keys are any text; as a path, one may lead out of the folder it is copied to."""
    if {"", ".", ".."} & set(name.split("/")):
        raise InputError(
            f"{url(folder)}: the key {name!r} cannot be a file below a local folder; "
            "rename or delete that object"
        )


@contextlib.contextmanager
def _renamed(target: Location) -> Iterator[str]:
    """Where to write a local file that gets its own name when it is complete, and on the disk.

    Every writer has a name of its own: of those of one target, the last one's file remains.
    """
    folder = os.path.dirname(target.path)
    target.filesystem.create_dir(folder)
    path = os.path.join(folder, f".{uuid.uuid4().hex}{UNFINISHED}")
    try:
        yield path
        _flush(path)
        os.replace(path, target.path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(path)
        raise


def _flush(path: str) -> None:
    """Else a file could be empty under its final name after a power failure."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _is_finished(info: fs.FileInfo) -> bool:
    name = info.base_name
    hidden = name.startswith(".") and name.endswith(UNFINISHED)
    return bool(info.type == fs.FileType.File) and not hidden


# S3


class S3(fs.S3FileSystem):  # type: ignore[misc]
    """Patient on bad days, in other processes too: pickled, pyarrow's own forgets its retries."""

    def __init__(self, endpoint: str | None, region: str | None) -> None:
        super().__init__(
            endpoint_override=endpoint,
            region=region,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_attempts()),
            connect_timeout=CONNECT_SECONDS,
            request_timeout=READ_SECONDS,
        )
        self.place = endpoint, region

    def __reduce__(self) -> tuple[Any, ...]:
        """Where it is, but no credentials: every process has its own."""
        return _filesystem, self.place


class _Object(NamedTuple):
    """A key, or a prefix, of a bucket."""

    client: Any
    bucket: str
    key: str

    def exists(self) -> bool:
        """Whether there is such an object, or any below it."""
        try:
            if self.key:
                self.client.head_object(Bucket=self.bucket, Key=self.key)
                return True
        except boto.ClientError as error:
            if _code(error) != "404":
                raise
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.below, MaxKeys=1)
        return not self.key or bool(found.get("Contents"))

    @property
    def below(self) -> str:
        """What the keys of a folder's files begin with."""
        return f"{self.key}/" if self.key else ""

    def objects(self, *, folders: bool = False) -> Iterator[tuple[str, int]]:
        """Keys and sizes below; objects that stand for folders, as pyarrow makes them, or not."""
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=self.below):
            for found in page.get("Contents", []):
                if folders or not found["Key"].endswith("/"):
                    yield found["Key"], found["Size"]

    def delete_below(self) -> None:
        keys = [{"Key": key} for key, _ in self.objects(folders=True)]
        for first in range(0, len(keys), BATCH):
            some = {"Objects": keys[first : first + BATCH], "Quiet": True}
            left = self.client.delete_objects(Bucket=self.bucket, Delete=some).get("Errors")
            if left:
                raise boto.ClientError({"Error": left[0]}, "DeleteObjects")


def _on_s3(location: Location) -> _Object | None:
    """The location for boto3; None when it is not on S3."""
    system = location.filesystem
    if not isinstance(system, fs.S3FileSystem):
        return None
    endpoint, region = system.place if isinstance(system, S3) else (_endpoint(), system.region)
    bucket, _, key = location.path.partition("/")
    return _Object(_client(endpoint, region), bucket, key)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _attempts() -> int:
    text = os.environ.get("AWS_MAX_ATTEMPTS") or str(ATTEMPTS)
    if not text.isdecimal() or int(text) < 1:
        raise OptionError(f"AWS_MAX_ATTEMPTS is {text!r}; it should be a number from 1 on")
    return int(text)


def _settings() -> tuple[tuple[str, str], ...]:
    """All AWS_* variables: with others, what was made before must not be used."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


def _kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """One of each per process, used by all its threads, until the settings change."""
    made = lru_cache(maxsize=8)(lambda _, *place: make(*place))
    return wraps(make)(lambda *place: made(_settings(), *place))


@_kept
def _filesystem(endpoint: str | None, region: str | None) -> S3:
    return S3(endpoint, region)


@_kept
def _client(endpoint: str | None, region: str | None) -> Any:
    mode = os.environ.get("AWS_RETRY_MODE") or "standard"
    config = Config(
        retries={"mode": mode, "total_max_attempts": _attempts()},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=32,
        # As pyarrow does: not every server knows its buckets by host name.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    # A session of its own: the default one is not for several threads.
    session = boto3.session.Session()
    client = session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
    client.meta.events.register_last("before-parameter-build.s3", _stay)
    return client


def _stay(context: dict[str, Any], **_: Any) -> None:
    """Be as strict about regions as pyarrow, which follows no redirection.

    Else a job would read its data, train, and fail at its first checkpoint.
    """
    context.setdefault("s3_redirect", {})["redirected"] = True


def _transfer() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=PART,
        multipart_chunksize=PART,
        # Of bodies that break off; requests that fail have their own.
        num_download_attempts=_attempts(),
        preferred_transfer_client="classic",
    )


# Errors

_THROTTLED = {"SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "429", "503"}
_THROTTLED |= {"RequestLimitExceeded", "TooManyRequests", "TooManyRequestsException"}
_DENIED = {"AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "403"}
_DENIED |= {"InvalidToken", "TokenRefreshRequired", "AllAccessDisabled", "AccountProblem", "401"}
_DENIED |= {"RequestTimeTooSkewed", "UnauthorizedAccess"}
_REGION = {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "301", "307"}
_REGION |= {"IllegalLocationConstraintException"}
_FAILING = {"InternalError", "RequestTimeout", "500", "502", "504"}
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
)
# The last two: of bodies that broke off; boto3 renames s3transfer's for some calls.
_NO_ANSWER = (boto.ConnectionError, boto.HTTPClientError, RetriesExceededError, BrokenOff)
_S3_ERRORS = (boto.BotoCoreError, boto.ClientError, *_NO_ANSWER)


@contextlib.contextmanager
def explained(location: Location, otherwise: type[LinearSRError] = InputError) -> Iterator[None]:
    """What fails inside, of pyarrow or boto3, is raised as an error that says what to do.

    For Parquet too: `with explained(file): pq.ParquetFile(file.path, filesystem=...)`.
    `otherwise` is raised when it is neither the storage nor a missing file.
    """
    try:
        yield
    except (OSError, *_S3_ERRORS) as error:
        raise _named(location, error, otherwise) from error


def _named(location: Location, error: Exception, otherwise: type[LinearSRError]) -> LinearSRError:
    at = _on_s3(location)
    if at is not None and _unclear(error):
        error = _ask(at, writing=otherwise is OutputError) or error
    kind, advice = _cause(error)
    if kind is None or (kind is MissingFile and otherwise is OutputError):
        kind, advice = otherwise, f"cannot be {'written' if otherwise is OutputError else 'read'}"
    why = getattr(error, "last_exception", error)  # "max retries exceeded" is no reason
    return kind(f"{url(location)}: {advice}: {one_line(why)}")


def _code(error: Exception) -> str:
    """S3's name for it; the number alone where S3 had no body to name it in."""
    response = error.response if isinstance(error, boto.ClientError) else {}
    return str(response.get("Error", {}).get("Code", ""))


def _unclear(error: Exception) -> bool:
    """Whether another request would tell more.

    pyarrow's errors are prose, and name throttling AccessDenied at times (ray issue 47230). A
    number alone says least where it is 400 or 404; 5xx has been tried often enough.
    """
    if isinstance(error, _S3_ERRORS):
        return _code(error) in {"301", "307", "400", "403", "404"}
    return True


def _ask(at: _Object, *, writing: bool) -> Exception | None:
    """What S3 says, with a name, to a request for the same; None when it grants it."""
    try:
        if at.key and not writing:
            at.client.get_object(Bucket=at.bucket, Key=at.key)["Body"].close()
        else:  # What is to be written need not be there.
            at.client.list_objects_v2(Bucket=at.bucket, Prefix=at.key, MaxKeys=1)
    except (boto.BotoCoreError, boto.ClientError) as error:
        return error
    return None


def _cause(error: Exception) -> tuple[type[LinearSRError] | None, str]:
    """The error's class and what to do about it."""
    if isinstance(error, FileNotFoundError):
        return MissingFile, "there is no such file"
    if isinstance(error, _NO_CREDENTIALS):
        return Denied, "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, _NO_ANSWER):
        return Unreachable, "the storage does not answer; check AWS_ENDPOINT_URL and the network"
    # Of pyarrow, when S3 grants the same by now: not a damaged file, say, which is an OSError too.
    if isinstance(error, OSError) and "AWS Error" in str(error):
        return Unreachable, _failing()
    return _cause_by_code(_code(error), error)


def _cause_by_code(code: str, error: Exception) -> tuple[type[LinearSRError] | None, str]:
    causes: list[tuple[set[str], type[LinearSRError], str]] = [
        (
            _THROTTLED,
            Throttled,
            f"throttled in up to {_attempts()} attempts; use fewer workers, or raise "
            "AWS_MAX_ATTEMPTS",
        ),
        (
            _DENIED,
            Denied,
            "denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, the permissions and the clock",
        ),
        ({"NoSuchBucket"}, MissingBucket, "there is no such bucket; create it, or check its name"),
        (_REGION, WrongRegion, f"wrong region; {_region_advice(error)}"),
        ({"NoSuchKey", "404"}, MissingFile, "there is no such file"),
        (_FAILING, Unreachable, _failing()),
    ]
    for codes, kind, advice in causes:
        if code in codes:
            return kind, advice
    return None, ""


def _failing() -> str:
    return (
        f"the storage fails in up to {_attempts()} attempts; try later, or raise AWS_MAX_ATTEMPTS"
    )


def _region_advice(error: Exception) -> str:
    response = error.response if isinstance(error, boto.ClientError) else {}
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
    return f"set AWS_REGION to {region or 'that of the bucket'}"
