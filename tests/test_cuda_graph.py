"""CUDA graphs, whose Python runs on a CPU with a call in place of each replay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linearsr.cuda_graph import Graph, Graphs


def test_graph_returns_the_function_of_new_inputs() -> None:
    graph = Graph(lambda x, y: x * 2 + y, torch.ones(3), torch.zeros(3))
    x, y = torch.arange(3.0), torch.ones(3)
    assert torch.equal(graph(x, y), 2 * x + y)
    with pytest.raises(ValueError, match="2 tensors were recorded, not 1"):
        graph(x)


def test_graphs_keep_the_shapes_used_last_and_return_results_of_the_callers_own() -> None:
    recorded: list[int] = []

    def double(x: Tensor) -> Tensor:
        recorded.append(len(x))
        return 2 * x

    graphs = Graphs(double, kept=2)
    first, second = graphs(torch.ones(3)), graphs(torch.zeros(3))
    assert torch.equal(first, torch.full((3,), 2.0)) and not second.any()
    assert recorded == [3, 3, 3]  # the recording, and two replays
    for length in (4, 3, 5, 3, 4):
        graphs(torch.ones(length))
    # 5 replaced 4, whose use lay longest back, and 4 replaced 5 in turn.
    assert recorded == [3, 3, 3, 4, 4, 3, 5, 5, 3, 4, 4]
    assert graphs(torch.ones(4, dtype=torch.float64)).dtype == torch.float64
