"""A converted Sana without QK-norm stays finite and right where un-normalised sums overflow.

Sana's users met NaN in float16 (its issue 65) and infinity in bfloat16 (its issue 267). Keys and
queries are scaled by powers of two here, which changes no attention, and values as well.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linearsr.denoiser import LinearSR, blocks, cpu_block
from linearsr.kernels import reference, relu_linear_attention
from linearsr.weights.convert import Unseen, from_files

Patch = pytest.MonkeyPatch
BLOCKS = 2  # of 20, since Triton's interpreter is slow


def converted(path: Path, keys: float, values: float) -> LinearSR:
    """Return the model with queries and keys, and values, that are so many times larger."""
    release = from_files(path, unseen=Unseen(tag_heads=2))
    model = LinearSR(release.config)
    model.load_state_dict(release.experts[0])
    model.blocks = model.blocks[:BLOCKS]
    assert not release.config.qk_norm
    with torch.no_grad():
        for block in model.blocks:
            query, key, value = block.attention.qkv.weight.chunk(3)  # type: ignore[union-attr]
            query *= keys
            key *= keys
            value *= values
    return model.requires_grad_(False).eval()


def run(model: LinearSR, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    model, latent = model.to(dtype), 4 * torch.randn(1, 32, 10, 8).to(dtype)
    condition = model.condition(torch.randn(1, 3, 320, 256).to(dtype))
    return model(latent, torch.tensor([0.6], dtype=dtype), condition)


def plain(model: LinearSR, patch: Patch) -> Tensor:
    """As in training: whole sums in PyTorch, with gradients."""
    model.use_strips = False
    model.requires_grad_(True)
    return run(model, torch.bfloat16).detach()


def in_parts(model: LinearSR, patch: Patch) -> Tensor:
    """PyTorch without gradients, tokens in several parts."""
    model.use_strips = False
    patch.setattr(reference, "_PART", 30)
    with torch.no_grad():
        return run(model, torch.bfloat16)


def in_strips(model: LinearSR, patch: Patch) -> Tensor:
    """Upscaling on a CPU: several strips of rows."""
    patch.setattr(cpu_block, "CACHED_TOKENS", 24)
    with torch.no_grad():
        return run(model, torch.bfloat16)


def in_triton(model: LinearSR, patch: Patch) -> Tensor:
    """Upscaling on a GPU, in Triton's interpreter."""
    model.use_strips = False
    patch.setenv("LINEARSR_KERNELS", "triton")
    with torch.no_grad():
        return run(model, torch.bfloat16)


@pytest.mark.parametrize("path", [plain, in_parts, in_strips, in_triton])
@pytest.mark.parametrize(("keys", "values"), [(2.0**14, 1.0), (2.0**62, 1.0), (2.0**14, 2.0**10)])
def test_model_without_qk_norm_is_right_on_large_activations(
    stand_ins: Path,
    keys: float,
    values: float,
    path: Callable[[LinearSR, Patch], Tensor],
    monkeypatch: Patch,
) -> None:
    source = stand_ins / "sana.pth"
    exact = run(converted(source, 1.0, values), torch.float64)
    usual = relative(plain(converted(source, 1.0, values), monkeypatch), exact)
    ours = path(converted(source, keys, values), monkeypatch)
    assert ours.isfinite().all()
    # The rest is bfloat16's own rounding, of ordinary keys as of large ones.
    assert relative(ours, exact) < 1.2 * usual + 0.002


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def first_attention(model: LinearSR, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of the first block."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q, k, v))
        return relu_linear_attention(q, k, v)

    model.use_strips = False
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(blocks, "relu_linear_attention", spy)
        run(model, dtype)
    return seen[0]


@pytest.mark.parametrize(
    ("dtype", "keys"), [(torch.float16, 2.0**14), (torch.bfloat16, 2.0**62)], ids=str
)
def test_sums_in_half_precision_overflow_on_these_activations(
    stand_ins: Path, dtype: torch.dtype, keys: float
) -> None:
    """The plain formula, without float32 sums and without scales, is what the kernels avoid."""
    q, k, v = first_attention(converted(stand_ins / "sana.pth", keys, 1.0), torch.bfloat16)
    assert all(x.to(dtype).isfinite().all() for x in (q, k, v))
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q.relu(), k.relu(), v))
    numerator, denominator = q @ (k.mT @ v), q @ k.sum(-2)[..., None]
    assert not (numerator / denominator).isfinite().all()


def test_attention_does_not_depend_on_the_size_of_its_keys(stand_ins: Path) -> None:
    """So the loss cannot hold their growth back, and nothing may depend on their size."""
    with torch.no_grad():
        small, large = (
            run(converted(stand_ins / "sana.pth", keys, 1.0), torch.bfloat16)
            for keys in (1.0, 2.0**20)
        )
    torch.testing.assert_close(small, large, rtol=2**-6, atol=2**-6)


def test_float16_is_refused_with_the_reason(stand_ins: Path) -> None:
    with pytest.raises(ValueError, match="65504"), torch.no_grad():
        run(converted(stand_ins / "sana.pth", 1.0, 1.0), torch.float16)
