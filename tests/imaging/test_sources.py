"""The inputs of a job: the files that count, their order, and the schema of shards."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linearsr.errors import InputError
from linearsr.imaging import sources as inputs
from linearsr.imaging.sources import list_inputs, open_shard, read_input
from linearsr.storage.location import Location, locate
from tests.helpers.s3 import Server


def _shard(folder: Path | Location, name: str, ids: Any, pictures: Any, group: int = 2) -> None:
    table = pa.table({"id": ids, "lr": pictures})
    place = locate(folder) if isinstance(folder, Path) else folder
    place.filesystem.create_dir(place.path)
    path = (place / name).path
    pq.write_table(table, path, filesystem=place.filesystem, row_group_size=group)


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def _ids(folder: Path, without: Path | None = None) -> list[str]:
    place = None if without is None else locate(without)
    return list_inputs(locate(folder), "lr", place).column("id").to_pylist()


def test_pictures_are_listed_by_their_paths_and_read(tmp_path: Path) -> None:
    _touch(tmp_path, "b.JPG", "a/c.png", "notes.txt")
    table = list_inputs(locate(tmp_path), "lr")
    assert table.column("id").to_pylist() == ["a/c.png", "b.JPG"]
    assert [read_input(locate(tmp_path), row, "lr") for row in table.to_pylist()] == [
        b"a/c.png",
        b"b.JPG",
    ]


def test_only_an_output_inside_the_input_is_left_out(tmp_path: Path) -> None:
    _touch(tmp_path / "in", "a.png", "out/a.png", "outer/b.png")
    assert _ids(tmp_path / "in", tmp_path / "in/out") == ["a.png", "outer/b.png"]
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for source, output in (("in", "link/out"), ("link", "in/out")):
        assert _ids(tmp_path / source, tmp_path / output) == ["a.png", "outer/b.png"]
    for elsewhere in (tmp_path, tmp_path / "other", tmp_path / "i"):
        assert _ids(tmp_path / "in", elsewhere) == ["a.png", "out/a.png", "outer/b.png"]


def test_only_an_output_inside_the_input_is_left_out_of_a_bucket(s3: Server) -> None:
    place = locate(s3.bucket())
    for name in ("in/a.png", "in/out/a.png"):
        (place / name).write(b"")
    listings = (list_inputs(place / "in", "lr", out) for out in (place, place / "in/out"))
    assert [table.num_rows for table in listings] == [2, 1]
    assert list_inputs(place, "lr", place / "in/out").column("id").to_pylist() == ["in/a.png"]


def test_results_of_an_earlier_job_beside_pictures_are_no_shards(tmp_path: Path) -> None:
    _touch(tmp_path, "a.png")
    for name, columns in {
        "errors/errors.parquet": {"id": ["x"], "stage": ["read"], "error": ["bad"]},
        "done/errors/errors.parquet": {"id": ["x"], "stage": ["read"], "error": ["bad"]},
        "data/part-0.parquet": {"id": ["x"], "image": [b"x"]},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        pq.write_table(pa.table(columns), tmp_path / name)
    assert _ids(tmp_path) == ["a.png"]
    # If there is nothing else, they are the input, except the list of failures.
    (tmp_path / "a.png").unlink()
    (tmp_path / "done/errors/errors.parquet").unlink()
    assert list_inputs(locate(tmp_path), "image").column("id").to_pylist() == ["x"]
    with pytest.raises(InputError, match=r"part-0\.parquet: no column 'lr'"):
        _ids(tmp_path)


def test_pictures_beside_shards_are_refused(tmp_path: Path) -> None:
    _touch(tmp_path, "a.png")
    _shard(tmp_path, "0.parquet", ["x"], [b"x"])
    with pytest.raises(InputError, match=r"both pictures \(a\.png\) and shards \(0\.parquet\)"):
        _ids(tmp_path)
    (tmp_path / "0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"0\.parquet: not a readable Parquet shard"):
        _ids(tmp_path)


def test_rows_of_many_shards_are_in_order_and_each_is_found(tmp_path: Path) -> None:
    expected = [(f"{n}-{row}", n, row) for n in range(40) for row in range(n % 4)]
    for n in range(40):
        ids = [id for id, shard, _ in expected if shard == n]
        pictures = pa.array([id.encode() for id in ids], pa.binary())
        _shard(tmp_path, f"{n:02}.parquet", pa.array(ids, pa.large_string()), pictures)
    table = list_inputs(locate(tmp_path), "lr")
    assert table.schema == inputs.INPUTS
    assert [(r["id"], r["file"], r["group"], r["row"]) for r in table.to_pylist()] == [
        (id, f"{n:02}.parquet", row // 2, row % 2) for id, n, row in expected
    ]
    for row in table.to_pylist():
        assert read_input(locate(tmp_path), row, "lr") == row["id"].encode()


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary(3), pa.binary_view()], ids=str
)
def test_every_kind_of_bytes_is_a_picture(tmp_path: Path, kind: pa.DataType) -> None:
    _shard(tmp_path, "0.parquet", ["x", "y"], pa.array([b"abc", None], kind))
    first, second = list_inputs(locate(tmp_path), "lr").to_pylist()
    assert read_input(locate(tmp_path), first, "lr") == b"abc"
    with pytest.raises(InputError, match="y: its 'lr' is empty"):
        read_input(locate(tmp_path), second, "lr")


@pytest.mark.parametrize(
    ("ids", "pictures", "words"),
    [
        (["x"], ["/etc/hostname"], r"'lr' is of type string; .* bytes, .* \(binary\)"),
        (["x"], [{"bytes": b"x"}], "'lr' is of type struct"),
        (["x"], pa.array([None]), "'lr' is of type null"),
        ([1], [b"x"], r"'id' is of type int64; it must hold text \(string\)"),
        ([b"x"], [b"x"], "'id' is of type binary"),
        (["x", None, None], [b"x"] * 3, "2 rows have no id"),
        (["x", "x"], [b"x", b"y"], "'x' occurs more than once"),
    ],
)
def test_shards_of_other_types_are_refused(
    tmp_path: Path, ids: Any, pictures: Any, words: str
) -> None:
    _shard(tmp_path, "0.parquet", ids, pictures)
    with pytest.raises(InputError, match=words):
        _ids(tmp_path)


def test_columns_are_checked_again_when_a_picture_is_read(tmp_path: Path) -> None:
    """The file that a worker opens may be another than the one that was listed."""
    _shard(tmp_path, "0.parquet", ["x"], [b"x"])
    row = list_inputs(locate(tmp_path), "lr").to_pylist()[0]
    _shard(tmp_path, "0.parquet", ["x"], ["/etc/hostname"])
    with pytest.raises(InputError, match=r"0\.parquet: column 'lr' is of type string"):
        read_input(locate(tmp_path), row, "lr")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the name of each shard that is opened from now on."""
    names: list[str] = []

    def counted(file: Location, *columns: str, real: Callable[..., Any] = open_shard) -> Any:
        names.append(file.name)
        return real(file, *columns)

    monkeypatch.setattr(inputs, "open_shard", counted)
    return names


