"""The schedule and each solver against diffusers' schedulers, and against an exact solution."""

import math
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
)

from linearsr.config import SamplingConfig, Solver
from linearsr.diffusion.schedule import schedule, shifted
from linearsr.diffusion.solvers import Denoise, SolverState, sample, uses_previous
from linearsr.errors import OptionError

SECOND_ORDER: tuple[Solver, ...] = ("dpm", "adams")


def euler(
    denoise: Denoise, z: torch.Tensor, timesteps: list[float], start: int = 0, stop: int = -1
) -> torch.Tensor:
    stop = stop if stop >= 0 else len(timesteps) - 1
    return sample("euler", denoise, SolverState(z), timesteps, start, stop).latent


def _field(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A velocity that is linear in neither the latent nor the time."""
    return torch.sin(3 * z) + t.view(-1, 1, 1, 1) ** 2


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schedule_and_steps_equal_diffusers(steps: int, shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    ours = shifted(steps, shift)
    np.testing.assert_allclose(ours, theirs.sigmas.numpy(), atol=1e-6)

    def field(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * z) + t.view(-1, 1, 1, 1)

    z = start = torch.randn(2, 3, 4, 5)
    for i, t in enumerate(theirs.timesteps):
        sigma = theirs.sigmas[i].expand(2)
        z = theirs.step(field(z, sigma), t, z).prev_sample
    torch.testing.assert_close(euler(field, start, ours), z, atol=1e-5, rtol=1e-5)


def test_segments_in_turn_equal_one_run() -> None:
    timesteps = shifted(9, 3.0)
    z = torch.randn(1, 2, 3, 3)
    whole = euler(lambda z, t: z * 0.3, z, timesteps)
    first = euler(lambda z, t: z * 0.3, z, timesteps, 0, 4)
    assert torch.equal(whole, euler(lambda z, t: z * 0.3, first, timesteps, 4, 9))


@pytest.mark.parametrize("steps", [0, 51, -1])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(OptionError):
        schedule(SamplingConfig(), steps)


def test_plan_is_used_for_its_length_and_the_shifted_schedule_otherwise() -> None:
    sampling = SamplingConfig(steps=4, flow_shift=2.0, plans=((1.0, 0.5), (1.0, 0.9, 0.5, 0.2)))
    assert schedule(sampling) == schedule(sampling, 4) == [1.0, 0.9, 0.5, 0.2, 0.0]
    assert schedule(sampling, 2) == [1.0, 0.5, 0.0]
    for steps in (1, 3, 50):
        assert schedule(sampling, steps) == shifted(steps, 2.0)


@pytest.mark.parametrize(
    "plans",
    [
        ((),),
        ((0.9, 0.5),),
        ((1.0, 0.5, 0.5),),
        ((1.0, 0.5, 0.6),),
        ((1.0, 0.0),),
        ((1.0, -0.1),),
        ((1.0, float("nan")),),
        ((1.0, 0.5), (1.0, 0.4)),
        (tuple(1 - i / 51 for i in range(51)),),
    ],
)
def test_plans_that_do_not_lead_from_noise_to_picture_are_refused(
    plans: tuple[tuple[float, ...], ...],
) -> None:
    with pytest.raises(OptionError, match="plan"):
        SamplingConfig.parse(plans=plans)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_equals_diffusers(steps: int, shift: float) -> None:
    """Both use our sigmas, ends included; diffusers computes a step in float32."""
    theirs = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", final_sigmas_type="zero"
    )
    theirs.set_timesteps(steps)
    ours = torch.tensor(shifted(steps, shift), dtype=torch.float64)
    theirs.sigmas = ours
    z = start = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for i, t in enumerate(theirs.timesteps):
        z = theirs.step(_field(z, ours[i].expand(2)), t, z).prev_sample
    latent = sample("dpm", _field, SolverState(start), ours).latent
    torch.testing.assert_close(latent, z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_adams_equals_diffusers(steps: int, shift: float) -> None:
    """The reference is diffusers' linear multistep method of order two, on our timesteps."""
    theirs = LMSDiscreteScheduler()
    theirs.set_timesteps(steps)
    ours = torch.tensor(shifted(steps, shift), dtype=torch.float64)
    theirs.sigmas = ours
    z = start = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for i, t in enumerate(theirs.timesteps):
        theirs.scale_model_input(z, t)
        z = theirs.step(_field(z, ours[i].expand(2)), t, z, order=2).prev_sample
    latent = sample("adams", _field, SolverState(start), ours).latent
    torch.testing.assert_close(latent, z, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("solver", "order", "first", "last"),
    [
        ("euler", 1, 1.0, 0.0),
        ("adams", 2, 1.0, 0.0),
        ("dpm", 2, 0.9, 0.1),  # log SNR is infinite at both ends, where DPM takes Euler's steps
    ],
)
def test_solvers_converge_at_their_order_on_a_known_flow(
    solver: Solver, order: int, first: float, last: float
) -> None:
    """Clean latents are normal, so every z_t is normal and the flow is known exactly."""
    mean, spread = 0.7, 0.3

    def field(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.view(-1, 1, 1, 1)
        variance = ((1 - t) * spread) ** 2 + t**2
        return (t - (1 - t) * spread**2) / variance * (z - (1 - t) * mean) - mean

    noise = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    begin, end = ((1 - t) * mean + math.hypot((1 - t) * spread, t) * noise for t in (first, last))
    errors = []
    for steps in (160, 640, 2560):
        t = torch.linspace(first, last, steps + 1, dtype=torch.float64)
        latent = sample(solver, field, SolverState(begin), t).latent
        errors.append((latent - end).abs().max().item())
    slopes = [math.log(a / b, 4) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.1), errors


def _in_turn(
    solver: Solver, start: torch.Tensor, timesteps: list[float], cuts: Iterable[int]
) -> torch.Tensor:
    """Run the segments in turn; each gets its own steps, and the previous one if it looks back."""
    walk, begin = SolverState(start), 0
    for end in (*cuts, len(timesteps) - 1):
        behind = int(uses_previous(solver, timesteps, begin))
        if not behind:
            walk = SolverState(walk.latent)
        walk = sample(solver, _field, walk, timesteps[begin - behind : end + 1], behind)
        begin = end
    return walk.latent


@pytest.mark.parametrize("solver", ["euler", *SECOND_ORDER])
@pytest.mark.parametrize("steps", [2, 3, 4, 9])
def test_segments_in_turn_equal_one_run_of_any_solver(solver: Solver, steps: int) -> None:
    timesteps, z = shifted(steps, 3.0), torch.randn(2, 3, 4, 5)
    whole = sample(solver, _field, SolverState(z), timesteps).latent
    for cut in range(1, steps):
        assert torch.equal(whole, _in_turn(solver, z, timesteps, [cut]))
    assert torch.equal(whole, _in_turn(solver, z, timesteps, range(1, steps)))


@pytest.mark.parametrize("solver", ["euler", *SECOND_ORDER])
def test_samples_at_timesteps_of_their_own_get_what_they_get_alone(solver: Solver) -> None:
    z, all_timesteps = torch.randn(3, 2, 4, 4), [shifted(5, shift) for shift in (1.0, 2.0, 3.0)]
    together = sample(solver, _field, SolverState(z), torch.tensor(all_timesteps).T).latent
    for i, timesteps in enumerate(all_timesteps):
        alone = sample(solver, _field, SolverState(z[i : i + 1]), timesteps).latent
        torch.testing.assert_close(together[i : i + 1], alone)


def test_uses_previous_names_the_steps_that_need_the_previous_one() -> None:
    timesteps = shifted(5, 3.0)
    for solver, steps in (("euler", []), ("dpm", [2, 3]), ("adams", [1, 2, 3, 4])):
        assert [i for i in range(6) if uses_previous(solver, timesteps, i)] == steps


@pytest.mark.parametrize(("solver", "most"), [("dpm", 3), ("adams", 1)])
def test_multistep_solvers_equal_euler_for_few_steps(solver: Solver, most: int) -> None:
    z = torch.randn(1, 2, 3, 3)
    for steps in range(1, most + 2):
        timesteps = shifted(steps, 3.0)
        latent = sample(solver, _field, SolverState(z), timesteps).latent
        assert torch.equal(latent, euler(_field, z, timesteps)) == (steps <= most)
