"""Latents: the exact space-to-depth fold, and DC-AE through diffusers with clear errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linearsr.config import LatentConfig
from linearsr.errors import WeightsError
from linearsr.latent import DCAutoencoder, SpaceToDepth, autoencoder, load_autoencoder
from tests.helpers.dc_ae import save_attending_dc_ae, save_dc_ae

WEIGHTS = "diffusion_pytorch_model.safetensors"


def picture(seed: int, height: int = 16, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, height, width, generator=generator) * 2 - 1


# Space to depth


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_space_to_depth_decodes_to_the_same_picture(factor: int) -> None:
    # With a scale that is a power of two and pictures of 8 bits, nothing is rounded.
    ae = load_autoencoder(LatentConfig(kind="space-to-depth", factor=factor, scale=0.125))
    hr, lr = ((p * 128).round() / 128 for p in (picture(0), picture(1)))
    latent = ae.encode(hr, lr)
    assert latent.shape == (2, 3 * factor**2, 16 // factor, 24 // factor)
    assert torch.equal(ae.decode(latent, lr), hr)


def test_fold_is_lossless_to_rounding_at_the_scale_of_the_tiny_model() -> None:
    ae = SpaceToDepth(LatentConfig(kind="space-to-depth", factor=4, scale=0.12))
    hr, lr = picture(0), picture(1)
    torch.testing.assert_close(ae.decode(ae.encode(hr, lr), lr), hr, rtol=0, atol=1e-6)


def test_a_latent_holds_the_residual_of_its_own_block() -> None:
    ae = SpaceToDepth(LatentConfig(kind="space-to-depth", factor=4, scale=0.5))
    lr = picture(1)
    hr = lr.clone()
    hr[1, 2, 4:8, 20:24] += 0.25
    latent = ae.encode(hr, lr)
    assert torch.count_nonzero(latent) == 16
    torch.testing.assert_close(latent[1, 32:48, 1, 5], torch.full((16,), 0.5))


def test_zero_latent_is_the_lr_picture_and_pictures_keep_their_range() -> None:
    ae = SpaceToDepth(LatentConfig(kind="space-to-depth", factor=4, scale=0.12))
    lr = picture(1)
    assert torch.equal(ae.decode(torch.zeros(2, 48, 4, 6), lr), lr)
    # [-1, 1] in, [-1, 1] on the latent grid: the condition is not scaled as a residual is.
    condition = ae.condition(lr)
    assert condition.shape == (2, 48, 4, 6)
    assert (condition.min(), condition.max()) == (lr.min(), lr.max())
    black, white = torch.full_like(lr, -1.0), torch.full_like(lr, 1.0)
    torch.testing.assert_close(ae.decode(ae.encode(white, black), black), white)


def test_decoding_does_not_clamp() -> None:
    ae = SpaceToDepth(LatentConfig(kind="space-to-depth", factor=4, scale=0.5))
    assert ae.decode(torch.ones(2, 48, 4, 6), torch.ones(2, 3, 16, 24)).max() == 1.5


# DC-AE


@pytest.fixture(scope="module")
def dc_ae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of a tiny 4x AutoencoderDC with random weights, and the model itself."""
    folder = tmp_path_factory.mktemp("dc-ae")
    return folder, save_attending_dc_ae(folder)


def config(source: Path | str | None, factor: int = 4, scale: float = 0.4) -> LatentConfig:
    source = None if source is None else str(source)
    return LatentConfig(kind="dc-ae", factor=factor, scale=scale, source=source)


def refusal(source: Path | str | None, factor: int = 4) -> str:
    with pytest.raises(WeightsError) as caught:
        load_autoencoder(config(source, factor))
    message = str(caught.value)
    assert "\n" not in message
    return message


