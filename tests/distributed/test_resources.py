"""Requests that can never be scheduled are refused; one process must fit on one node."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from linearsr.distributed.resources import ResourceRequest, check_feasible
from linearsr.errors import OptionError


@pytest.fixture
def another_node(cluster: Cluster) -> Iterator[None]:
    """A node with two CPUs beside the head with four.

    It has a folder of its own, as another machine has: in a common one it would replace the head's
    copy of the jobs' working folder, and leave half of it behind when it is removed.
    """
    with tempfile.TemporaryDirectory(prefix="lsr-", ignore_cleanup_errors=True) as folder:
        node = cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20, temp_dir=folder)
        cluster.wait_for_nodes()
        yield
        cluster.remove_node(node)


def test_a_total_fits_the_cluster_and_a_process_fits_a_node(another_node: None) -> None:
    assert ray.cluster_resources()["CPU"] == 6
    check_feasible("a pool", ResourceRequest(6), ResourceRequest(4), "ask for less")
    with pytest.raises(OptionError, match=r"^a pool needs 7 CPU, the cluster has 6: ask for less$"):
        check_feasible("a pool", ResourceRequest(7), ResourceRequest(1), "ask for less")
    with pytest.raises(OptionError, match="needs 5 CPU on one node, the largest has 4: ask"):
        check_feasible("a task", ResourceRequest(5), ResourceRequest(5), "ask for less")
    with pytest.raises(OptionError, match="needs 1 GPU, the cluster has 0"):
        check_feasible("a task", ResourceRequest(1, 1), ResourceRequest(1, 1), "ask for less")
