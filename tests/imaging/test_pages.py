"""Pages and frames: which one is read, and what is said of the others."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, features

from linearsr.errors import InputError
from linearsr.imaging import files
from linearsr.imaging.files import encode, join_pages, read
from linearsr.imaging.listing import choose_pictures
from linearsr.storage.walk import Notes


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


CR2_DIRECTORY = 2 + 10 * 12 + 4


def tiff(*pages: dict[str, Any], order: str = "<", cr2: bool = False) -> bytes:
    """A TIFF file: size, kind (NewSubfileType), photometric (None for none), sub (pages) of each.

    Its samples are not compressed, but compression and packed (bytes) may be given, and further
    tags of bytes.
    """
    data = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(8))
    if cr2:
        data.extend(bytes(4 + CR2_DIRECTORY))

    def add(page: dict[str, Any]) -> tuple[int, int]:
        """Append a page; return where it is and where its next offset belongs."""
        subs = [add(sub)[0] for sub in page.get("sub", ())]
        width, height = page["size"]
        photometric = page.get("photometric", 2)
        bands = 3 if photometric in (2, 6, 8, 34892) else 1
        samples = np.full(width * height * bands, page.get("value", 100), np.uint8).tobytes()
        samples = page.get("packed", samples)
        strip = len(data)
        data.extend(samples + bytes(len(samples) % 2))
        bits = len(data)
        data.extend(struct.pack(f"{order}4H", 8, 8, 8, 0))
        sub_at = len(data)
        data.extend(struct.pack(f"{order}{len(subs)}I", *subs))
        entries = [
            (254, 4, 1, page.get("kind", 0)),
            (256, 4, 1, width),
            (257, 4, 1, height),
            (258, 3, bands, bits if bands == 3 else 8),
            (259, 3, 1, page.get("compression", 1)),
            *([] if photometric is None else [(262, 3, 1, photometric)]),
            (273, 4, 1, strip),
            (277, 3, 1, bands),
            (278, 4, 1, height),
            (279, 4, 1, len(samples)),
        ]
        for tag, value in page.get("tags", {}).items():
            entries.append((tag, 7, len(value), len(data)))
            data.extend(value + bytes(len(value) % 2))
        entries += [(274, 3, 1, page["turned"])] if "turned" in page else []
        if subs:
            entries.append((330, 4, len(subs), subs[0] if len(subs) == 1 else sub_at))
        at = len(data)
        data.extend(struct.pack(f"{order}H", len(entries)))
        for tag, kind, count, value in sorted(entries):
            data.extend(struct.pack(f"{order}HHI", tag, kind, count))
            short = kind == 3 and count == 1
            data.extend(struct.pack(f"{order}HH" if short else f"{order}I", value, *([0] * short)))
        data.extend(bytes(4))
        return at, len(data) - 4

    link = 4
    for page in pages:
        at, following = add(page)
        data[link : link + 4] = struct.pack(f"{order}I", at)
        link = following
    if cr2:
        (first,) = struct.unpack_from("<I", data, 4)
        data[16 : 16 + CR2_DIRECTORY] = data[first : first + CR2_DIRECTORY]
        data[4:12] = b"\x10\0\0\0CR\2\0"
    return bytes(data)


THUMBNAIL = {"size": (6, 4), "kind": 1}


def test_the_test_writes_what_libraries_read() -> None:
    for order in "<>":
        data = tiff({"size": (24, 16), "value": 7}, {"size": (8, 9)}, order=order)
        image = Image.open(io.BytesIO(data))
        assert (image.size, image.n_frames) == ((24, 16), 2)  # type: ignore[attr-defined]
        assert read(data).pixels.shape == (3, 16, 24)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("place", ["chain", "sub"])
def test_a_thumbnail_before_its_photograph_is_passed_over(place: str, order: str) -> None:
    full = {"size": (24, 16), "value": 200}
    smaller = {"size": (12, 8), "kind": 1}
    if place == "chain":
        data = tiff(THUMBNAIL, full, smaller, order=order)
    else:
        data = tiff({**THUMBNAIL, "sub": [smaller, full]}, order=order)
    result = read(data)
    assert result.pixels.shape == (3, 16, 24)
    assert (result.pixels * 255).round().unique().tolist() == [200]
    assert (result.pages, result.notes) == (1, ())
    format, sizes = files.measure(data)
    assert (format, *sizes[0]) == ("tiff", 24, 16)
    with pytest.raises(InputError, match="--max-pixels"):
        read(data, max_pixels=100)


@pytest.mark.parametrize("photometric", [32803, 34892])
def test_raw_photographs_are_refused_by_name(photometric: int) -> None:
    raw = {"size": (24, 16), "photometric": photometric}
    files_of_cameras = (
        tiff({**THUMBNAIL, "sub": [raw]}),
        tiff(THUMBNAIL, raw),
        tiff(raw),
        tiff({"size": (24, 16)}, {"size": (6, 4)}, cr2=True),
    )
    for data in files_of_cameras:
        for look in (read, files.measure):
            with pytest.raises(InputError, match=r"a raw photograph.*develop it"):
                look(data)


@pytest.mark.parametrize(("compression", "photometric"), [(34713, 6), (65000, None), (32767, 1)])
def test_raw_photographs_are_known_by_their_compression(
    compression: int, photometric: int | None
) -> None:
    raw = {"size": (24, 16), "compression": compression, "photometric": photometric}
    for data in (tiff({**THUMBNAIL, "sub": [raw]}), tiff({"size": (6, 4)}, raw)):
        with pytest.raises(InputError, match=r"a raw photograph.*develop it"):
            read(data)


@pytest.mark.parametrize("kind", [{}, {"kind": 1}])
def test_larger_picture_in_a_subifd_is_the_page(kind: dict[str, int]) -> None:
    smaller, full = {"size": (12, 8)}, {"size": (24, 16), "value": 200}
    data = tiff({"size": (6, 4), **kind, "sub": [smaller, full]}, {"size": (9, 9)})
    for number, size in enumerate([(16, 24), (9, 9)]):
        assert (read(data, page=number).pages, read(data).notes) == (2, ())
        assert read(data, page=number).pixels.shape[1:] == size


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [{}, {"photometric": 8}])
def test_picture_in_a_subifd_has_the_tags_of_its_directory(
    kind: dict[str, int], order: str
) -> None:
    iptc = b"\x1c\x02\x78\x00\x06A lake"
    tags = {700: b"<x:xmpmeta/>", 33723: iptc}
    full = {"size": (24, 16), **kind}
    data = tiff({**THUMBNAIL, "tags": tags, "turned": 6, "sub": [full]}, order=order)
    result = read(data)
    assert (result.iptc, result.xmp) == (iptc, b"<x:xmpmeta/>")
    assert result.pixels.shape == (3, 24, 16)
    assert files.measure(data) == ("tiff", [(16, 24)])


@pytest.mark.skipif(not features.check("libtiff"), reason="this PIL has no libtiff")
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["zstd", "lab", "unreadable"])
def test_thumbnail_never_stands_for_a_picture_that_only_pil_reads(kind: str, order: str) -> None:
    full: dict[str, Any] = {"size": (24, 16), "value": 200}
    if kind == "zstd":
        packed = pa.compress(bytes([200]) * (24 * 16 * 3), codec="zstd", asbytes=True)
        full |= {"compression": 50000, "packed": packed}
    else:
        full |= {"photometric": 8} if kind == "lab" else {"compression": 34887}
    data = tiff({**THUMBNAIL, "sub": [full]}, order=order)
    assert files.measure(data) == ("tiff", [(24, 16)])
    if kind == "unreadable":
        with pytest.raises(InputError, match="holds LERC compression"):
            read(data)
    else:
        assert read(data).pixels.shape == (3, 16, 24)
        assert kind == "lab" or (read(data).pixels * 255).round().unique().tolist() == [200]


def test_further_pictures_of_a_jpeg_are_noted() -> None:
    pictures = [picture(seed, (48, 32)) for seed in range(3)]
    data = saved(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    assert read(data).notes == ("only the first of 3 pictures",)
    assert read(saved(pictures[0], "MPO")).notes == ()
    # Those that another program has cut off, and thumbnails, are no pictures.
    first = len(data) - data[::-1].index(b"\xff\xd8\xff"[::-1]) - 3
    assert read(data[:first]).notes == ("only the first of 2 pictures",)
    entries = data.index(struct.pack("<HHI", 0xB002, 7, 3 * 16)) + 12
    at = data.index(struct.pack("<I", 0x030000), entries) + 16
    thumbnail = data[:at] + struct.pack("<I", 0x010001) + data[at + 4 :]
    assert read(thumbnail).notes == ("only the first of 2 pictures",)


def test_smaller_copies_and_masks_are_no_pages() -> None:
    data = tiff({"size": (24, 16)}, {"size": (12, 8), "kind": 1}, {"size": (24, 16), "kind": 4})
    assert read(data).pages == 1
    data = tiff({"size": (24, 16)}, {"size": (12, 8), "kind": 2}, {"size": (24, 16), "kind": 2})
    assert read(data).pages == 3


def test_a_chain_of_pages_that_loops_ends() -> None:
    data = bytearray(tiff({"size": (24, 16)}, {"size": (8, 9)}))
    first = struct.unpack("<I", data[4:8])[0]
    data[-4:] = struct.pack("<I", first)
    assert read(bytes(data)).pages == 2


def test_every_page_is_read_by_its_number() -> None:
    pages = [picture(seed, (24 + seed, 16)) for seed in range(3)]
    data = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    for number, page in enumerate(pages):
        result = read(data, page=number)
        assert result.pages == 3
        np.testing.assert_array_equal(
            (result.pixels * 255).round().permute(1, 2, 0).numpy(), np.asarray(page)
        )


def test_joined_pages_are_those_of_their_files() -> None:
    pages = [picture(seed, (24 + seed, 16)) for seed in range(3)]
    encoded = []
    for number, page in enumerate(pages):
        grey = files.from_pil(page.convert("L") if number == 1 else page)
        encoded.append(
            encode(grey, "tiff", provenance={"software": "linearsr", "page": f"{number}"})
        )
    data = join_pages(encoded)
    image = Image.open(io.BytesIO(data))
    assert image.n_frames == 3  # type: ignore[attr-defined]
    for number, page in enumerate(pages):
        result = read(data, page=number)
        assert result.grey == (number == 1)
        assert (result.pixels == read(encoded[number]).pixels).all()
        assert result.exif is not None
        assert f'"page": "{number}"'.encode() in result.exif
        image.seek(number)
        shown = np.asarray(image)
        np.testing.assert_array_equal(shown, np.asarray(page.convert("L") if number == 1 else page))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF"])
def test_animations_say_that_one_frame_is_read(format: str) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this PIL has no AVIF")
    frames = [picture(seed) for seed in range(4)]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
    assert read(data).notes == ("only the first of 4 frames",)
    assert read(saved(frames[0], format)).notes == ()


def test_pages_after_a_thumbnail_are_all_pages() -> None:
    data = tiff(THUMBNAIL, {"size": (24, 16), "value": 7}, {"size": (12, 8), "value": 9})
    for number, (size, value) in enumerate((((16, 24), 7), ((8, 12), 9))):
        result = read(data, page=number)
        assert (result.pages, result.notes) == (2, ())
        assert result.pixels.shape[1:] == size
        assert (result.pixels * 255).round().unique().tolist() == [value]


def test_a_broken_subifd_costs_no_page() -> None:
    pages = [{"size": (24, 16), "sub": [THUMBNAIL]}, {"size": (8, 9)}, {"size": (8, 9)}]
    data = bytearray(tiff(*pages))
    at = data.index(struct.pack("<HHI", 330, 4, 1)) + 8
    for offset in (len(data) + 1000, len(data) - 1, 2**32 - 1):
        data[at : at + 4] = struct.pack("<I", offset)
        assert (read(bytes(data)).pages, read(bytes(data)).notes) == (3, ())


def test_pages_that_cannot_be_read_are_noted() -> None:
    two = tiff({"size": (24, 16)}, {"size": (8, 9)})
    three = tiff({"size": (24, 16)}, {"size": (8, 9)}, {"size": (8, 9)})
    for cut in (len(two), len(three) - CR2_DIRECTORY):
        result = read(three[:cut])
        assert result.pages == 2
        assert result.notes == ("its further pages cannot be read",)
    data = tiff(*[{"size": (1, 1)}] * 10_001)
    assert read(data).pages == 10_000
    assert read(data).notes == ("its further pages cannot be read",)


def test_pixels_that_look_like_the_mark_of_a_raw_photograph_are_read() -> None:
    data = bytearray(tiff({"size": (24, 16), "photometric": 1}))
    strip = data.index(struct.pack("<HHI", 273, 4, 1)) + 8
    data[strip : strip + 4] = struct.pack("<I", 8)
    data[8:12] = b"CR\2\0"
    assert read(bytes(data)).pixels.shape == (3, 16, 24)
    assert choose_pictures(["scan"], lambda _: bytes(data), Notes()) == ["scan"]
