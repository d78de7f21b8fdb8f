"""Stages one after the other by `ray job submit`; a table and a picture for each."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from linearsr.errors import LinearSRError, one_line
from tools.rehearsal.machine import Place
from tools.rehearsal.scenario import Stage

ROOT = Path(__file__).parents[2]
TOLD = 15


class Failed(LinearSRError):
    """A stage did not end as it should."""


class Done(NamedTuple):
    """A stage that has ended, well or not."""

    stage: Stage
    seconds: float
    picture: str
    error: str = ""

    @property
    def row(self) -> str:
        """Of the table."""
        state = f"failed: {self.error}" if self.error else f"{self.seconds:.0f} s"
        shown = f"[picture]({self.picture})" if self.picture else ""
        return f"| {self.stage.name} | {state} | `{self.stage.results}` | {shown} |"


def run(stages: Sequence[Stage], place: Place, output: Path) -> None:
    """All stages in order; the page grows with each. Raises Failed at the first that fails."""
    done: list[Done] = []
    for number, stage in enumerate(stages, 1):
        script = stage.command.partition(".py")[0]
        done.append(_run(stage, f"{number}-{script}", place, output))
        _write_page(done, output)
        if done[-1].error:
            raise Failed(f"{stage.name}: {done[-1].error}; see {output}/README.md")
    print(f"\n{_table(done)}\n", flush=True)


def _run(stage: Stage, file: str, place: Place, output: Path) -> Done:
    began = time.perf_counter()
    command = f"python ray_jobs/{stage.command}"
    print(f"== {stage.name}: {command}", flush=True)
    log, picture = output / f"{file}.log", output / f"{file}.png"
    if fault := _submit(command, place.dashboard, log):
        tail = "\n".join(log.read_text().splitlines()[-TOLD:])
        print(tail, file=sys.stderr)
        return Done(stage, time.perf_counter() - began, "", f"{fault}; see {log.name}")
    try:
        stage.draw().save(picture)
    except Exception as error:  # whatever is not as it should be shows here first
        return Done(stage, time.perf_counter() - began, "", _told(error))
    took = time.perf_counter() - began
    print(f"== {stage.name}: {took:.0f} s, {picture}", flush=True)
    return Done(stage, took, picture.name)


def _told(error: Exception) -> str:
    """Never empty, as a failed `assert` or `next` would be."""
    return f"{type(error).__name__}: {one_line(error)}"


def _submit(command: str, dashboard: str, log: Path) -> str:
    """Run a job by `ray job submit`; what went wrong, "" if nothing did.

    What it says goes on to the terminal and into `log`. No job outlives its stage, not even one
    whose log broke off, or that was given up by Ctrl-C.
    """
    job = f"rehearsal-{secrets.token_hex(8)}"
    flags = f"--submission-id={job}", f"--working-dir={ROOT}", "--", *shlex.split(command)
    try:
        with log.open("w") as file, _ray_job("submit", dashboard, *flags) as submitted:
            assert submitted.stdout is not None
            for line in submitted.stdout:
                file.write(line)
                print(f"   {line}", end="", flush=True)
    finally:
        # One that has ended already it only tells of; the other's exit code knows no stopped ones.
        with _ray_job("stop", dashboard, job) as stopped:
            told = stopped.communicate()[0]
    if stopped.returncode:
        return f"no word of {job}; where it runs on, `ray job stop` it"
    ended = re.search(rf"Job '{job}' ([a-z ]+)", told)
    return "" if ended and ended[1] == "succeeded" else f"the job {ended[1] if ended else told}"


def _ray_job(verb: str, dashboard: str, *flags: str) -> subprocess.Popen[str]:
    """`ray job VERB`, with all that it says on its stdout."""
    ray = Path(sys.executable).with_name("ray")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [str(ray), "job", verb, f"--address={dashboard}", *flags],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _write_page(done: Sequence[Done], output: Path) -> None:
    """The table, then each stage that ended well: its command and its picture."""
    shown = [
        f"## {one.stage.name}\n\n```sh\nray job submit --working-dir . -- python ray_jobs/"
        f"{one.stage.command}\n```\n\n![{one.stage.name}]({one.picture})"
        for one in done
        if one.picture
    ]
    text = "\n\n".join(["# A rehearsal", _table(done), *shown])
    (output / "README.md").write_text(f"{text}\n")


def _table(done: Sequence[Done]) -> str:
    total = f"| all | {sum(one.seconds for one in done):.0f} s | | |"
    head = ("| stage | took | results | |", "|---|---|---|---|")
    return "\n".join([*head, *(one.row for one in done), total])
