"""Work on a list of items with a fixed pool of actors, or with a task per item.

Items and results are names and numbers, never pixels, so memory does not grow with the dataset:
each worker fetches, computes and writes by itself. The driver holds a bounded number of calls in
flight, collects results in completion order, and decides what happens when a process dies.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import ray
from pydantic import Field
from ray.exceptions import RayError, RayTaskError

from linearsr.config import Config
from linearsr.distributed.resources import ResourceRequest, autoscales, check_feasible
from linearsr.errors import LinearSRError, one_line

Item = TypeVar("Item")
Result = TypeVar("Result")

# An item whose worker process dies is tried this often, alone; a pool gives up after this many
# starts per actor that all failed.
ATTEMPTS: Final = 4
CRASHED: Final = f"the worker process crashed on this item {ATTEMPTS} times"


class Pool(Config):
    """A fixed pool of actors and the resources that each of them reserves."""

    actors: int = Field(default=1, ge=1)
    """Number of actors, each of which loads a model."""
    actor_cpus: float = Field(default=1.0, gt=0)
    """Logical CPUs that each actor reserves."""
    gpu: bool = False
    """Reserve a GPU for each actor."""


class DatasetActor:
    """A process that holds one worker. Its class name is what `ray list actors` shows."""

    def start(self, worker: Callable[..., Any], arguments: Sequence[object]) -> None:
        """Make the worker. Not done in `__init__`, where Ray would hide the class of an error."""
        self.worker = worker(*arguments)

    def run(self, items: list[Any]) -> Sequence[Any]:
        """Return a result for each item."""
        results: Sequence[Any] = self.worker(items)
        return results


def map_actors(
    items: Sequence[Item],
    worker: Callable[..., Callable[[list[Item]], Sequence[Any]]],
    arguments: Sequence[object],
    pool: Pool,
    *,
    batch: int = 1,
    concurrency: int = 1,
) -> Iterator[tuple[Item, Any]]:
    """Yield every item with its result, in completion order.

    Each actor calls `worker(*arguments)` once. The worker takes up to `batch` items per call and
    returns as many results; `concurrency` calls run in it at once, in threads. When an actor dies,
    a new one takes its place and the items it held are tried again, one at a time, after all
    others. An item that kills ATTEMPTS actors by itself has the result None.

    Raises what the worker raises, OptionError if the cluster can never hold the pool, and
    LinearSRError if its actors keep dying before the worker is made.
    """
    if not items:
        return
    actor = ResourceRequest(pool.actor_cpus, int(pool.gpu))
    whole_pool = ResourceRequest(*(pool.actors * amount for amount in actor))
    advice = "use fewer --actors, or lower --actor-cpus"
    check_feasible(f"a pool of {pool.actors}", whole_pool, actor, advice)
    batches = deque(_Call(list(items[i : i + batch])) for i in range(0, len(items), batch))
    suspects: deque[_Call] = deque()
    # One call more than an actor works on, so that it never waits for its next one.
    several = 1 if batch == concurrency == 1 else concurrency + 1
    actors = _Actors(worker, arguments, pool, concurrency, min(pool.actors, len(batches)))
    try:
        for queue, per_actor in ((batches, several), (suspects, 1)):
            while queue or actors.calls:
                actors.submit(queue, per_actor)
                for call, results in actors.completed():
                    retries = call.retries(alone=per_actor == 1) if results is None else []
                    suspects.extend(retries)
                    if not retries:
                        yield from zip(call.items, results or [None], strict=True)
    finally:
        actors.kill()


class _Call(NamedTuple):
    """Items for one call of a worker, and how often they, alone, have killed an actor."""

    items: list[Any]
    crashes: int = 0

    def retries(self, *, alone: bool) -> list[_Call]:
        """Return the calls that try the items again one by one, or none after ATTEMPTS crashes."""
        crashes = self.crashes + alone
        return [_Call([item], crashes) for item in self.items] if crashes < ATTEMPTS else []


class _Actors:
    """Actors that are ready, those that are starting, and the calls in flight."""

    def __init__(
        self,
        worker: Callable[..., Any],
        arguments: Sequence[object],
        pool: Pool,
        concurrency: int,
        count: int,
    ) -> None:
        self.worker, self.arguments, self.pool = worker, arguments, pool
        self.remote = ray.remote(DatasetActor).options(
            num_cpus=pool.actor_cpus,
            num_gpus=1 if pool.gpu else None,
            max_concurrency=concurrency,
        )
        self.ready: list[Any] = []
        self.starting: dict[Any, Any] = {}
        self.calls: dict[Any, tuple[Any, _Call]] = {}
        self.failed_starts = 0
        for _ in range(count):
            self.add()

    def add(self) -> None:
        """Start an actor; it gets no call before its worker is made."""
        actor = self.remote.remote()
        self.starting[actor.start.remote(self.worker, self.arguments)] = actor

    def submit(self, queue: deque[_Call], per_actor: int) -> None:
        """Hand out calls until every ready actor has `per_actor`, the least busy first."""
        held = Counter(actor for actor, _ in self.calls.values())
        while queue and self.ready:
            actor = min(self.ready, key=lambda one: held[one])
            if held[actor] >= per_actor:
                return
            call = queue.popleft()
            self.calls[actor.run.remote(call.items)] = actor, call
            held[actor] += 1

    def completed(self) -> Iterator[tuple[_Call, Sequence[Any] | None]]:
        """Wait, then yield each finished call with its results, or with None if its actor died."""
        ended, _ = ray.wait([*self.calls, *self.starting])
        for reference in ended:
            if reference in self.starting:
                self._started(reference)
                continue
            actor, call = self.calls.pop(reference)
            try:
                results = _get(reference)
            except RayError:
                results = None
                if actor in self.ready:  # the other calls of a dead actor fail as well
                    self.ready.remove(actor)
                    ray.kill(actor)
                    self.add()
            yield call, results

    def _started(self, reference: Any) -> None:
        actor = self.starting.pop(reference)
        try:
            _get(reference)
        except RayError as error:
            self.failed_starts += 1
            if self.failed_starts >= ATTEMPTS * self.pool.actors:
                raise LinearSRError(
                    f"actors died {self.failed_starts} times in a row while they loaded their "
                    f"model: {one_line(error)}"
                ) from error
            self.add()
        else:
            self.failed_starts = 0
            self.ready.append(actor)

    def kill(self) -> None:
        """End all actors, whatever they do."""
        for actor in (*self.ready, *self.starting.values()):
            ray.kill(actor)


def map_tasks(
    items: Iterable[Item],
    function: Callable[[Item], Result],
    cpus: float,
    max_cpus: float,
    gpus: float = 0.0,
) -> Iterator[tuple[Item, Result | None]]:
    """Yield every item with `function(item)`, in completion order.

    Each is a task of `cpus` CPUs and `gpus` GPUs, of which a share is possible.

    An item that kills ATTEMPTS workers has the result None. A cluster that autoscales would add
    nodes for every waiting task, so it gets tasks for at most `max_cpus` CPUs at a time. Raises
    what the function raises, and OptionError if no node can ever run a task.
    """
    left = deque(items)
    if not left:
        return
    request = ResourceRequest(cpus, gpus)
    check_feasible("a task", request, request, "lower --cpus" + " or --gpus" * bool(gpus))
    task = ray.remote(_call).options(num_cpus=cpus, num_gpus=gpus or None, max_retries=ATTEMPTS - 1)
    # On a fixed cluster as many tasks wait as run, so that no CPU idles between two of them.
    cpus_in_flight = max_cpus if autoscales() else 2 * ray.cluster_resources().get("CPU", 0.0)
    limit = max(1, int(cpus_in_flight / cpus))
    calls: dict[Any, Item] = {}
    while left or calls:
        while left and len(calls) < limit:
            item = left.popleft()
            calls[task.remote(function, item)] = item
        ended, _ = ray.wait(list(calls))
        for call in ended:
            try:
                result = _get(call)
            except RayError:
                result = None
            yield calls.pop(call), result


def _call(function: Callable[[Any], Any], item: object) -> Any:
    """Be what Ray runs: it takes plain functions only."""
    return function(item)


def _get(call: Any) -> Any:
    """Return a call's result. Raise what the worker raised, or RayError if its process died.

    Errors other than ours become a RuntimeError with the worker's traceback: not all of them can
    be pickled.
    """
    try:
        return ray.get(call)
    except RayTaskError as error:
        if isinstance(error.cause, LinearSRError):
            raise error.cause from None
        raise RuntimeError(str(error)) from None
