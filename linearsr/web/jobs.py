"""Jobs: requests whose clients do not wait, kept in files until they expire or are deleted.

    <folder>/<id>/job.json   who sent it, when, with which options; later how it ended
    <folder>/<id>/input      the picture
    <folder>/<id>/result     the result, once there is one

A store that is started on the same folder goes on with the jobs that had not ended. They begin
again from their seed, so the pixels are the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
import secrets
import shutil
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, Protocol

import anyio
from pydantic import BaseModel, ConfigDict

from linearsr.config import FileOptions, Options
from linearsr.errors import LinearSRError, TooLarge
from linearsr.pipeline.sizes import output_size
from linearsr.storage.atomic import replace_file
from linearsr.web.problems import Problem, problem
from linearsr.web.service import (
    Full,
    JobLimits,
    NotFinished,
    Progress,
    Result,
    TookTooLong,
    UnknownJob,
    UpscaleRequest,
    Upscaling,
)

# Seconds after which a client may ask again.
ASK_AGAIN = 2
# Bytes that are kept free for each pixel of a result until its size is known: 8-bit RGB.
RESERVED_BYTES = 3


class JobState(BaseModel):
    """A job as its client sees it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    status: Literal["queued", "running", "succeeded", "failed"]
    created: int
    """When the job was sent, in seconds since 1970."""
    expires: int | None = None
    """When the job is deleted, in seconds since 1970; null until it has finished."""
    progress: dict[str, str | int] | None = None
    """The last progress event, as in the stream of /v1/upscale."""
    error: Problem | None = None
    """Why the job failed."""


def new_id() -> str:
    """Return an id that nobody can guess."""
    return secrets.token_urlsafe(24)


class Jobs(Protocol):
    """The interface of the backend that keeps jobs.

    owner: digest of the token of whoever sends or asks; "" where there is no token. A job is
    unknown to everybody but its owner.
    """

    async def submit(self, id: str, request: UpscaleRequest, name: str, owner: str) -> JobState:
        """Keep a request and begin it when there is room; do nothing if the job is known.

        id: see `new_id`. Raises Full.
        """
        ...

    async def get(self, id: str, owner: str) -> JobState:
        """Return a job. Raises UnknownJob."""
        ...

    async def content(self, id: str, owner: str) -> tuple[Result, str]:
        """Return a job's result, and the file name of its picture.

        Raises UnknownJob, NotFinished, or JobFailed.
        """
        ...

    async def delete(self, id: str, owner: str) -> None:
        """Cancel a job if it has not finished, and forget it. Raises UnknownJob."""
        ...


