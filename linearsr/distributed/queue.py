"""A fixed pool of actors at work on a list, by Ray Data: what the dataset jobs have in common.

Items and results are names and numbers, never pixels, so memory does not grow with the dataset;
each actor fetches, works and writes by itself.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

import pyarrow as pa
from pydantic import Field

from linearsr.config import Config
from linearsr.distributed.logs import last_line, quiet_data
from linearsr.distributed.resources import ResourceRequest, check_feasible
from linearsr.errors import LinearSRError

Item = TypeVar("Item")

# How often a call whose actor or node died is made again, and an actor started again. By default
# Ray Data never gives up: a picture that kills its reader, or a model that does not fit, would keep
# a job for ever.
RETRIES: Final = 3
RESTARTS: Final = 100
LOST: Final = "its worker died, repeatedly"


class Pool(Config):
    """How many actors, and what each of them reserves. CPUs are Ray's logical ones."""

    actors: int = Field(default=1, ge=1)
    """Models at work; fixed."""
    actor_cpus: float = Field(default=1.0, gt=0)
    """Logical CPUs of each actor."""
    gpu: bool = False
    """A GPU for each actor."""


def pooled(
    items: Sequence[Item],
    worker: Callable[..., Callable[[list[Item]], list[Any]]],
    arguments: Sequence[object],
    pool: Pool,
    *,
    batch: int = 1,
    hands: int = 1,
) -> Iterator[tuple[Item, Any]]:
    """Every item with its result, as they are done: `worker(*arguments)` is made once per actor.

    The worker takes up to `batch` items a call and returns as many results; `hands` calls are under
    way in it at once, in threads. A result is None for an item whose actors kept dying, also when
    it was alone with one. All can be pickled. Raises what the worker raises, and OptionError for a
    pool that the cluster has no room for.
    """
    left = dict(enumerate(items))
    actor = ResourceRequest(pool.actor_cpus, int(pool.gpu))
    everyone = ResourceRequest(*(pool.actors * amount for amount in actor))
    advice = "use fewer --actors, or lower --actor-cpus"
    check_feasible(f"a pool of {pool.actors}", everyone, actor, advice)
    # One item may have taken along what its actor had in hand: that is tried one by one.
    for size, calls in ((batch, hands), (1, 1)):
        for number, result in _results(left, worker, arguments, pool, size, calls):
            yield left.pop(number), result
    yield from ((item, None) for item in left.values())


def _results(
    items: dict[int, Item],
    worker: Callable[..., Any],
    arguments: Sequence[object],
    pool: Pool,
    batch: int,
    hands: int,
) -> Iterator[tuple[int, Any]]:
    import ray

    if not items:
        return
    quiet_data()
    table = pa.table({"number": list(items), "item": as_objects(items.values())})
    # In memory: reading would be tasks of a whole CPU each, that nobody has reserved. A block a
    # call: what is lost, is lost by blocks.
    dataset = ray.data.from_blocks([table.slice(i, batch) for i in range(0, len(items), batch)])
    strategy = ray.data.ActorPoolStrategy(
        size=pool.actors,
        max_concurrent_calls_per_actor=hands,
        # One more than is under way, so that none waits for its next call; but not where each item
        # is to be alone.
        max_tasks_in_flight_per_actor=1 if batch == hands == 1 else hands + 1,
        enable_true_multi_threading=hands > 1,
    )
    done = mapped(
        dataset,
        _Actor,
        fn_constructor_args=(worker, tuple(arguments)),
        batch_size=batch,
        compute=strategy,
        num_cpus=pool.actor_cpus,
        num_gpus=1 if pool.gpu else None,
        max_task_retries=RETRIES,
        max_restarts=RESTARTS,
    )
    for row in done:
        yield row["number"], row["result"]


def mapped(dataset: Any, work: Callable[..., Any], **options: Any) -> Iterator[dict[str, Any]]:
    """Rows with a `result`, as they are done, of `dataset.map_batches(work, **options)`.

    Blocks whose workers kept dying are left out. Raises the first result that is an exception, and
    LinearSRError for what goes wrong in Ray.
    """
    import ray

    # Blocks are lost to dying workers only: all else comes back as a result.
    dataset.context.max_errored_blocks = -1
    with warnings.catch_warnings():
        # Of options other than CPUs; for retries there is no other way yet.
        warnings.simplefilter("ignore")
        done = dataset.map_batches(work, batch_format="pyarrow", **options)
    try:
        for block in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in block.to_pylist():
                if isinstance(row["result"], Exception):
                    raise row["result"]
                yield row
    except ray.exceptions.RayError as error:
        raise LinearSRError(last_line(error)) from error


class _Actor:
    """The worker, and what it raises as a result: raised here, Ray would try it ever again."""

    def __init__(self, worker: Callable[..., Any], arguments: tuple[object, ...]) -> None:
        made = told(worker, *arguments)
        self.failed = made if isinstance(made, Exception) else None
        self.worker = made

    def __call__(self, block: pa.Table) -> pa.Table:
        items = block["item"].to_pylist()
        results = self.failed or told(self.worker, items)
        if isinstance(results, Exception):
            results = [results] * len(items)
        return pa.table({"number": block["number"], "result": as_objects(results)})


def as_objects(values: Iterable[object]) -> pa.Array:
    """A column of Python objects as they are: left to itself, Ray makes tuples into lists."""
    from ray.data.extensions import ArrowPythonObjectArray

    return ArrowPythonObjectArray.from_objects(values)


def told(work: Callable[..., Any], *arguments: object) -> Any:
    """What `work` returns or raises, so that only the loss of a worker fails a call."""
    try:
        return work(*arguments)
    except LinearSRError as error:
        return error
    except Exception:  # not all of them can be pickled
        return RuntimeError(traceback.format_exc())
