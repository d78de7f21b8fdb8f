"""Read and write directories of tags: those of TIFF files, and EXIF, which is such a directory.

Each value keeps its type and its bytes. PIL and libexif are not enough here: libexif drops the tags
that it does not know, PIL turns UNDEFINED into BYTE, and neither writes EXIF into a TIFF file with
16 bit colours. Nothing is decoded but numbers.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, Union

from PIL.ExifTags import IFD, Base

# A hostile file can point thousands of tags at one large block, so the number of bytes is limited.
_MAX_READ: Final = 8 * 2**20
# It can also list directories within directories, so the number of tags is limited as well.
_MAX_TAGS: Final = 2**19
_MAX_PAGES: Final = 10_000

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED = 1, 2, 3, 4, 5, 7
# The size of one value of each type, and the size of the units whose order of bytes matters.
# Type 129 is EXIF 3.0's UTF-8.
_SIZES: Final = {
    **{1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4},
    129: 1,
}
# The types of BigTIFF that EXIF lacks (LONG8, SLONG8, IFD8), and those that they become.
_SHORTER: Final = {16: (LONG, "Q", "I"), 17: (9, "q", "i"), 18: (LONG, "Q", "I")}
_UNITS: Final = {**_SIZES, 5: 4, 10: 4}
_NUMBERS: Final = {
    1: "B",
    3: "H",
    4: "I",
    5: "I",
    6: "b",
    8: "h",
    9: "i",
    10: "i",
    13: "I",
}


# Tags that hold the words of a person, or that EXIF must have.
_LAST: Final[frozenset[int]] = frozenset(
    {
        Base.ImageDescription,
        Base.Artist,
        Base.Copyright,
        Base.Software,
        Base.DateTimeOriginal,
        Base.ExifVersion,
        Base.UserComment,
        Base.XPTitle,
        Base.XPComment,
        Base.XPAuthor,
        Base.XPKeywords,
        Base.XPSubject,
    }
)


_BIG: Final = (b"+\0", b"\0+")
# IPTC metadata: as they are, and in a resource of Photoshop.
IPTC, PHOTOSHOP = 33723, 34377
# Tags of a directory that hold for the pictures in its SubIFDs as well: XMP, IPTC in its two places
# and the orientation.
_SHARED: Final = (Base.XMLPacket, IPTC, PHOTOSHOP, Base.Orientation)


class Value(NamedTuple):
    """A tag's value: the number of its type, its bytes, and where in the file they lay."""

    kind: int
    data: bytes
    at: int | None = None


Directory = dict[int, Union[Value, "Directory"]]


