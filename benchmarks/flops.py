"""Operations counted without computing anything: tensors have shapes here, and no data."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def torch_only() -> AbstractContextManager[object]:
    """PyTorch's own operations instead of ours: those are what can be counted."""
    return mock.patch.dict(os.environ, {"LINEARSR_KERNELS": "torch"})


def counted(prepare: Callable[[], Callable[[], object]]) -> int:
    """Operations (a multiplication and an addition are two) of what `prepare` returns."""
    with torch_only(), FakeTensorMode(allow_non_fake_inputs=True):
        work = prepare()
        with FlopCounterMode(display=False) as counter:
            work()
    return int(counter.get_total_flops())
