"""Pools of actors: real processes that die, with whom their items are shared."""

from __future__ import annotations

import os
import signal

import pytest
from ray.cluster_utils import Cluster

from linearsr.cluster import actors
from linearsr.cluster.actors import Pool, pooled
from linearsr.errors import InputError


class Squares:
    """Squares; 13 kills whoever looks at it, and -1 is refused."""

    def __init__(self, offset: int) -> None:
        if offset < 0:
            raise InputError("no negative offsets")
        self.offset = offset

    def __call__(self, items: list[int]) -> list[int]:
        if 13 in items:
            os.kill(os.getpid(), signal.SIGKILL)
        if -1 in items:
            raise InputError("no square of -1")
        return [item**2 + self.offset for item in items]


POOL = Pool(actors=1, actor_cpus=0.5)


def test_an_item_that_kills_its_worker_costs_only_itself(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "RETRIES", 1)  # each is a new process
    items = list(range(10, 20))
    results = list(pooled(items, Squares, (1,), POOL, batch=4, hands=2))
    assert sorted(item for item, _ in results) == items
    assert dict(results) == {i: None if i == 13 else i**2 + 1 for i in items}


def test_nothing_to_do_starts_nothing(cluster: Cluster) -> None:
    assert list(pooled([], Squares, (0,), POOL)) == []


@pytest.mark.parametrize(("offset", "items"), [(-1, [1]), (0, [1, -1])])
def test_what_a_worker_raises_ends_the_job(cluster: Cluster, offset: int, items: list[int]) -> None:
    with pytest.raises(InputError, match="no "):
        list(pooled(items, Squares, (offset,), POOL))