class Tags:
    """The first directory of EXIF or of a TIFF file, with the directories in it."""

    def __init__(self, order: str = "<", root: Directory | None = None) -> None:
        self.order = order
        self.root: Directory = {} if root is None else root

    def group(self, *path: int) -> Directory:
        """Return the directory at this path of tags; an empty one that is not kept if none."""
        found = self.root
        for tag in path:
            child = found.get(tag)
            found = child if isinstance(child, dict) else {}
        return found

    def numbers(self, value: Any) -> list[float]:
        """Return a value's numbers; none if it is not a value of numbers."""
        if not isinstance(value, Value) or value.kind not in _NUMBERS:
            return []
        unit = _NUMBERS[value.kind]
        count = len(value.data) // struct.calcsize(unit)
        numbers = struct.unpack(f"{self.order}{count}{unit}", value.data)
        if value.kind in (5, 10):
            pairs = zip(numbers[::2], numbers[1::2], strict=True)
            return [top / bottom if bottom else 0.0 for top, bottom in pairs]
        return list(numbers)

    def number(self, tag: int, *path: int) -> float | None:
        """Return the first number of a tag; None if it has none."""
        numbers = self.numbers(self.group(*path).get(tag))
        return numbers[0] if numbers else None

    def pack(self, kind: int, *numbers: int) -> Value:
        """Return a value of SHORT, LONG or RATIONAL numbers (two for each)."""
        unit = "H" if kind == SHORT else "I"
        return Value(kind, struct.pack(f"{self.order}{len(numbers)}{unit}", *numbers))

    def child(self, tag: int) -> Directory:
        """Return the directory in this tag of the first one; add an empty one if there is none."""
        child = self.root.get(tag)
        if not isinstance(child, dict):
            child = self.root[tag] = {}
        return child

    def ordered(self, order: str) -> Tags:
        """Return these tags with another order of bytes."""
        return self if order == self.order else Tags(order, _swapped(self.root))

    def tobytes(self, limit: int | None = None) -> bytes:
        """Return EXIF without its header.

        A maker note stays where it was if possible, because cameras write offsets into it that
        count from the start of the block. If the block is longer than `limit`, the note may move,
        and then the largest values go, those of _LAST after all others.
        """
        note = self.group(IFD.Exif).get(Base.MakerNote)
        keep = note if isinstance(note, Value) and 8 <= (note.at or 0) < 2**16 else None
        data = self._written(keep)
        if limit is None or len(data) <= limit:
            return data
        data = self._written()
        values = self._values(limit)
        while values and len(data) > limit:
            excess = len(data) - limit
            while values and excess > 0:
                group, tag, size = values.pop()
                del group[tag]
                excess -= 12 + size
            data = self._written()
        return data if len(data) <= limit else b""

    def count(self) -> int:
        """Return the number of values in all directories."""
        return len(self._values(0))

    def _values(self, limit: int) -> list[tuple[Directory, int, int]]:
        """Return the group, tag and size of each value, those to give up first at the end."""
        paths = ((), (IFD.Exif,), (IFD.GPSInfo,), (IFD.Exif, IFD.Interop))
        values = [
            (group, tag, len(value.data))
            for group in (self.group(*path) for path in paths)
            for tag, value in group.items()
            if isinstance(value, Value)
        ]
        # A value that is nearly too long by itself would drive out all others.
        return sorted(values, key=lambda v: (v[1] not in _LAST or v[2] > limit * 7 // 8, v[2]))

    def _written(self, keep: Value | None = None) -> bytes:
        writer = _Writer(self.order, keep=keep)
        first = writer.directory(self.root)
        mark = b"II*\0" if self.order == "<" else b"MM\0*"
        writer.written[:8] = mark + struct.pack(f"{self.order}I", first)
        return bytes(writer.written)


def _swapped(directory: Directory) -> Directory:
    def swap(value: Value | Directory) -> Value | Directory:
        if isinstance(value, dict):
            return _swapped(value)
        unit = _UNITS[value.kind]
        units = (value.data[i : i + unit][::-1] for i in range(0, len(value.data), unit))
        return value._replace(data=b"".join(units))

    return {tag: swap(value) for tag, value in directory.items()}


class _Writer:
    """Directories and their values, from the offset `base` of a file on.

    keep: a value that stays where it was; what fits before it is written there.
    """

    def __init__(self, order: str, base: int = 0, keep: Value | None = None) -> None:
        self.order, self.base, self.keep = order, base, keep
        # EXIF begins with eight bytes of header, which the caller writes.
        self.written = bytearray(0 if base else 8)
        self.gap = 0, 0
        if keep is not None and keep.at is not None:
            self.gap = 8, keep.at
            self.written = bytearray(keep.at) + keep.data

    def place(self, data: bytes) -> int:
        """Write data at the next even offset with enough room, and return the offset."""
        low, high = self.gap
        low += low % 2
        if low + len(data) <= high:
            self.written[low : low + len(data)] = data
            self.gap = low + len(data), high
            return low
        self.written += bytes((self.base + len(self.written)) % 2)
        self.written += data
        return self.base + len(self.written) - len(data)

    def directory(self, tags: Directory, *, in_place: bool = False, next: int = 0) -> int:
        """Write a directory and return its offset.

        in_place: values with an offset are in the file already, and the directory comes last, so
            that a file that was cut has none. next: the next directory's offset.
        """
        at = 0 if in_place else self.place(bytes(6 + 12 * len(tags)))
        entries = struct.pack(f"{self.order}H", len(tags))
        for tag, value in sorted(tags.items()):
            if isinstance(value, dict):
                value = Value(LONG, struct.pack(f"{self.order}I", self.directory(value)))
            entries += struct.pack(
                f"{self.order}HHI", tag, value.kind, len(value.data) // _SIZES[value.kind]
            )
            if len(value.data) <= 4:
                entries += value.data.ljust(4, b"\0")
            elif value is self.keep or (in_place and value.at is not None):
                entries += struct.pack(f"{self.order}I", value.at)
            else:
                entries += struct.pack(f"{self.order}I", self.place(value.data))
        entries += struct.pack(f"{self.order}I", next)
        if in_place:
            return self.place(entries)
        begin = at - self.base
        self.written[begin : begin + len(entries)] = entries
        return at


class _Reader:
    """The directories of EXIF without its header, or of a TIFF file, also of a BigTIFF file.

    Raises ValueError or struct.error for other bytes, and for tags that refer to too much data.
    """

    def __init__(self, data: bytes, left: int = _MAX_READ) -> None:
        self.data, self.left, self.tags_left = data, left, _MAX_TAGS
        self.link = 0  # the place of the offset of the directory after the last one
        self.order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
        self.big = data[2:4] in _BIG
        if not self.order or not (self.big or data[2:4] in (b"*\0", b"\0*")):
            raise ValueError("not a block of tags")
        self.first = int(self.unpack("Q" if self.big else "I", 8 if self.big else 4)[0])

    def unpack(self, format: str, at: int) -> tuple[Any, ...]:
        if at > len(self.data):  # BigTIFF's offsets may be too large for Python's own check
            raise struct.error("an offset beyond the end")
        return struct.unpack_from(self.order + format, self.data, at)

    def directory(self, at: int, children: Sequence[int]) -> tuple[Directory, int]:
        """Return the directory at an offset, and the offset of the next one.

        Values that cannot be read are left out; `children` are the tags to follow.
        """
        count_size, entry, format = (8, 20, "HHQ") if self.big else (2, 12, "HHI")
        (count,) = self.unpack("Q" if self.big else "H", at)
        tags: Directory = {}
        start = at + count_size
        count = max(0, min(count, (len(self.data) - start) // entry))
        self.tags_left -= count
        if self.tags_left < 0:
            raise ValueError("there are too many tags")
        for place in range(start, start + count * entry, entry):
            tag, kind, number = self.unpack(format, place)
            value = self._value(place + entry - (8 if self.big else 4), kind, number)
            if value is None or tag in tags:
                continue
            tags[tag] = value
            if tag in children:
                self._follow(tags, tag, value)
        self.link = start + count * entry
        try:
            following = int(self.unpack("Q" if self.big else "I", self.link)[0])
        except struct.error:
            following = 0
        return tags, following

    def _value(self, at: int, kind: int, number: int) -> Value | None:
        size = (8 if kind in _SHORTER else _SIZES.get(kind, 0)) * number
        room = 8 if self.big else 4
        if not size:
            return None
        if size > room:
            (at,) = self.unpack("Q" if self.big else "I", at)
        if at + size > len(self.data):
            return None
        self.left -= size
        if self.left < 0:
            raise ValueError("the tags refer to too much data")
        data = self.data[at : at + size]
        if kind in _SHORTER:
            return self._shortened(kind, data)
        return Value(kind, data, at if size > room else None)

    def _shortened(self, kind: int, data: bytes) -> Value | None:
        """Return numbers of 8 bytes as numbers of 4; None if one does not fit."""
        kind, unit, shorter = _SHORTER[kind]
        numbers = struct.unpack(f"{self.order}{len(data) // 8}{unit}", data)
        try:
            return Value(kind, struct.pack(f"{self.order}{len(numbers)}{shorter}", *numbers))
        except struct.error:
            return None

    def _follow(self, tags: Directory, tag: int, value: Value) -> None:
        # Interop lies in EXIF alone, and the others in the first directory: nothing loops.
        inside = (IFD.Interop,) if tag == IFD.Exif else ()
        del tags[tag]
        try:
            offset = struct.unpack(f"{self.order}I", value.data[:4])[0]
            tags[tag] = self.directory(offset, inside)[0]
        except struct.error:
            pass


def parse(data: bytes, at: int | None = None) -> Tags | None:
    """Return the tags in a block of EXIF, or those of the first page of a TIFF file.

    data: the TIFF file, or the EXIF without `linearsr.imaging.exif.HEADER`. at: the offset of
    another directory to read instead of the first. The result is None if nothing can be read.
    """
    try:
        reader = _Reader(data)
        root, _ = reader.directory(reader.first if at is None else at, (IFD.Exif, IFD.GPSInfo))
        return Tags(reader.order, root)
    except (ValueError, struct.error):
        return None


# Pages


class Page(NamedTuple):
    """A directory of a TIFF file: its place in the chain, and in the page's SubIFDs if not None."""

    number: int
    sub: int | None
    at: int
    tags: Tags

    def value(self, tag: int) -> int:
        """Return a tag's number, or 0."""
        return int(self.tags.number(tag) or 0)

    @property
    def pixels(self) -> int:
        """The number of pixels."""
        return self.value(Base.ImageWidth) * self.value(Base.ImageLength)

    @property
    def is_whole(self) -> bool:
        """Whether this is a picture of its own: no thumbnail, smaller copy or mask."""
        return not self.value(Base.NewSubfileType) & 5 and self.value(Base.SubfileType) != 2


def tiff_pages(data: bytes) -> tuple[list[Page], bytes | None]:
    """Return the directories of a TIFF file, each followed by its SubIFDs.

    A directory that is listed again is left out, and so is a SubIFD that cannot be read. If the
    chain goes on with directories that cannot be read, the file without them is returned as well.
    """
    pages: list[Page] = []
    seen: set[int] = set()
    link = 0
    try:
        reader = _Reader(data, left=len(data) + _MAX_READ)
        at, number = reader.first, 0
        while at and at not in seen:
            if len(pages) >= _MAX_PAGES:
                raise ValueError("there are too many pages")
            seen.add(at)
            root, following = reader.directory(at, ())
            link = reader.link
            tags = Tags(reader.order, root)
            pages += [Page(number, None, at, tags), *_sub_pages(reader, number, tags, seen)]
            at, number = following, number + 1
    except (ValueError, struct.error):
        size = 8 if data[2:4] in _BIG else 4
        return pages, data[:link] + bytes(size) + data[link + size :]
    return pages, None


def with_first(data: bytes, at: int) -> bytes:
    """Return a TIFF file whose first page is that of the directory at this offset."""
    order = "<" if data[:2] == b"II" else ">"
    place, unit = (8, "Q") if data[2:4] in _BIG else (4, "I")
    link = struct.pack(f"{order}{unit}", at)
    return data[:place] + link + data[place + len(link) :]


def _sub_pages(reader: _Reader, number: int, page: Tags, seen: set[int]) -> Iterator[Page]:
    for sub, offset in enumerate(map(int, page.numbers(page.root.get(Base.SubIFDs))[:100])):
        if offset not in seen:
            seen.add(offset)
            with contextlib.suppress(struct.error):
                root, _ = reader.directory(offset, ())
                shared: Directory = {tag: page.root[tag] for tag in _SHARED if tag in page.root}
                yield Page(number, sub, offset, Tags(reader.order, {**shared, **root}))


def join_tiff(files: Sequence[tuple[bytes, Tags | None]]) -> bytes:
    """Return one TIFF file with the page of each file, and with the tags for each.

    The files come from one writer: little-endian and with strips. Each new directory lies at the
    end of the file; the old ones stay behind as a few unused bytes.
    """
    data = bytearray()
    roots: list[Directory] = []
    for file, exif in files:
        data += bytes(len(data) % 2)
        base = len(data)
        reader = _Reader(file, left=len(file) + _MAX_READ)
        root, _ = reader.directory(reader.first, (IFD.Exif, IFD.GPSInfo))
        page = Tags(reader.order, _moved(root, base))
        if base:
            strips = (int(n) + base for n in page.numbers(root[Base.StripOffsets]))
            page.root[Base.StripOffsets] = page.pack(LONG, *strips)
        data += file
        if exif:
            page.root.update(_moved(exif.ordered(reader.order).root, None))
        roots.append(page.root)
    following = 0
    for root in reversed(roots):
        writer = _Writer("<", len(data))
        following = writer.directory(root, in_place=True, next=following)
        data += writer.written
    data[4:8] = struct.pack("<I", following)
    return bytes(data)


def _moved(root: Directory, by: int | None) -> Directory:
    """Return values whose offsets are larger by so many bytes, or forgotten."""

    def move(value: Value | Directory) -> Value | Directory:
        if isinstance(value, dict):
            return _moved(value, by)
        return value._replace(at=None if by is None or value.at is None else value.at + by)

    return {tag: move(value) for tag, value in root.items()}
