"""A block, strip by strip: what lies between its layers stays in a CPU core's cache.

Elementwise passes cost a CPU more than matrix products, and far more where each of them goes
through main memory. So a strip of rows goes through all it can before the next one does, the two
halves of a gated layer are tensors of their own, and what can be folded into a matrix is. It is the
function of `Block.forward`, which has the plain order; no gradients here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearsr.denoiser.blocks import Block, LinearAttention, MixFFN, TagAttention
from linearsr.kernels import modulate, scaled_state

# Tokens whose activations, five times as wide in the Mix-FFN, fit a CPU core's cache.
CACHED_TOKENS = 4096


def suit(x: Tensor) -> bool:
    """Whether tokens (B, H, W, C) are better taken in strips: on a CPU, without gradients or
    autocast, which would give the parts of a sum different types.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return x.device.type == "cpu"


def forward(
    block: Block,
    x: Tensor,
    modulation: Tensor,
    tags: tuple[Tensor, Tensor] | None = None,
    tag_mask: Tensor | None = None,
) -> Tensor:
    """`block(x, modulation, tags, tag_mask)`."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = block.modulations(modulation)
    strips = x.split(max(1, CACHED_TOKENS // (x.shape[0] * x.shape[2])), dim=1)
    queries, read = _attention(block.attention, (modulate(s, shift, scale) for s in strips))
    tagged = None if tags is None else _tag_reader(block.tag_attention, tags, tag_mask)
    value, ffn_gated = _Branch(block.ffn, 0), _Branch(block.ffn, 1)
    # (B, hidden, C): the gate rides on the projection, and the sum on its product.
    project = block.ffn.project.weight.t() * ffn_gate.squeeze(1)
    y, attended, fed = torch.empty_like(x), 0, 0
    for strip, query in zip(strips, queries, strict=True):
        rows = y[:, attended : attended + strip.shape[1]]
        torch.addcmul(strip, gate, read(query).view(strip.shape), out=rows)
        if tagged is not None:
            rows += tagged(rows)
        attended += strip.shape[1]
        seen, last = modulate(rows, ffn_shift, ffn_scale), attended == x.shape[1]
        hidden = value(seen, last).mul_(F.silu(ffn_gated(seen, last), inplace=True))
        # In place: who looks at these rows has done so.
        done = y[:, fed : fed + hidden.shape[1]].view(len(x), -1, x.shape[-1])
        done.baddbmm_(hidden.flatten(1, 2), project)
        fed += hidden.shape[1]
    return y


def _attention(
    attention: LinearAttention, strips: Iterable[Tensor]
) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """The queries of each strip (B, rows, W, C), and what turns them into `attention`'s output."""
    query, key, value = attention.qkv.weight.chunk(3)
    norm_q, norm_k = attention.norm_q, attention.norm_k
    if isinstance(norm_q, nn.RMSNorm):
        query = norm_q.weight[:, None] * query
    if isinstance(norm_k, nn.RMSNorm):
        # relu(w k) = |w| relu(sign(w) k): the sizes of the weights wait for the sums.
        key = torch.where(norm_k.weight[:, None] < 0, -key, key)
    queries, states = [], []
    wide = torch.promote_types(key.dtype, torch.float32)
    for strip in strips:
        x = strip.flatten(1, 2)
        queries.append(F.linear(x, query).relu_())
        k = F.linear(x, key)
        if isinstance(norm_k, nn.RMSNorm):
            k *= _inverse_rms(k, norm_k)
        k, v = k.relu_(), F.linear(x, value)
        sums = attention.heads(k).transpose(1, 2).mT @ attention.heads(v).transpose(1, 2)
        z = attention.heads(k.sum(1))[..., None]
        states.append(torch.cat([sums, z], dim=-1).to(wide))
    state = torch.stack(states).sum(0)
    if isinstance(norm_k, nn.RMSNorm):
        state *= attention.heads(norm_k.weight.abs())[..., None]
    return queries, _reader(state, attention.out)


