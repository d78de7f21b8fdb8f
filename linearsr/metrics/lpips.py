"""LPIPS, the distance of two pictures as people see it, with SqueezeNet as its trunk.

R. Zhang, P. Isola, A. Efros, E. Shechtman and O. Wang, "The Unreasonable Effectiveness of Deep
Features as a Perceptual Metric", 2018, version 0.1. The network and its heads are those of the
`lpips` package. The trunk is torchvision's SqueezeNet 1.1, which no package contains. Knows nothing
of pyiqa, whose own `lpips` has AlexNet as its trunk.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from linearsr.errors import WeightsError, one_line, require

TRUNK_VARIABLE = "LINEARSR_LPIPS_TRUNK"
DOWNLOAD_SECONDS = 10
_URL = "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"


def load(trunk: str | Path | None = None, net: Literal["squeeze"] = "squeeze") -> nn.Module:
    """LPIPS as a module: (B, 3, H, W) and (B, 3, H, W) in [-1, 1] to distances (B, 1, 1, 1).

    Distances begin at 0, for equal pictures; two random ones are about 0.1 apart. With
    `normalize=True` the pictures are in [0, 1]. The shorter side needs 17 pixels. The module is in
    evaluation mode, in which it must stay. Its parameters have no gradients; its inputs may.

    trunk: a file of SqueezeNet 1.1, whole as torchvision's or only its features. None is
    `find_trunk()`, or else a download of 5 MB into torch's hub cache.

    Raises WeightsError when the trunk cannot be had or is not SqueezeNet's, and MissingExtra
    without the packages.
    """
    require("quality", "lpips", "torchvision")
    import lpips

    path = Path(trunk) if trunk else find_trunk()
    tensors = _read(path) if path else _downloaded()
    # The random weights that are replaced below must not change what the caller draws next, and
    # the package calls torchvision with arguments that are deprecated.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    _fill(model.get_submodule("net"), tensors, path or Path(_URL))
    return model.requires_grad_(False).eval()


def find_trunk() -> Path | None:
    """The trunk's file on this machine; None where there is none. Downloads nothing.

    It is the file that the environment variable LINEARSR_LPIPS_TRUNK names, or else torchvision's
    own in torch's hub cache. Raises WeightsError when the variable names a file that is not there.
    """
    if given := os.environ.get(TRUNK_VARIABLE):
        if not Path(given).is_file():
            raise WeightsError(f"{TRUNK_VARIABLE}={given}: there is no such file; correct the path")
        return Path(given)
    return next(iter(sorted(_cache().glob("squeezenet1_1-*.pth"))), None)


def how_to_get() -> str:
    """A sentence for whoever lacks the trunk."""
    return (
        f"its trunk, SqueezeNet 1.1, is not on this machine; put {_URL} into {_cache()}, or let "
        f"{TRUNK_VARIABLE} name the file"
    )


def _cache() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise WeightsError(
            f"{path}: cannot be read as SqueezeNet's weights ({one_line(error)}); copy it again"
        ) from error
    if not isinstance(found, dict):
        raise WeightsError(
            f"{path}: holds no state dict; it should be torchvision's SqueezeNet 1.1"
        )
    return found


def _downloaded() -> dict[str, Tensor]:
    """Torchvision's own file, through its own loader, which checks the hash and keeps the file."""
    from torchvision.models import SqueezeNet1_1_Weights

    try:
        with impatient():
            return dict(
                SqueezeNet1_1_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
            )
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: a wrong hash
        raise WeightsError(f"lpips: {how_to_get()} (download: {one_line(error)})") from error


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Let a download give up when nothing comes for DOWNLOAD_SECONDS."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _fill(slices: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load the trunk, which `lpips` has cut into slices whose layers keep their numbers."""
    features = {key.removeprefix("features."): tensor for key, tensor in tensors.items()}
    try:
        for part in slices.children():
            part.load_state_dict({key: features[key] for key in part.state_dict()})
    except (KeyError, RuntimeError, TypeError) as error:
        raise WeightsError(
            f"{path}: is not torchvision's SqueezeNet 1.1 ({one_line(error)}); see {_URL}"
        ) from error
