"""Shortcuts that save passes over memory must not change what is computed."""

from __future__ import annotations

import torch

from linearsr.denoiser import blocks


def test_modulate_gives_a_sample_alone_its_part_of_a_batch() -> None:
    shapes = (3, 4, 5, 8), (3, 1, 1, 8), (3, 1, 1, 8)
    x, shift, scale = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    batch = blocks.modulate(x, shift, scale)
    for i in range(3):
        one = blocks.modulate(x[i : i + 1], shift[i : i + 1], scale[i : i + 1])
        torch.testing.assert_close(one[0], batch[i], atol=1e-12, rtol=1e-12)


def test_linear_attention_does_not_depend_on_the_length_of_a_query() -> None:
    """The query's RMS is never computed, because the result is the same without it."""
    attention = blocks.LinearAttention(32, 16, qk_norm=True).double()
    torch.nn.init.uniform_(attention.norm_q.weight, 0.5, 1.5)
    x = torch.randn(1, 3, 4, 32, dtype=torch.float64)
    q, k, v = attention.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
    heads = (1, 12, 2, 16)
    q, k = attention.norm_q(q), attention.norm_k(k)
    o = blocks.relu_linear_attention(q.view(heads), k.view(heads), v.reshape(heads))
    torch.testing.assert_close(attention(x), attention.out(o.reshape(1, 3, 4, 32)))
