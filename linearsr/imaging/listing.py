"""The one rule for which files of a folder or bucket are pictures. Needs no pyarrow and no Ray.

- Files that a system, a NAS or a program leaves among pictures (LITTER) are left out with a count.
- A file with a suffix of READ_SUFFIXES is a picture; if it is damaged, reading it says so.
- Any other file is judged by its first bytes, unless its suffix is known to stand for no picture.
- Pictures of kinds that cannot be read are named, and all other files are left out silently.
"""

from __future__ import annotations

import mimetypes
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Final

from linearsr.errors import Denied, InputError, StorageError, is_text
from linearsr.imaging.files import (
    OTHERS,
    RAW,
    READ_SUFFIXES,
    RESULT_SUFFIXES,
    other_kind,
    sniff,
)
from linearsr.storage.walk import Kind, Notes, walk

# The first bytes that tell pictures from other files, and the number of files that are opened at
# the same time.
HEAD_BYTES: Final = 512
OPENED: Final = 16

_MACOS: Final = Kind("file that macOS made", "files that macOS made", named=False)
_WINDOWS: Final = Kind("file that Windows made", "files that Windows made", named=False)
_THUMBNAIL: Final = Kind("thumbnail", "thumbnails", named=False)
_DELETED: Final = Kind("deleted file", "deleted files", named=False)
_BACKUP: Final = Kind("copy that a program made", "copies that programs made", named=False)
_UNFINISHED: Final = Kind("unfinished download", "unfinished downloads")
_LOCK: Final = Kind("lock file of a program", "lock files of programs", named=False)
_VERSIONS: Final = Kind("file of a version control", "files of a version control", named=False)

# Names of files and folders in lower case; a folder's files are left out with it.
LITTER: Final = {
    **dict.fromkeys(
        (".ds_store", ".localized", "icon\r", ".apdisk", ".volumeicon.icns", "__macosx"), _MACOS
    ),
    **dict.fromkeys((".appledouble", ".fseventsd", ".temporaryitems", ".appledb"), _MACOS),
    **dict.fromkeys((".spotlight-v100", ".documentrevisions-v100", "temporary items"), _MACOS),
    **dict.fromkeys(("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"), _WINDOWS),
    "system volume information": _WINDOWS,
    **dict.fromkeys(("@eadir", ".@__thumb", "@__thumb", ".thumbnails", ".thumbs"), _THUMBNAIL),
    **dict.fromkeys((".tmb", ".wdmc", ".comments"), _THUMBNAIL),
    **dict.fromkeys(("#recycle", "@recycle", "$recycle.bin", "recycle.bin"), _DELETED),
    **dict.fromkeys((".recycle", ".deleted", "network trash folder"), _DELETED),
    **dict.fromkeys(("#snapshot", "@recently-snapshot", ".snapshot", ".snapshots"), _BACKUP),
    **dict.fromkeys((".stversions", ".dropbox.cache"), _BACKUP),
    **dict.fromkeys((".git", ".hg", ".svn"), _VERSIONS),
}
_LITTER_BEGINNINGS: Final = (
    *(("._", _MACOS), (".trash", _DELETED)),
    *((".~lock.", _LOCK), ("~$", _LOCK), (".nfs", _DELETED), (".syncthing.", _UNFINISHED)),
)
# The thumbnails of Linux' desktops, and of Lightroom's catalogues.
_CACHE: Final = re.compile(r"(^|/)\.cache/thumbnails/|previews\.lrdata/")
# Windows' older recycle bins by what is in them, since a folder of people may be called "recycled":
# a folder for each user's number, or files like Dc12.jpg.
_OLD_BIN: Final = re.compile(r"(^|/)recycle[dr]/(s-1-\d|(.*/)?(d[a-z]\d+(\.[^/]*)?|info2)$)")
# exiftool keeps the old file as photo.jpg_original.
_OLD_ENDING: Final = "_original"
_LITTER_ENDINGS: Final = (
    ("~", _BACKUP),
    *((end, _UNFINISHED) for end in (".part", ".partial", ".crdownload", ".download")),
    # The preview of a video.
    (".thm", _THUMBNAIL),
)

# Suffixes that stand for no picture and that the module mimetypes does not know.
_DATA: Final = """
    .arrow .ckpt .db .gz .jsonl .lock .log .lrcat .lrprev .md .npy .npz .parquet .pkl .pt .pth
    .safetensors .sqlite .tfrecord .toml .xmp .yaml .yml .zst
"""
_NO_PICTURES: Final = frozenset(_DATA.split())
# A suffix of any program's binary files says nothing.
_SAYS_NOTHING: Final = "application/octet-stream"
_CAMERAS: Final = """
    .3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .fff .iiq .k25 .kdc .mef .mos .mrw .nef .nrw .orf .pef
    .raf .raw .rw2 .rwl .sr2 .srf .srw .x3f
"""
_RAW_SUFFIXES: Final = frozenset(_CAMERAS.split())
UNKNOWN: Final = Kind("file that cannot be read", "files that cannot be read")
NAME_FAULT: Final = "the file's name is not UTF-8; rename it"
NOT_TEXT: Final = Kind("file whose name is not UTF-8", "files whose names are not UTF-8")


def _unreadable(name: str) -> Kind:
    return Kind(f"{name} picture", f"{name} pictures", "convert to PNG or JPEG")


