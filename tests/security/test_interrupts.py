"""Ctrl-C, pressed again and again by somebody who does not wait for the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from PIL import Image

from linearsr.cli.report import INTERRUPTED
from tests.helpers.fleet_files import TOP
from tests.helpers.processes import until

# A command whose end takes as long as that of a cluster, and which says when it begins and ends.
SLOW_TO_END = """
import atexit, signal, sys, time
from linearsr.cli.report import exit_code

def end():
    signal.sigtimedwait([signal.SIGUSR1], 60)
    print("ended", flush=True)

def work():
    print("begun", flush=True)
    while True:  # a signal that comes just before a longer wait would not end it
        time.sleep(0.01)

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
atexit.register(end)
sys.exit(exit_code(work, "start it again"))
"""


def test_a_second_interrupt_does_not_interrupt_the_end() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_END],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as command:
        assert command.stdout and command.stderr
        assert command.stdout.readline() == "begun\n"
        os.killpg(command.pid, signal.SIGINT)
        assert command.stderr.readline() == "linearsr: interrupted; start it again\n"
        os.killpg(command.pid, signal.SIGINT)
        command.send_signal(signal.SIGUSR1)
        out, err = command.communicate(timeout=60)
        assert (command.returncode, out, err) == (INTERRUPTED, "ended\n", "")


@pytest.mark.thorough
def test_two_interrupts_of_a_job_leave_no_process_of_its_cluster(
    photograph: Image.Image, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    photograph.save(tmp_path / "in" / "photograph.png")
    with tempfile.TemporaryDirectory(prefix="lsr-", ignore_cleanup_errors=True) as folder:
        alone = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
        environment = {**alone, "RAY_TMPDIR": folder}
        places = [f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}"]
        with subprocess.Popen(
            [sys.executable, "ray_jobs/upscale_dataset.py", *places],
            cwd=TOP,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as job:
            until(lambda: len(started_with(environment)) > 5 or job.poll() is not None, "Ray")
            for _ in range(2):
                os.killpg(job.pid, signal.SIGINT)
            _, err = job.communicate(timeout=300)
        assert job.returncode == INTERRUPTED
        assert "Traceback" not in err and "linearsr: interrupted; start it again" in err
        until(lambda: not started_with(environment), "the end of Ray's processes", 60)


def started_with(environment: dict[str, str]) -> list[int]:
    """Return the processes of Ray whose folder is that of this environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == environment["RAY_TMPDIR"]:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
