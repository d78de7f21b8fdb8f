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
# Shapes whose graphs are kept. Tiles of one picture have one shape, but for those that a request
# alone fills.
KEPT = 4


class Graph:
    """A function of tensors with fixed shapes, recorded once and then replayed.

    function: returns a tensor, and may not wait for the device. Its result is overwritten by the
    next call. pool: memory that the graph may share with graphs whose results nobody needs any
    more when this one is replayed.
    """

    def __init__(
        self, function: Callable[..., Tensor], *examples: Tensor, pool: Any = None
    ) -> None:
        self.function = function
        self.inputs = [example.clone() for example in examples]
        self.graph = torch.cuda.CUDAGraph() if examples[0].is_cuda else None
        with torch.inference_mode():
            if self.graph is None:
                self.result = function(*self.inputs)
                return
            # Compiling, autotuning and first allocations must be over before the recording.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    function(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph, pool=pool):
                self.result = function(*self.inputs)

    @torch.inference_mode()
    def __call__(self, *tensors: Tensor) -> Tensor:
        """Return the function of these tensors, which have the shapes of the examples."""
        if len(tensors) != len(self.inputs):
            raise ValueError(f"{len(self.inputs)} tensors were recorded, not {len(tensors)}")
        # One launch for all tensors of a type, since a model has dozens of keys of tags.
        torch._foreach_copy_(self.inputs, list(tensors))
        if self.graph is None:
            self.result.copy_(self.function(*self.inputs))
        else:
            self.graph.replay()
        return self.result


class Graphs:
    """A function of tensors of any shapes, with a graph for each of the shapes used last.

    Not for several threads at once.
    """

    def __init__(self, function: Callable[..., Tensor], kept: int = KEPT) -> None:
        self.function = function
        self.kept = kept
        self._graphs: dict[tuple[Any, ...], Graph] = {}
        self._pool: Any = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Return the function of these tensors; the result is the caller's own.

        The first call with tensors of new shapes records a graph, and the graph whose use lies
        longest back is dropped if there are more than `kept`.
        """
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        graph = self._graphs.pop(key, None)
        if graph is None:
            while len(self._graphs) >= self.kept:
                self._graphs.pop(next(iter(self._graphs)))
            if tensors[0].is_cuda and self._pool is None:
                # All graphs share their memory, since results are copied before the next replay.
                self._pool = torch.cuda.graph_pool_handle()
            graph = Graph(self.function, *tensors, pool=self._pool)
        self._graphs[key] = graph  # the last one in the dictionary is the one used last
        return graph(*tensors).clone()
