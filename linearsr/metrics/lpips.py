"""LPIPS, the perceptual distance of two pictures, with SqueezeNet as its trunk.

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
    """Load LPIPS as a module from two (B, 3, H, W) in [-1, 1] to distances (B, 1, 1, 1).

    The distance of equal pictures is 0, that of two random ones about 0.1. With `normalize=True`
    the pictures are in [0, 1]. The shorter side needs 17 pixels. The module must stay in evaluation
    mode. Gradients reach its inputs but not its parameters.

    trunk: a file of SqueezeNet 1.1, all of torchvision's or its features only. None is
        `find_trunk()`, or else a download of 5 MB into torch's hub cache.

    Raises WeightsError if the trunk cannot be found or downloaded or is not SqueezeNet's, and
    MissingExtra without the packages.
    """
    require("evaluation", "lpips", "torchvision")
    path = Path(trunk) if trunk else find_trunk()
    tensors = _read(path) if path else _downloaded()
    # The random weights, which are replaced below, must not change the caller's next random
    # numbers.
    with torch.random.fork_rng(devices=[]):
        model = _network(net, pretrained=True)
    _fill(model.get_submodule("net"), tensors, path or Path(_URL))
    return model.requires_grad_(False).eval()


def without_weights(net: Literal["squeeze"] = "squeeze") -> nn.Module:
    """Return LPIPS with random weights, to count its cost. Raises MissingExtra."""
    require("evaluation", "lpips", "torchvision")
    return _network(net, pretrained=False).requires_grad_(False).eval()


def _network(net: str, *, pretrained: bool) -> nn.Module:
    """Return LPIPS with a random trunk. pretrained: whether its heads are the package's own."""
    import lpips

    # The package calls torchvision with deprecated arguments, hence the filter.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = lpips.LPIPS(
            pretrained=pretrained, net=net, pnet_rand=True, verbose=False
        )
    return model


def find_trunk() -> Path | None:
    """Return the trunk's file on this machine, or None; nothing is downloaded.

    It is the file that the environment variable LINEARSR_LPIPS_TRUNK names, or else torchvision's
    own in torch's hub cache. Raises WeightsError if the variable names a missing file.
    """
    if path := os.environ.get(TRUNK_VARIABLE):
        if not Path(path).is_file():
            raise WeightsError(f"{TRUNK_VARIABLE}={path}: there is no such file; correct the path")
        return Path(path)
    return next(iter(sorted(_cache().glob("squeezenet1_1-*.pth"))), None)


def how_to_get() -> str:
    """Return advice on where to get the trunk and where to put it."""
    return (
        f"its trunk, SqueezeNet 1.1, is not on this machine; put {_URL} into {_cache()}, or let "
        f"{TRUNK_VARIABLE} name the file"
    )


def _cache() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise WeightsError(
            f"{path}: cannot be read as SqueezeNet's weights ({one_line(error)}); copy it again"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path}: holds no state dict; it should be torchvision's SqueezeNet 1.1"
        )
    return content


def _downloaded() -> dict[str, Tensor]:
    """Download torchvision's file with its own loader, which checks the hash and caches it."""
    from torchvision.models import SqueezeNet1_1_Weights

    try:
        with impatient():
            return dict(
                SqueezeNet1_1_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
            )
    except (OSError, RuntimeError) as error:  # no network, or a wrong hash
        raise WeightsError(f"lpips: {how_to_get()} (download: {one_line(error)})") from error


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Return a context in which a download fails if nothing arrives for DOWNLOAD_SECONDS."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _fill(slices: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load the trunk, which `lpips` splits into slices that keep the layers' numbers."""
    features = {key.removeprefix("features."): tensor for key, tensor in tensors.items()}
    try:
        for part in slices.children():
            part.load_state_dict({key: features[key] for key in part.state_dict()})
    except (KeyError, RuntimeError, TypeError) as error:
        raise WeightsError(
            f"{path}: is not torchvision's SqueezeNet 1.1 ({one_line(error)}); see {_URL}"
        ) from error
