"""The parts of one transformer block: linear attention, tag attention, Mix-FFN, modulation.

Tokens are channels-last, (B, H, W, C), from end to end: on a small model memory passes cost more
than matrix products. Knows nothing of latents, noise levels or pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearsr.kernels import key_value_state, read_state, relu_linear_attention

# Tokens whose activations, five times as wide in the Mix-FFN, fit a CPU core's cache.
CACHED_TOKENS = 2048


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: normalise (B, H, W, C) over channels, then scale and shift by (B, 1, 1, C)."""
    if len(x) == 1:  # the norm's own weight and bias then do it in the same pass over memory
        return F.layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), eps=1e-6)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def silu(x: Tensor) -> Tensor:
    """SiLU that overwrites `x` where no gradient will ask for it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class LinearAttention(nn.Module):
    """Multi-head ReLU linear attention, O(N) in tokens (Sana section 2.2; LinearSR section 3).

    QK-RMSNorm runs across all heads: without it ReLU keys grow until bf16 overflows. Of the query's
    norm only the weight is left to apply: a query's length cancels in the normalised attention.
    """

    def __init__(self, width: int, head_dim: int, qk_norm: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); every token attends to every other."""
        b, h, w, c = x.shape
        q, k, v = self.qkv(x.reshape(b, h * w, c)).chunk(3, dim=-1)
        heads = (b, h * w, c // self.head_dim, self.head_dim)
        if isinstance(self.norm_q, nn.RMSNorm):
            # Under autocast the float32 weights of the norms would make q and k float32 as well.
            q, k = (q * self.norm_q.weight).to(v.dtype), self.norm_k(k).to(v.dtype)
        o = relu_linear_attention(q.reshape(heads), k.reshape(heads), v.reshape(heads))
        return self.out(o.reshape(b, h, w, c))

    def state(self, x: Tensor) -> Tensor:
        """What keys and values of some tokens (B, H, W, C) add to the state of all."""
        k, v = F.linear(x.flatten(1, 2), self.qkv.weight[x.shape[-1] :]).chunk(2, dim=-1)
        return key_value_state(self._heads(self.norm_k(k)), self._heads(v))

    def read(self, x: Tensor, state: Tensor) -> Tensor:
        """`forward` of some tokens, when the state of all is known."""
        q = F.linear(x.flatten(1, 2), self.qkv.weight[: x.shape[-1]])
        if isinstance(self.norm_q, nn.RMSNorm):
            q = q * self.norm_q.weight
        return self.out(read_state(self._heads(q), state).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
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
        """Tags (B, T, C) -> keys and values (B, heads, T, C/heads); they do not depend on t."""
        k, v = self.kv(tags).chunk(2, dim=-1)
        return self._split(self.norm_k(k)), self._split(v)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); `mask` (B, T) is True where a tag is real.

        A sample without a real tag gets zeros: the same as a model that is given no tags.
        """
        q = self._split(self.norm_q(self.q(x.flatten(1, 2))))
        if mask is None:
            o = F.scaled_dot_product_attention(q, *keys_values)
            return self.out(o.transpose(1, 2).reshape(x.shape))
        tagged = mask.any(dim=1)[:, None, None, None]
        # Where all is padding, attend to it: a softmax over nothing has no finite gradient.
        attend = mask[:, None, None, :] | ~tagged
        o = F.scaled_dot_product_attention(q, *keys_values, attn_mask=attend)
        return self.out(o.transpose(1, 2).reshape(x.shape)) * tagged


class MixFFN(nn.Module):
    """Inverted bottleneck with a 3x3 depthwise convolution and a gate (Sana section 2.2).

    The convolution is what tells tokens where they are: there is no position embedding.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.expand = nn.Linear(width, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.project = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, above: int = 0, below: int = 0) -> Tensor:
        """(B, H, W, C) -> (B, H - above - below, W, C).

        above, below: 0 where the picture ends; 1 where the first or the last row belongs to what
        lies beyond, and is only there for the convolution to look at.
        """
        hidden = silu(self.expand(x))
        # A view: NHWC memory seen as channels_last NCHW.
        hidden = hidden.permute(0, 3, 1, 2)
        if above or below:
            # Zeros where the picture ends, the neighbouring rows where it goes on.
            hidden = F.pad(hidden, (0, 0, 1 - above, 1 - below))
        weight, bias = self.depthwise.weight, self.depthwise.bias
        padding = (0 if above or below else 1, 1)
        hidden = F.conv2d(hidden, weight, bias, padding=padding, groups=len(weight))
        value, gate = hidden.permute(0, 2, 3, 1).chunk(2, dim=-1)
        return self.project(value * silu(gate))


class Block(nn.Module):
    """Linear attention, tag attention where built, Mix-FFN; AdaLN-single modulation (PixArt)."""

    def __init__(
        self,
        width: int,
        head_dim: int,
        ffn_ratio: float,
        qk_norm: bool,
        tag_heads: int | None,
    ) -> None:
        super().__init__()
        self.attention = LinearAttention(width, head_dim, qk_norm)
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
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + modulation)[
            :, :, None, None
        ].unbind(1)
        # A strip of rows goes through all it can before the next: what lies in between is never
        # written to memory, which on a CPU takes longer than the products.
        strips = x.split(_rows_at_once(x), dim=1)
        if len(strips) == 1:
            attend: Callable[[Tensor], Tensor] = self.attention
        else:
            states = [self.attention.state(modulate(s, shift, scale)) for s in strips]
            attend = partial(self.attention.read, state=torch.stack(states).sum(0))
        attended = []
        for strip in strips:
            y = torch.addcmul(strip, gate, attend(modulate(strip, shift, scale)))
            if tags is not None and self.tag_attention is not None:
                y = y + self.tag_attention(y, tags, tag_mask)
            attended.append(y)
        x, top, fed = _joined(attended), 0, []
        for strip in attended:
            bottom = top + strip.shape[1]
            above, below = min(top, 1), min(x.shape[1] - bottom, 1)
            seen = modulate(x[:, top - above : bottom + below], ffn_shift, ffn_scale)
            fed.append(torch.addcmul(strip, ffn_gate, self.ffn(seen, above, below)))
            top = bottom
        return _joined(fed)


def _rows_at_once(x: Tensor) -> int:
    """How many rows of (B, H, W, C) go through a block's layers together: on a CPU as many as stay
    in its cache, while no gradient is asked for.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return x.shape[1]
    return max(1, CACHED_TOKENS // (x.shape[0] * x.shape[2]))


def _joined(strips: list[Tensor]) -> Tensor:
    return strips[0] if len(strips) == 1 else torch.cat(strips, dim=1)
