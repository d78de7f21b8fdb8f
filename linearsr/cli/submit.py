"""Send a job to a Ray cluster, follow its log, and return its exit code.

The nodes need the packages that LinearSR depends on (deploy/Dockerfile installs them). LinearSR
itself travels as the job's working directory, so that the cluster runs this version. Small files
and folders that some flags name travel with it, and no variables of the environment do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import shlex
import shutil
import tempfile
from argparse import Action, Namespace
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import linearsr
from linearsr.cli.jobs.shared import TOKEN_ADVICE
from linearsr.cli.report import INTERRUPTED, SOME_FAILED, say
from linearsr.errors import LinearSRError, one_line, require

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DASHBOARD = "http://127.0.0.1:8265"
# Larger files and folders are not sent: the dashboard refuses an upload of 500 MB with status 413.
LARGEST = 100 * 2**20
# The flags of the submission itself.
OURS = ("submit", "address", "help")
# Flags for folders that need not exist yet.
WRITTEN = ("output", "storage")


def submit(
    parser: argparse.ArgumentParser,
    name: str,
    options: Namespace,
    *,
    places: Collection[str],
    sent: Collection[str],
) -> int:
    """Submit the job `name` and return its exit code.

    places, sent: see `linearsr.cli.jobs`. Raises MissingExtra without Ray, and LinearSRError if the
    cluster does not take the job.
    """
    require("data", "ray")
    address = options.address or _environment_address() or DASHBOARD
    client = _connect(address)
    with tempfile.TemporaryDirectory(prefix="linearsr-job-") as folder:
        staged = Path(folder)
        size = _copy(Path(linearsr.__file__).parent, staged / "linearsr")
        here = {flag: _absolute(flag) for flag in places}
        here |= {flag: _sender(staged, flag) for flag in sent}
        words = arguments(parser, options, here)
        command = shlex.join(["python", "-m", "linearsr.cli", "job", name, *words])
        say(f"linearsr: sending the package ({size / 1e6:.0f} MB) to {address}", error=True)
        job = _explained(
            address,
            lambda: client.submit_job(entrypoint=command, runtime_env={"working_dir": folder}),
        )
    say(f"linearsr: {job} began: {command}", error=True)
    return _follow(client, job, address)


def arguments(
    parser: argparse.ArgumentParser,
    options: Namespace,
    change: dict[str, Callable[[str], str]],
) -> list[str]:
    """Return the command line that gives `options` again.

    change: functions for the values of some flags, such as one that makes a path absolute.
    """
    words: list[str] = []
    for action in parser._actions:
        if action.dest in OURS:
            continue
        value = getattr(options, action.dest)
        if value != action.default and value is not None:
            same = change.get(action.dest, str)
            words += _words(action, value, same)
    return words


def _words(action: Action, value: object, change: Callable[[str], str]) -> Iterator[str]:
    """Yield an option with its values, or the values of a positional argument."""
    values = value if isinstance(value, list) else [value]
    texts = [change(str(one)) for one in values]
    flag = action.option_strings[-1:] or [""]
    if action.nargs == 0:
        yield from flag
    elif not action.option_strings:
        yield from texts
    elif action.nargs in ("+", "*"):
        yield from (*flag, *texts)
    else:  # with "=", so that a value may begin with a dash
        yield from (f"{flag[0]}={text}" for text in texts)


def _absolute(flag: str) -> Callable[[str], str]:
    """Return a function that makes a flag's PATH or NAME=PATH absolute.

    It returns a url, and a word or a path that does not exist here, as they are.
    """

    def absolute(text: str) -> str:
        name, equals, path = text.rpartition("=")
        if "://" in path or not (flag in WRITTEN or os.path.exists(path)):
            return text
        return f"{name}{equals}{os.path.abspath(path)}"

    return absolute


def _sender(staged: Path, flag: str) -> Callable[[str], str]:
    """Return a function that copies what a flag names into the folder that is sent.

    It returns the copy's path on the cluster. Too large things stay here, and words that are not
    paths are returned.
    """

    def send(text: str) -> str:
        name, equals, path = text.rpartition("=")
        source = Path(path)
        if not source.exists():
            return text
        size = _size(source)
        if size > LARGEST:
            say(
                f"linearsr: --{flag.replace('_', '-')}: {path} is not sent, as it has "
                f"{size / 1e6:.0f} MB; every node must see it at {source.absolute()}",
                error=True,
            )
            return f"{name}{equals}{source.absolute()}"
        target = Path("files", flag, source.resolve().name)
        _copy(source, staged / target)
        return f"{name}{equals}{target}"

    return send


def _size(source: Path) -> int:
    files = source.rglob("*") if source.is_dir() else [source]
    return sum(file.stat().st_size for file in files if file.is_file())


def _copy(source: Path, target: Path) -> int:
    """Copy a file or a folder without caches and large files; return the bytes of the copy."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        out = {name for name in names if name == "__pycache__" or name.endswith(".pyc")}
        for name in names:
            file = Path(folder, name)
            if file.is_file() and file.stat().st_size > LARGEST:
                say(f"linearsr: {file} is not sent, as it is larger than 100 MB", error=True)
                out.add(name)
        return out

    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=left_out)
    else:
        shutil.copyfile(source, target)
    return _size(target)


