"""Paths on shared storage: local folders and s3:// prefixes behind one interface.

An S3-compatible endpoint and credentials come from the standard AWS variables (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_MAX_ATTEMPTS). Local paths need pyarrow
but no boto3.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from linearsr.errors import (
    InputError,
    LinearSRError,
    MissingFile,
    OptionError,
    OutputError,
    StorageError,
    one_line,
    require,
)
from linearsr.storage import atomic, targets
from linearsr.storage.walk import Notes, walk

if TYPE_CHECKING:
    from linearsr.storage.s3 import S3Path

# Files that are copied at the same time.
COPIES = 8
# Where Ray unpacks the folder that a job came with (`ray job submit --working-dir`), on each node.
UNPACKED = "/runtime_resources/working_dir_files/"


@dataclass(frozen=True)
class Location:
    """A file or folder on a filesystem.

    Every method raises a subclass of StorageError when the storage itself is to blame.
    """

    filesystem: fs.FileSystem
    path: str

    def __hash__(self) -> int:
        return hash(self.path)

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}")

    @property
    def is_local(self) -> bool:
        """Whether this is a path of this machine."""
        return not isinstance(self.filesystem, fs.S3FileSystem)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def is_below(self, folder: Location) -> bool:
        """Return whether this path is inside `folder`, by name alone."""
        return self.path.startswith(f"{folder.path.rstrip('/')}/")

    def is_same(self, other: Location) -> bool:
        """Return whether both are one place, also through links of local folders."""
        if self.is_local and other.is_local:
            return targets.is_same(self.path, other.path)
        return self.path == other.path

    def is_inside(self, folder: Location) -> bool:
        """Return whether this is below `folder`, also through links of local folders."""
        if self.is_local and folder.is_local:
            return targets.is_inside(self.path, folder.path)
        return self.is_below(folder)

    def relative_to(self, folder: Location) -> str:
        """Return the path from `folder` to here. Raises ValueError unless this is below it."""
        if not self.is_below(folder):
            raise ValueError(f"{self.path} is not below {folder.path}")
        return self.path[len(folder.path.rstrip("/")) + 1 :]

    def exists(self) -> bool:
        """Return whether there is a file or folder."""
        with explained(self):
            if s3 := _on_s3(self):
                return s3.exists()
            return bool(self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound)

    def is_file(self) -> bool:
        """Return whether there is a file or an object of exactly this name."""
        with explained(self):
            if s3 := _on_s3(self):
                return s3.is_object()
            return os.path.isfile(self.path)

    def read(self) -> bytes:
        """Return the bytes of a file. Raises InputError; MissingFile if there is no file."""
        with explained(self):
            if s3 := _on_s3(self):
                return s3.read()
            with self.filesystem.open_input_stream(self.path) as file:
                return bytes(file.read())

    def head(self, size: int) -> bytes:
        """Return the first bytes of a file, at most `size`. Raises as `read` does."""
        with explained(self):
            if s3 := _on_s3(self):
                return s3.head(size)
            with open(self.path, "rb") as file:
                return file.read(size)

    def write(self, data: bytes) -> None:
        """Write a file, which is complete before it gets its name. Raises OutputError."""
        with explained(self, OutputError):
            if s3 := _on_s3(self):
                s3.upload(io.BytesIO(data))
            else:
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
                atomic.write(self.path, data)

    def create(self, data: bytes) -> bool:
        """Write a file that does not exist yet; return False, having written nothing, if it does.

        Of several writers of different data at the same moment exactly one gets True. Raises
        OutputError.
        """
        with explained(self, OutputError):
            if s3 := _on_s3(self):
                return s3.create(data)
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            return atomic.create(self.path, data)

    def sizes(self, notes: Notes | None = None) -> dict[Location, int]:
        """Return all files below a folder, sorted, with their sizes in bytes.

        The result is empty if the folder does not exist. Unfinished files of a killed process are
        left out. Links are followed as in `walk`.

        notes: gets the links that are left out and the subfolders that cannot be read; without
        it, such a folder raises InputError. A name that is not UTF-8 has surrogates in its path.
        """
        with explained(self):
            if s3 := _on_s3(self):
                sizes = {f"{s3.bucket}/{found.key}": found.size for found in s3.objects()}
            else:
                sizes = self._local_sizes(notes)
        return {Location(self.filesystem, path): sizes[path] for path in sorted(sizes)}

    def _local_sizes(self, notes: Notes | None) -> dict[str, int]:
        seen = Notes() if notes is None else notes
        sizes = {}
        with contextlib.suppress(FileNotFoundError):
            for name, entry in walk(self.path, seen):
                try:
                    sizes[(self / name).path] = entry.stat().st_size
                except FileNotFoundError:
                    continue  # it was deleted meanwhile
                except OSError as error:  # a folder that may be listed but not entered
                    if not (below := os.path.dirname(name)):
                        raise
                    seen.fail(below, f"its files cannot be read ({error.strerror or error})")
        if notes is None:
            seen.check(self.path)
        return sizes

    def files(self, notes: Notes | None = None) -> list[Location]:
        """Return all files below a folder, sorted; none if the folder does not exist.

        notes: as for `sizes`.
        """
        return list(self.sizes(notes))

    def fingerprint(self, suffix: str | tuple[str, ...]) -> str:
        """Return the SHA-256 digest of the files directly in a folder that end in `suffix`.

        It covers their names, their sizes and the first MiB of each, so it takes no time for large
        files. Raises InputError, also if there are no such files.
        """
        digest, found = hashlib.sha256(), False
        for file, size in self.sizes(Notes()).items():
            name = file.relative_to(self)
            if name.endswith(suffix) and "/" not in name:
                digest.update(f"{name} {size} ".encode() + file.head(1 << 20))
                found = True
        if not found:
            raise InputError(f"{url(self)}: no file of this folder ends in {suffix}")
        return digest.hexdigest()

    def etags(self, suffix: str) -> dict[str, str]:
        """Return the ETags of the objects directly in an S3 folder that end in `suffix`, by name.

        They differ as soon as a byte does. Raises InputError.
        """
        with explained(self):
            s3 = _on_s3(self)
            assert s3 is not None, self.path
            names = {found.key.removeprefix(s3.prefix): found.etag for found in s3.objects()}
        return {k: v for k, v in names.items() if k.endswith(suffix) and "/" not in k}

    def copy_to(self, target: Location, names: Iterable[str] | None = None) -> None:
        """Copy a folder's files, or those of these names; each is complete before it gets its name.

        Raises OutputError, and before anything is copied InputError for an object whose key leads
        out of a local target.
        """
        names = [f.relative_to(self) for f in self.files()] if names is None else list(names)
        if _on_s3(target) is None:
            for name in names:
                _check_inside(name, self)
        with ThreadPoolExecutor(COPIES) as pool:
            list(pool.map(_copy, [self / n for n in names], [target / n for n in names]))

    def delete(self) -> None:
        """Delete a folder with all its files, if it exists. Raises OutputError."""
        with explained(self, OutputError):
            if s3 := _on_s3(self):
                s3.delete_folder()
            elif self.exists():
                self.filesystem.delete_dir(self.path)

    def delete_file(self) -> None:
        """Delete a file, if it exists. Raises OutputError."""
        with explained(self, OutputError), contextlib.suppress(FileNotFoundError):
            if s3 := _on_s3(self):
                s3.delete()
            else:
                self.filesystem.delete_file(self.path)

    @contextlib.contextmanager
    def local(self, suffix: str = "") -> Iterator[Path]:
        """Yield a local folder with this folder's files, or with those that end in `suffix`.

        A local folder is used where it lies; files on S3 are copied and deleted afterwards. Raises
        InputError for an object whose key leads out of the folder.
        """
        if isinstance(self.filesystem, fs.LocalFileSystem):
            yield Path(self.path)
            return
        with tempfile.TemporaryDirectory() as folder:
            names = (file.relative_to(self) for file in self.files())
            self.copy_to(locate(folder), [name for name in names if name.endswith(suffix)])
            yield Path(folder)


def locate(path: str | Path) -> Location:
    """Return the location of a local path or an s3:// URL.

    Local paths are made absolute, because workers run in other folders. Raises InputError for other
    URLs, and MissingExtra for s3:// without boto3.
    """
    text = str(path)
    if not text.startswith("s3://"):
        if "://" in text:
            raise InputError(f"{text}: only local paths and s3:// are supported")
        return Location(fs.LocalFileSystem(), os.path.abspath(text))
    inside = text.removeprefix("s3://").rstrip("/")
    if not inside or inside.startswith("/"):
        raise InputError(f"{text}: names no bucket; it should be s3://BUCKET/PREFIX")
    require("data", "boto3")
    from linearsr.storage.s3 import default_filesystem

    return Location(default_filesystem(), inside)


def url(location: Location) -> str:
    """Return the text that `locate` turns back into the location, from any working folder."""
    return location.path if location.path.startswith("/") else f"s3://{location.path}"


def is_plain(name: str) -> bool:
    """Return whether a key or id is a path below any folder: no empty part, `.` or `..` in it."""
    return not {"", ".", ".."} & set(name.split("/"))


def write_table(target: Location, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write a Parquet file of the rows. Raises OutputError."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
    target.write(buffer.getvalue())


def part_name(ids: Iterable[str]) -> str:
    """Return a name for a part of a result: the same for the same ids, so that a retry finds it."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def check_writable(folder: Location) -> None:
    """Write and delete a small file. Raises OutputError naming the folder.

    Raises OptionError for a folder that Ray deletes with the job, which is where a relative path of
    a submitted job leads.
    """
    if UNPACKED in folder.path:
        raise OptionError(
            f"{folder.path}: lies in the job's working_dir, a temporary copy that Ray deletes; "
            "give an s3:// folder or an absolute path that all nodes see"
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


@contextlib.contextmanager
def explained(location: Location, otherwise: type[LinearSRError] = InputError) -> Iterator[None]:
    """Turn errors of the operating system, pyarrow and boto3 into ones that say what to do.

    Use it for Parquet too: `with explained(file): pq.ParquetFile(file.path, filesystem=...)`.
    `otherwise` is raised if neither the storage nor a missing file is the cause.
    """
    try:
        yield
    except _errors(location) as error:
        raise _explain(location, error, otherwise) from error


def _errors(location: Location) -> tuple[type[Exception], ...]:
    if not isinstance(location.filesystem, fs.S3FileSystem):
        return (OSError,)
    from linearsr.storage.s3_errors import ERRORS

    return (OSError, *ERRORS)


def _explain(location: Location, error: Exception, otherwise: type[LinearSRError]) -> LinearSRError:
    writing, cause = otherwise is OutputError, None
    if s3 := _on_s3(location):
        from linearsr.storage import s3_errors

        error = s3_errors.clearest_error(error, s3, writing=writing)
        cause = s3_errors.cause(error)
    if isinstance(error, FileNotFoundError):
        cause = MissingFile, "there is no such file"
    if cause is None or (cause[0] is MissingFile and writing):
        cause = otherwise, "cannot be written" if writing else "cannot be read"
    kind, advice = cause
    # "Max retries exceeded" is no reason; the last error is.
    return kind(f"{url(location)}: {advice}: {one_line(getattr(error, 'last_exception', error))}")


def _on_s3(location: Location) -> S3Path | None:
    """Return the location for boto3, or None if it is not on S3."""
    if not isinstance(location.filesystem, fs.S3FileSystem):
        return None
    from linearsr.storage.s3 import open_path

    return open_path(location.filesystem, location.path)


def _copy(source: Location, target: Location) -> None:
    """Copy one file; between buckets the server does it."""
    source_s3, target_s3 = _on_s3(source), _on_s3(target)
    # The source has just been listed, so the target is to blame, unless it is local.
    with explained(target if target_s3 else source, OutputError):
        if source_s3 and target_s3:
            target_s3.copy_from(source_s3)
            return
        if target_s3:
            with source.filesystem.open_input_file(source.path) as file:
                target_s3.upload(file)
            return
        Path(target.path).parent.mkdir(parents=True, exist_ok=True)
        with atomic.replace_file(target.path) as temporary:
            if source_s3:
                source_s3.download(str(temporary))
            else:
                fs.copy_files(
                    source.path,
                    str(temporary),
                    source_filesystem=source.filesystem,
                    destination_filesystem=target.filesystem,
                )


def _check_inside(name: str, folder: Location) -> None:
    """Raise InputError for a key that as a path leads out of a folder, since keys are any text."""
    if not is_plain(name):
        raise InputError(
            f"{url(folder)}: the key {name!r} cannot be a file below a local folder; "
            "rename or delete that object"
        )
