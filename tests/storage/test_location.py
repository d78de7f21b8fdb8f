"""Locations: files appear whole or not at all, and errors name the cause. S3 is a real server."""

from __future__ import annotations

import contextlib
import pickle
import re
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linearsr.errors import (
    Denied,
    InputError,
    MissingBucket,
    MissingFile,
    OptionError,
    OutputError,
    StorageError,
    Throttled,
    Unreachable,
    WrongRegion,
)
from linearsr.storage import atomic, location
from linearsr.storage import s3 as s3_module
from linearsr.storage.location import Location, check_writable, explained, locate, url
from tests.helpers.s3 import Server
from tests.helpers.s3_faults import INTERNAL_ERROR, SLOW_DOWN, Answer, Faults, Proxy
from tools import s3_server as swift

# AWS answers like this to a request for another region; Swift has one region only.
REDIRECT = Answer(
    301,
    "PermanentRedirect",
    "The bucket you are attempting to access must be addressed using the specified endpoint.",
    "<Endpoint>b.s3-eu-west-1.amazonaws.com</Endpoint><Bucket>b</Bucket>",
    ("x-amz-bucket-region: eu-west-1",),
)


def _bytes(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def _attempts(patch: pytest.MonkeyPatch, number: int) -> None:
    patch.setenv("AWS_MAX_ATTEMPTS", str(number))


def test_written_files_are_read_back_without_leftovers(tmp_path: Path) -> None:
    file = locate(tmp_path) / "new" / "file.bin"
    assert not file.exists()
    file.write(b"first")
    file.write(b"second")
    assert file.exists() and file.read() == b"second"
    assert [f.name for f in locate(tmp_path).files()] == ["file.bin"]


@contextlib.contextmanager
def _full_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_the_old_file_whole_and_nothing_else(tmp_path: Path) -> None:
    file, other = locate(tmp_path) / "to" / "file.bin", locate(tmp_path) / "from" / "file.bin"
    file.write(b"old")
    other.write(_bytes(0, 1 << 20))
    for write in (
        lambda: file.write(_bytes(0, 1 << 20)),
        lambda: (locate(tmp_path) / "from").copy_to(locate(tmp_path) / "to"),
    ):
        with _full_disk(100_000), pytest.raises(OutputError, match=r"file\.bin"):
            write()
        assert file.read() == b"old"
    with pytest.raises(OutputError, match="to: cannot be written"):
        (locate(tmp_path) / "to").write(b"where a folder is")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file.bin", "file.bin", "from", "to"]


def test_many_writers_of_one_file_succeed_and_one_content_remains(tmp_path: Path) -> None:
    file = locate(tmp_path) / "file.bin"
    contents = [_bytes(seed, 200_000) for seed in range(32)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(file.write, contents))
    assert file.read() in contents
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_longest_file_name_can_be_written(tmp_path: Path) -> None:
    (locate(tmp_path) / ("a" * 255)).write(b"x")
    assert [f.name for f in locate(tmp_path).files()] == ["a" * 255]


def test_unfinished_files_are_not_listed_or_copied(tmp_path: Path) -> None:
    here = locate(tmp_path)
    (here / "from/.hidden").write(b"")
    (here / "from/a.part").write(b"")
    with atomic.replace_file(tmp_path / "from/b.parquet") as temporary:
        temporary.write_bytes(b"half")
        assert [f.name for f in (here / "from").files()] == [".hidden", "a.part"]
        (here / "from").copy_to(here / "to")
    assert [f.name for f in (here / "from").files()] == [".hidden", "a.part", "b.parquet"]
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == [".hidden", "a.part"]


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
    """Workers run in another folder, where a relative path would be another file."""
    monkeypatch.chdir(tmp_path)
    assert locate("runs").path == str(tmp_path / "runs")


def test_locations_can_be_pickled(tmp_path: Path) -> None:
    place = locate(tmp_path) / "x"
    again = pickle.loads(pickle.dumps(place))
    assert again == place and hash(again) == hash(place)


def test_unknown_schemes_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gs://bucket"):
        locate("gs://bucket/prefix")
    for nothing in ("s3://", "s3:///prefix"):
        with pytest.raises(InputError, match="names no bucket"):
            locate(nothing)
    with pytest.raises(MissingFile, match=r"nothing\.txt"):
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


def test_folder_that_ray_deletes_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_0/runs"
    with pytest.raises(OptionError, match="a temporary copy that Ray deletes"):
        check_writable(locate(copy))
    assert not copy.exists()


def test_a_file_is_deleted_if_it_exists(tmp_path: Path) -> None:
    file = locate(tmp_path) / "file.bin"
    file.write(b"x")
    file.delete_file()
    file.delete_file()
    assert not file.exists()


def test_s3_location_behaves_like_a_folder(s3: Server, tmp_path: Path) -> None:
    place = locate(s3.bucket()) / "runs"
    check_writable(place)
    assert not place.exists() and place.files() == []
    contents = {
        "a.txt": b"",
        "deep/er/b.txt": b"b",
        "deep/er.txt": _bytes(0, s3_module.PART_BYTES + 1),
    }
    for name, data in contents.items():
        (place / name).write(b"old")
        (place / name).write(data)
        assert (place / name).read() == data
    assert place.exists() and (place / "deep").exists() and (place / "deep/er/b.txt").exists()
    # A part of a name or a longer name is neither a file nor a folder.
    assert not (place / "dee").exists() and not (place / "a.txt/x").exists()
    assert [url(f).removeprefix(f"{url(place)}/") for f in place.files()] == sorted(contents)
    assert {f.path.removeprefix(f"{place.path}/"): n for f, n in place.sizes().items()} == {
        name: len(data) for name, data in contents.items()
    }
    (place / "a.txt").delete_file()
    (place / "a.txt").delete_file()
    assert not (place / "a.txt").exists()
    with place.local(".txt") as folder:
        assert (folder / "deep/er/b.txt").read_bytes() == b"b"
        assert (folder / "deep/er.txt").read_bytes() == contents["deep/er.txt"]


def test_folders_are_copied_from_and_to_s3(s3: Server, tmp_path: Path) -> None:
    here, there = locate(tmp_path), locate(s3.bucket())
    for name in ("a.txt", "deep/er/b.txt"):
        (here / "1" / name).write(name.encode())
    (here / "1").copy_to(there / "2")
    (there / "2").copy_to(there / "3")
    (there / "3").copy_to(here / "4")
    assert (here / "4/a.txt").read() == b"a.txt"
    assert (here / "4/deep/er/b.txt").read() == b"deep/er/b.txt"
    (there / "2").delete()
    assert [f.path.partition("/")[2] for f in there.files()] == ["3/a.txt", "3/deep/er/b.txt"]


@pytest.mark.parametrize("key", ["../outside.txt", "deep/../../outside.txt", "a//b", "./a"])
def test_objects_whose_keys_lead_out_of_a_local_folder_are_not_copied(
    s3: Server, tmp_path: Path, key: str
) -> None:
    there, target = locate(s3.bucket()) / "folder", locate(tmp_path) / "target"
    (there / "good.txt").write(b"good")
    at = location._on_s3(there / "x")
    assert at is not None
    at.client.put_object(Bucket=at.bucket, Key=f"folder/{key}", Body=b"bad")
    with pytest.raises(InputError, match=f"folder: the key '{re.escape(key)}' cannot be"):
        there.copy_to(target)
    with pytest.raises(InputError, match="cannot be a file"), there.local():
        pass
    assert not list(tmp_path.iterdir())


def test_more_files_than_one_answer_lists_are_all_found_and_deleted(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server lists 100 files at a time; as many are deleted at a time."""
    monkeypatch.setattr(s3_module, "DELETE_BATCH", 100)
    place = locate(s3.bucket()) / "many"
    names = [f"{number:05d}" for number in range(205)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: (place / name).write(b""), names))
    assert [file.name for file in place.files()] == names
    place.delete()
    assert place.files() == []


def test_folder_markers_of_pyarrow_are_no_files(s3: Server) -> None:
    place = locate(s3.bucket()) / "runs"
    place.filesystem.create_dir(f"{place.path}/empty")
    assert place.files() == [] and place.exists()
    place.delete()
    assert not place.exists()


def test_pickled_s3_locations_keep_their_retries(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickled filesystem of pyarrow falls back to three attempts."""
    file = locate(s3.bucket()) / "file.bin"
    file.write(b"here")
    _attempts(monkeypatch, 4)
    with s3.proxy() as proxy:
        travelled = pickle.dumps(locate(url(file)))
        again = pickle.loads(travelled)
        assert again.read() == b"here"
        proxy.faults = Faults(always=INTERNAL_ERROR)
        proxy.injected.clear()
        with pytest.raises(OSError, match="INTERNAL_FAILURE"):
            pickle.loads(pickle.dumps(again.filesystem)).open_output_stream(f"{file.path}2")
        assert proxy.injected["requests"] == 4
    assert swift.SECRET.encode() not in travelled


# Errors and their causes


def _uses(folder: Location) -> list[Callable[[], object]]:
    """Return the operations that may be the first on a storage."""
    return [
        (folder / "x").read,
        lambda: (folder / "x").write(b""),
        folder.files,
        folder.exists,
        folder.delete,
        lambda: check_writable(folder),
        lambda: locate(Path(__file__).parent).copy_to(folder),
        lambda: _parquet(folder / "x"),
    ]


def _parquet(file: Location) -> pa.Table:
    with explained(file), pq.ParquetFile(file.path, filesystem=file.filesystem) as shard:
        return shard.read()


def _refused(bucket: str, error: type[StorageError], words: str) -> None:
    for use in _uses(locate(bucket) / "folder"):
        with pytest.raises(error, match=f"^{bucket}/folder.*{words}"):
            use()


def test_a_missing_bucket_is_named(s3: Server) -> None:
    _refused("s3://no-such-bucket", MissingBucket, "no such bucket")


def test_missing_object_is_named(s3: Server) -> None:
    file = locate(s3.bucket()) / "nothing.parquet"
    for use in (file.read, lambda: _parquet(file)):
        with pytest.raises(MissingFile, match=r"nothing\.parquet"):
            use()


def test_wrong_secrets_are_named(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3.bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    _refused(bucket, Denied, "AWS_SECRET_ACCESS_KEY")


def test_a_storage_without_credentials_says_which_it_needs(
    s3: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket = s3.bucket()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(Denied, match="set AWS_ACCESS_KEY_ID"):
        locate(bucket).files()


def test_a_wrong_region_is_named_with_the_right_one(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.bucket()
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    _refused(bucket, WrongRegion, "set AWS_REGION to us-east-1")


def test_a_redirection_names_the_right_region(s3: Server) -> None:
    bucket = s3.bucket()
    with s3.proxy() as proxy:
        proxy.faults = Faults(always=REDIRECT)
        _refused(bucket, WrongRegion, "set AWS_REGION to eu-west-1")


def test_an_endpoint_where_nobody_listens_is_named(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    _attempts(monkeypatch, 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{swift.free_port()}")
    _refused("s3://bucket", Unreachable, "check AWS_ENDPOINT_URL")


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (SLOW_DOWN, Throttled, "throttled in up to 2 attempts; use fewer workers"),
        (INTERNAL_ERROR, Unreachable, "fails in up to 2 attempts"),
    ],
)
def test_a_storage_that_does_not_recover_is_given_up(
    s3: Server,
    monkeypatch: pytest.MonkeyPatch,
    answer: Answer,
    error: type[StorageError],
    words: str,
) -> None:
    bucket = s3.bucket()
    _attempts(monkeypatch, 2)
    with s3.proxy() as proxy:
        proxy.faults = Faults(always=answer)
        _refused(bucket, error, words)


def test_s3_bodies_that_always_break_off_are_never_taken_for_whole(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = locate(s3.bucket())
    table = pa.table({"hr": [_bytes(i, 5000) for i in range(20)]})
    (folder / "x").write(_bytes(0, 100_000))
    pq.write_table(table, f"{folder.path}/y", filesystem=folder.filesystem)
    _attempts(monkeypatch, 2)
    with s3.proxy() as proxy:
        folder = locate(url(folder))
        proxy.faults = Faults(cut=1)
        for use in (
            (folder / "x").read,
            lambda: location._copy(folder / "x", locate(tmp_path) / "x"),
            folder.files,
            lambda: (folder / "x").write(_bytes(1, 100_000)),
            lambda: _parquet(folder / "y"),
        ):
            proxy.injected.clear()
            with pytest.raises(Unreachable, match=r"does not answer|fails in up to 2"):
                use()
            assert proxy.injected["cut"] >= 2
    assert not list(tmp_path.iterdir())
    # A partial new object never replaces the old one either.
    assert locate(url(folder / "x")).read() == _bytes(0, 100_000)


def test_bad_number_of_attempts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "many")
    with pytest.raises(OptionError, match=r"AWS_MAX_ATTEMPTS must be .*, not 'many'"):
        locate("s3://bucket")


# Faulty storage


@pytest.fixture
def bad_day(s3: Server) -> Iterator[tuple[Location, Proxy]]:
    """A bucket whose server answers 5% with 500 or 503, resets 1%, and cuts 1% of bodies."""
    bucket = s3.bucket()
    with s3.proxy(seed=7) as proxy:
        proxy.faults = Faults(slow_down=0.025, internal_error=0.025, reset=0.01, cut=0.01)
        yield locate(bucket) / "data", proxy


def test_faulty_s3_loses_and_damages_no_object(bad_day: tuple[Location, Proxy]) -> None:
    place, proxy = bad_day
    rng = np.random.default_rng(0)
    large = [int(size) for size in rng.integers(1 << 20, 8 << 20, 8)]
    sizes = [*(int(size) for size in rng.integers(0, 50_000, 120)), *large]

    def write(number: int) -> None:
        (place / f"{number:04d}").write(_bytes(number, sizes[number]))

    def whole(number: int) -> bool:
        return (place / f"{number:04d}").read() == _bytes(number, sizes[number])

    numbers = range(len(sizes))
    with ThreadPoolExecutor(16) as pool:  # most of them wait before another attempt
        list(pool.map(write, numbers))
        assert list(place.sizes().values()) == sizes
        assert all(pool.map(whole, numbers))
    copy = locate(f"{url(place)}-copy")
    place.copy_to(copy)
    assert list(copy.sizes().values()) == sizes
    place.delete()
    assert place.files() == []
    _assert_bad(proxy)


def test_faulty_s3_writes_and_reads_parquet_whole(bad_day: tuple[Location, Proxy]) -> None:
    place, proxy = bad_day
    tables = [
        pa.table({"id": range(60), "hr": [_bytes(60 * n + i, 40_000) for i in range(60)]})
        for n in range(4)
    ]
    for number, table in enumerate(tables):
        path = f"{place.path}/{number}.parquet"
        pq.write_table(table, path, filesystem=place.filesystem, row_group_size=10)
    for _ in range(3):
        for file, table in zip(place.files(), tables, strict=True):
            with pq.ParquetFile(file.path, filesystem=file.filesystem) as shard:
                groups = [shard.read_row_group(i) for i in range(shard.num_row_groups)]
            assert pa.concat_tables(groups).equals(table)
    _assert_bad(proxy)


def _assert_bad(proxy: Proxy) -> None:
    """Assert that every kind of fault occurred."""
    assert {"SlowDown", "InternalError", "reset", "cut"} <= set(proxy.injected), proxy.injected
