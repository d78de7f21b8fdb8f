"""The rehearsal's cluster: raylets stand for machines, an autoscaler replaces them, S3."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.cluster import Jobs
from tests.helpers.rehearsal_fleet import Fleet
from tools import s3_server as swift
from tools.rehearsal.machine import machine


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with pytest.MonkeyPatch.context() as patch:
        for name in swift.environment(0):  # `machine` sets these
            patch.setenv(name, "")
        with machine(tmp_path_factory.mktemp("fleet") / "ray.log") as place:
            yield Fleet(place, Jobs(place.dashboard))
