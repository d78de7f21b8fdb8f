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
from tools.rehearsal.machine import Target
from tools.rehearsal.scenario import Step

ROOT = Path(__file__).parents[2]
# Lines of a failed job's log that are printed.
TAIL = 15


class Failed(LinearSRError):
    """A step did not end as it should."""


class Done(NamedTuple):
    """A step that has ended, well or not."""

    step: Step
    seconds: float
    picture: str
    error: str = ""

    @property
    def row(self) -> str:
        """Return the step's row of the table."""
        result = f"failed: {self.error}" if self.error else f"{self.seconds:.0f} s"
        shown = f"[picture]({self.picture})" if self.picture else ""
        return f"| {self.step.name} | {result} | `{self.step.results}` | {shown} |"


def run(steps: Sequence[Step], target: Target, output: Path) -> None:
    """Run all steps in order and add each to the page. Raises Failed at the first that fails."""
    done: list[Done] = []
    for number, step in enumerate(steps, 1):
        script = step.command.partition(".py")[0]
        done.append(_run(step, f"{number}-{script}", target, output))
        _write_page(done, output)
        if done[-1].error:
            raise Failed(f"{step.name}: {done[-1].error}; see {output}/README.md")
    print(f"\n{_table(done)}\n", flush=True)


def _run(step: Step, file: str, target: Target, output: Path) -> Done:
    began = time.perf_counter()
    command = f"python ray_jobs/{step.command}"
    print(f"== {step.name}: {command}", flush=True)
    log, picture = output / f"{file}.log", output / f"{file}.png"
    if fault := _submit(command, target.dashboard, log):
        tail = "\n".join(log.read_text().splitlines()[-TAIL:])
        print(tail, file=sys.stderr)
        return Done(step, time.perf_counter() - began, "", f"{fault}; see {log.name}")
    try:
        step.draw().save(picture)
    except Exception as error:  # missing or wrong results show here first
        return Done(step, time.perf_counter() - began, "", _describe(error))
    took = time.perf_counter() - began
    print(f"== {step.name}: {took:.0f} s, {picture}", flush=True)
    return Done(step, took, picture.name)


def _describe(error: Exception) -> str:
    """Name the error, as the text of a failed `assert` or `next` may be empty."""
    return f"{type(error).__name__}: {one_line(error)}"


def _submit(command: str, dashboard: str, log: Path) -> str:
    """Run a job by `ray job submit` and return its error, "" if it succeeded.

    Its output goes to the terminal and into `log`. No job outlives its step, not even one whose log
    broke off, or that was stopped by Ctrl-C.
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
        # For a job that has ended, `stop` only prints how; the exit code of `submit` does not tell
        # a stopped job.
        with _ray_job("stop", dashboard, job) as stopped:
            message = stopped.communicate()[0]
    if stopped.returncode:
        return f"no word of {job}; if it still runs, stop it with `ray job stop`"
    ended = re.search(rf"Job '{job}' ([a-z ]+)", message)
    return "" if ended and ended[1] == "succeeded" else f"the job {ended[1] if ended else message}"


def _ray_job(verb: str, dashboard: str, *flags: str) -> subprocess.Popen[str]:
    """Start `ray job VERB`, with all its output on stdout."""
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
    """Write the table, then the command and the picture of each step that succeeded."""
    shown = [
        f"## {one.step.name}\n\n```sh\nray job submit --working-dir . -- python ray_jobs/"
        f"{one.step.command}\n```\n\n![{one.step.name}]({one.picture})"
        for one in done
        if one.picture
    ]
    text = "\n\n".join(["# A rehearsal", _table(done), *shown])
    (output / "README.md").write_text(f"{text}\n")


def _table(done: Sequence[Done]) -> str:
    total = f"| all | {sum(one.seconds for one in done):.0f} s | | |"
    head = ("| step | took | results | |", "|---|---|---|---|")
    return "\n".join([*head, *(one.row for one in done), total])
