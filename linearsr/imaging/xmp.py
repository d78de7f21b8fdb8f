"""Keep XMP right for a result, and turn IPTC into XMP for formats that have no IPTC.

Both are kept as they are but for sizes and orientation, which described the old picture.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final
from xml.parsers import expat
from xml.sax.saxutils import escape

# Properties of the old file: an attribute or an element each.
_OLD: Final = (
    rb"(?:tiff:(?:Orientation|ImageWidth|ImageLength|XResolution|YResolution|ResolutionUnit)"
    rb"|exif:(?:PixelXDimension|PixelYDimension)"
    rb"|xmp:Thumbnails|xmpGImg:(?:width|height|format|image))"
)
_OLD_ATTRIBUTE: Final = re.compile(rb"\s" + _OLD + rb"\s*=\s*(?:\"[^\"]*\"|'[^']*')")
# A start tag; the second group is a slash if the element ends with it.
_OLD_START: Final = re.compile(
    rb"<(" + _OLD + rb")(?:\s+[\w:.-]+\s*=\s*(?:\"[^\"<]*\"|'[^'<]*'))*\s*(/?)>"
)
_DESCRIPTION_END: Final = b"</rdf:RDF>"

# JPEG's way of telling that the XMP goes on elsewhere: an attribute or an element.
_MORE: Final = re.compile(
    rb"\sxmpNote:HasExtendedXMP\s*=\s*[\"'](\w*)[\"']"
    rb"|<xmpNote:HasExtendedXMP>(\w*)</xmpNote:HasExtendedXMP>"
)
_PACKET: Final = re.compile(rb"<\?xpacket[^>]{,200}\?>")

_DATE: Final = 55
# The fields of IPTC's record 2 that XMP has a property for, and the list that holds its values.
_FIELDS: Final = {
    5: ("dc:title", "Alt"),
    25: ("dc:subject", "Bag"),
    40: ("photoshop:Instructions", ""),
    _DATE: ("photoshop:DateCreated", ""),
    80: ("dc:creator", "Seq"),
    90: ("photoshop:City", ""),
    95: ("photoshop:State", ""),
    101: ("photoshop:Country", ""),
    103: ("photoshop:TransmissionReference", ""),
    105: ("photoshop:Headline", ""),
    110: ("photoshop:Credit", ""),
    115: ("photoshop:Source", ""),
    116: ("dc:rights", "Alt"),
    120: ("dc:description", "Alt"),
    122: ("photoshop:CaptionWriter", ""),
}
_EMPTY: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"></rdf:RDF>'
    '</x:xmpmeta><?xpacket end="w"?>'
).encode()
_POINTER: Final = (
    b'<rdf:Description rdf:about="" xmlns:xmpNote="http://ns.adobe.com/xmp/note/" '
    b'xmpNote:HasExtendedXMP="%s"/></rdf:RDF>'
)
_NAMESPACES: Final = (
    'xmlns:dc="http://purl.org/dc/elements/1.1/" '
    'xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"'
)


def result_xmp(xmp: bytes | None, iptc: bytes | None = None) -> bytes | None:
    """Return XMP without the sizes, orientation and thumbnails of the old picture.

    iptc: IPTC's records; those fields of them that XMP lacks are added. XMP that is not UTF-8 is
    returned unchanged.
    """
    if xmp is not None:
        xmp = _without_old_elements(_OLD_ATTRIBUTE.sub(b"", xmp))
    added = _properties(iptc, xmp or b"") if iptc else ""
    if not added:
        return xmp
    before, end, after = (xmp or _EMPTY).rpartition(_DESCRIPTION_END)
    if not end:
        return xmp
    description = f'<rdf:Description rdf:about="" {_NAMESPACES}>{added}</rdf:Description>'
    return before + description.encode() + end + after


def extended(xmp: bytes, limit: int) -> tuple[bytes, bytes, bytes]:
    """Return XMP of `limit` bytes at most, the name of an extension, and the extension.

    The extension is empty if there is none, also if the XMP cannot be divided.
    """
    if len(xmp) <= limit or _DESCRIPTION_END not in xmp:
        return xmp, b"", b""
    rest = _PACKET.sub(b"", xmp).strip()
    guid = hashlib.md5(rest, usedforsecurity=False).hexdigest().upper().encode()
    return _EMPTY.replace(_DESCRIPTION_END, _POINTER % guid), guid, rest


def joined(
    xmp: bytes | None, parts: Mapping[bytes, Sequence[tuple[int, bytes]]]
) -> tuple[bytes | None, bool]:
    """Return XMP with the extension that it names, and whether that could not be read.

    parts: the offset and the bytes of each part, by the name of the extension.
    """
    if xmp is None or not (name := _MORE.search(xmp)):
        return xmp, False
    xmp = _MORE.sub(b"", xmp)
    rest = b"".join(part for _, part in sorted(parts.get(name[1] or name[2], ())))
    descriptions = rest.partition(b"<rdf:RDF")[2].partition(b">")[2].rpartition(_DESCRIPTION_END)[0]
    before, end, after = xmp.rpartition(_DESCRIPTION_END)
    whole = before + descriptions + end + after
    # A part that is missing, or a prefix that is declared outside, leaves no XML.
    return (whole, False) if _is_xml(rest) and _is_xml(whole) else (xmp, True)


def _is_xml(data: bytes) -> bool:
    try:
        # Prefixes of names must be known as well.
        expat.ParserCreate(namespace_separator=" ").Parse(data.rstrip(b"\0"), True)
    except expat.ExpatError:
        return False
    return True


def _without_old_elements(xmp: bytes) -> bytes:
    """Return XMP without the elements of the old file; one without an end tag stays.

    Each byte is searched once for each name at most, so that no file takes long.
    """
    kept, at = [], 0
    unclosed: set[bytes] = set()
    for start in _OLD_START.finditer(xmp):
        name, slash = start.groups()
        if start.start() < at or name in unclosed:
            continue
        end: re.Match[bytes] | None = start
        if not slash:
            end = re.compile(rb"</" + name + rb"\s*>").search(xmp, start.end())
        if end is None:
            unclosed.add(name)
            continue
        kept.append(xmp[at : start.start()])
        at = end.end()
    return b"".join([*kept, xmp[at:]])


def _properties(iptc: bytes, xmp: bytes) -> str:
    """Return IPTC's fields as XML, without those that XMP has."""
    values: dict[int, list[str]] = {}
    for number, text in _records(iptc):
        values.setdefault(number, []).append(text)
    lines = []
    for number, texts in values.items():
        name, kind = _FIELDS[number]
        if re.search(rb"[<\s]" + name.encode() + rb"[\s=>/]", xmp):
            continue
        language = ' xml:lang="x-default"' if kind == "Alt" else ""
        items = "".join(f"<rdf:li{language}>{_xml(text)}</rdf:li>" for text in texts)
        value = f"<rdf:{kind}>{items}</rdf:{kind}>" if kind else _xml(texts[0])
        lines.append(f"<{name}>{value}</{name}>")
    return "".join(lines)


