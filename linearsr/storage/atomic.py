"""Write files and folders so that a reader finds the old content or the new, never a part of it.

Everything is written under a unique hidden name in the target's folder, flushed to the disk and
then renamed. Of several writers of one target the last one wins, and each of them succeeds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".part"


def is_temporary(name: str) -> bool:
    """Return whether this is the name of an unfinished file, which a killed process may leave."""
    return name.startswith(".") and name.endswith(_SUFFIX)


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of a temporary file to write; it becomes `path` when the block ends.

    If the block raises, `path` is as it was. Raises OSError, or ValueError for an impossible path.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()
        raise


def write(path: str | Path, data: bytes) -> None:
    """Write a file. Raises OSError, or ValueError for an impossible path."""
    with replace_file(path) as temporary:
        temporary.write_bytes(data)


def create(path: str | Path, data: bytes) -> bool:
    """Write a file that does not exist yet; return False, having written nothing, if it does.

    Of several writers at the same moment exactly one gets True. Raises OSError.
    """
    temporary = _temporary(Path(path))
    try:
        temporary.write_bytes(data)
        _flush(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with open(path, "xb") as file:
                file.write(data)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; it becomes `folder` when the block ends.

    A folder cannot be replaced in one step: for a moment the old one is called `old_folder(folder)`
    and there is no `folder`. After a crash, look for both. Raises OSError.
    """
    temporary, old = _temporary(folder), old_folder(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _flush(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def old_folder(folder: Path) -> Path:
    """Return where a folder is while `replace_folder` puts another in its place."""
    return folder.with_name(f"{folder.name}.old")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{uuid.uuid4().hex}{_SUFFIX}")


def _flush(path: Path) -> None:
    """Without this a file could be empty under its final name after a power failure."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