def test_threads_fetch_a_row_group_once(tmp_path: Path, opened: list[str]) -> None:
    """Threads read all cached row groups in turn and miss each of them at the same time."""
    kept, threads = inputs.GROUPS_KEPT, 8
    pictures = [bytes([n]) * 100_000 for n in range(kept)]
    _shard(tmp_path, "0.parquet", [str(n) for n in range(kept)], pictures, group=1)
    rows = list_inputs(locate(tmp_path), "lr").to_pylist()
    opened.clear()
    together = Barrier(threads)

    def read_all(_: int) -> list[bytes]:
        pictures_read = []
        for row in rows * 2:
            together.wait()
            pictures_read.append(read_input(locate(tmp_path), row, "lr"))
        return pictures_read

    with ThreadPoolExecutor(threads) as pool:
        assert all(result == pictures * 2 for result in pool.map(read_all, range(threads)))
    assert len(opened) == kept


def test_a_fetch_that_failed_is_tried_again(tmp_path: Path) -> None:
    _shard(tmp_path, "0.parquet", ["x"], [b"x"])
    row = list_inputs(locate(tmp_path), "lr").to_pylist()[0]
    (tmp_path / "0.parquet").rename(tmp_path / "away")
    with pytest.raises(InputError, match="no such file"):
        read_input(locate(tmp_path), row, "lr")
    (tmp_path / "away").rename(tmp_path / "0.parquet")
    assert read_input(locate(tmp_path), row, "lr") == b"x"


def test_ids_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    bytes_as_text = pa.Array.from_buffers(
        pa.string(), 1, pa.array([b"caf\xe9"], pa.binary()).buffers()
    )
    _shard(tmp_path, "a.parquet", bytes_as_text, [b"x"])
    with pytest.raises(InputError, match="an id is not UTF-8"):
        list_inputs(locate(tmp_path), "lr")
