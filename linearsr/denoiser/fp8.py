"""Products of the blocks in 8-bit floats (e4m3), with a scale for each token and each channel.

Weights are rounded once, activations at each product; sums are in float32. GPUs of compute
capability 8.9 and up multiply such numbers twice as fast as bfloat16. It has never run on a GPU;
tests run the same code on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearsr.denoiser.lora import AdaptedLinear
from linearsr.denoiser.model import LinearSR
from linearsr.errors import OptionError

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
# Both sides of a matrix must be multiples of this.
MULTIPLE = 16
# These layers stay as they are: they make the keys and values of a request's few tags, which are
# computed only once for all tiles and steps of a segment.
SKIPPED = "tag_attention.kv"


class Fp8Linear(nn.Module):
    """A linear layer that multiplies 8-bit floats. Only for inference."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | AdaptedLinear) -> None:
        super().__init__()
        weight, scale = _rounded(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.mT)
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs) of the same dtype."""
        recipe = F.ScalingType.RowWise
        rows, scale = _rounded(x.flatten(0, -2))
        product = F.scaled_mm(
            rows, self.weight.mT, scale, recipe, self.scale, recipe, bias=self.bias
        )
        return product.to(x.dtype).unflatten(0, x.shape[:-1])


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (N, C) as 8-bit floats, and the factor of each row (N, 1) in float32."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    # CUDA takes rows that are contiguous, and `rows` may be a view of channels.
    return (rows / scale).to(FORMAT, memory_format=torch.contiguous_format), scale


def use_fp8(model: LinearSR) -> None:
    """Let the linear layers of a model's blocks multiply 8-bit floats, in place.

    Each layer gets weights of its own, also one of adapters on a shared base. Raises OptionError if
    PyTorch or the device cannot, or if the model's width does not fit.
    """
    if not hasattr(F, "scaled_mm"):
        raise OptionError(f"fp8 needs PyTorch 2.10 or newer, not {torch.__version__}")
    device = model.embed.weight.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise OptionError(f"fp8 needs a GPU of compute capability 8.9 or higher; {device} has less")
    model.use_strips = False
    for name, layer in list(model.blocks.named_modules()):
        if not isinstance(layer, (nn.Linear, AdaptedLinear)) or name.endswith(SKIPPED):
            continue
        if any(side % MULTIPLE for side in layer.weight.shape):
            raise OptionError(
                f"fp8 needs layers with multiples of {MULTIPLE} channels, and blocks.{name} is "
                f"{tuple(layer.weight.shape)}"
            )
        model.blocks.set_submodule(name, Fp8Linear(layer))
