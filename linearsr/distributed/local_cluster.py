"""The Ray cluster that this process starts on its own machine, and who may use it.

Whoever may send a task to a cluster runs code as its user, and Ray listens on more ports than that
of HTTP. So a cluster that is started here always asks for Ray's token.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Any

import ray

from linearsr.distributed.compat import ask_for_token, listen_on_loopback
from linearsr.errors import LinearSRError, one_line
from linearsr.storage import atomic


def start(**options: Any) -> Any:
    """Start a cluster whose processes listen on loopback; return Ray's context.

    options: those of `ray.init`. Raises LinearSRError if Ray does not start.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        print(
            f"linearsr: RAY_AUTH_MODE={mode} is ignored: the Ray cluster that starts here asks for "
            "a token, since anyone could run code on it otherwise.",
            file=sys.stderr,
        )
    expect_private()
    _make_token()
    try:
        return ray.init(address="local", **options)
    except Exception as error:  # Ray has no type for it
        raise LinearSRError(
            f"Ray did not start on this machine: {one_line(error)} If the machine is busy, try "
            "again later; Ray's logs are in /tmp/ray/session_latest/logs"
        ) from error


def expect_private() -> None:
    """Let this process start a cluster as above, or look for one that another process started."""
    ask_for_token()
    listen_on_loopback()


def _make_token() -> None:
    """Make a token that only this user can read, if there is none.

    Otherwise Ray would make one, in a file that everyone can read.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.create(path, secrets.token_hex(32).encode())
        path.chmod(0o600)
    except OSError:  # the home cannot be written: only this process and its children know the token
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
