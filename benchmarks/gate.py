"""Numerics first: what does not compute the same function is not timed."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.contestants import Contestants, Forward
from linearsr.denoiser import Condition

SIDE = 256
ALLOWED = 2.0
NOT_THE_SAME = "softmax attention"  # another function, for its cost alone


class GateError(Exception):
    """A way is further from the truth than rounding explains, or not finite."""


def check(contestants: Contestants, compiled: bool) -> dict[str, float]:
    """Relative errors to float64 of every way, on the same rounded weights and inputs.

    Raises GateError where one is above twice that of the plain order in the same precision.
    """
    given = contestants.inputs(SIDE)
    exact = copy.deepcopy(contestants.ours).double()
    exact.in_strips = False
    embedded = contestants.condition(given).embedded.double()
    condition = Condition(embedded, exact.tag_keys(given.tags.double()))
    truth = exact(given.latent.double(), given.t.double(), condition)
    errors = {
        name: float((run().double() - truth).norm() / truth.norm())
        for name, run in contestants.forwards(given, compiled).items()
        if name != NOT_THE_SAME
    }
    plain = errors["LinearSR, plain order"]
    # diffusers rounds in places of its own: it is the judge of nobody here.
    for name in (name for name in errors if name.startswith("LinearSR")):
        if not errors[name] <= ALLOWED * plain:  # NaN too
            raise GateError(f"{name}: error {errors[name]:.2g}, plain order has {plain:.2g}")
    return errors


def check_finite(ways: Mapping[str, Forward], side: int) -> None:
    """Raises GateError for a way that gives NaN or infinity at this size."""
    for name, run in ways.items():
        result: Tensor = run()
        if not torch.isfinite(result).all():
            raise GateError(f"{name}: not finite at {side} px")
