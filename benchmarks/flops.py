"""Count operations without computing anything: the tensors have shapes and no data."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def torch_only() -> AbstractContextManager[object]:
    """Use PyTorch's own operations instead of our kernels, which cannot be counted."""
    return mock.patch.dict(os.environ, {"LINEARSR_KERNELS": "torch"})


def counted(prepare: Callable[[], Callable[[], object]]) -> int:
    """Count the operations of the call that `prepare` returns; a multiply-add counts as two."""
    with torch_only(), FakeTensorMode(allow_non_fake_inputs=True):
        work = prepare()
        with FlopCounterMode(display=False) as counter:
            work()
    return int(counter.get_total_flops())
