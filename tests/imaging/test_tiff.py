"""Directories of tags: hostile ones, all types of values, and blocks that are too long."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from linearsr.imaging import files, tiff
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
    assert files.measure(hostile(repeats, subs)) == ("tiff", 24, 16)
    assert 20_000 < read < 2**20
