"""Shortcuts that save passes over memory must not change what is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linearsr.denoiser import blocks

WHOLE = 10**9


def block_of(batch: int, dtype: torch.dtype) -> tuple[blocks.Block, list[Tensor]]:
    """A block, and a picture of 7 rows with its modulation and two tags."""
    torch.manual_seed(0)
    block = blocks.Block(16, head_dim=8, ffn_ratio=2.5, qk_norm=True, tag_heads=2).eval()
    given = [torch.randn(batch, 7, 9, 16), torch.randn(batch, 6, 16), torch.randn(batch, 2, 16)]
    return block.to(dtype), [x.to(dtype) for x in given]


def run(block: blocks.Block, given: list[Tensor]) -> Tensor:
    x, modulation, tags = given
    assert block.tag_attention is not None
    return block(x, modulation, block.tag_attention.keys_values(tags))


@pytest.mark.parametrize("cached", [1, 27, 40])  # one, three and four rows of one picture
@pytest.mark.parametrize("batch", [1, 2])
def test_strips_of_rows_equal_the_whole(
    monkeypatch: pytest.MonkeyPatch, cached: int, batch: int
) -> None:
    block, given = block_of(batch, torch.float64)
    with torch.no_grad():
        monkeypatch.setattr(blocks, "CACHED_TOKENS", WHOLE)
        whole = run(block, given)
        monkeypatch.setattr(blocks, "CACHED_TOKENS", cached)
        assert len(given[0].split(blocks._rows_at_once(given[0]), dim=1)) > 1
        strips = run(block, given)
    torch.testing.assert_close(strips, whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(run(block, given), whole, atol=1e-12, rtol=1e-12)  # with gradients


def test_strips_round_no_worse_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, on weights and inputs that bfloat16 holds exactly."""
    block, given = block_of(1, torch.bfloat16)
    with torch.no_grad():
        monkeypatch.setattr(blocks, "CACHED_TOKENS", WHOLE)
        whole = run(block, given)
        monkeypatch.setattr(blocks, "CACHED_TOKENS", 18)
        strips = run(block, given)
        exact = run(block.double(), [x.double() for x in given])
    plain, ours = ((x.double() - exact).norm() / exact.norm() for x in (whole, strips))
    assert 0 < plain < 0.02
    assert ours < 2 * plain


def test_modulation_of_one_sample_equals_its_part_of_a_batch() -> None:
    x, shift, scale = torch.randn(3, 4, 5, 8), torch.randn(3, 1, 1, 8), torch.randn(3, 1, 1, 8)
    batch = blocks.modulate(x, shift, scale)
    for i in range(3):
        one = blocks.modulate(x[i : i + 1], shift[i : i + 1], scale[i : i + 1])
        torch.testing.assert_close(one[0], batch[i], atol=1e-6, rtol=1e-5)


def test_the_length_of_a_query_cancels() -> None:
    """Why the query's RMS is never computed: with it, the result is the same."""
    attention = blocks.LinearAttention(32, 16, qk_norm=True)
    torch.nn.init.uniform_(attention.norm_q.weight, 0.5, 1.5)
    x = torch.randn(1, 3, 4, 32)
    q, k, v = attention.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
    heads = (1, 12, 2, 16)
    q, k = attention.norm_q(q), attention.norm_k(k)
    o = blocks.relu_linear_attention(q.view(heads), k.view(heads), v.reshape(heads))
    torch.testing.assert_close(attention(x), attention.out(o.reshape(1, 3, 4, 32)))
