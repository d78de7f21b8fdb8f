"""A forward recorded as a CUDA graph, which starts all its kernels by one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UPS = 3


class Graph:
    """A function of tensors with fixed shapes, recorded once and then replayed.

    function: returns a tensor, and may not wait for the device. Its result is overwritten by the
    next call. On a CPU the same code runs, and each replay is a call of the function.
    """

    def __init__(self, function: Callable[..., Tensor], *examples: Tensor) -> None:
        self.function = function
        self.inputs = [example.clone() for example in examples]
        self.graph = torch.cuda.CUDAGraph() if examples[0].is_cuda else None
        with torch.inference_mode():
            if self.graph is None:
                self.result = function(*self.inputs)
                return
            # Autotuning and allocations must be over before the recording.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    function(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.result = function(*self.inputs)

    @torch.inference_mode()
    def __call__(self, *tensors: Tensor) -> Tensor:
        """Return the function of these tensors, which have the shapes of the examples."""
        for held, tensor in zip(self.inputs, tensors, strict=True):
            held.copy_(tensor)
        if self.graph is None:
            self.result.copy_(self.function(*self.inputs))
        else:
            self.graph.replay()
        return self.result
