"""How every dataset job goes on after it ended early.

A result appears whole, under a name that its input alone decides. So an input with a result is
done, and a job that is started again works on the rest. Two files lie beside the results:

    job.json                the settings of the results; other settings are refused
    errors/errors.parquet   items that failed: id, stage, error; absent when there are none

A failed item has no result, so the next run tries it again. Tagging writes its settings into each
shard instead of job.json, since its output may be its input; an evaluation keeps its scores in a
folder named after the digest of its settings until the report is written.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from linearsr.distributed.queue import CRASHED
from linearsr.errors import OptionError
from linearsr.imaging.sources import FAILURES
from linearsr.storage.location import Location, check_writable, url, write_table
from linearsr.storage.walk import Notes

JOB: Final = "job.json"
# New errors between two writes of their list.
SAVE_EVERY: Final = 100
SCHEMA: Final = pa.schema({"id": pa.string(), "stage": pa.string(), "error": pa.string()})


class Failure(NamedTuple):
    """The stage at which an item failed, and why.

    notes: what to say about an item that did not fail, for which `error` is empty.
    """

    stage: str
    error: str
    notes: tuple[str, ...] = ()


CRASH: Final = Failure("crash", CRASHED)


@dataclass(frozen=True)
class Summary:
    """How a run ended. `total` items are `earlier` (done by earlier runs), `done` and `failed`."""

    unit: str
    verb: str
    total: int
    earlier: int
    done: int
    failed: int
    detail: str = ""

    def __str__(self) -> str:
        earlier = f", {self.earlier} done earlier" if self.earlier else ""
        detail = f"; {self.detail}" if self.detail else ""
        return (
            f"{self.total} {self.unit}: {self.done} {self.verb}{earlier}, "
            f"{self.failed} failed{detail}"
        )


def claim(
    output: Location,
    settings: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any] | None = None,
    new: bool = False,
    hidden: str = "",
) -> None:
    """Write the settings to OUTPUT/job.json, or check that an earlier run had the same.

    Of jobs with different settings that start at the same moment, one is accepted.

    defaults: values of settings that the code of an earlier run may not have known.
    new: whether to refuse a folder with files but without job.json. hidden: a setting whose value
    says nothing to a reader, such as a digest. Raises OptionError naming the settings that differ,
    OutputError if the folder cannot be written.
    """
    note = output / JOB
    check_writable(output)
    if not note.exists():
        if new and output.files(Notes()):
            raise OptionError(
                f"{url(output)}: is not empty and has no {JOB} of a job; choose another --output"
            )
        if note.create(f"{json.dumps(settings, indent=1)}\n".encode()):
            return
    try:
        before = {**(defaults or {}), **json.loads(note.read())}
    except (ValueError, TypeError) as error:
        raise OptionError(
            f"{url(note)}: cannot be read as the settings of an earlier job ({error}); "
            "choose another --output"
        ) from error
    differing = [
        name if name == hidden else f"{name} ({before.get(name)}, now {value})"
        for name, value in settings.items()
        if before.get(name) != json.loads(json.dumps(value))
    ]
    if differing:
        raise OptionError(
            f"{url(output)}: holds results of a job with other settings: {', '.join(differing)}; "
            "choose another --output, or delete this folder"
        )


def digest(settings: object) -> str:
    """Return 12 hexadecimal digits that differ for other settings."""
    return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:12]


def progress(description: str, total: int, unit: str, *, initial: int = 0) -> Any:
    """Return a bar with items per second, time left and the number of errors."""
    return tqdm(desc=description, total=total, unit=f" {unit}", initial=initial, mininterval=1)


class Errors:
    """The list of items that failed, in OUTPUT/errors/errors.parquet.

    Used in a `with` statement it is saved at the end, whatever ended the job, and every SAVE_EVERY
    errors, as a killed job cannot save anything.
    """

    def __init__(self, output: Location, keep: Callable[[Mapping[str, str]], bool]) -> None:
        """Open the list; of the rows of earlier runs only those that `keep` accepts remain."""
        self.file = output / FAILURES
        data = self.file.read() if self.file.exists() else None
        before = pq.read_table(pa.BufferReader(data)).to_pylist() if data else []
        self.rows = {row["id"]: row for row in before if keep(row)}
        self.new = 0

    def add(self, id: str, failure: Failure, bar: Any = None) -> None:
        """Add an item, and print it above the bar."""
        self.rows[id] = {"id": id, "stage": failure.stage, "error": failure.error}
        self.new += 1
        if bar is not None:
            bar.write(f"{id}: {failure.error} (stage: {failure.stage})", file=sys.stderr)
            bar.set_postfix(errors=self.new, refresh=False)
        if self.new % SAVE_EVERY == 0:
            self.save()

    def remove(self, id: str) -> None:
        """Remove an item of an earlier run that has a result by now."""
        self.rows.pop(id, None)

    def save(self) -> None:
        """Write the list, or delete its file if it is empty."""
        if self.rows:
            write_table(self.file, [self.rows[id] for id in sorted(self.rows)], SCHEMA)
        else:
            self.file.delete_file()

    def __enter__(self) -> Errors:
        return self

    def __exit__(self, *_: object) -> None:
        self.save()
