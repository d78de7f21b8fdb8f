"""Independent tasks on a cluster, by Ray Data: each one writes its own results whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa

from linearsr.distributed.logs import quiet_data
from linearsr.distributed.queue import RETRIES, as_objects, mapped, told
from linearsr.distributed.resources import ResourceRequest, check_feasible, grows

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    items: Iterable[Item], work: Callable[[Item], Result], cpus: float, most_cpus: float
) -> Iterator[Result]:
    """`work(item)` for every item, as they are done, a task of `cpus` logical CPUs each.

    Items and results are small and can be pickled. What `work` raises is raised here; an item whose
    workers keep dying has no result. A cluster that grows is asked for `most_cpus` in all: without
    a limit Ray Data asks for twice the cluster again and again, until it is given nodes with GPUs.
    """
    import ray

    # In memory: reading would be tasks of a whole CPU each, that nobody has reserved.
    blocks = [pa.table({"item": as_objects([item])}) for item in items]
    if not blocks:
        return
    check_feasible("a task", ResourceRequest(cpus), ResourceRequest(cpus), "lower --cpus")
    quiet_data()
    options: dict[str, Any] = {"batch_size": 1, "num_cpus": cpus, "max_retries": RETRIES}
    if grows():
        at_once = max(1, int(most_cpus / cpus))
        options["compute"] = ray.data.TaskPoolStrategy(min(at_once, len(blocks)))
    for row in mapped(ray.data.from_blocks(blocks), partial(_do, work=work), **options):
        yield row["result"]


def _do(block: pa.Table, work: Callable[[Any], object]) -> pa.Table:
    return pa.table({"result": as_objects(told(work, item) for item in block["item"].to_pylist())})