class JobFailed(LinearSRError):
    """A job has ended with this problem instead of a result."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return self.problem.detail


class _Record(BaseModel):
    """The content of job.json."""

    owner: str
    name: str
    created: float
    options: Options
    files: FileOptions
    pages: list[tuple[int, int]]
    finished: float | None = None
    # The fields of a Result but for its image.
    result: dict[str, Any] | None = None
    error: Problem | None = None


class _Job:
    """A job in memory: its record, the bytes that count as its own, and its progress."""

    def __init__(self, folder: Path, record: _Record) -> None:
        self.folder = folder
        self.record = record
        self.progress: Progress | None = None
        self.started = False
        self.task: asyncio.Task[None] | None = None
        self.reserved = 0

    @property
    def bytes(self) -> int:
        """The bytes on disk, and those that are kept free for the result."""
        files = (self.folder / name for name in ("input", "result"))
        return self.reserved + sum(file.stat().st_size for file in files if file.exists())

    def save(self) -> None:
        """Write the record."""
        with replace_file(self.folder / "job.json") as file:
            file.write_text(self.record.model_dump_json())

    def state(self, kept_seconds: float) -> JobState:
        """Return what a client sees."""
        record = self.record
        status: Literal["queued", "running", "succeeded", "failed"]
        status = "running" if self.started else "queued"
        if record.finished is not None:
            status = "failed" if record.error else "succeeded"
        return JobState(
            id=self.folder.name,
            status=status,
            created=int(record.created),
            expires=None if record.finished is None else int(record.finished + kept_seconds),
            progress=self.progress.public() if self.progress else None,
            error=record.error,
        )


class JobStore:
    """Jobs in a folder, worked on by a service. Only one store may use a folder at a time."""

    def __init__(self, service: Upscaling, limits: JobLimits, folder: Path) -> None:
        self._service = service
        self._limits = limits
        self._folder = folder
        self._running = asyncio.Semaphore(limits.running)
        self._jobs: dict[str, _Job] = {}

    async def start(self) -> None:
        """Go on with the jobs that are in the folder, in the order in which they were sent."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for job in sorted(await asyncio.to_thread(self._load), key=lambda j: j.record.created):
            self._jobs[job.folder.name] = job
            if job.record.finished is None:
                self._begin(job)
            else:
                self._expire_later(job)

    async def submit(self, id: str, request: UpscaleRequest, name: str, owner: str) -> JobState:
        """See `Jobs`."""
        if id in self._jobs:
            return await self.get(id, owner)
        reserved = RESERVED_BYTES * _result_pixels(request)
        self._check_room(len(request.data) + reserved)
        record = _Record(
            owner=_signed(id, owner),
            name=name.encode(errors="replace").decode(),
            created=time.time(),
            options=request.options,
            files=request.files,
            pages=list(request.pages),
        )
        job = _Job(self._folder / id, record)
        job.reserved = len(request.data) + reserved  # until the picture is on disk
        self._jobs[id] = job
        try:
            await asyncio.to_thread(_create, job, request.data)
        except BaseException:
            self._forget(job)
            raise
        job.reserved = reserved
        self._begin(job)
        return job.state(self._limits.kept_seconds)

    async def get(self, id: str, owner: str) -> JobState:
        """See `Jobs`."""
        return self._find(id, owner).state(self._limits.kept_seconds)

    async def content(self, id: str, owner: str) -> tuple[Result, str]:
        """See `Jobs`."""
        job = self._find(id, owner)
        if job.record.error:
            raise JobFailed(job.record.error)
        if job.record.result is None:
            raise NotFinished(ASK_AGAIN)
        image = await asyncio.to_thread((job.folder / "result").read_bytes)
        return _result(image, job.record.result), job.record.name

    async def delete(self, id: str, owner: str) -> None:
        """See `Jobs`."""
        job = self._find(id, owner)
        self._forget(job)
        if job.task:
            job.task.cancel()
            # The slot is free when this returns.
            with contextlib.suppress(asyncio.CancelledError):
                await job.task

    async def clear(self) -> None:
        """Cancel and forget all jobs."""
        jobs = list(self._jobs.values())
        for job in jobs:
            self._forget(job)
            if job.task:
                job.task.cancel()
        await asyncio.gather(*(job.task for job in jobs if job.task), return_exceptions=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _load(self) -> list[_Job]:
        jobs = []
        for folder in self._folder.iterdir():
            try:
                record = _Record.model_validate_json((folder / "job.json").read_bytes())
            except (OSError, ValueError):  # killed before the job was accepted
                shutil.rmtree(folder, ignore_errors=True)
            else:
                job = _Job(folder, record)
                job.reserved = 0 if record.finished else RESERVED_BYTES * _result_pixels(record)
                jobs.append(job)
        return jobs

    def _find(self, id: str, owner: str) -> _Job:
        job = self._jobs.get(id)
        if job is None or not hmac.compare_digest(job.record.owner, _signed(id, owner)):
            raise UnknownJob("there is no such job, or it has expired")
        return job

    def _check_room(self, needed: int) -> None:
        used = sum(job.bytes for job in self._jobs.values())
        if len(self._jobs) >= self._limits.count or used + needed > self._limits.bytes:
            ends = [job.record.finished for job in self._jobs.values() if job.record.finished]
            wait = min(ends, default=time.time()) + self._limits.kept_seconds - time.time()
            raise Full(max(1, math.ceil(wait)))

    def _begin(self, job: _Job) -> None:
        job.task = asyncio.create_task(self._run(job))

    async def _run(self, job: _Job) -> None:
        """Work on a job until it has a result or an error, and write that down."""
        async with self._running:
            job.started = True
            try:
                result = await self._work(job)
                self._check_result(job, result)
                await asyncio.to_thread(_write, job.folder / "result", result.image)
                job.record.result = {**vars(result), "image": None}
            except Exception as error:
                job.record.error = problem(error)
        job.reserved, job.record.finished = 0, time.time()
        try:
            await asyncio.to_thread(job.save)
        except OSError:
            logging.getLogger(__name__).exception("job %s was not saved", job.folder.name)
        self._expire_later(job)

    async def _work(self, job: _Job) -> Result:
        record = job.record
        data = await asyncio.to_thread((job.folder / "input").read_bytes)
        pages = tuple(record.pages)
        request = UpscaleRequest(data, record.options, record.files, progress=True, pages=pages)
        with anyio.CancelScope(deadline=anyio.current_time() + self._limits.seconds):
            async with aclosing(self._service.upscale(request)) as events:
                async for event in events:
                    if isinstance(event, Result):
                        return event
                    job.progress = event
            raise AssertionError("the service ended without a result")
        raise TookTooLong("the job took too long; send a smaller picture or use fewer steps")

    def _check_result(self, job: _Job, result: Result) -> None:
        others = sum(other.bytes for other in self._jobs.values() if other is not job)
        if others + len(result.image) > self._limits.bytes:
            size = len(result.image)
            raise TooLarge(f"the result has {size} bytes, for which there is no room; try later")

    def _expire_later(self, job: _Job) -> None:
        assert job.record.finished is not None
        left = job.record.finished + self._limits.kept_seconds - time.time()
        asyncio.get_running_loop().call_later(max(0.0, left), self._forget, job)

    def _forget(self, job: _Job) -> None:
        self._jobs.pop(job.folder.name, None)
        shutil.rmtree(job.folder, ignore_errors=True)


def _signed(id: str, owner: str) -> str:
    """Return a digest of the owner that differs from job to job."""
    return hmac.digest(id.encode(), owner.encode(), "sha256").hex()


def _create(job: _Job, data: bytes) -> None:
    job.folder.mkdir(mode=0o700)
    _write(job.folder / "input", data)
    job.save()  # from now on the job survives


def _write(path: Path, data: bytes) -> None:
    with replace_file(path) as file:
        file.write_bytes(data)


def _result(image: bytes, fields: dict[str, Any]) -> Result:
    return Result(**{**fields, "image": image, "notes": tuple(fields["notes"])})


def _result_pixels(job: _Record | UpscaleRequest) -> int:
    sizes = (output_size(height, width, job.options) for width, height in job.pages)
    return sum(map(math.prod, sizes))
