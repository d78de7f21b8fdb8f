"""`linearsr serve --redeploy` over an endpoint that runs."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.helpers.command import environment, serve, serving
from tests.helpers.endpoint import answered_by

pytestmark = [pytest.mark.cluster, pytest.mark.thorough]

TOKENS = ("a-word-that-no-log-may-have", "another-word-that-no-log-may-have")


def test_redeployment_checks_the_room_and_changes_token_and_limits(small_bundle: Path) -> None:
    old, new = ({"Authorization": f"Bearer {token}"} for token in TOKENS)
    form: dict[str, Any] = {
        "files": {"image": ("a.png", answered_by(small_bundle)[0].picture)},
        "data": {"steps": 1},
    }
    with tempfile.TemporaryDirectory(prefix="lsr-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with serving(small_bundle, folder, LINEARSR_TOKEN=TOKENS[0]) as (process, url):
            ask = partial(requests.post, f"{url}/v1/upscale", timeout=60, **form)
            assert (ask(headers=old).status_code, ask(headers=new).status_code) == (200, 401)
            redeploy = partial(
                subprocess.run,
                env=environment(folder, LINEARSR_TOKEN=TOKENS[1]),
                capture_output=True,
                text=True,
                check=False,
            )
            refused = redeploy(serve(small_bundle, "--redeploy", "--replicas", "400"))
            assert refused.returncode == 2 and "the endpoint needs" in refused.stderr
            assert (ask(headers=old).status_code, ask(headers=new).status_code) == (200, 401)
            changed = redeploy(serve(small_bundle, "--redeploy", "--max-pixels", "5000"))
            assert changed.returncode == 0, changed.stderr
            assert (ask(headers=old).status_code, ask(headers=new).status_code) == (401, 200)
            limits = requests.get(f"{url}/v1/models", timeout=60).json()["limits"]
            assert limits["pixels"] == 5000
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
        files = [path for path in folder.rglob("*") if path.is_file()]
        for token in TOKENS:
            assert [path for path in files if token.encode() in path.read_bytes()] == []
