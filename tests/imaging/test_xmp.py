"""XMP for results: what described the old picture goes, and all the rest stays."""

from __future__ import annotations

import time

import pytest

from linearsr.imaging.xmp import result_xmp


@pytest.mark.parametrize(
    "piece",
    [
        b"<tiff:Orientation>",
        b"<tiff:Orientation x='1'>",
        b"<xmp:Thumbnails>",
        b"<xmpGImg:image>",
        b" tiff:Orientation='",
        b"<tiff:Orientation a=",
        b"</tiff:Orientation ",
    ],
)
def test_xmp_is_searched_in_linear_time(piece: bytes) -> None:
    xmp = piece * 30_000
    start = time.process_time()
    result = result_xmp(xmp)
    assert time.process_time() - start < 10
    assert result is not None


@pytest.mark.parametrize(
    "old",
    [
        b'<tiff:Orientation rdf:resource="x"/>',
        b"<tiff:Orientation />",
        b"<tiff:Orientation>6</tiff:Orientation >",
        b'<tiff:Orientation a=">"/>',
        b'<exif:PixelXDimension rdf:parseType="Resource"><rdf:value>6</rdf:value>'
        b"</exif:PixelXDimension>",
        b"<xmp:Thumbnails><rdf:Alt><rdf:li><xmpGImg:width>9</xmpGImg:width></rdf:li></rdf:Alt>"
        b"</xmp:Thumbnails>",
    ],
)
def test_old_elements_go_and_their_neighbours_stay(old: bytes) -> None:
    title = b"<dc:title>keep me</dc:title>"
    again = b"<tiff:Orientation>6</tiff:Orientation>"
    assert result_xmp(b"<a>" + old + title + again + title + b"</a>") == (
        b"<a>" + title + title + b"</a>"
    )


def test_an_element_that_never_ends_stays() -> None:
    xmp = b"<a><tiff:Orientation>6<exif:PixelXDimension>9</exif:PixelXDimension></a>"
    assert result_xmp(xmp) == b"<a><tiff:Orientation>6</a>"


def test_dates_of_iptc_become_dates_of_xmp() -> None:
    for date, result in (
        (b"20240131", b"2024-01-31"),
        (b"20240100", b"2024-01"),
        (b"20240000", b"2024"),
        (b"in 1970!", b"in 1970!"),
    ):
        xmp = result_xmp(None, b"\x1c\x02\x37\0\x08" + date)
        assert xmp is not None
        assert b"<photoshop:DateCreated>" + result + b"</photoshop:DateCreated>" in xmp
