"""The program behind every command of a page: the real one with added flags, or a stand-in.

    python program.py CONTEXT.json NAME ARGUMENTS...

It starts often, so it reads its tables from CONTEXT.json. Equal commands are run once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Table = Mapping[str, Any]
WITHIN = 180.0  # seconds until a server must answer


def main(context: Table, name: str, arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    os.environ["PATH"] = context["path"]
    command = shlex.join([name, *arguments])
    if _first(context["stand_ins"], command) is not None:
        from tests.helpers.pages import fakes

        fakes.ALL[name](*arguments)
        return 0
    if name in ("curl", "pre-commit", "ray") or arguments[:1] == ["-"]:
        return _real(context, command, name, arguments)
    if command.startswith(("linearsr serve", "serve ")):
        return _serving(context, command, name, arguments)
    digest = hashlib.sha256(command.encode()).hexdigest()
    done = Path(context["done"]) / digest
    if done.exists():
        print(f"done before: {command}")
        return 0
    code = _real(context, command, name, arguments)
    if code == 0:
        done.write_text(command)
    return code


def _first(table: Table, command: str) -> Any:
    """Return the table's value for the longest of its commands that this one begins with."""
    fits = [k for k in table if f"{command} ".startswith(f"{k} ")]
    return table[max(fits, key=len)] if fits else None


def _real(context: Table, command: str, name: str, arguments: list[str]) -> int:
    program = shutil.which(name)
    assert program, f"{name} is not installed"
    flags = [*arguments, *(_first(context["added"], command) or [])]
    job = re.match(r"(?:python ray_jobs/(\w+)\.py|linearsr job ([\w-]+))", command)
    if job and "--gpu" in flags:
        flags.remove("--gpu")
        name = job[1] or job[2].replace("-", "_")
        flags += [context["gpu"].get(name, "--actors"), "1"]
    refusal = _first(context["refuses"], command)
    if refusal is None:
        return subprocess.call([program, *flags])
    run = subprocess.run([program, *flags], capture_output=True, text=True, check=False)
    output, (code, words) = run.stdout + run.stderr, refusal
    print(output)
    # If the program can do its work after all, that is no error.
    return 0 if run.returncode == code and words in output else run.returncode


def _serving(context: Table, command: str, name: str, arguments: list[str]) -> int:
    """Run a command that serves; `linearsr serve` then runs until the next one."""
    running = Path(context["done"]) / "serving"
    if running.exists() and running.read_text().endswith(command):
        return 0
    if "--redeploy" in arguments:  # over the endpoint that runs, if there is one
        return _real(context, command, name, arguments)
    end_serving(running)
    if name == "serve":
        code = _real(context, command, name, arguments)
        return code if "deploy" not in arguments or code else _answers(context["http"])
    # A deployment of another page still holds the port.
    if code := _real(context, "serve shutdown", "serve", ["shutdown", "--yes"]):
        return code
    program = shutil.which(name)
    assert program
    with open(running.with_suffix(".log"), "wb") as output:
        arguments = [*arguments, "--port", str(context["http"])]
        server = subprocess.Popen(
            [program, *arguments], stdout=output, stderr=output, start_new_session=True
        )
    running.write_text(f"{server.pid} {command}")
    log, deadline = running.with_suffix(".log"), time.monotonic() + WITHIN
    # The log decides, since an endpoint of another page may answer at this port.
    while time.monotonic() < deadline and server.poll() is None:
        if "press Ctrl-C to stop" in log.read_text():
            return _answers(context["http"])
        time.sleep(0.1)
    print(log.read_text())
    return 1


def _answers(port: int) -> int:
    """Return 0 as soon as the endpoint is healthy, 1 if it does not become so in time."""
    deadline = time.monotonic() + WITHIN
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5).close()
            return 0
        time.sleep(0.1)
    return 1


def end_serving(running: Path) -> None:
    """Send Ctrl-C to the running server, if there is one."""
    import psutil

    if not running.exists():
        return
    number = int(running.read_text().split()[0])
    with contextlib.suppress(psutil.NoSuchProcess):
        server = psutil.Process(number)
        server.send_signal(signal.SIGINT)
        while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)
    running.unlink()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[3])
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], sys.argv[3:]))
