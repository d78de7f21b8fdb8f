"""Pools of actors: real processes that die, with whom their items are shared."""

from __future__ import annotations

import os
import signal
import time

import pytest
from ray.cluster_utils import Cluster

from linearsr.distributed import queue as actors
from linearsr.distributed.queue import Pool, pooled
from linearsr.errors import InputError, LinearSRError, OptionError


class Squares:
    """Squares; 13 kills whoever looks at it, and -1 is refused."""

    def __init__(self, offset: int) -> None:
        if offset < 0:
            raise InputError("no negative offsets")
        self.offset = offset

    def __call__(self, items: list[int]) -> list[int]:
        if 13 in items:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.offset == SLOW:  # still at work when 13 comes
            time.sleep(1)
        if -1 in items:
            raise InputError("no square of -1")
        return [item**2 + self.offset for item in items]


SLOW = 7
POOL = Pool(actors=1, actor_cpus=0.5)


def test_an_item_that_kills_its_worker_costs_only_itself(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "RETRIES", 1)  # each is a new process
    items = [13, *range(6)]
    results = list(pooled(items, Squares, (SLOW,), POOL, batch=2, hands=3))
    assert sorted(item for item, _ in results) == sorted(items)
    assert dict(results) == {i: None if i == 13 else i**2 + SLOW for i in items}


class Stillborn(Squares):
    """Its model does not fit, say."""

    def __init__(self, offset: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_cannot_start_end_the_job(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "RESTARTS", 1)
    with pytest.raises(LinearSRError, match="died"):
        list(pooled([1, 2], Stillborn, (0,), POOL))


def test_a_pool_that_has_no_room_is_refused(cluster: Cluster) -> None:
    for pool in (Pool(actors=50), Pool(gpu=True)):
        with pytest.raises(OptionError, match="the cluster has"):
            list(pooled([1], Squares, (0,), pool))


def test_nothing_to_do_starts_nothing(cluster: Cluster) -> None:
    assert list(pooled([], Squares, (0,), POOL)) == []


@pytest.mark.parametrize(("offset", "items"), [(-1, [1]), (0, [1, -1])])
def test_what_a_worker_raises_ends_the_job(cluster: Cluster, offset: int, items: list[int]) -> None:
    with pytest.raises(InputError, match="no "):
        list(pooled(items, Squares, (offset,), POOL))
