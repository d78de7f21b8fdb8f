"""Locations: files appear whole or not at all, and what cannot work is named."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from linearsr.cluster.storage import Location, check_writable, locate
from linearsr.errors import InputError, OutputError


def test_what_is_written_is_read_back_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = locate(tmp_path) / "new" / "file.bin"
    assert not file.exists()
    file.write(b"first")
    file.write(b"second")
    assert file.exists() and file.read() == b"second"
    assert [f.name for f in locate(tmp_path).files()] == ["file.bin"]


def test_a_write_that_fails_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = locate(tmp_path) / "file.bin"
    file.write(b"old")
    # A folder of that name stands where the new content would be written.
    (tmp_path / "file.bin.tmp").mkdir()
    with pytest.raises(OutputError, match=r"file\.bin"):
        file.write(b"new")
    assert file.read() == b"old"


def test_copies_take_the_whole_folder_and_deleting_removes_it(tmp_path: Path) -> None:
    here = locate(tmp_path)
    for name in ("a.txt", "deep/er/b.txt"):
        (here / "from" / name).write(name.encode())
    (here / "from").copy_to(here / "to")
    assert [f.path.removeprefix(f"{here.path}/") for f in (here / "to").files()] == [
        "to/a.txt",
        "to/deep/er/b.txt",
    ]
    assert (here / "to" / "deep/er/b.txt").read() == b"deep/er/b.txt"
    (here / "from").delete()
    assert not (here / "from").exists() and (here / "to").exists()
    (here / "from").delete()


def test_a_local_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    with locate(tmp_path).local(".safetensors") as folder:
        assert folder == tmp_path


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in another folder."""
    monkeypatch.chdir(tmp_path)
    assert locate("runs").path == str(tmp_path / "runs")


def test_locations_travel_to_other_processes(tmp_path: Path) -> None:
    place = locate(tmp_path) / "x"
    again = pickle.loads(pickle.dumps(place))
    assert again == place and hash(again) == hash(place)


def test_unknown_schemes_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gs://bucket"):
        locate("gs://bucket/prefix")
    with pytest.raises(InputError, match=r"nothing\.txt"):
        (locate(tmp_path) / "nothing.txt").read()
    assert locate(tmp_path / "nowhere").files() == []


def test_s3_addresses_become_bucket_and_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    place = locate("s3://bucket/some/prefix/")
    assert isinstance(place, Location) and place.path == "bucket/some/prefix"
    assert place.name == "prefix" and (place / "x").path == "bucket/some/prefix/x"


def test_storage_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="storage cannot be written to"):
        check_writable(locate(tmp_path / "file" / "runs"))
    check_writable(locate(tmp_path / "runs"))
    assert locate(tmp_path / "runs").files() == []
