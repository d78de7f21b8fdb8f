"""The files of a folder that are pictures, and what is said of the others."""

from __future__ import annotations

import io
import os
from pathlib import Path, PurePosixPath

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from linearsr.errors import InputError
from linearsr.imaging.files import result_name
from linearsr.imaging.listing import find_images
from linearsr.imaging.sources import choose, list_inputs, read_input
from linearsr.storage.location import locate
from linearsr.storage.walk import Notes
from tests.helpers.permissions import permissions_hold
from tests.helpers.s3 import Server
from tests.helpers.s3_faults import Faults


def _picture(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, format)
    return buffer.getvalue()


JPEG, PNG, BMP, TIFF = (_picture(format) for format in ("JPEG", "PNG", "BMP", "TIFF"))
PICTURES = {
    **dict.fromkeys(("s0.jfif", "s1.jpe", "s2.jif", "s3.pjpeg", "s4.JFIF", "s5.jpg_large"), JPEG),
    **dict.fromkeys(("s6.mpo", "no suffix", "Mt. Everest", "scan.001", "ok.jpg"), JPEG),
    **dict.fromkeys(("shot.apng", "data.bin"), PNG),
    "scan.bmp": BMP,
    "d.jp2": b"\0\0\0\x0cjP  \r\n\x87\n",
}
UNREADABLE = {
    "a.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "b.heic": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic",
    "c.jxl": b"\xff\x0a\0\0",
    "c2": b"\0\0\0\x0cJXL \r\n\x87\n",
    "e.psd": b"8BPS\0\1",
    "f.dng": TIFF,
    "g.cr2": b"II*\0\x10\0\0\0CR\2\0",
    "h.svg": b"<?xml version='1.0'?><svg></svg>",
    "i.ppm": b"P6 4 4 255\n",
    "j.iiq": b"IIIIwaR\0",
    "k.erf": b"some bytes",
    "l.tga": b"\0\0\2" + bytes(40),
    "m.pcx": b"\x0a\5\1\x08",
    "n.jng": b"\x8bJNG\r\n\x1a\n",
    "o": b"\x8aMNG\r\n\x1a\n",
}
OTHERS = {
    "notes.txt": JPEG,  # its suffix says text
    "notes": b"BMW is a car",
    "job.json": b"{}",
    "empty": b"",
    "movie.mp4": b"\0\0\0\x18ftypisom",
    ".0a.part": JPEG,
}
LITTER = {
    **dict.fromkeys(("._ok.jpg", "__MACOSX/._ok.jpg", "__MACOSX/x.jpg", ".DS_Store"), JPEG),
    **dict.fromkeys(("Thumbs.db", "sub/desktop.ini"), b""),
    **dict.fromkeys(("sub/@eaDir/ok.jpg/thumb.jpg", ".thumbnails/1.png", "GOPR.THM"), JPEG),
    **dict.fromkeys((".Trash-1000/files/gone.jpg", "#recycle/x.jpg", "$RECYCLE.BIN/y.jpg"), JPEG),
    **dict.fromkeys(("ok.jpg_original", "raw.cr2_original", "sub/ok.jpg~"), JPEG),
    **dict.fromkeys(("RECYCLER/S-1-5-21-7/x.jpg", "disk/RECYCLED/Dc12.jpg"), JPEG),
    **dict.fromkeys((".recycle/1.jpg", "Network Trash Folder/1.jpg", "Recycle.Bin/1.jpg"), JPEG),
    **dict.fromkeys((".deleted/1.jpg", ".nfs0001.jpg", "sub/Temporary Items/1.jpg"), JPEG),
    **dict.fromkeys((".cache/thumbnails/large/1.png", ".tmb/1.png", ".wdmc/1/i.jpg"), JPEG),
    **dict.fromkeys((".comments/1.jpg", "My Previews.lrdata/1/a.jpg"), JPEG),
    **dict.fromkeys((".~lock.ok.jpg#", "~$ok.jpg", ".syncthing.ok.jpg.tmp"), JPEG),
}
LINES = [
    "left out: 5 files that macOS made",
    "left out: 8 thumbnails",
    "left out: 10 deleted files",
    "left out: 2 lock files of programs",
    "left out: 1 unfinished download (.syncthing.ok.jpg.tmp)",
    "left out: 2 files that Windows made",
    "left out: 3 copies that programs made",
    "left out: 2 HEIC pictures (a.heic, b.heic): convert to PNG or JPEG",
    "left out: 2 JPEG XL pictures (c.jxl, c2): convert to PNG or JPEG",
    "left out: 1 Photoshop picture (e.psd): convert to PNG or JPEG",
    "left out: 4 camera raw files (f.dng, g.cr2, j.iiq, ...): develop to TIFF, PNG or JPEG",
    "left out: 1 TGA picture (l.tga): convert to PNG or JPEG",
    "left out: 1 PCX picture (m.pcx): convert to PNG or JPEG",
    "left out: 1 JNG picture (n.jng): convert to PNG or JPEG",
    "left out: 1 MNG picture (o): convert to PNG or JPEG",
    "left out: 1 SVG picture (h.svg): convert to PNG or JPEG",
    "left out: 1 PNM picture (i.ppm): convert to PNG or JPEG",
]


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_folders_locations_and_buckets_list_the_same_pictures(s3: Server, tmp_path: Path) -> None:
    _write(tmp_path, PICTURES | UNREADABLE | OTHERS | LITTER)
    bucket = locate(s3.bucket())
    locate(tmp_path).copy_to(bucket / "in")
    notes = Notes()
    found = find_images(tmp_path, notes)
    assert [str(path.relative_to(tmp_path)) for path in found] == sorted(PICTURES)
    assert sorted(notes.lines()) == sorted(LINES) and not notes.failures
    for place in (locate(tmp_path), bucket / "in"):
        notes = Notes()
        table = list_inputs(place, "lr", notes=notes)
        assert table.column("id").to_pylist() == sorted(PICTURES)
        assert sorted(notes.lines()) == sorted(LINES) and not notes.failures


