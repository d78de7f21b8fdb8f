"""Copies of S3 folders on this machine, which its processes share."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from filelock import FileLock

from linearsr.errors import InputError, OutputError, StorageError, one_line
from linearsr.storage.location import locate

VARIABLE = "LINEARSR_CACHE"
# How often a folder is copied again because its objects changed meanwhile.
ATTEMPTS = 3


def local_copy(source: str, suffix: str = "") -> Path:
    """Return this machine's copy of the files directly in an s3:// folder that end in `suffix`.

    One process makes the copy and the others wait for it. It lies in the folder that LINEARSR_CACHE
    names (~/.cache/linearsr if unset), under a digest of the objects' ETags, so objects that change
    are copied anew. Nothing deletes a copy. Raises InputError if there are no such files or they
    cannot be read, and OutputError if the copy cannot be written.
    """
    folder = locate(source)
    for _ in range(ATTEMPTS):
        etags = folder.etags(suffix)
        if not etags:
            raise InputError(f"{source}: there are no files here that are needed; correct the path")
        digest = hashlib.sha256(json.dumps([source, etags]).encode()).hexdigest()[:16]
        copy = Path(os.environ.get(VARIABLE) or "~/.cache/linearsr", digest, folder.name)
        unfinished = copy.with_name(".unfinished")
        try:
            copy, unfinished = copy.expanduser(), unfinished.expanduser()
            copy.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(copy.with_name(".lock")):
                if copy.is_dir():
                    return copy
                shutil.rmtree(unfinished, ignore_errors=True)
                folder.copy_to(locate(unfinished), etags)
                if folder.etags(suffix) == etags:
                    os.rename(unfinished, copy)
                    return copy
        except StorageError:
            raise
        except (OSError, RuntimeError, OutputError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OutputError(
                f"{copy}: cannot be written ({one_line(error)}); let {VARIABLE} name another folder"
            ) from error
    raise InputError(f"{source}: its files change all the time; start again when they are complete")