def edited(dc_ae: tuple[Path, Any], folder: Path, **tensors: Tensor | None) -> Path:
    """Return a copy of the folder with tensors replaced, added, or (None) removed."""
    content = {**load_file(dc_ae[0] / WEIGHTS), **tensors}
    kept = {key: x for key, x in content.items() if x is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_bytes((dc_ae[0] / "config.json").read_bytes())
    return folder


def test_tiled_decode_equals_the_whole_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's reach is a few cells, so tiles with that overlap give the whole picture."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sides = {"block_types": ("ResBlock",) * 2, "block_out_channels": (8, 16)}
    sides |= {"layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
    both = {f"{side}_{key}": v for side in ("encoder", "decoder") for key, v in sides.items()}
    ae = DCAutoencoder(config(None, factor=2), diffusers.AutoencoderDC(latent_channels=8, **both))
    latent, lr = torch.randn(2, 8, 40, 30), torch.zeros(2, 3, 80, 60)
    whole = ae.decode(latent, lr)
    monkeypatch.setattr(autoencoder, "DECODE_TILE", 56)

    def trace(overlap: int) -> float:
        monkeypatch.setattr(autoencoder, "DECODE_OVERLAP", overlap)
        return float((ae.decode(latent, lr) - whole).abs().max() / whole.std())

    assert trace(overlap=40) < 0.02
    assert trace(overlap=0) > 0.2


def test_dc_ae_in_bfloat16_keeps_the_precision_of_pictures(dc_ae: tuple[Path, Any]) -> None:
    exact, rounded = (
        load_autoencoder(config(dc_ae[0]), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    hr, lr = picture(0), picture(1)
    latent = rounded.encode(hr, lr)
    decoded = rounded.decode(latent, lr)
    assert latent.dtype == decoded.dtype == torch.float32
    truth = exact.encode(hr, lr)
    assert 0 < (latent - truth).norm() < 0.05 * truth.norm()


def test_dc_ae_latent_is_that_of_diffusers_times_the_scale(dc_ae: tuple[Path, Any]) -> None:
    folder, model = dc_ae
    ae = load_autoencoder(config(folder))
    hr, lr = picture(0), picture(1)
    with torch.no_grad():
        latent = ae.encode(hr, lr)
        torch.testing.assert_close(latent, model.encode(hr).latent * 0.4)
        torch.testing.assert_close(ae.condition(lr), model.encode(lr).latent * 0.4)
        torch.testing.assert_close(ae.decode(latent, lr), model.decode(latent / 0.4).sample)
    assert latent.shape == (2, 8, 4, 6)
    assert latent.abs().max() > 0
    assert ae.factor == 4


def test_dc_ae_is_frozen_and_takes_the_dtype(dc_ae: tuple[Path, Any]) -> None:
    ae = load_autoencoder(config(dc_ae[0]), dtype=torch.bfloat16)
    assert isinstance(ae, DCAutoencoder)
    assert not ae.model.training
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in ae.model.parameters())


def test_decoder_of_another_model_decodes(dc_ae: tuple[Path, Any], tmp_path: Path) -> None:
    conv = load_file(dc_ae[0] / WEIGHTS)["decoder.conv_out.weight"]
    other = edited(dc_ae, tmp_path, **{"decoder.conv_out.weight": conv.flip(0)})
    one, both, two = (
        load_autoencoder(config(source).model_copy(update={"decoder": decoder}))
        for source, decoder in ((dc_ae[0], None), (dc_ae[0], str(other)), (other, None))
    )
    hr, lr = picture(0), picture(1)
    latent = both.encode(hr, lr)
    assert torch.equal(both.decode(latent, lr), two.decode(latent, lr))
    assert not torch.equal(both.decode(latent, lr), one.decode(latent, lr))
    assert both.digest() == one.digest()  # what was encoded before stays valid


def test_decoder_of_other_latents_is_refused(dc_ae: tuple[Path, Any], tmp_path: Path) -> None:
    other = save_dc_ae(tmp_path / "other", channels=4, factor=4)
    wrong = config(dc_ae[0]).model_copy(update={"decoder": str(other)})
    for load in (load_autoencoder, autoencoder.without_weights):
        with pytest.raises(WeightsError, match=r"decodes 4 channels, .* encodes 8"):
            load(wrong)


def test_graphs_decode_to_the_same_bits(
    dc_ae: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoencoder, "DECODE_TILE", 16)
    monkeypatch.setattr(autoencoder, "DECODE_OVERLAP", 8)
    plain, recorded = (
        load_autoencoder(config(dc_ae[0]), graphs=graphs) for graphs in (False, True)
    )
    for rows in (4, 9, 9, 4, 9):  # recorded at the second time
        latent, lr = torch.randn(2, 8, rows, 7), torch.zeros(2, 3, 4 * rows, 28)
        assert torch.equal(recorded.decode(latent, lr), plain.decode(latent, lr))


def test_channels_last_decodes_to_the_same_picture(dc_ae: tuple[Path, Any]) -> None:
    """The layout on a GPU."""
    plain, last = (load_autoencoder(config(dc_ae[0])) for _ in range(2))
    assert isinstance(last, DCAutoencoder)
    last.model.to(memory_format=torch.channels_last)
    latent, lr = torch.randn(1, 8, 6, 7), torch.zeros(1, 3, 24, 28)
    torch.testing.assert_close(last.decode(latent, lr), plain.decode(latent, lr))


def test_wrong_factor_is_named(dc_ae: tuple[Path, Any]) -> None:
    assert "compresses 4x, but the config says 32x" in refusal(dc_ae[0], factor=32)


def test_missing_source_is_refused() -> None:
    assert "latent.source" in refusal(None)


def test_missing_folder_and_unreachable_hub_id_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    # Another test module may have imported the hub before the variable was set.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in (str(tmp_path / "nowhere"), "nobody-at-all/no-such-dc-ae"):
        message = refusal(source)
        assert source in message
        assert "missing folder or unreachable hub id" in message


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    assert f"from folder {str(tmp_path)!r}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("decoder.conv_out.weight", None),
        ("decoder.conv_out.gone_astray", torch.zeros(2)),
        ("decoder.conv_out.weight", torch.zeros(2, 2)),
        ("decoder.conv_out.weight", torch.full((3, 8, 3, 3), torch.nan)),
    ],
    ids=["missing", "unexpected", "shape", "nan"],
)
def test_wrong_tensors_are_named(
    dc_ae: tuple[Path, Any], tmp_path: Path, key: str, value: Tensor | None
) -> None:
    assert key in refusal(edited(dc_ae, tmp_path, **{key: value}))


def test_damaged_files_are_named(dc_ae: tuple[Path, Any], tmp_path: Path) -> None:
    folder = edited(dc_ae, tmp_path)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])
    assert WEIGHTS in refusal(folder)
    (folder / "config.json").write_text(json.dumps(["not a config"])[:-1])
    assert "config.json" in refusal(folder)
