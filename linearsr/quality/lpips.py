"""LPIPS, a distance that sees as people do (Zhang et al. 2018), through the `lpips` package.

That package has the weights of the last layers only; the trunk is an ImageNet classifier of
torchvision's, which is looked for and never downloaded.
"""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path

import torch
from torch import nn

from linearsr.errors import WeightsError, one_line, require

VARIABLE = "LINEARSR_LPIPS_TRUNK"
# torchvision's files, in torch's hub cache.
FILES = {
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
}


def load(trunk: Path | None = None, net: str = "squeeze") -> nn.Module:
    """LPIPS with a frozen trunk: pictures (B, 3, H, W) in [-1, 1], two of them -> (B, 1, 1, 1).

    trunk: a file of torchvision's weights for `net`; without, that of LINEARSR_LPIPS_TRUNK, or
    torchvision's own in torch's hub cache. Raises MissingExtra without the package, WeightsError
    where there is no such file or it is of another network.
    """
    require("quality", "lpips")
    import lpips  # type: ignore[import-untyped]

    path = _find(trunk, net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments that torchvision has renamed
        model: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    _fill(model.net, path)
    return model.requires_grad_(False).eval()


def _find(trunk: Path | None, net: str) -> Path:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / FILES[net]
    path = trunk or Path(os.environ.get(VARIABLE) or cached)
    if not path.is_file():
        raise WeightsError(
            f"{path}: the trunk of LPIPS is not there; name torchvision's {FILES[net]} by "
            f"{VARIABLE}, or copy it there"
        )
    return path


def _fill(trunk: object, path: Path) -> None:
    """The trunk's slices from one file; names count through all of them."""
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
        tensors = {key.removeprefix("features."): value for key, value in found.items()}
        slices = [part for name, part in trunk.named_children() if name.startswith("slice")]  # type: ignore[attr-defined]
        for part in slices:
            part.load_state_dict({key: tensors[key] for key in part.state_dict()})
    except (RuntimeError, LookupError, AttributeError, pickle.UnpicklingError, EOFError) as error:
        raise WeightsError(f"{path}: not a trunk of LPIPS: {one_line(error)}") from error
