"""The path against float64, and the preconditioning against its derivation."""

import pytest
import torch

from linearsr.diffusion.path import Preconditioning, add_noise, euler_step, velocity


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 5, 7, dtype=torch.float64), torch.randn(
        4, 3, 5, 7, dtype=torch.float64
    )


def test_path_runs_straight_from_clean_to_noise() -> None:
    clean, noise = _pair()
    t = torch.tensor([0.0, 0.3, 0.875, 1.0], dtype=torch.float64)
    z = add_noise(clean, noise, t)
    for i, ti in enumerate(t):
        torch.testing.assert_close(z[i], (1 - ti) * clean[i] + ti * noise[i])


def test_euler_with_the_true_velocity_lands_anywhere_on_the_path() -> None:
    clean, noise = _pair()
    t, t_next = (
        torch.tensor([1.0, 0.9, 0.5, 0.1]).double(),
        torch.tensor([0.0, 0.2, 0.4, 0.05]).double(),
    )
    moved = euler_step(add_noise(clean, noise, t), velocity(clean, noise), t, t_next)
    torch.testing.assert_close(moved, add_noise(clean, noise, t_next))


def test_preconditioning_is_the_best_linear_guess_completed_by_the_network() -> None:
    """The formula is v = (z - z0) / t with z0 = (1-t)/D z + t/sqrt(D) F, for any F and t > 0."""
    t = torch.tensor([0.05, 0.5, 0.93, 1.0], dtype=torch.float64)
    z, f = (
        torch.randn(4, 2, 3, 3, dtype=torch.float64),
        torch.randn(4, 2, 3, 3, dtype=torch.float64),
    )
    c = Preconditioning.at(t)
    s = t.view(-1, 1, 1, 1)
    d = (1 - s) ** 2 + s**2
    clean = (1 - s) / d * z + s / d.sqrt() * f
    torch.testing.assert_close(c.skip * z + c.output_scale * f, (z - clean) / s)
    torch.testing.assert_close(c.input_scale, (1 - s) / d)


def test_linear_guess_minimises_the_error_over_random_pairs() -> None:
    clean, noise = torch.randn(2, 200_000, dtype=torch.float64)
    t = torch.tensor([0.7], dtype=torch.float64)
    z = add_noise(clean[None], noise[None], t)[0]
    best = (z @ clean) / (z @ z)
    assert Preconditioning.at(t).input_scale.item() == pytest.approx(best.item(), abs=0.01)
