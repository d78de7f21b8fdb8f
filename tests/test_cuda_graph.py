"""CUDA graphs, whose Python runs on a CPU with a call in place of each replay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linearsr.cuda_graph import Graph, Graphs


def test_graph_returns_the_function_of_new_inputs() -> None:
    graph = Graph(lambda x, y: x * 2 + y.float(), torch.ones(3), torch.zeros(3).bfloat16())
    x, y = torch.arange(3.0), torch.ones(3).bfloat16()
    assert torch.equal(graph(x, y), 2 * x + 1)
    with pytest.raises(ValueError, match="2 tensors were recorded, not 1"):
        graph(x)


class Doubles:
    """A function that notes the lengths with which it is called."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        if len(x) > 9:
            raise MemoryError
        return 2 * x


def test_shape_is_recorded_when_it_comes_for_the_second_time() -> None:
    function = Doubles()
    graphs = Graphs(function)
    first, second, third = (graphs(torch.full((3,), float(i))) for i in range(3))
    assert function.calls == [3, 3, 3, 3]  # as it is, the recording, and two replays
    assert [x.tolist() for x in (first, second, third)] == [[0] * 3, [2] * 3, [4] * 3]
    assert graphs(torch.ones(3, dtype=torch.float64)).dtype == torch.float64


def test_graphs_keep_the_shapes_used_last() -> None:
    function = Doubles()
    graphs = Graphs(function, kept=2)
    for length in (3, 3, 4, 4, 3, 5, 5):  # 5 replaces 4, whose use lies longest back
        graphs(torch.ones(length))
    function.calls.clear()
    for length in (3, 5, 4):
        graphs(torch.ones(length))
    assert function.calls == [3, 5, 4, 4]  # 4 is recorded again


def test_failed_recording_drops_all_graphs() -> None:
    """No graph could be recorded into the memory that they share."""
    function = Doubles()
    graphs = Graphs(function)
    for _ in range(2):
        graphs(torch.ones(3))
    for _ in range(2):
        with pytest.raises(MemoryError):
            graphs(torch.ones(10))
    function.calls.clear()
    assert torch.equal(graphs(torch.ones(3)), torch.full((3,), 2.0))
    assert function.calls == [3, 3]  # recorded again
