"""The command, the dataset job and the endpoint turn bytes into bytes in one way."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from linearsr import Options, Upscaler
from linearsr.config import FileOptions
from linearsr.errors import InputError
from linearsr.imaging.files import Picture, encode, read
from linearsr.pipeline.codec import encode_result, read_tagged, upscale_encoded

OPTIONS = Options(steps=1, seed=3)


@pytest.fixture(scope="module")
def small(small_bundle: Path) -> Upscaler:
    return Upscaler.load(small_bundle, "cpu")


@pytest.fixture(scope="module")
def data(photograph: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photograph.save(buffer, "PNG")
    return buffer.getvalue()


def test_bytes_are_those_of_the_stages_by_hand(small: Upscaler, data: bytes) -> None:
    result = upscale_encoded(small, data, OPTIONS, FileOptions())
    by_hand = small.upscale(read(data), OPTIONS)
    assert result.data == encode(by_hand, "png", provenance=small.describe(OPTIONS))
    assert result[1:] == ("png", 256, 192, ())


def test_both_ends_give_the_bytes_of_the_whole(small: Upscaler, data: bytes) -> None:
    files = FileOptions(format="webp", quality=80)
    picture, options = read_tagged(small, data, OPTIONS, files)
    result = encode_result(small, small.upscale_tagged(picture, options), options, files)
    assert result == upscale_encoded(small, data, OPTIONS, files)
    assert result.format == "webp"


def test_tags_are_resolved_once(
    small: Upscaler, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Options] = []
    with_tags = small.with_tags

    def counted(picture: Picture, options: Options) -> Options:
        calls.append(options)
        return with_tags(picture, options)

    monkeypatch.setattr(small, "with_tags", counted)
    upscale_encoded(small, data, OPTIONS, FileOptions())
    assert calls == [OPTIONS]


def test_stages_are_named_with_their_picture(small: Upscaler, data: bytes) -> None:
    sizes: dict[str, int] = {}
    upscale_encoded(
        small,
        data,
        OPTIONS,
        FileOptions(),
        on_stage=lambda stage, picture: sizes.update({stage: picture.pixels.shape[-1]}),
    )
    assert sizes == {"upscale": 64, "encode": 256}


def test_errors_call_the_picture_by_its_name(small: Upscaler, data: bytes) -> None:
    with pytest.raises(InputError, match=r"cat\.png"):
        upscale_encoded(small, data[:200], OPTIONS, FileOptions(), name="cat.png")
