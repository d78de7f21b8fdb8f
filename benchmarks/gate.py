"""Check the numerics first: a way that does not compute the same function is not timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.contestants import Contestants, Forward
from benchmarks.machine import Machine
from linearsr.denoiser import Condition

SIDE = 256
TOKENS = 5000  # of the operator alone
ALLOWED = 2.0
ALLOWED_OF_OTHERS = 10.0
PLAIN = "LinearSR, plain order"
NOT_THE_SAME = "softmax attention"  # another function, timed for its cost alone


class GateError(Exception):
    """A result is further from float64 than rounding explains, or not finite."""


def check(contestants: Contestants, compiled: bool) -> dict[str, float]:
    """Return the relative error of every way against float64, with the same rounded inputs.

    Raises GateError if one is above twice that of the plain order in the same precision.
    """
    inputs = contestants.inputs(SIDE)
    exact = copy.deepcopy(contestants.ours).double()
    exact.use_strips = False
    embedded = contestants.condition(inputs).embedded.double()
    condition = Condition(embedded, exact.tag_keys(inputs.tags.double()))
    truth = exact(inputs.latent.double(), inputs.t.double(), condition)
    ways = contestants.forwards(inputs, compiled)
    del ways[NOT_THE_SAME]
    return check_ways(ways, truth)


def check_ways(ways: Mapping[str, Forward], truth: Tensor) -> dict[str, float]:
    """Return the relative error of every way against the true result, in float64.

    Raises GateError if one is above twice that of PyTorch's plain order in the same precision.
    """
    errors = {
        name: float((run().double() - truth).norm() / truth.norm()) for name, run in ways.items()
    }
    plain = errors[PLAIN]
    for name, error in errors.items():
        # diffusers rounds at other places.
        allowed = (ALLOWED if name.startswith("LinearSR") else ALLOWED_OF_OTHERS) * plain
        if not error <= allowed:  # NaN too
            raise GateError(f"{name}: error {error:.2g}, plain order has {plain:.2g}")
    return errors


def check_operator(attend: Callable[[Tensor, Tensor, Tensor], Tensor], machine: Machine) -> None:
    """Raise GateError if the attention operator is further from float64 than rounding explains.

    The operator is relu(q) (relu(k)^T v) over relu(q) . sum relu(k). Rounding explains one rounding
    of the result, and sums in float32 in any order: rounding errors of n additions grow like
    sqrt(n) units (Higham and Mary, "A new approach to probabilistic rounding error analysis",
    2019).
    """
    shape = (1, TOKENS, 3, 32)
    q, k, v = (torch.randn(shape, device=machine.device, dtype=machine.dtype) for _ in "qkv")
    query, key, value = q.double().relu(), k.double().relu(), v.double()
    state = torch.einsum("bnhd,bnhe->bhde", key, value)
    total = torch.einsum("bnhd,bhd->bnh", query, key.sum(1))
    truth = torch.einsum("bnhd,bhde->bnhe", query, state) / total[..., None]
    error = float((attend(q, k, v).double() - truth).norm() / truth.norm())
    result, term = (torch.finfo(dtype).eps / 2 for dtype in (machine.dtype, torch.float32))
    allowed = result + math.sqrt(TOKENS) * term
    if not error <= allowed:
        raise GateError(
            f"linear attention: error {error:.2g} in {machine.dtype}, allowed are {allowed:.2g}"
        )


def finite(name: str, run: Forward, side: int) -> Forward:
    """Wrap `run` so that it raises GateError for NaN or infinity at this size."""

    def checked() -> Tensor:
        result = run()
        # The sum costs little beside the computation of the result.
        if not torch.isfinite(result.sum()):
            raise GateError(f"{name}: not finite at {side} px")
        return result

    return checked