def test_names_of_people_are_not_taken_for_litter(tmp_path: Path) -> None:
    names = [
        ".cache/a.jpg",
        "Mona_original",
        "recycled/bottle.jpg",
        "recycler/d1/a.jpg",
        "sunset. 1_original",
    ]
    _write(tmp_path, dict.fromkeys(names, JPEG))
    notes = Notes()
    assert find_images(tmp_path, notes) == [tmp_path / name for name in names]
    assert notes.lines() == []


def test_only_files_that_their_suffix_leaves_open_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, dict.fromkeys(("a.jpg", "b.png", "c.txt", "d.json", "e.xmp", "f"), JPEG))
    opened: list[str] = []
    real = io.open

    def note(path: object, *arguments: object) -> object:
        opened.append(Path(str(path)).name)
        return real(path, *arguments)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", note)
    assert len(find_images(tmp_path)) == 3
    assert opened == ["f"]


def test_find_images_is_recursive_sorted_and_blind_to_other_files(tmp_path: Path) -> None:
    names = ("z.png", "A.JPG", "b/y.webp", "b/c/x.TIFF", "b/notes.txt", ".1f.part", "b/k.gif")
    _write(tmp_path, dict.fromkeys(names, b""))
    found = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)]
    assert found == ["A.JPG", "b/c/x.TIFF", "b/k.gif", "b/y.webp", "z.png"]
    (tmp_path / "empty").mkdir()
    assert find_images(tmp_path / "empty") == []


def test_folders_that_cannot_be_listed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file.png").touch()
    for folder in (tmp_path / "missing", tmp_path / "file.png"):
        with pytest.raises(InputError, match="cannot be listed"):
            find_images(folder)


def test_a_litter_folder_may_be_the_input_itself(tmp_path: Path) -> None:
    _write(tmp_path, {".thumbnails/a.png": PNG})
    assert find_images(tmp_path / ".thumbnails") == [tmp_path / ".thumbnails" / "a.png"]


def test_litter_that_cannot_be_listed_is_no_failure(tmp_path: Path) -> None:
    _write(tmp_path, {".Trashes/a.png": PNG, "lost+found/b.png": PNG, "c.png": PNG})
    (tmp_path / ".Trashes").chmod(0)
    (tmp_path / "lost+found").chmod(0)
    notes = Notes()
    with permissions_hold():
        assert find_images(tmp_path, notes) == [tmp_path / "c.png"]
    assert notes.failures == {"lost+found": "cannot be listed (Permission denied)"}


