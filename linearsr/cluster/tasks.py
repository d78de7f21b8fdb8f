"""Independent tasks on a cluster, by Ray Data: each one writes its own results whole."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import pandas as pd

from linearsr.cluster.actors import RETRIES, Pool, as_objects, check_room
from linearsr.cluster.logs import last_line, quiet_data
from linearsr.errors import LinearSRError

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(items: Iterable[Item], work: Callable[[Item], Result], cpus: float) -> Iterator[Result]:
    """`work(item)` for every item, as they are done, a task of `cpus` logical CPUs each.

    Items and results are small and can be pickled. What `work` raises is raised here; an item whose
    workers keep dying has no result.
    """
    import ray

    # In memory: reading would be tasks of a whole CPU each, that nobody has reserved.
    blocks = [pd.DataFrame({"item": as_objects([item])}) for item in items]
    if not blocks:
        return
    check_room(Pool(actor_cpus=cpus))
    quiet_data()
    dataset = ray.data.from_blocks(blocks)
    dataset.context.max_errored_blocks = -1
    with warnings.catch_warnings():
        # Of other options than CPUs; for this one there is no other way yet.
        warnings.simplefilter("ignore")
        done = dataset.map_batches(
            partial(_do, work=work),
            batch_size=1,
            batch_format="pandas",
            num_cpus=cpus,
            max_retries=RETRIES,
        )
    try:
        for table in done.iter_batches(batch_size=None, batch_format="pandas"):
            for result in table["result"]:
                if isinstance(result, Exception):
                    raise result
                yield result
    except ray.exceptions.RayError as error:
        raise LinearSRError(last_line(error)) from error


def _do(block: pd.DataFrame, work: Callable[[Any], object]) -> pd.DataFrame:
    return pd.DataFrame({"result": as_objects(_result(item, work) for item in block["item"])})


def _result(item: object, work: Callable[[Any], object]) -> object:
    """What `work` returns or raises, so that only the loss of a worker fails a task."""
    try:
        return work(item)
    except LinearSRError as error:
        return error
    except Exception:  # Not all of them can be pickled.
        return RuntimeError(traceback.format_exc())
