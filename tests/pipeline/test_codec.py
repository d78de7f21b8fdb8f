"""The command, the dataset job and the endpoint share one function from bytes to bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from linearsr import Options, Upscaler
from linearsr.config import FileOptions
from linearsr.errors import InputError, OutputError, TooLarge
from linearsr.imaging.files import Picture, encode, read
from linearsr.pipeline import codec
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


def test_upscale_encoded_equals_its_stages_run_by_hand(small: Upscaler, data: bytes) -> None:
    result = upscale_encoded(small, data, OPTIONS, FileOptions())
    by_hand = small.upscale(read(data), OPTIONS)
    assert result.data == encode(by_hand, "png", provenance=small.describe(OPTIONS))
    assert result[1:] == ("png", 256, 192, ())


def test_read_tagged_and_encode_result_give_the_bytes_of_upscale_encoded(
    small: Upscaler, data: bytes
) -> None:
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


def test_on_stage_gets_each_stage_with_its_picture(small: Upscaler, data: bytes) -> None:
    sizes: dict[str, int] = {}
    upscale_encoded(
        small,
        data,
        OPTIONS,
        FileOptions(),
        on_stage=lambda stage, picture: sizes.update({stage: picture.pixels.shape[-1]}),
    )
    assert sizes == {"upscale": 64, "encode": 256}


def test_errors_name_the_picture(small: Upscaler, data: bytes) -> None:
    with pytest.raises(InputError, match=r"cat\.png"):
        upscale_encoded(small, data[:200], OPTIONS, FileOptions(), name="cat.png")


def pages(number: int) -> bytes:
    buffer = io.BytesIO()
    colours = [Image.new("RGB", (16 + 4 * i, 12), (60 * i, 90, 200)) for i in range(number)]
    colours[0].save(buffer, "TIFF", save_all=True, append_images=colours[1:])
    return buffer.getvalue()


def test_all_pages_of_a_tiff_are_upscaled_into_a_tiff(small: Upscaler) -> None:
    result = upscale_encoded(small, pages(3), OPTIONS, FileOptions())
    assert result[1:] == ("tiff", 64, 48, ())
    for page in range(3):
        expected = small.upscale(read(pages(3), page=page), OPTIONS)
        written = read(result.data, page=page)
        assert written.pages == 3
        assert (written.pixels - expected.pixels).abs().max() < 1 / 255
        assert written.exif is not None
        assert b"small" in written.exif
    assert upscale_encoded(small, pages(1), OPTIONS, FileOptions()).notes == ()


def test_progress_is_that_of_all_pages(small: Upscaler) -> None:
    seen: list[float] = []
    upscale_encoded(
        small, pages(3), OPTIONS, FileOptions(), progress=lambda one: seen.append(one.fraction)
    )
    # The pages are 16, 20 and 24 pixels wide.
    ends = [0, 16 / 60, 36 / 60, 1]
    assert seen == pytest.approx([ends[0], ends[1], ends[1], ends[2], ends[2], ends[3]])


@pytest.fixture
def steps(small: Upscaler, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the width of each picture that the model upscales."""
    widths: list[int] = []
    upscale = small.upscale_tagged

    def counted(picture: Picture, *arguments: Any) -> Picture:
        widths.append(picture.pixels.shape[-1])
        return upscale(picture, *arguments)

    monkeypatch.setattr(small, "upscale_tagged", counted)
    return widths


def test_a_later_page_that_cannot_be_read_is_found_before_the_first_step(
    small: Upscaler, steps: list[int], tmp_path: Path
) -> None:
    (tmp_path / "a.tif").write_bytes(pages(3))
    limit = FileOptions(max_pixels=20 * 12)  # the third page has 24 x 12 pixels
    for source in (pages(3), tmp_path / "a.tif"):
        with pytest.raises(TooLarge, match=r"page 3 of (the picture|.*a\.tif)"):
            upscale_encoded(small, source, OPTIONS, limit)
    assert steps == []


def test_a_file_is_opened_once_for_all_its_pages(
    small: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tif").write_bytes(pages(3))
    read_file, opened = Path.read_bytes, []

    def counted(path: Path) -> bytes:
        opened.append(path.name)
        return read_file(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    result = upscale_encoded(small, tmp_path / "a.tif", OPTIONS, FileOptions())
    assert opened.count("a.tif") == 2  # to see that it has pages, and for them
    assert result == upscale_encoded(small, pages(3), OPTIONS, FileOptions())


@pytest.mark.parametrize(("limit", "done"), [(100, 1), (2900, 2)])
def test_pages_that_one_file_cannot_hold_are_refused_as_soon_as_that_is_clear(
    small: Upscaler, steps: list[int], monkeypatch: pytest.MonkeyPatch, limit: int, done: int
) -> None:
    monkeypatch.setattr(codec, "TIFF_BYTES", limit)
    monkeypatch.setattr(
        codec, "encode_result", lambda *_: codec.Encoded(bytes(1500), "tiff", 64, 48)
    )
    with pytest.raises(OutputError, match="the 3 pages would need about"):
        upscale_encoded(small, pages(3), OPTIONS, FileOptions())
    assert len(steps) == done


def test_other_formats_get_the_first_page_with_a_note(small: Upscaler) -> None:
    options = FileOptions(format="png")
    result = upscale_encoded(small, pages(3), OPTIONS, options)
    assert result.notes == ("only the first of 3 pages",)
    picture, tagged = read_tagged(small, pages(3), OPTIONS, options)
    ends = encode_result(small, small.upscale_tagged(picture, tagged), tagged, FileOptions())
    assert ends.format == "tiff"
    assert ends.notes == result.notes
