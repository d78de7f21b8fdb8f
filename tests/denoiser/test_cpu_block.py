"""The CPU block computes strips of rows; it equals the plain block up to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linearsr.denoiser import cpu_block as strips
from linearsr.denoiser.blocks import Block

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = tuple(CLOSE)


def block_of(
    batch: int, dtype: torch.dtype, qk_norm: bool = True, local: int = 0
) -> tuple[Block, list[Tensor]]:
    """Return a block and its inputs: a picture of 7 rows of 9, its modulation, two tags."""
    torch.manual_seed(0)
    block = Block(16, 8, 2.5, qk_norm=qk_norm, tag_heads=2, local_kernel=local).eval()
    if qk_norm:
        assert block.tag_attention is not None
        for part in (block.attention, block.tag_attention):
            for norm in (part.norm_q, part.norm_k):
                torch.nn.init.uniform_(norm.weight, -0.5, 1.5)
                norm.weight.data[3] = 0  # one channel, and then all of a head
                norm.weight.data[8:] = 0
    inputs = [torch.randn(batch, 7, 9, 16), torch.randn(batch, 6, 16), torch.randn(batch, 2, 16)]
    return block.to(dtype), [x.to(dtype) for x in inputs]


def both(block: Block, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the results of the plain block and of the CPU block."""
    x, modulation, tags = inputs
    assert block.tag_attention is not None
    keys = block.tag_attention.keys_values(tags)
    return block(x, modulation, keys), strips.forward_(block, x.clone(), modulation, keys)


@pytest.mark.parametrize("cached", [1, 27, 36, 54, 10**9])  # 1, 3, 4 and 6 rows at once, and all
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("local", [0, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_cpu_block_equals_the_plain_block(
    monkeypatch: pytest.MonkeyPatch,
    cached: int,
    batch: int,
    qk_norm: bool,
    local: int,
    dtype: torch.dtype,
) -> None:
    block, inputs = block_of(batch, dtype, qk_norm, local)
    monkeypatch.setattr(strips, "CACHED_TOKENS", cached * batch)
    whole, result = both(block, inputs)
    torch.testing.assert_close(result, whole, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize(("height", "width"), [(1, 9), (2, 9), (7, 1), (1, 1)])
@pytest.mark.parametrize("cached", [1, 10**9])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_cpu_block_equals_the_plain_block_on_tiny_pictures(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int, cached: int, dtype: torch.dtype
) -> None:
    block, (x, *rest) = block_of(1, dtype, local=5)
    monkeypatch.setattr(strips, "CACHED_TOKENS", cached)
    whole, result = both(block, [x[:, :height, :width], *rest])
    torch.testing.assert_close(result, whole, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@torch.inference_mode()
def test_cpu_block_gives_the_same_result_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs = block_of(1, torch.float32)
    monkeypatch.setattr(strips, "_fuses", lambda dtype: False)
    whole, result = both(block, inputs)
    torch.testing.assert_close(result, whole, atol=1e-5, rtol=1e-5)


def test_cpu_block_fuses_activations_if_onednn_is_available() -> None:
    fused = torch.backends.mkldnn.is_available()
    assert strips._fuses(torch.float32) == fused and not strips._fuses(torch.float64)


@pytest.mark.parametrize("tags", [1, 8, 9])  # a head has 8 channels
@pytest.mark.parametrize("qk_norm", [True, False])
@torch.inference_mode()
def test_cpu_block_equals_the_plain_block_for_any_number_of_tags(tags: int, qk_norm: bool) -> None:
    block, (x, modulation, _) = block_of(2, torch.float64, qk_norm)
    inputs = [x, modulation, torch.randn(2, tags, 16, dtype=torch.float64)]
    whole, result = both(block, inputs)
    torch.testing.assert_close(result, whole, atol=1e-12, rtol=1e-12)


@torch.inference_mode()
def test_cpu_block_ignores_padding_tags() -> None:
    block, (x, modulation, tags) = block_of(2, torch.float64)
    assert block.tag_attention is not None
    keys, mask = (
        block.tag_attention.keys_values(tags),
        torch.tensor([[True, False], [False, False]]),
    )
    whole = block(x, modulation, keys, mask)
    result = strips.forward_(block, x.clone(), modulation, keys, mask)
    torch.testing.assert_close(result, whole, atol=1e-12, rtol=1e-12)


@torch.inference_mode()
def test_cpu_block_gives_the_bias_for_a_query_without_positive_values() -> None:
    block, (x, modulation, _) = block_of(1, torch.float64)
    block.attention.qkv.weight[:16] = 0
    result = strips.forward_(block, x.clone(), modulation)
    assert result.isfinite().all()
    torch.testing.assert_close(result, block(x, modulation), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(7, 9), (7, 1), (1, 9), (1, 1)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cached", [1, 18, 10**9])
@torch.inference_mode()
def test_cpu_block_rounds_no_worse_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int, batch: int, cached: int
) -> None:
    """The truth is float64, on weights and inputs that bfloat16 holds exactly."""
    monkeypatch.setattr(strips, "CACHED_TOKENS", cached)
    block, (x, *rest) = block_of(batch, torch.bfloat16)
    inputs = [x[:, :height, :width], *rest]
    rounded = both(block, inputs)
    exact, _ = both(block.double(), [part.double() for part in inputs])
    plain, ours = ((part.double() - exact).norm() / exact.norm() for part in rounded)
    assert 0 < plain < 0.02
    assert ours < 2 * plain


def test_gradients_use_the_plain_block() -> None:
    x = torch.zeros(1, 2, 2, 4)
    assert not strips.supports(x)
    with torch.no_grad():
        assert strips.supports(x)


def test_autocast_uses_the_plain_block_with_the_same_result() -> None:
    block, (x, modulation, _) = block_of(1, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not strips.supports(x)
        assert block(x, modulation).isfinite().all()