_RAW: Final = Kind("camera raw file", "camera raw files", "develop to TIFF, PNG or JPEG")
_KINDS: Final = {name: _RAW if name == RAW else _unreadable(name) for name, _, _ in OTHERS}
_PNM: Final = _unreadable("PNM")
_SVG: Final = _unreadable("SVG")
# Kinds whose first bytes say nothing.
_BY_SUFFIX: Final = {
    **{".tga": _unreadable("TGA"), ".pcx": _unreadable("PCX")},
    **dict.fromkeys(_RAW_SUFFIXES, _RAW),
}


def find_images(folder: str | Path, notes: Notes | None = None) -> list[Path]:
    """Return the pictures in a folder and its subfolders, sorted.

    notes: gets what is left out, and as failures the subfolders that cannot be listed; without it,
    such a subfolder raises InputError. Raises InputError if `folder` cannot be listed.
    """
    seen = Notes() if notes is None else notes
    try:
        names = [name for name, _ in walk(str(folder), seen)]
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{folder}: cannot be listed ({reason}); check the folder.") from error

    def head(name: str) -> bytes:
        with open(os.path.join(folder, name), "rb") as file:
            return file.read(HEAD_BYTES)

    pictures = choose_pictures(names, head, seen)
    if notes is None:
        seen.check(str(folder))
    return sorted(Path(folder, name) for name in pictures)


def choose_pictures(
    names: Iterable[str], head: Callable[[str], bytes], notes: Notes, *, text: bool = False
) -> list[str]:
    """Return the names of the pictures among files, in order.

    names: paths below the folder, with "/". head: returns the first HEAD_BYTES of a file; it is
    called from several threads. notes: gets what is left out.
    text: names become ids, so that a picture whose name is not UTF-8 is a failure.

    Raises StorageError if the storage does not answer.
    """
    candidates = [name for name in names if not _leave_litter_out(name, notes)]
    for folder in [name for name in notes.failures if litter(name)]:
        del notes.failures[folder]  # nothing in it would have been used
    unknown = [name for name in candidates if _must_look(name)]
    verdicts = dict(zip(unknown, _judge_all(unknown, head), strict=True))
    pictures = []
    for name in candidates:
        verdict = verdicts.get(name, _suffix(name) in READ_SUFFIXES)
        if isinstance(verdict, Kind):
            notes.leave_out(verdict, name)
        elif not text or is_text(name):
            pictures += [name] if verdict else []
        elif verdict:
            notes.fail(name, NAME_FAULT)
        if not verdict and not is_text(name):
            notes.leave_out(NOT_TEXT, name)
    return pictures


def _leave_litter_out(name: str, notes: Notes) -> bool:
    kind = litter(name)
    if kind:
        notes.leave_out(kind, name)
    return kind is not None


def litter(name: str) -> Kind | None:
    """Return the kind of litter that a file, or a folder around it, is; None for no litter."""
    name = name.lower()
    for part in name.split("/"):
        if kind := LITTER.get(part):
            return kind
        for beginning, kind in _LITTER_BEGINNINGS:
            if part.startswith(beginning):
                return kind
    if _OLD_BIN.search(name):
        return _DELETED
    if _CACHE.search(name):
        return _THUMBNAIL
    if name.endswith(_OLD_ENDING) and _says_picture(_suffix(name.removesuffix(_OLD_ENDING))):
        return _BACKUP
    return next((kind for end, kind in _LITTER_ENDINGS if name.endswith(end)), None)


def _says_picture(suffix: str) -> bool:
    """Return whether a suffix in lower case is one of pictures, also of those that are not read."""
    known = {*READ_SUFFIXES, *RESULT_SUFFIXES, *_RAW_SUFFIXES, ".heic", ".heif", ".jxl"}
    return suffix in known or _types().get(suffix, "").startswith("image/")


def _must_look(name: str) -> bool:
    """Return whether the first bytes decide: the suffix neither says picture nor another type."""
    suffix = _suffix(name)
    if suffix in READ_SUFFIXES or suffix in _NO_PICTURES:
        return False
    kind = _types().get(suffix, _SAYS_NOTHING)
    return kind.startswith("image/") or kind == _SAYS_NOTHING


@lru_cache(maxsize=1)
def _types() -> dict[str, str]:
    """Return Python's own table of types; that of the machine would differ between machines."""
    return mimetypes.MimeTypes(filenames=()).types_map[True]


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _judge_all(names: Sequence[str], head: Callable[[str], bytes]) -> list[Kind | bool]:
    if not names:
        return []

    def judge(name: str) -> Kind | bool:
        try:
            return _judge(head(name), _suffix(name))
        except Denied:
            return UNKNOWN
        except StorageError:
            raise  # nothing is wrong with the file
        except (OSError, InputError):
            return UNKNOWN

    with ThreadPoolExecutor(OPENED) as pool:
        return list(pool.map(judge, names))


def _judge(head: bytes, suffix: str) -> Kind | bool:
    """Return whether a file begins like a picture, or the kind of a picture that is not read."""
    kind = _KINDS.get(other_kind(head))
    format = sniff(head)
    if kind is _RAW or (format == "tiff" and suffix in _RAW_SUFFIXES):
        return _RAW  # many of them are TIFF files as well
    if format:
        return True
    if kind:
        return kind
    if head[:1] == b"P" and head[1:2] in b"1234567fF" and head[2:3].isspace():
        return _PNM
    if b"<svg" in head:
        return _SVG
    return _BY_SUFFIX.get(suffix, False) if head else False
