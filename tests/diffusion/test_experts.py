"""Every step has exactly one expert; boundaries and steps per expert are those of the paper."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from linearsr.config import SamplingConfig
from linearsr.diffusion.experts import boundaries, expert_at, log_snr, plan, ranges, timestep
from linearsr.diffusion.schedule import shifted
from linearsr.errors import OptionError

PAPER = (0.223, 0.875, 0.939)


def test_snr_bisection_gives_the_papers_boundaries() -> None:
    assert boundaries() == pytest.approx(PAPER, abs=5e-4)
    assert SamplingConfig().boundaries == PAPER


def test_log_snr_at_the_boundaries_is_that_of_the_paper() -> None:
    assert [log_snr(t) for t in PAPER] == pytest.approx([2.497, -3.892, -5.468], abs=2e-3)


@given(st.floats(-30, 30))
def test_timestep_inverts_log_snr(x: float) -> None:
    assert log_snr(timestep(x)) == pytest.approx(x, abs=1e-6)


@pytest.mark.parametrize(
    ("steps", "load"), [(20, [4, 2, 13, 1]), (28, [5, 4, 17, 2]), (50, [9, 6, 31, 4])]
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_segments_with_shift_three_give_each_expert_its_steps(
    steps: int, load: list[int], dtype: type
) -> None:
    timesteps = [float(dtype(t)) for t in shifted(steps, 3.0)[:-1]]
    segments = plan(timesteps, PAPER)
    assert [s.expert for s in segments] == [0, 1, 2, 3]
    assert [s.stop - s.start for s in segments] == load


def test_a_step_on_a_boundary_belongs_to_the_lower_noise_expert() -> None:
    assert shifted(20, 3.0)[6] == pytest.approx(0.875)
    for t in (0.875, float(np.float32(0.875)), 0.875 + 5e-8):
        assert expert_at(t, PAPER) == 2
    assert expert_at(float(np.float32(0.939)), PAPER) == 1
    assert expert_at(0.9391, PAPER) == 0


def test_one_step_stays_with_the_first_expert() -> None:
    assert plan(shifted(1, 3.0)[:-1], PAPER) == [(0, 0, 1)]


def test_no_boundaries_give_one_expert() -> None:
    assert plan(shifted(7, 3.0)[:-1], ()) == [(0, 0, 7)]


@given(st.integers(1, 50), st.floats(0.5, 10))
def test_segments_cover_every_step_once_in_order_of_falling_noise(steps: int, shift: float) -> None:
    timesteps = shifted(steps, shift)[:-1]
    segments = plan(timesteps, PAPER)
    assert [i for s in segments for i in range(s.start, s.stop)] == list(range(steps))
    experts = [s.expert for s in segments]
    assert experts == sorted(set(experts))
    for segment in segments:
        low, high = ranges(PAPER)[segment.expert]
        for t in timesteps[segment.start : segment.stop]:
            assert low - 1e-6 < t <= high + 2e-6


@pytest.mark.parametrize("bad", [[], [0.5, 0.6], [1.0, 0.0], [1.2, 0.5], [0.5, 0.5]])
def test_timesteps_out_of_range_are_refused(bad: list[float]) -> None:
    with pytest.raises(OptionError):
        plan(bad, PAPER)


def test_boundaries_with_an_anchor_out_of_range_are_refused() -> None:
    with pytest.raises(OptionError):
        boundaries(anchor=0.99)
