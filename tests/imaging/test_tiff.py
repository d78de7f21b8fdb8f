"""Directories of tags: hostile ones, all types of values, and blocks that are too long."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from PIL.ExifTags import IFD, Base

from linearsr.errors import InputError
from linearsr.imaging import exif, files, tiff
from linearsr.imaging.containers import MAX_EXIF
from tests.imaging.test_pages import tiff as tiff_file


def hostile(repeats: int, subs: int) -> bytes:
    """A page whose SubIFDs are directories of 65,535 tags of an unknown type, 2 bytes apart."""
    page = tiff_file({"size": (24, 16), "sub": [{"size": (6, 4)}] * (repeats * subs)})
    data = bytearray(page)
    inner = struct.pack("<H", 65535) + struct.pack("<HHI", 5, 99, 1) * 65535
    at = len(data)
    data += inner + bytes(2 * subs)
    offsets = [at + 12 * (n % subs) for n in range(repeats * subs)]
    # The 65,535 entries are those of every directory that begins within the first ones.
    for offset in offsets:
        data[offset : offset + 2] = struct.pack("<H", 65535)
    place = data.index(struct.pack("<HHI", 330, 4, len(offsets))) + 8
    (table,) = struct.unpack_from("<I", data, place)
    struct.pack_into(f"<{len(offsets)}I", data, table, *offsets)
    return bytes(data)


@pytest.mark.parametrize(("repeats", "subs"), [(60, 1), (1, 60)])
def test_directories_in_directories_end_soon(
    repeats: int, subs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_value, read = tiff._Reader._value, 0

    def count(*arguments: Any) -> tiff.Value | None:
        nonlocal read
        read += 1
        return read_value(*arguments)

    monkeypatch.setattr(tiff._Reader, "_value", count)
    format, sizes = files.measure(hostile(repeats, subs))
    assert (format, *sizes[0]) == ("tiff", 24, 16)
    assert 20_000 < read < 2**20


def big_tiff(order: str) -> bytes:
    """A BigTIFF file with numbers of 8 bytes, in itself and in EXIF, to which an IFD8 leads."""
    data = bytearray((b"II+\0" if order == "<" else b"MM\0+") + struct.pack(f"{order}HHQ", 8, 0, 0))

    def add(*entries: tuple[int, int, int]) -> int:
        at = len(data)
        data.extend(struct.pack(f"{order}Q", len(entries)))
        for tag, kind, value in entries:
            unit = {3: "H6x", 4: "I4x", 16: "Q", 17: "q", 18: "Q"}[kind]
            data.extend(struct.pack(f"{order}HHQ{unit}", tag, kind, 1, value))
        data.extend(bytes(8))
        return at

    strip = len(data)
    data.extend(bytes(range(64)))
    inner = add((Base.ISOSpeed, 16, 200), (Base.FlashEnergy, 16, 2**40), (Base.Flash, 17, -9))
    layout = [(256, 3, 8), (257, 3, 8), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 16, strip)]
    rest = [(277, 3, 1), (278, 3, 8), (279, 16, 64), (Base.Rating, 16, 4), (IFD.Exif, 18, inner)]
    struct.pack_into(f"{order}Q", data, 8, add(*layout, *rest))
    return bytes(data)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "tiff"])
def test_numbers_of_big_tiff_become_those_of_exif(format: str, order: str) -> None:
    picture = files.read(big_tiff(order))
    assert picture.pixels.shape == (3, 8, 8)
    tags = exif.parse(files.read(files.encode(picture, format)).exif)
    assert tags is not None
    assert tags.number(Base.Rating) == 4
    assert tags.number(Base.ISOSpeed, IFD.Exif) == 200
    assert tags.number(Base.Flash, IFD.Exif) == -9
    assert Base.FlashEnergy not in tags.group(IFD.Exif)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "tiff"])
def test_texts_of_the_type_utf_8_are_kept(format: str) -> None:
    artist = tiff.Value(129, "Jos\u00e9\0".encode())
    block = tiff.Tags("<", {Base.Artist: artist}).tobytes()
    picture = files.Picture(torch.zeros(3, 8, 8), exif=exif.HEADER + block)
    tags = exif.parse(files.read(files.encode(picture, format)).exif)
    assert tags is not None
    kept = tags.root[Base.Artist]
    assert isinstance(kept, tiff.Value)
    assert kept[:2] == artist[:2]


def texts(sizes: dict[int, int]) -> tiff.Directory:
    return {tag: tiff.Value(2, b"x" * (size - 1) + b"\0") for tag, size in sizes.items()}


PERSONAL = {Base.ImageDescription: 500, Base.Artist: 240, Base.Copyright: 210}


@pytest.mark.parametrize("at", [8, 200, 65_500])
@pytest.mark.parametrize("size", [100, 40_000, 65_000])
def test_a_maker_note_does_not_drive_out_what_people_wrote(size: int, at: int) -> None:
    tags = tiff.Tags("<", texts({**PERSONAL, Base.Make: 100}))
    tags.child(IFD.Exif)[Base.MakerNote] = tiff.Value(7, b"N" * size, at=at)
    kept = tiff.parse(tags.tobytes(MAX_EXIF))
    assert kept is not None
    assert kept.root.keys() >= PERSONAL.keys()
    assert (Base.MakerNote in kept.group(IFD.Exif)) == (size < 65_000)


def test_one_value_that_is_too_long_goes_alone() -> None:
    for path in ((), (IFD.Exif,), (IFD.GPSInfo,), (IFD.Exif, IFD.Interop)):
        tags = tiff.Tags(">", texts(PERSONAL))
        tags.root[IFD.GPSInfo] = {}
        tags.root[IFD.Exif] = {IFD.Interop: {}}
        tags.group(*path)[Base.DocumentName] = tiff.Value(2, bytes(100_000))
        kept = tiff.parse(tags.tobytes(MAX_EXIF))
        assert kept is not None
        assert kept.root.keys() >= PERSONAL.keys()
        assert Base.DocumentName not in kept.group(*path)
    tags = tiff.Tags(">", texts({**PERSONAL, Base.ImageDescription: 65_500}))
    kept = tiff.parse(tags.tobytes(MAX_EXIF))
    assert kept is not None
    assert kept.root.keys() == {Base.Artist, Base.Copyright}


def test_exif_that_cannot_be_short_enough_is_left_out() -> None:
    assert tiff.Tags("<", {IFD.Exif: {IFD.Interop: {}}}).tobytes(20) == b""


def test_an_offset_too_large_for_python_is_a_damaged_file() -> None:
    data = bytearray(big_tiff("<"))
    data[8:16] = b"\xff" * 8
    with pytest.raises(InputError, match="damaged"):
        files.read(bytes(data))
