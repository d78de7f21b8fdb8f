"""One copy of an S3 folder for all processes of a machine."""

from __future__ import annotations

import errno
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from linearsr.distributed.latents import encoder_fingerprint
from linearsr.distributed.models import load_upscaler
from linearsr.errors import InputError, OutputError, WeightsError
from linearsr.hub import resolve
from linearsr.storage import cache, location
from linearsr.storage.cache import local_copy
from linearsr.storage.location import Location, explained, locate, url
from tests.helpers.s3 import Server

WEIGHTS = "weights.safetensors"


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
    assert sorted(p.name for p in copy.parent.iterdir()) == [".lock", "dc-ae"]
    assert len(list(copy.parents[1].iterdir())) == 1


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
    (folder / WEIGHTS).write(b"weightZ")  # of the same size
    assert (local_copy(url(folder)) / WEIGHTS).read_bytes() == b"weightZ"
    assert (first / WEIGHTS).read_bytes() == b"weights"


def test_a_folder_that_changes_while_it_is_copied_is_copied_again(
    folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, changes = location._copy, iter([b"newer", b"newest"])

    def changing(file: Location, to: Location) -> None:
        original(file, to)
        if file.name == WEIGHTS and (data := next(changes, None)):
            (folder / WEIGHTS).write(data)

    monkeypatch.setattr(location, "_copy", changing)
    assert (local_copy(url(folder)) / WEIGHTS).read_bytes() == b"newest"
    endless = itertools.count()
    changes = (str(number).encode() for number in endless)
    (folder / WEIGHTS).write(b"again")
    with pytest.raises(InputError, match="change all the time"):
        local_copy(url(folder))


def test_folders_inside_are_not_copied(folder: Location) -> None:
    """The folder above a bundle may hold a run's checkpoints, which are large."""
    (folder / "checkpoint/ema-0.safetensors").write(b"large")
    copy = local_copy(url(folder))
    assert sorted(p.name for p in copy.iterdir()) == ["config.json", WEIGHTS]


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


def test_a_missing_folder_is_named(folder: Location) -> None:
    with pytest.raises(InputError, match="gone: there are no files here"):
        local_copy(f"{url(folder)}-gone")
    with pytest.raises(WeightsError, match="gone: there are no files here"):
        resolve(f"{url(folder)}-gone")


def test_a_full_disk_and_a_cache_that_cannot_be_written_are_named(
    folder: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Location, to: Location) -> None:
        with explained(file, OutputError):
            Path(to.path).parent.mkdir(parents=True, exist_ok=True)
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(location, "_copy", full)
        with pytest.raises(OutputError, match=f"No space left.*{cache.VARIABLE}"):
            local_copy(url(folder))
    assert not list((tmp_path / "cache").rglob(".unfinished"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(OutputError, match=cache.VARIABLE):
        local_copy(url(folder))


def test_a_bundle_on_s3_is_loaded_from_one_copy(
    s3: Server, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = locate(s3.bucket()) / "weights"
    locate(small_bundle).copy_to(there)
    original, copied = location._copy, []
    monkeypatch.setattr(
        location, "_copy", lambda file, to: (copied.append(file.name), original(file, to))[1]
    )
    for _ in range(2):
        upscaler = load_upscaler(url(there), "cpu")
    assert len(upscaler.experts) == 4 and len(copied) == len(set(copied)) > 0
    with pytest.raises(WeightsError):
        load_upscaler(f"{url(there)}-gone", "cpu")


def test_an_encoder_on_s3_has_the_fingerprint_of_its_copy(folder: Location, tmp_path: Path) -> None:
    folder.copy_to(locate(tmp_path / "copy"))
    assert encoder_fingerprint(url(folder)) == encoder_fingerprint(str(tmp_path / "copy"))
    with pytest.raises(InputError):
        encoder_fingerprint(f"{url(folder)}-gone")


def test_only_sources_on_s3_are_copied(folder: Location, tmp_path: Path) -> None:
    path, revision = resolve(url(folder))
    assert Path(path).name == "dc-ae" and Path(path).is_dir() and revision is None
    assert resolve(str(tmp_path)) == (str(tmp_path), None)
    assert resolve("owner/model@0123abc") == ("owner/model", "0123abc")
