"""The setting of how threads wait is made before torch loads and leaves the user's own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from linearsr.threads import CHOSEN, SPIN_ROUNDS

TELL = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"


def printed_by(code: str, **chosen: str) -> str:
    """Return the output of a fresh interpreter whose user has set only `chosen`."""
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; {TELL}"],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, **chosen},
    )
    return run.stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "linearsr.cli",
        "linearsr.cli.job",
        "linearsr.training.loop",
        "linearsr.distributed.train.trainer",
    ],
)
def test_threads_spin_briefly_in_every_entry_point(module: str) -> None:
    assert printed_by(f"import {module}") == SPIN_ROUNDS


@pytest.mark.parametrize(
    ("chosen", "left"),
    [({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_settings_of_the_user_are_kept(chosen: dict[str, str], left: str) -> None:
    assert printed_by("import linearsr", **chosen) == left


def test_process_that_has_loaded_torch_is_left_alone() -> None:
    assert printed_by("import torch, linearsr") == "None"


def test_openmp_reads_the_setting_when_torch_loads() -> None:
    """GNU OpenMP prints its settings when it loads, which is also when it reads them."""
    code = "import linearsr.pipeline.upscaler"
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "OMP_DISPLAY_ENV": "verbose"},
    )
    if "GOMP_SPINCOUNT" not in run.stderr:
        pytest.skip("torch has another OpenMP than GNU's here")
    assert f"GOMP_SPINCOUNT = '{SPIN_ROUNDS}'" in run.stderr