def test_ids_cannot_hold_names_that_are_not_utf8(tmp_path: Path) -> None:
    picture, text, bare = (os.fsdecode(b"caf\xe9" + end) for end in (b".png", b".txt", b""))
    _write(tmp_path, {picture: PNG, text: b"text", bare: JPEG, "ok.png": PNG})
    notes = Notes()
    assert list_inputs(locate(tmp_path), "lr", notes=notes).column("id").to_pylist() == ["ok.png"]
    reason = "the file's name is not UTF-8; rename it"
    assert notes.failures == {r"caf\xe9.png": reason, r"caf\xe9": reason}
    assert notes.lines() == [r"left out: 1 file whose name is not UTF-8 (caf\xe9.txt)"]
    with pytest.raises(InputError, match="not UTF-8"):
        choose(locate(tmp_path), "hr")
    assert len(find_images(tmp_path)) == 3


def test_s3_keys_with_empty_parts_and_dots_are_themselves(s3: Server) -> None:
    bucket = s3.bucket()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3.port}")
    keys = ("in/ok.jpg", "in//ok.jpg", "in/../ok.jpg", "in/./ok.jpg", "in//a//b.png")
    for key in keys:
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=key.encode())
    rows = list_inputs(locate(f"{bucket}/in"), "lr").to_pylist()
    assert {row["id"] for row in rows} == {key.removeprefix("in/") for key in keys}
    for row in rows:
        assert read_input(locate(f"{bucket}/in"), row, "lr") == f"in/{row['id']}".encode()


def test_shards_whose_keys_have_empty_parts_are_read(s3: Server) -> None:
    place = locate(s3.bucket())
    for key in ("in/0.parquet", "in//0.parquet"):
        buffer = io.BytesIO()
        pq.write_table(pa.table({"id": [key], "lr": [key.encode()]}), buffer)
        (place / key).write(buffer.getvalue())
    rows = list_inputs(place / "in", "lr").to_pylist()
    assert sorted(row["id"] for row in rows) == ["in//0.parquet", "in/0.parquet"]
    for row in rows:
        assert read_input(place / "in", row, "lr") == row["id"].encode()


def test_litter_beside_shards_is_no_shard(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["x"], "lr": [b"x"]}), tmp_path / "0.parquet")
    _write(tmp_path, {"._0.parquet": b"\0\5\x16\7", ".Trash-0/1.parquet": b"PAR1"})
    notes = Notes()
    assert list_inputs(locate(tmp_path), "lr", notes=notes).column("id").to_pylist() == ["x"]
    assert len(notes.lines()) == 2


def test_first_bytes_of_objects_are_read_alone(s3: Server) -> None:
    place = locate(s3.bucket())
    (place / "a").write(b"abcdef")
    (place / "empty").write(b"")
    assert (place / "a").head(3) == b"abc" and (place / "empty").head(3) == b""


def test_bodies_that_break_off_hide_no_picture(s3: Server) -> None:
    place = locate(s3.bucket())
    names = [f"scan.{number:03}" for number in range(20)]
    for name in names:
        (place / name).write(JPEG)
    with s3.proxy(seed=1) as proxy:
        proxy.faults = Faults(slow_down=0.1, cut=0.2)
        table = list_inputs(locate(f"s3://{place.path}"), "lr")
    assert proxy.injected["cut"] and table.column("id").to_pylist() == names


@pytest.mark.parametrize(
    ("name", "format", "result"),
    [
        ("Mt. Everest", None, "Mt. Everest.png"),
        ("scan.001", None, "scan.001.png"),
        ("scan.002", "webp", "scan.002.webp"),
        ("v1.2", "jpg", "v1.2.jpg"),
        ("a.JPG", None, "a.JPG"),
        ("a.JPG", "webp", "a.webp"),
        ("a.avif", None, "a.png"),
        ("a.jfif", None, "a.jpg"),
        ("a.bmp", "tif", "a.tif"),
    ],
)
def test_results_keep_names_without_a_pictures_suffix(
    name: str, format: str | None, result: str
) -> None:
    assert result_name(PurePosixPath(name), format).name == result
