"""The parts of one transformer block: linear attention, tag attention, Mix-FFN, modulation.

Tokens are channels-last, (B, H, W, C), throughout: in a small model memory passes cost more than
matrix products. Knows nothing of latents, noise levels or pictures.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearsr.kernels import depthwise_gate, modulate, relu_linear_attention


class LinearAttention(nn.Module):
    """Multi-head ReLU linear attention, O(N) in tokens (Sana section 2.2; LinearSR section 3).

    QK-RMSNorm runs across all heads: without it nothing holds the growth of ReLU keys back, and
    sums in half precision overflow (docs/design/method.md). Queries are only multiplied by their
    norm's weight, not divided by their length, which cancels in the normalised attention.

    With `local_kernel` a depthwise convolution of the values is added to the attention, as in
    EfficientViT and FLatten Transformer, because sums over all tokens cannot tell neighbours apart.
    """

    def __init__(self, width: int, head_dim: int, qk_norm: bool, local_kernel: int = 0) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.local = (
            nn.Conv2d(
                width, width, local_kernel, padding=local_kernel // 2, groups=width, bias=False
            )
            if local_kernel
            else None
        )
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Let every token of x (B, H, W, C) attend to every other; return the same shape."""
        b, h, w, c = x.shape
        q, k, v = self.qkv(x.reshape(b, h * w, c)).chunk(3, dim=-1)
        if isinstance(self.norm_q, nn.RMSNorm):
            # Under autocast the float32 weights of the norms would make q and k float32 as well.
            q, k = (q * self.norm_q.weight).to(v.dtype), self.norm_k(k).to(v.dtype)
        o = relu_linear_attention(self.heads(q), self.heads(k), self.heads(v))
        o = o.reshape(b, h, w, c)
        return self.out(o if self.local is None else o + self.neighbours(v.reshape(b, h, w, c)))

    def neighbours(self, values: Tensor) -> Tensor:
        """Convolve values (B, H, W, C) with their neighbours: (B, H, W, C)."""
        local = cast(nn.Conv2d, self.local)
        # A view: NHWC memory seen as channels_last NCHW.
        return local(values.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def heads(self, x: Tensor) -> Tensor:
        """Split channels into heads: (B, N, C) -> (B, N, H, D)."""
        return x.unflatten(-1, (-1, self.head_dim))


class TagAttention(nn.Module):
    """Softmax cross-attention from tokens to the few tag embeddings of a request."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.norm_q = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, tags: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, heads, T, C/heads) of tags (B, T, C), the same for every t."""
        k, v = self.kv(tags).chunk(2, dim=-1)
        return self._split(self.norm_k(k)), self._split(v)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); `mask` (B, T) is True where a tag is real.

        A sample without a real tag gets zeros, as from a model without tags.
        """
        q = self._split(self.norm_q(self.q(x.flatten(1, 2))))
        if mask is None:
            o = F.scaled_dot_product_attention(q, *keys_values)
            return self.out(o.transpose(1, 2).reshape(x.shape))
        tagged = mask.any(dim=1)[:, None, None, None]
        # If all is padding, attend to it: a softmax over nothing has no finite gradient.
        attend = mask[:, None, None, :] | ~tagged
        o = F.scaled_dot_product_attention(q, *keys_values, attn_mask=attend)
        return self.out(o.transpose(1, 2).reshape(x.shape)) * tagged


class MixFFN(nn.Module):
    """Inverted bottleneck with a 3x3 depthwise convolution and a gate (Sana section 2.2).

    The convolution tells tokens where they are, since there is no position embedding.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.expand = nn.Linear(width, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.project = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward branch of x (B, H, W, C), in the same shape."""
        weight, bias = self.depthwise.weight, cast(Tensor, self.depthwise.bias)
        return self.project(depthwise_gate(F.silu(self.expand(x)), weight, bias))


class Block(nn.Module):
    """Linear attention, optional tag attention, Mix-FFN; AdaLN-single modulation (PixArt)."""

    def __init__(
        self,
        width: int,
        head_dim: int,
        ffn_ratio: float,
        qk_norm: bool,
        tag_heads: int | None,
        local_kernel: int = 0,
    ) -> None:
        super().__init__()
        self.attention = LinearAttention(width, head_dim, qk_norm, local_kernel)
        self.tag_attention = None if tag_heads is None else TagAttention(width, tag_heads, qk_norm)
        self.ffn = MixFFN(width, ffn_ratio)
        self.modulation = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        tags: tuple[Tensor, Tensor] | None = None,
        tag_mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, H, W, C), modulation (B, 6, C) shared by all blocks -> (B, H, W, C)."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.modulations(modulation)
        x = torch.addcmul(x, gate, self.attention(modulate(x, shift, scale)))
        if tags is not None and self.tag_attention is not None:
            x = x + self.tag_attention(x, tags, tag_mask)
        return torch.addcmul(x, ffn_gate, self.ffn(modulate(x, ffn_shift, ffn_scale)))

    def modulations(self, shared: Tensor) -> tuple[Tensor, ...]:
        """Return shift, scale and gate of the attention, then of the Mix-FFN, each (B, 1, 1, C).

        shared: the modulation (B, 6, C) that all blocks share.
        """
        return (self.modulation + shared)[:, :, None, None].unbind(1)
