"""The denoiser: noisy latent, LR condition and tags in, velocity out."""

from linearsr.denoiser.model import Condition, LinearSR

__all__ = ["Condition", "LinearSR"]
