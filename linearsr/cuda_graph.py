"""Functions of tensors that are recorded as CUDA graphs, whose kernels one call starts.

Without a graph Python starts each kernel, and a GPU waits for Python where kernels are short. On a
CPU the same code runs, and each replay is a call of the function: so tests cover all of it but the
recording itself, which has never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3
# The number of shapes whose graphs are kept: those of a picture's tiles, for a few batch sizes.
KEPT = 4
# The number of shapes that are remembered because they came once.
SEEN = 64


class Graph:
    """A function of tensors with fixed shapes, recorded once and then replayed.

    function: returns a tensor, and may not wait for the device. Its result is overwritten by the
    next call. pool: memory that the graph may share with graphs whose results nobody needs any
    more when this one is replayed. stream: records; PyTorch keeps a workspace for each that it has
    seen, so one is to be used for many graphs.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *examples: Tensor,
        pool: Any = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.function = function
        self.inputs = [example.clone() for example in examples]
        self.graph = torch.cuda.CUDAGraph() if examples[0].is_cuda else None
        with torch.inference_mode():
            if self.graph is None:
                self.result = function(*self.inputs)
                return
            with torch.cuda.device(examples[0].device):
                stream = stream or torch.cuda.Stream()
                # Compiling and first allocations must be over before the recording.
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UPS):
                        function(*self.inputs)
                torch.cuda.current_stream().wait_stream(stream)
                # Other threads may allocate memory meanwhile.
                with torch.cuda.graph(
                    self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ):
                    self.result = function(*self.inputs)

    @torch.inference_mode()
    def __call__(self, *tensors: Tensor) -> Tensor:
        """Return the function of these tensors, which have the shapes of the examples."""
        if len(tensors) != len(self.inputs):
            raise ValueError(f"{len(self.inputs)} tensors were recorded, not {len(tensors)}")
        # One launch copies all tensors of a type: a model has dozens of keys of tags.
        for dtype in {held.dtype for held in self.inputs}:
            pairs = [p for p in zip(self.inputs, tensors, strict=True) if p[0].dtype == dtype]
            torch._foreach_copy_([held for held, _ in pairs], [new for _, new in pairs])
        if self.graph is None:
            self.result.copy_(self.function(*self.inputs))
        else:
            self.graph.replay()
        return self.result


class Graphs:
    """A function of tensors of any shapes, with a graph for each of the shapes used last.

    A shape is recorded when it comes for the second time. Threads must take turns.
    """

    def __init__(self, function: Callable[..., Tensor], kept: int = KEPT) -> None:
        self.function = function
        self.kept = kept
        # Both in the order of their last use.
        self._graphs: dict[tuple[Any, ...], Graph] = {}
        self._seen: dict[tuple[Any, ...], None] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Return the function of these tensors; the result is the caller's own."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        graph = self._graphs.pop(key, None)
        if graph is None and key not in self._seen:
            _make_room(self._seen, SEEN)
            self._seen[key] = None
            return self.function(*tensors)
        if graph is None:
            _make_room(self._graphs, self.kept)
            graph = self._record(tensors)
        self._graphs[key] = graph
        return graph(*tensors).clone()

    def clear(self) -> None:
        """Drop all graphs, and the memory that they share."""
        self._graphs.clear()
        self._pool = None

    def _record(self, tensors: tuple[Tensor, ...]) -> Graph:
        if tensors[0].is_cuda and self._pool is None:
            # All graphs share their memory, since results are copied before the next replay.
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(tensors[0].device)
        try:
            return Graph(self.function, *tensors, pool=self._pool, stream=self._stream)
        except BaseException:
            self.clear()  # nothing more can be recorded into the pool of a failed recording
            raise


def _make_room(held: dict[Any, Any], most: int) -> None:
    while len(held) >= most:
        del held[next(iter(held))]
