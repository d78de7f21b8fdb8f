"""Paths on shared storage: local folders and s3:// prefixes through pyarrow, by one interface.

An S3-compatible endpoint and credentials come from the standard AWS variables (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from linearsr.errors import InputError, OutputError, one_line


@dataclass(frozen=True)
class Location:
    """A file or folder on a filesystem."""

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
        return self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound

    def read(self) -> bytes:
        """A file's bytes. Raises InputError."""
        try:
            with self.filesystem.open_input_stream(self.path) as file:
                return file.read()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {one_line(error)}") from error

    def write(self, data: bytes) -> None:
        """A whole file, complete before it gets its name. Raises OutputError."""
        local = isinstance(self.filesystem, fs.LocalFileSystem)
        # An S3 object appears when its upload is complete; a local file has to be moved there.
        target = f"{self.path}.tmp" if local else self.path
        try:
            self.filesystem.create_dir(os.path.dirname(self.path))
            with self.filesystem.open_output_stream(target) as file:
                file.write(data)
            if local:
                self.filesystem.move(target, self.path)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {one_line(error)}") from error

    def files(self) -> list[Location]:
        """All files below a folder, sorted; none when it does not exist."""
        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        found = (i for i in self.filesystem.get_file_info(selector) if i.type == fs.FileType.File)
        return [Location(self.filesystem, i.path) for i in sorted(found, key=lambda i: i.path)]

    def copy_to(self, target: Location) -> None:
        """Copy a folder and what is in it."""
        target.filesystem.create_dir(target.path)
        fs.copy_files(
            self.path,
            target.path,
            source_filesystem=self.filesystem,
            destination_filesystem=target.filesystem,
        )

    def delete(self) -> None:
        """Delete a folder and what is in it, if it exists."""
        if self.exists():
            self.filesystem.delete_dir(self.path)

    @contextlib.contextmanager
    def local(self, suffix: str = "") -> Iterator[Path]:
        """What is in the folder (files ending in `suffix`) as a local folder, while in use."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            yield Path(self.path)
            return
        with tempfile.TemporaryDirectory() as folder:
            for file in self.files():
                if file.name.endswith(suffix):
                    copy = Path(folder, file.path.removeprefix(f"{self.path}/"))
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(file.read())
            yield Path(folder)


def locate(path: str | Path) -> Location:
    """A local path (made absolute: workers run elsewhere) or an s3:// URL. Raises InputError."""
    text = str(path)
    if not text.startswith("s3://"):
        if "://" in text:
            raise InputError(f"{text}: only local paths and s3:// are supported")
        return Location(fs.LocalFileSystem(), os.path.abspath(text))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    filesystem = fs.S3FileSystem(endpoint_override=endpoint, region=region)
    return Location(filesystem, text.removeprefix("s3://").rstrip("/"))


def url(location: Location) -> str:
    """What `locate` would turn back into the location, from any working folder."""
    return location.path if location.path.startswith("/") else f"s3://{location.path}"


def check_writable(folder: Location) -> None:
    """Write and delete a probe. Raises OutputError naming the folder."""
    probe = folder / ".linearsr-write-test"
    try:
        probe.write(b"")
        probe.filesystem.delete_file(probe.path)
    except (OutputError, OSError) as error:
        raise OutputError(
            f"{folder.path}: storage cannot be written to; check its permissions "
            f"({one_line(error)})"
        ) from error
