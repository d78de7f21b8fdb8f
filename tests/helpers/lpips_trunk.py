"""The real weights of the network that LPIPS compares features of."""

from __future__ import annotations

import os
from pathlib import Path

from linearsr.metrics import lpips


def real_lpips_trunk() -> Path | None:
    """Return the file of SqueezeNet's weights that the environment names or that lies beside the
    project. Return None if there is neither; tests that need the weights are skipped then.
    """
    beside = Path(__file__).parents[3] / "shared" / "data" / "iqa" / "squeezenet1_1-features.pth"
    candidates = [Path(os.environ.get(lpips.TRUNK_VARIABLE) or beside), beside]
    return next((path for path in candidates if path.is_file()), None)
