"""Copies of S3 folders on this machine, which its processes share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from filelock import FileLock

from linearsr.errors import InputError, OutputError, one_line
from linearsr.storage.location import locate

VARIABLE = "LINEARSR_CACHE"


def local_copy(source: str, suffix: str = "") -> Path:
    """Return this machine's copy of an s3:// folder, or of its files that end in `suffix`.

    One process makes the copy and the others wait for it. It lies in the folder that LINEARSR_CACHE
    names (~/.cache/linearsr if unset), under the fingerprint of the files: objects that change are
    copied anew. Nothing deletes a copy. Raises InputError if there are no such files or they cannot
    be read, and OutputError if the copy cannot be written.
    """
    folder = locate(source)
    cache = Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "linearsr")
    copy = cache / folder.fingerprint(suffix)[:16] / folder.name
    if copy.is_dir():
        return copy
    if not any(file.name.endswith(suffix) for file in folder.files()):
        raise InputError(f"{source}: there are no files; correct the path")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.with_name("lock")):
            if not copy.is_dir():
                unfinished = copy.with_name("unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
                folder.copy_to(locate(unfinished), suffix)
                os.rename(unfinished, copy)
    except OSError as error:
        raise OutputError(
            f"{copy}: cannot be written ({one_line(error)}); let {VARIABLE} name another folder"
        ) from error
    return copy
