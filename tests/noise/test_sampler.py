"""The schedule and Euler's method against diffusers' FlowMatchEulerDiscreteScheduler."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from linearsr.errors import OptionError
from linearsr.noise.sampler import euler, schedule


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schedule_and_steps_equal_diffusers(steps: int, shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    ours = schedule(steps, shift)
    np.testing.assert_allclose(ours, theirs.sigmas.numpy(), atol=1e-6)

    def field(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * z) + t.view(-1, 1, 1, 1)

    z = start = torch.randn(2, 3, 4, 5)
    for i, t in enumerate(theirs.timesteps):
        sigma = theirs.sigmas[i].expand(2)
        z = theirs.step(field(z, sigma), t, z).prev_sample
    torch.testing.assert_close(euler(field, start, ours), z, atol=1e-5, rtol=1e-5)


def test_segments_in_turn_equal_one_run() -> None:
    timesteps = schedule(9, 3.0)
    z = torch.randn(1, 2, 3, 3)
    whole = euler(lambda z, t: z * 0.3, z, timesteps)
    first = euler(lambda z, t: z * 0.3, z, timesteps, 0, 4)
    assert torch.equal(whole, euler(lambda z, t: z * 0.3, first, timesteps, 4, 9))


@pytest.mark.parametrize("steps", [0, 51, -1])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(OptionError):
        schedule(steps, 3.0)
