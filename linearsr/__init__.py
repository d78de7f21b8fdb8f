"""LinearSR: photorealistic image super-resolution with linear attention (arXiv 2510.08771)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linearsr.upscaler import Options, Upscaler

__version__ = "0.1.0"
__all__ = ["Options", "Upscaler", "__version__"]


def __getattr__(name: str) -> Any:
    # torch takes a second to import: only those who use the model pay for it.
    if name in ("Options", "Upscaler"):
        return getattr(import_module("linearsr.upscaler"), name)
    raise AttributeError(f"module 'linearsr' has no attribute {name!r}")
