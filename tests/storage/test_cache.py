"""One copy of an S3 folder for all processes of a machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from linearsr.errors import InputError, OutputError
from linearsr.hub import resolve
from linearsr.storage import cache, location
from linearsr.storage.cache import local_copy
from linearsr.storage.location import Location, locate, url
from tests.helpers.s3 import Server

WEIGHTS = "model/weights.safetensors"


@pytest.fixture
def folder(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Location]:
    """A folder on S3 with two files, and an empty cache."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    folder = locate(s3.bucket()) / "dc-ae"
    (folder / WEIGHTS).write(b"weights")
    (folder / "config.json").write(b"{}")
    return folder


def test_processes_that_ask_at_the_same_time_share_one_copy(folder: Location) -> None:
    program = f"from linearsr.storage.cache import local_copy; print(local_copy({url(folder)!r}))"
    asking = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = {process.communicate(timeout=120)[0].strip() for process in asking}
    assert all(process.returncode == 0 for process in asking)
    (copy,) = map(Path, answers)
    assert (copy / WEIGHTS).read_bytes() == b"weights"
    assert sorted(p.name for p in copy.parent.iterdir()) == ["dc-ae", "lock"]


def test_a_copy_is_made_once_and_again_for_changed_objects(
    folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    original = location._copy
    monkeypatch.setattr(
        location, "_copy", lambda file, to: (copied.append(file.name), original(file, to))[1]
    )
    first = local_copy(url(folder))
    assert local_copy(url(folder)) == first and sorted(copied) == [
        "config.json",
        "weights.safetensors",
    ]
    (folder / WEIGHTS).write(b"WEIGHTS")
    assert (local_copy(url(folder)) / WEIGHTS).read_bytes() == b"WEIGHTS"
    assert (first / WEIGHTS).read_bytes() == b"weights"


def test_a_suffix_leaves_out_other_files(folder: Location) -> None:
    copy = local_copy(url(folder), ".safetensors")
    assert [p.name for p in copy.rglob("*") if p.is_file()] == ["weights.safetensors"]


def test_a_copy_that_was_cut_off_is_not_used(
    folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(file: Location, to: Location) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(location, "_copy", cut)
        with pytest.raises(KeyboardInterrupt):
            local_copy(url(folder))
    assert (local_copy(url(folder)) / WEIGHTS).read_bytes() == b"weights"


def test_a_missing_folder_and_a_full_disk_are_named(
    folder: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="there are no files"):
        local_copy(f"{url(folder)}-gone")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(OutputError, match=cache.VARIABLE):
        local_copy(url(folder))


def test_only_sources_on_s3_are_copied(folder: Location, tmp_path: Path) -> None:
    path, revision = resolve(url(folder))
    assert Path(path).name == "dc-ae" and Path(path).is_dir() and revision is None
    assert resolve(str(tmp_path)) == (str(tmp_path), None)
    assert resolve("owner/model@0123abc") == ("owner/model", "0123abc")
