"""Fixtures that fill unwritten memory with NaN and round bfloat16 as GPUs do.

They do not depend on what the kernels compute. The tests run on the device that the environment
variable LINEARSR_TEST_DEVICE names: on the CPU, by default, in Triton's interpreter.
"""

import os

DEVICE = os.environ.get("LINEARSR_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    # @triton.jit reads it, so it is set before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)

# torch.device("meta") remembers the functions that allocate memory at its first use. That must come
# before they are replaced, or models of later tests would not be on "meta".
with torch.device("meta"):
    torch.empty(0)


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        x = allocate(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    return wrapper


@pytest.fixture(autouse=True)
def unset_switch(monkeypatch):
    monkeypatch.delenv("LINEARSR_KERNELS", raising=False)


@pytest.fixture(autouse=True)
def poison_empty_memory(monkeypatch):
    """New memory is often zero, which would hide an unwritten element."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def round_bfloat16(monkeypatch):
    """The interpreter truncates fp32 to bfloat16; GPUs round to nearest even, as this does."""
    if DEVICE != "cpu":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def convert_rounding(x, source, target, mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(x, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", convert_rounding)