def _xml(text: str) -> str:
    return escape("".join(letter for letter in text if letter.isprintable() or letter in "\n\t"))


def _records(iptc: bytes) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each field of record 2 that XMP has a property for."""
    at = 0
    codec = "utf-8" if b"\x1c\x01\x5a\x00\x03\x1b%G" in iptc else None
    while iptc[at : at + 1] == b"\x1c" and at + 5 <= len(iptc):
        record, number = iptc[at + 1], iptc[at + 2]
        size = int.from_bytes(iptc[at + 3 : at + 5], "big")
        if size >= 2**15:  # a field longer than any text here
            return
        body = iptc[at + 5 : at + 5 + size]
        if record == 2 and number in _FIELDS:
            text = _decoded(body, codec)
            yield number, _dated(text) if number == _DATE else text
        at += 5 + size


def _dated(text: str) -> str:
    """Return IPTC's date, whose unknown parts are zeros, in the way of XMP; other texts as is."""
    if not re.fullmatch(r"[0-9]{8}", text):
        return text
    return re.sub("-00.*", "", f"{text[:4]}-{text[4:6]}-{text[6:]}")


def _decoded(body: bytes, codec: str | None) -> str:
    """Return a text, which is UTF-8 if the records say so, or if it can be."""
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        return body.decode(codec or "latin-1", "replace")
