"""ReLU linear attention in plain PyTorch: the truth the Triton kernels are tested against.

It is also the CPU path, so it keeps its passes over the tokens few. Autograd differentiates it. It
does not check its arguments (the package's __init__ does) and knows nothing of Triton.
"""

import torch
from torch import Tensor


def reference_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """relu_linear_attention for checked q, k, v of shape (B, N, H, D); any device and dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    # Autocast would run the products in half precision; their sums must stay wide.
    with torch.autocast(q.device.type, enabled=False):
        query, key = (x.transpose(1, 2).relu().to(wide) for x in (q, k))  # (B, H, N, D)
        query = query * _inverse_power_of_two(query.detach().amax(dim=-1, keepdim=True))
        key = key * _inverse_power_of_two(key.detach().amax(dim=(-2, -1), keepdim=True))
        state = key.mT @ v.transpose(1, 2).to(wide)
        total = key.sum(dim=-2).unsqueeze(-1)
        scale = _inverse_power_of_two(total.detach().amax(dim=-2, keepdim=True))
        # The total rides as one more column, so that one product reads the queries once.
        state = torch.cat([state * scale, total * scale + eps], dim=-1)
        numerator, denominator = (query @ state).split([q.shape[-1], 1], dim=-1)
        # Zero where no feature of the query is above zero: the numerator is 0 there as well.
        denominator = denominator + (denominator == 0).to(wide)
        return (numerator / denominator).transpose(1, 2).to(q.dtype)


def _inverse_power_of_two(x: Tensor) -> Tensor:
    """2**-e with 2**(e-1) <= x < 2**e, 1/2 for x = 0: scaling by it is exact, and bounds x by 1."""
    tiny = torch.finfo(x.dtype).tiny
    x = x.masked_fill(x == 0, 1.0).clamp(tiny, 0.25 / tiny)  # so that no result is subnormal
    return torch.frexp(x).mantissa / x
