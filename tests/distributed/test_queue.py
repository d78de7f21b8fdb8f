"""Pools of actors and tasks whose processes really die; their items are not lost."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from linearsr.distributed import queue
from linearsr.distributed.queue import ATTEMPTS, Pool, map_actors, map_tasks
from linearsr.errors import InputError, LinearSRError, OptionError, OutputError
from tests.helpers.processes import until


class Squares:
    """A worker that squares; 13 kills its process, and -1 is refused."""

    def __init__(self, offset: int) -> None:
        if offset < 0:
            raise InputError("no negative offsets")
        self.offset = offset

    def __call__(self, items: list[int]) -> list[int]:
        if 13 in items:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.offset == SLOW:  # still running when 13 arrives
            time.sleep(1)
        if -1 in items:
            raise InputError("no square of -1")
        return [item**2 + self.offset for item in items]


SLOW = 7
POOL = Pool(actors=1, actor_cpus=0.5)


def test_an_item_that_kills_its_worker_costs_only_itself(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "ATTEMPTS", 2)  # each is a new process
    items = [13, *range(6)]
    results = list(map_actors(items, Squares, (SLOW,), POOL, batch=2, concurrency=3))
    assert sorted(item for item, _ in results) == sorted(items)
    assert dict(results) == {i: None if i == 13 else i**2 + SLOW for i in items}


class Counted:
    """A worker that "always" kills every time and "once" kills once; each death leaves a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, items: list[str]) -> list[int]:
        deaths = {"always": 99, "once": 1}
        return [_dies((item, deaths[item]), self.folder) for item in items]


def _dies(item: tuple[str, int], folder: Path) -> int:
    name, times = item
    deaths = len(list(folder.glob(f"{name}-*")))
    if deaths < times:
        (folder / f"{name}-{deaths}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return times


def test_an_item_alone_is_tried_as_often_as_its_error_says(
    cluster: Cluster, tmp_path: Path
) -> None:
    results = dict(map_actors(["always", "once"], Counted, (tmp_path,), POOL))
    assert results == {"always": None, "once": 1}
    assert len(list(tmp_path.glob("always-*"))) == ATTEMPTS == 4
    assert queue.CRASHED == "the worker process crashed on this item 4 times"


class Stillborn(Squares):
    """A worker that cannot start, as if its model did not fit."""

    def __init__(self, offset: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_cannot_start_end_the_job(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "ATTEMPTS", 2)
    with pytest.raises(LinearSRError, match="died"):
        list(map_actors([1, 2], Stillborn, (0,), POOL))


def test_a_pool_that_never_fits_is_refused(cluster: Cluster) -> None:
    for pool in (Pool(actors=50), Pool(gpu=True)):
        with pytest.raises(OptionError, match="the cluster has"):
            list(map_actors([1], Squares, (0,), pool))


def test_an_empty_list_starts_nothing(cluster: Cluster) -> None:
    assert list(map_actors([], Squares, (0,), POOL)) == []


@pytest.mark.parametrize(("offset", "items"), [(-1, [1]), (0, [1, -1])])
def test_an_error_of_a_worker_ends_the_job(cluster: Cluster, offset: int, items: list[int]) -> None:
    with pytest.raises(InputError, match=r"^no "):
        list(map_actors(items, Squares, (offset,), POOL))


class Overlap:
    """A worker that counts its concurrent calls and returns the largest count."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __call__(self, items: list[int]) -> list[int]:
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.3)
        self.now -= 1
        return [self.most] * len(items)


def test_calls_in_an_actor_overlap_up_to_its_concurrency(cluster: Cluster) -> None:
    results = dict(map_actors(range(12), Overlap, (), POOL, concurrency=3))
    assert len(results) == 12 and max(results.values()) == 3


# Tasks


def test_a_task_whose_worker_dies_is_retried_a_few_times(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "ATTEMPTS", 2)
    items = [("never", 0), ("once", 1), ("always", 99)]
    results = dict(map_tasks(items, partial(_dies, folder=tmp_path), 0.5, 2))
    assert results == {("never", 0): 0, ("once", 1): 1, ("always", 99): None}
    assert len(list(tmp_path.glob("always-*"))) == 2


def _alone(item: int, folder: Path) -> int:
    """Raise if another call is running."""
    busy = folder / "busy"
    busy.touch(exist_ok=False)
    np.linalg.svd(np.random.default_rng(item).normal(size=(400, 400)))
    busy.unlink()
    return item


def _together(item: int, folder: Path) -> int:
    """Wait until the other call runs too."""
    (folder / str(item)).touch()
    until((folder / str(1 - item)).exists, "two tasks at once")
    return item


def test_map_tasks_on_an_autoscaling_cluster_uses_no_more_than_allowed(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = map_tasks([0, 1], partial(_together, folder=tmp_path), 0.5, 0.5)
    assert sorted(together) == [(0, 0), (1, 1)]
    monkeypatch.setattr(queue, "autoscales", lambda: True)
    alone = map_tasks(range(8), partial(_alone, folder=tmp_path), 0.5, 0.9)
    assert sorted(alone) == [(item, item) for item in range(8)]


def _fails(item: int) -> int:
    if item == 1:
        raise OutputError("disk full")
    return 10 // (item - 2)


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [(1, OutputError, "^disk full$"), (2, RuntimeError, "ZeroDivision")],
)
def test_an_error_of_a_task_ends_the_job(
    cluster: Cluster, item: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        list(map_tasks([item], _fails, 0.5, 2))
