"""LinearSR: photorealistic image super-resolution with linear attention (arXiv 2510.08771)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from linearsr.threads import wait_briefly

if TYPE_CHECKING:
    from linearsr.config import Options
    from linearsr.pipeline.upscaler import Upscaler

__version__ = "0.1.0"
__all__ = ["Options", "Upscaler", "__version__"]

# Here, because commands, jobs, training, actors and replicas all import this package before torch.
wait_briefly()


def __getattr__(name: str) -> Any:
    # torch takes a second to import: only those who use the model pay for it.
    home = {"Options": "linearsr.config", "Upscaler": "linearsr.pipeline.upscaler"}.get(name)
    if home:
        return getattr(import_module(home), name)
    raise AttributeError(f"module 'linearsr' has no attribute {name!r}")