def _environment_address() -> str | None:
    return os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")


def _connect(address: str) -> JobSubmissionClient:
    """Return a client for the cluster; it gets this machine's token only if it asks for one."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # which set their level when they are imported
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    # Ray would take the address in RAY_ADDRESS instead of --address.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        if not (token := _token()):
            raise LinearSRError(
                f"the cluster at {address} asks for its token, and there is none here: "
                f"{TOKEN_ADVICE}"
            ) from error
        headers = {"Authorization": f"Bearer {token}"}
        return _explained(address, lambda: JobSubmissionClient(address, headers=headers))
    except Exception as error:
        raise _unreachable(address, error) from error


def _token() -> str:
    """Return the token that Ray would send from here, or "" if there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else ""


def _unreachable(address: str, error: Exception) -> LinearSRError:
    return LinearSRError(
        f"no cluster takes jobs at {address}: {one_line(error)} (start one with "
        "`ray start --head`, or give the address of its dashboard as --address)"
    )


def _explained(address: str, call: Callable[[], Any]) -> Any:
    """Call, and raise LinearSRError with a plain message for an error of the job server."""
    from ray.exceptions import AuthenticationError

    try:
        return call()
    except AuthenticationError as error:
        raise LinearSRError(
            f"the cluster at {address} refuses the token of this machine: {TOKEN_ADVICE}"
        ) from error
    except Exception as error:
        raise _unreachable(address, error) from error


def _follow(client: JobSubmissionClient, job: str, address: str) -> int:
    """Print the log until the job ends, and return its exit code."""
    try:
        _explained(address, lambda: asyncio.run(_print_log(client, job)))
    except KeyboardInterrupt:
        say(
            f"linearsr: {job} goes on; `ray job logs --address {address} --follow {job}` shows its "
            f"log, and `ray job stop --address {address} {job}` ends it",
            error=True,
        )
        return INTERRUPTED
    info = _explained(address, lambda: client.get_job_info(job))
    say(f"linearsr: {job}: {info.status.lower()}", error=True)
    if info.status == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None and info.message:
        say(f"linearsr: {one_line(Exception(info.message))}", error=True)
    return info.driver_exit_code or SOME_FAILED


async def _print_log(client: JobSubmissionClient, job: str) -> None:
    """Print the log as it grows; after a lost connection, the part that is new."""
    printed = 0
    while True:
        received = 0
        # A lost connection: if the cluster is gone as well, asking for the status says so.
        with contextlib.suppress(OSError, RuntimeError):
            async for text in client.tail_job_logs(job):
                print(text[max(0, printed - received) :], end="", flush=True)
                received += len(text)
                printed = max(printed, received)
        if client.get_job_status(job).is_terminal():
            break
        await asyncio.sleep(1)
    print(client.get_job_logs(job)[printed:], end="", flush=True)
