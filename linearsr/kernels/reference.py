"""The kernels' functions in plain PyTorch, against which the Triton kernels are tested.

They also run on the CPU, so they make few passes over the tokens. Autograd differentiates them.
The package's __init__ checks their arguments.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# The number of tokens whose fp32 copies stay in a CPU core's cache.
_PART = 4096


def reference_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Compute relu_linear_attention of checked q, k, v (B, N, H, D); any device and dtype."""
    if q.device.type == "cpu" and not torch.is_grad_enabled():
        return _in_parts(q, k, v, eps)
    # Keys are scaled first, so that gradients stay finite if they are tiny.
    largest = k.detach().amax(dim=(1, 3)).clamp(min=0)[:, :, None, None]
    scale = _inverse_power_of_two(largest.to(torch.promote_types(k.dtype, torch.float32)))
    return read_state(q, key_value_state(k, v, scale), eps)


def _in_parts(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Do the same part by part of the tokens, so that intermediate results stay in cache."""
    parts = zip(k.split(_PART, 1), v.split(_PART, 1), strict=True)
    state = torch.stack([key_value_state(*part) for part in parts]).sum(0)
    out = torch.empty_like(q)
    for query, part in zip(q.split(_PART, 1), out.split(_PART, 1), strict=True):
        part.copy_(read_state(query, state, eps))
    return out


def key_value_state(k: Tensor, v: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return (B, H, D, D + 1) in fp32 or wider: S and, as the last column, z; times `scale`.

    The states of parts of the tokens add up to that of all tokens.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    # Autocast would run the products in half precision; their sums must stay wide.
    with torch.autocast(k.device.type, enabled=False):
        key = k.transpose(1, 2).relu().to(wide)  # (B, H, N, D)
        key = key if scale is None else key * scale
        return torch.cat([key.mT @ v.transpose(1, 2).to(wide), key.sum(-2).unsqueeze(-1)], dim=-1)


def read_state(q: Tensor, state: Tensor, eps: float) -> Tensor:
    """Return the attention (B, N, H, D) of queries (B, N, H, D) to the state of all tokens.

    See `relu_linear_attention` for eps.
    """
    wide = state.dtype
    with torch.autocast(q.device.type, enabled=False):
        query = q.transpose(1, 2).relu().to(wide)
        query = query * _inverse_power_of_two(query.detach().amax(dim=-1, keepdim=True))
        # z is one more column, so that one product reads the queries once.
        product = query @ scaled_state(state, eps)
        numerator, denominator = product.split([q.shape[-1], 1], dim=-1)
        # Both are 0 where no feature of the query is above zero.
        denominator = denominator + (denominator == 0).to(wide)
        return (numerator / denominator).transpose(1, 2).to(q.dtype)


def scaled_state(state: Tensor, eps: float = 1e-15) -> Tensor:
    """Return the state of all tokens over c of `relu_linear_attention`, with eps added to z."""
    state = state * _inverse_power_of_two(state[..., -1:].detach().amax(dim=-2, keepdim=True))
    return torch.cat([state[..., :-1], state[..., -1:] + eps], dim=-1)


def _inverse_power_of_two(x: Tensor) -> Tensor:
    """Return 2**-e for 2**(e-1) <= x < 2**e, or 1/2 for x = 0: an exact scale below 1 / x."""
    tiny = torch.finfo(x.dtype).tiny
    x = x.masked_fill(x == 0, 1.0).clamp(tiny, 0.25 / tiny)  # so that no result is subnormal
    return torch.frexp(x).mantissa / x


def reference_depthwise_gate(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `depthwise_gate` of checked arguments; any device and dtype."""
    # A view: NHWC memory seen as channels_last NCHW.
    hidden = F.conv2d(hidden.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
    value, gate = hidden.permute(0, 2, 3, 1).chunk(2, dim=-1)
    return value * F.silu(gate)


def reference_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute `modulate` of checked arguments; any device and dtype."""
    if len(x) == 1:  # The norm's own weight and bias do it in the same pass over memory.
        return F.layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), eps=1e-6)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)
