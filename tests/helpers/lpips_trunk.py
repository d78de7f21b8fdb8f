"""The real weights of the network that LPIPS compares features of."""

from __future__ import annotations

import os
from pathlib import Path

from linearsr.metrics import lpips


def real_lpips_trunk() -> Path | None:
    """SqueezeNet's own weights: the file that the environment names, or the one beside the project.

    None where there is neither; tests that need them are skipped then.
    """
    beside = Path(__file__).parents[3] / "shared" / "data" / "iqa" / "squeezenet1_1-features.pth"
    found = [Path(os.environ.get(lpips.TRUNK_VARIABLE) or beside), beside]
    return next((path for path in found if path.is_file()), None)
