"""Run a block on a CPU strip by strip, so that activations stay in a core's cache.

Elementwise passes cost a CPU more than matrix products, and far more if each of them goes through
main memory. So a strip of rows passes through as many layers as possible before the next strip,
the two halves of a gated layer are separate tensors, and scales and gates are folded into matrices.
The result is that of `Block.forward`, which has the plain order. There are no gradients here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearsr.denoiser.blocks import Block, LinearAttention, MixFFN, TagAttention
from linearsr.kernels import modulate, scaled_state

# The number of tokens whose activations, five times as wide in the Mix-FFN, fit the caches of two
# cores. It does not depend on the number of threads, because a picture's bits depend on it.
CACHED_TOKENS = 8192


def supports(x: Tensor) -> bool:
    """Return whether `forward_` can take x (B, H, W, C): on a CPU, no gradients, no autocast.

    Autocast would give the parts of a sum different dtypes.
    """
    plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    return plain and x.device.type == "cpu"


def forward_(
    block: Block,
    x: Tensor,
    modulation: Tensor,
    tags: tuple[Tensor, Tensor] | None = None,
    tag_mask: Tensor | None = None,
) -> Tensor:
    """Compute `block(x, modulation, tags, tag_mask)` in place and return x."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = block.modulations(modulation)
    strips = x.split(max(1, CACHED_TOKENS // (x.shape[0] * x.shape[2])), dim=1)
    modulated = (modulate(strip, shift, scale) for strip in strips)
    queries, values, attend_ = _attention(block.attention, modulated, gate)
    attend_nearby_ = _local_attention(block.attention, values, gate, x)
    attend_tags_ = None if tags is None else _tag_attention(block.tag_attention, tags, tag_mask)
    feed = _MixFFN(block.ffn, ffn_gate, x)
    for strip, query in zip(strips, queries, strict=True):
        attend_(strip, query)
        if attend_nearby_ is not None:
            attend_nearby_(strip)
        if attend_tags_ is not None:
            attend_tags_(strip)
        feed(modulate(strip, ffn_shift, ffn_scale))
    return x


def _attention(
    attention: LinearAttention, strips: Iterable[Tensor], gate: Tensor
) -> tuple[list[Tensor], list[Tensor], Callable[[Tensor, Tensor], None]]:
    """Return each strip's queries, its values, and a function that adds the attention to a strip.

    The values are empty without a local convolution. The attention is multiplied by `gate`.
    """
    query, key, value = attention.qkv.weight.chunk(3)
    norm_q, norm_k = attention.norm_q, attention.norm_k
    if isinstance(norm_q, nn.RMSNorm):
        query = norm_q.weight[:, None] * query
    if isinstance(norm_k, nn.RMSNorm):
        # relu(w k) = |w| relu(sign(w) k), so |w| can be applied to the sums below.
        key = torch.where(norm_k.weight[:, None] < 0, -key, key)
    queries, values, states = [], [], []
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
        if attention.local is not None:
            values.append(v)
    state = torch.stack(states).sum(0)
    if isinstance(norm_k, nn.RMSNorm):
        state *= attention.heads(norm_k.weight.abs())[..., None]
    return queries, values, _reader(state, attention.out, gate)


def _local_attention(
    attention: LinearAttention, values: Sequence[Tensor], gate: Tensor, tokens: Tensor
) -> Callable[[Tensor], None] | None:
    """Return a function that adds the projected local convolution to the next strip, or None.

    values: (B, N, C) of each strip. The convolution also reads rows of the neighbouring strips.
    """
    if attention.local is None:
        return None
    whole = torch.cat(list(values), dim=1).view(tokens.shape)
    kernel, reach = attention.local.weight, attention.local.weight.shape[-1] // 2
    # (B, C, C): the output projection times the gate.
    project = attention.out.weight.t() * gate.squeeze(1)
    done = 0

    def attend_nearby_(strip: Tensor) -> None:
        nonlocal done
        top, bottom = done, done + strip.shape[1]
        above, below = min(reach, top), min(reach, whole.shape[1] - bottom)
        rows = whole[:, top - above : bottom + below].permute(0, 3, 1, 2)
        # Zero padding is for the edges of the picture only; between strips there are real rows.
        rows = F.pad(rows, (0, 0, reach - above, reach - below))
        local = F.conv2d(rows, kernel, padding=(0, reach), groups=len(kernel))
        _add_product(strip, local.permute(0, 2, 3, 1).flatten(1, 2), project)
        done = bottom

    return attend_nearby_


def _reader(state: Tensor, out: nn.Linear, gate: Tensor) -> Callable[[Tensor, Tensor], None]:
    """Return a function that adds the projected attention to tokens (B, rows, W, C).

    The function takes the tokens and their queries (B, N, C) after ReLU. state: (B, H, D, D + 1) of
    all tokens. Its sums, the output projection and the gate become one matrix (B, C, C), which is
    applied to a query after each of its heads is divided by its product with z.
    """
    sums, z = scaled_state(state).split([state.shape[-2], 1], dim=-1)
    heads, dim = sums.shape[1:3]
    weight = out.weight
    project = weight.unflatten(1, (heads, dim)).permute(1, 2, 0)
    matrix = (sums @ project.to(sums.dtype)).flatten(1, 2) * gate.squeeze(1)
    matrix, bias = matrix.to(weight.dtype), out.bias * gate
    # (B, C, H): the z of a head in its own rows and column.
    z = torch.diag_embed(z.squeeze(-1).mT).transpose(1, 2).flatten(1, 2).to(weight.dtype)

    def attend_(tokens: Tensor, query: Tensor) -> None:
        norm = query @ z
        # Where no feature of the query is above zero, zero over one.
        norm.masked_fill_(norm == 0, 1)
        weights = query.unflatten(-1, (heads, dim)) / norm.unsqueeze(-1)
        _add_product(tokens.add_(bias), weights.flatten(-2), matrix)

    return attend_


def _tag_attention(
    attention: TagAttention | None, tags: tuple[Tensor, Tensor], mask: Tensor | None
) -> Callable[[Tensor], object] | None:
    """Return a function that adds the attention to tags to tokens (B, rows, W, C), or None.

    tags: keys and values. For a few tags these are two narrow matrices: the keys of all heads, each
    in its own rows and columns, and the values times the output projection.
    """
    if attention is None:
        return None
    keys, values = tags
    heads, count, dim = keys.shape[1:]
    if mask is not None or count > dim:  # The narrow matrices would not be narrow.
        return lambda tokens: tokens.add_(attention(tokens, tags, mask))
    norm = attention.norm_q
    if isinstance(norm, nn.RMSNorm):
        keys = keys * norm.weight.unflatten(0, (heads, 1, dim))
    # (B, C, heads * T) and (B, heads * T, C)
    keys = torch.diag_embed(keys.permute(0, 3, 2, 1)).permute(0, 3, 1, 4, 2) * dim**-0.5
    keys = keys.flatten(3, 4).flatten(1, 2)
    project = attention.out.weight.unflatten(1, (heads, dim)).permute(1, 2, 0)
    # The weights of a head add up to one, so the heads' shares of the bias add up to the bias.
    values = (values @ project + attention.out.bias / heads).flatten(1, 2)

    def attend_(tokens: Tensor) -> None:
        q = attention.q(tokens.flatten(1, 2))
        # Tokens last: the softmax over a few tags is then one over many tokens at once.
        logits = (q @ keys).mT.contiguous()
        if isinstance(norm, nn.RMSNorm):
            logits *= _inverse_rms(q, norm).mT
        weights = logits.unflatten(1, (heads, count)).softmax(2).flatten(1, 2)
        _add_product(tokens, weights.mT, values)

    return attend_


def _inverse_rms(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Return the inverse root mean square (B, N, 1) of x (B, N, C)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (length.square() / x.shape[-1]).add_(norm.eps or 0).rsqrt_()


def _add_product(tokens: Tensor, x: Tensor, matrix: Tensor) -> None:
    """Add x (B, N, K) @ matrix (B, K, C) to tokens (B, rows, W, C)."""
    tokens.view(len(tokens), -1, tokens.shape[-1]).baddbmm_(x, matrix)


class _MixFFN:
    """A function that adds `gate` times a `MixFFN` to all tokens (B, H, W, C), strip by strip.

    The convolution needs one more row than it returns, so the last two rows of the input are kept.
    Expanding them again costs less than copying their expanded activations.
    """

    def __init__(self, ffn: MixFFN, gate: Tensor, tokens: Tensor) -> None:
        # Read once: an adapted layer makes its weight anew for each reader.
        expand = ffn.expand.weight.chunk(2)
        self.halves = [_Half.of(ffn, number, weight) for number, weight in enumerate(expand)]
        # (B, hidden, C): the projection times the gate; the sum is added by its product.
        self.project = ffn.project.weight.t() * gate.squeeze(1)
        self.tokens, self.known, self.done = tokens, tokens[:, :0], 0

    def __call__(self, strip: Tensor) -> None:
        """Take the next rows (B, n, W, C) and update all tokens whose neighbours are known."""
        known = torch.cat([self.known, strip], dim=1)
        start = max(0, self.done - 1)
        top, bottom = start == self.done, start + known.shape[1] == self.tokens.shape[1]
        count = start + known.shape[1] - self.done - (not bottom)
        if count:
            # Zero padding is for the edges of the picture; it spoils the row at the other end.
            edge, first = int(top or bottom), int(bottom and not top)
            value, gated = (half(known, edge).narrow(1, first, count) for half in self.halves)
            done = self.tokens.narrow(1, self.done, count)
            _add_product(done, value.mul_(gated).flatten(1, 2), self.project)
            self.done += count
        self.known = known[:, max(0, self.done - 1) - start :]


class _Half(NamedTuple):
    """The layers of one half of a `MixFFN`: the values, or the gates for them."""

    expand: tuple[Tensor, Tensor]
    depthwise: tuple[Tensor, Tensor]
    is_gate: bool

    @classmethod
    def of(cls, ffn: MixFFN, number: int, expand: Tensor) -> _Half:
        """Return half of the first two layers' channels: values (number 0) or gates (1).

        expand: that half of the first layer's weight.
        """
        biases = [x.get_parameter("bias").chunk(2)[number] for x in (ffn.expand, ffn.depthwise)]
        depthwise = ffn.depthwise.weight.chunk(2)[number]
        return cls((expand, biases[0]), (depthwise, biases[1]), number == 1)

    def __call__(self, x: Tensor, edge: int) -> Tensor:
        """(B, n, W, C) -> (B, n - 2 + 2 edge, W, hidden), with `edge` rows of zero padding."""
        fuses, channels = _fuses(x.dtype), len(self.depthwise[0])
        if fuses:
            x = torch.ops.mkldnn._linear_pointwise(x, *self.expand, "swish", [], "")
        else:
            x = F.silu(F.linear(x, *self.expand), inplace=True)
        # Views: NHWC memory seen as channels_last NCHW.
        x = x.permute(0, 3, 1, 2)
        if fuses and self.is_gate:
            ones, padding = [1, 1], [edge, 1]
            x = torch.ops.mkldnn._convolution_pointwise(
                x, *self.depthwise, padding, ones, ones, channels, "swish", [], ""
            )
        else:
            x = F.conv2d(x, *self.depthwise, padding=(edge, 1), groups=channels)
            x = F.silu(x, inplace=True) if self.is_gate else x
        return x.permute(0, 2, 3, 1)


def _fuses(dtype: torch.dtype) -> bool:
    """Return whether oneDNN can fuse SiLU into a product of this type, as for torch.compile."""
    if not torch.backends.mkldnn.enabled or not _onednn_has_it():
        return False
    bfloat16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or bfloat16


@functools.cache
def _onednn_has_it() -> bool:
    """Return whether torch has the private operators of torch.compile's CPU backend.

    There is no public name for them. If they disappear, SiLU takes a second pass.
    """
    names = ("_linear_pointwise", "_convolution_pointwise", "_is_mkldnn_bf16_supported")
    built = torch.backends.mkldnn.is_available()
    return built and all(hasattr(torch.ops.mkldnn, name) for name in names)