def _tag_reader(
    attention: TagAttention | None, tags: tuple[Tensor, Tensor], mask: Tensor | None
) -> Callable[[Tensor], Tensor] | None:
    """What gives `attention` of tokens (B, H, W, C) to tags whose keys and values are known.

    Few tags are two narrow matrices: the keys of all heads, each in its own rows and columns, and
    the values with the output projection folded in.
    """
    if attention is None:
        return None
    keys, values = tags
    heads, count, dim = keys.shape[1:]
    if mask is not None or count > dim:  # then these matrices would be the wider way
        return lambda x: attention(x, tags, mask)
    norm = attention.norm_q
    if isinstance(norm, nn.RMSNorm):
        keys = keys * norm.weight.unflatten(0, (heads, 1, dim))
    # (B, C, heads * T) and (B, heads * T, C)
    keys = torch.diag_embed(keys.permute(0, 3, 2, 1)).permute(0, 3, 1, 4, 2) * dim**-0.5
    keys = keys.flatten(3, 4).flatten(1, 2)
    project = attention.out.weight.unflatten(1, (heads, dim)).permute(1, 2, 0)
    values = (values @ project).flatten(1, 2)

    def read(x: Tensor) -> Tensor:
        q = attention.q(x.flatten(1, 2))
        logits = q @ keys
        if isinstance(norm, nn.RMSNorm):
            logits *= _inverse_rms(q, norm)
        weights = logits.unflatten(-1, (heads, count)).softmax(-1).flatten(-2)
        return torch.baddbmm(attention.out.bias, weights, values).view(x.shape)

    return read


def _inverse_rms(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """(B, N, C) -> (B, N, 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (length.square() / x.shape[-1]).add_(norm.eps or 0).rsqrt_()


def _reader(state: Tensor, out: nn.Linear) -> Callable[[Tensor], Tensor]:
    """What gives `out` of the attention of queries (B, N, C) that have been through ReLU.

    state: (B, H, D, D + 1), of all tokens. Its sums and the output projection make one matrix
    (B, C, C); a query meets that once each of its heads is divided by what it has with z.
    """
    sums, z = scaled_state(state).split([state.shape[-2], 1], dim=-1)
    heads, dim = sums.shape[1:3]
    project = out.weight.unflatten(1, (heads, dim)).permute(1, 2, 0)
    matrix = (sums @ project.to(sums.dtype)).flatten(1, 2).to(out.weight.dtype)
    # (B, C, H): the z of a head in its own rows and column.
    z = torch.diag_embed(z.squeeze(-1).mT).transpose(1, 2).flatten(1, 2).to(out.weight.dtype)

    def read(query: Tensor) -> Tensor:
        norm = query @ z
        # Where no feature of the query is above zero, zero over one.
        norm.masked_fill_(norm == 0, 1)
        weights = query.unflatten(-1, (heads, dim)) / norm.unsqueeze(-1)
        return torch.baddbmm(out.bias, weights.flatten(-2), matrix)

    return read


class _Branch:
    """One half of a `MixFFN` up to its convolution: the values, or the gate.

    It keeps the rows that the convolution looks at again with the next strip.
    """

    def __init__(self, ffn: MixFFN, half: int) -> None:
        self.expand = _half(ffn.expand, half)
        self.depthwise = _half(ffn.depthwise, half)
        self.rows: Tensor | None = None

    def __call__(self, strip: Tensor, last: bool) -> Tensor:
        """(B, rows, W, C) -> (B, n, W, hidden), the rows whose neighbours are known by now: one
        fewer of the first strip, one more of the `last`.
        """
        above = 1 if self.rows is None else 2
        size = above + strip.shape[1] + last
        window = strip.new_empty(len(strip), size, strip.shape[2], len(self.depthwise[0]))
        window[:, :above] = 0 if self.rows is None else self.rows
        hidden = F.linear(strip, *self.expand)
        torch.ops.aten.silu.out(hidden, out=window[:, above : above + strip.shape[1]])
        if last:
            window[:, -1] = 0
        self.rows = window[:, -2:]
        if window.shape[1] < 3:
            return hidden[:, :0]
        # Views: NHWC memory seen as channels_last NCHW.
        kernel, bias = self.depthwise
        window = window.permute(0, 3, 1, 2)
        hidden = F.conv2d(window, kernel, bias, padding=(0, 1), groups=len(kernel))
        return hidden.permute(0, 2, 3, 1)


def _half(layer: nn.Linear | nn.Conv2d, half: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of the first or the second half of a layer's outputs."""
    return layer.weight.chunk(2)[half], layer.get_parameter("bias").chunk(2)[half]
