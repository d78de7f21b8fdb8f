"""Turn colour spaces that tags describe into ICC profiles, which every format can carry.

PNG's gAMA, cHRM and cICP, AVIF's nclx, and the Adobe RGB of cameras become a profile of three
primaries and one curve; the pixels stay as they are. A profile is a list of numbers, so it is
written here: no library at hand makes one from primaries and a curve.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import numpy as np

from linearsr.errors import InputError
from linearsr.imaging.containers import D65, Cicp, Marks

# White, red, green and blue (x, y), by their numbers in ITU-T H.273. Number 2 is "unspecified".
_C = (0.31, 0.316)
_SRGB: Final = (*D65, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_SMPTE: Final = (*D65, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07)
_PRIMARIES: Final[dict[int, tuple[float, ...]]] = {
    1: _SRGB,
    2: _SRGB,
    4: (*_C, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*D65, 0.64, 0.33, 0.29, 0.6, 0.15, 0.06),
    6: _SMPTE,
    7: _SMPTE,
    8: (*_C, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049),
    9: (*D65, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    10: (1 / 3, 1 / 3, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0),
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    12: (*D65, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    22: (*D65, 0.63, 0.34, 0.295, 0.605, 0.155, 0.077),
}
_ADOBE: Final = (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
_ADOBE_GAMMA: Final = 563 / 256

# A curve is an exponent g alone, or the g, a, b, c, d of ICC's parametric curve of type 3:
# (a x + b)^g from d on, and c x below.
_SRGB_CURVE: Final = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_VIDEO_CURVE: Final = (1 / 0.45, 1 / 1.09929682, 0.09929682 / 1.09929682, 1 / 4.5, 0.08124286)
_CURVES: Final[dict[int, tuple[float, ...]]] = {
    **dict.fromkeys((1, 6, 11, 12, 14, 15), _VIDEO_CURVE),
    **dict.fromkeys((2, 13), _SRGB_CURVE),
    4: (2.2,),
    5: (2.8,),
    7: (1 / 0.45, 1 / 1.1115, 0.1115 / 1.1115, 1 / 4, 0.0912),
    8: (1.0,),
    17: (2.6,),
}
_HDR: Final = {16: "PQ", 18: "HLG"}

# Gammas this close are the same to libpng.
_SAME_GAMMA: Final = 0.05
_SAME_XY: Final = 0.002
_D50: Final = (0.9642, 1.0, 0.8249)
_BRADFORD: Final = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def tagged_profile(marks: Marks, icc: bytes | None, *, grey: bool, name: str) -> bytes | None:
    """Return the profile of a picture, from its own profile and the marks of its file.

    PNG's cICP comes first, then the profile, AVIF's nclx, PNG's sRGB, and gAMA with cHRM or what
    TIFF and BMP have for them. A note is added to `marks` for code points that are not known. The
    result is None for sRGB. name: the picture's name in errors.

    Raises InputError for HDR, whose samples mean another brightness in every other format.
    """
    if marks.cicp and (marks.cicp_first or not icc):
        cicp = marks.cicp
        if cicp.transfer not in _CURVES or cicp.primaries not in _PRIMARIES:
            numbers = f"primaries {cicp.primaries}, transfer {cicp.transfer}"
            marks.notes.append(f"its colour space ({numbers}) is not known and taken for sRGB")
        return _cicp_profile(cicp, grey=grey, name=name)
    if icc or marks.srgb or not (marks.gamma or marks.curve or marks.chromaticities):
        return icc
    points = marks.chromaticities or _SRGB
    is_srgb = np.allclose(points, _SRGB, atol=_SAME_XY) or grey
    if is_srgb and not marks.curve and abs((marks.gamma or 2.2) / 2.2 - 1) < _SAME_GAMMA:
        return None
    curve = marks.curve or ((marks.gamma,) if marks.gamma else _SRGB_CURVE)
    return profile(points, curve, grey=grey)


def _cicp_profile(cicp: Cicp, *, grey: bool, name: str) -> bytes | None:
    if cicp.transfer in _HDR:
        raise InputError(
            f"{name}: an HDR picture ({_HDR[cicp.transfer]}), which is not read; convert it to SDR."
        )
    points = _PRIMARIES.get(cicp.primaries, _SRGB)
    curve = _CURVES.get(cicp.transfer, _SRGB_CURVE)
    return None if (points, curve) == (_SRGB, _SRGB_CURVE) else profile(points, curve, grey=grey)


def adobe_profile(*, grey: bool) -> bytes | None:
    """Return a profile with the primaries and the gamma of Adobe RGB (1998)."""
    return profile(_ADOBE, (_ADOBE_GAMMA,), grey=grey)


def profile(points: Sequence[float], curve: Sequence[float], *, grey: bool = False) -> bytes | None:
    """Return an ICC profile (version 4), RGB or grey; None for primaries that cannot be.

    points: x and y of white, red, green and blue. curve: see `_CURVES`; or a longer table of the
    light of each sample, from 0 to 65535.
    """
    try:
        white, matrix = _to_d50(points)
        parts = {b"wtpt": _xyz(_D50), b"chad": b"sf32\0\0\0\0" + _fixed(white.ravel())}
        if len(curve) > len(_SRGB_CURVE):
            trc = struct.pack(f">4sII{len(curve)}H", b"curv", 0, len(curve), *map(int, curve))
        else:
            trc = b"para" + struct.pack(">IHH", 0, 0 if len(curve) == 1 else 3, 0) + _fixed(curve)
        if grey:
            parts[b"kTRC"] = trc
        else:
            for letter, column in zip((b"r", b"g", b"b"), matrix.T, strict=True):
                parts[letter + b"XYZ"] = _xyz(column)
                parts[letter + b"TRC"] = trc
    except (ValueError, ZeroDivisionError, struct.error, np.linalg.LinAlgError):
        return None
    parts[b"desc"], parts[b"cprt"] = _words("Colour space of the file's tags"), _words("CC0")
    return _assembled(parts, b"GRAY" if grey else b"RGB ")


def _to_d50(points: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix that adapts white to D50, and that of the primaries after it."""
    first, *colours = [(x, y, 1 - x - y) for x, y in zip(points[::2], points[1::2], strict=True)]
    if not first[1]:
        raise ValueError("no white")
    white, primaries = np.divide(first, first[1]), np.transpose(colours)
    ratios = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    adapt = np.linalg.inv(_BRADFORD) @ np.diag(ratios) @ _BRADFORD
    return adapt, adapt @ (primaries * np.linalg.solve(primaries, white))


def _fixed(numbers: Sequence[float] | np.ndarray) -> bytes:
    return struct.pack(f">{len(numbers)}i", *(round(float(n) * 65536) for n in numbers))


def _xyz(numbers: Sequence[float] | np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(numbers)


def _words(text: str) -> bytes:
    words = text.encode("utf-16-be")
    return struct.pack(">4sIII2s2sII", b"mluc", 0, 1, 12, b"en", b"US", len(words), 28) + words


def _assembled(parts: dict[bytes, bytes], space: bytes) -> bytes:
    """Return the profile of these tags; equal ones share their bytes."""
    start = 128 + 4 + 12 * len(parts)
    table, body = struct.pack(">I", len(parts)), b""
    places: dict[bytes, int] = {}
    for tag, part in parts.items():
        if part not in places:
            places[part] = start + len(body)
            body += part + bytes(-len(part) % 4)
        table += struct.pack(">4sII", tag, places[part], len(part))
    header = struct.pack(">II", start + len(body), 0) + b"\4\x30\0\0" + b"mntr" + space + b"XYZ "
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(_D50)
    return header.ljust(128, b"\0") + table + body
