"""Links, folders that cannot be listed, odd names, and results that cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from linearsr.distributed.datasets.resume import Errors, Failure
from linearsr.errors import InputError, OutputError, is_text, printable
from linearsr.storage.location import locate
from linearsr.storage.targets import TargetCheck
from linearsr.storage.walk import DANGLING, DOUBLE, LOOP, Notes, walk
from tests.helpers.permissions import permissions_hold


def _files(folder: Path, notes: Notes) -> list[str]:
    return sorted(name for name, _ in walk(str(folder), notes))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three files in a tree, and one outside of it."""
    for name in ("in/a", "in/one/b", "in/two/c", "out/deep/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path / "in"


@pytest.mark.parametrize("target", [".", "..", "../..", "loop", "../one", "/"])
def test_links_that_lead_in_circles_are_left_out(tree: Path, target: str) -> None:
    (tree / "one" / "loop").symlink_to(target)
    notes = Notes()
    assert _files(tree, notes) == ["a", "one/b", "two/c"]
    assert notes.left_out == {LOOP: ["one/loop"]} and not notes.failures


def test_link_to_a_folder_of_the_tree_does_not_list_it_twice(tree: Path) -> None:
    (tree / "0 first").symlink_to("two")
    notes = Notes()
    assert _files(tree, notes) == ["a", "one/b", "two/c"]
    assert notes.left_out == {DOUBLE: ["0 first"]}


def test_links_to_folders_outside_are_followed_once(tree: Path) -> None:
    (tree / "x").symlink_to(tree.parent / "out")
    (tree / "y").symlink_to(tree.parent / "out" / "deep")
    (tree.parent / "out" / "back").symlink_to(tree)
    notes = Notes()
    assert _files(tree, notes) == ["a", "one/b", "two/c", "x/deep/d"]
    assert notes.left_out == {DOUBLE: ["y"], LOOP: ["x/back"]}


def test_links_to_files_are_followed_and_dangling_ones_are_noted(tree: Path) -> None:
    (tree / "file").symlink_to(tree.parent / "out" / "deep" / "d")
    (tree / "nothing").symlink_to("missing")
    (tree / "slash").symlink_to("a/")
    notes = Notes()
    assert _files(tree, notes) == ["a", "file", "one/b", "two/c"]
    assert notes.lines() == ["left out: 2 links that lead nowhere (nothing, slash)"]
    assert list(notes.left_out) == [DANGLING] and not notes.failures


def test_pipes_and_devices_are_said_and_never_opened(tree: Path) -> None:
    os.mkfifo(tree / "pipe.png")
    (tree / "link.png").symlink_to("pipe.png")
    (tree / "null.png").symlink_to(os.devnull)
    notes = Notes()
    assert _files(tree, notes) == ["a", "one/b", "two/c"]
    line = "left out: 3 pipes, sockets or devices (link.png, null.png, pipe.png)"
    assert notes.lines() == [line]


def test_locations_list_what_the_walk_lists(tree: Path) -> None:
    (tree / "loop").symlink_to(".")
    (tree / "self").symlink_to("self")
    (tree / "link").symlink_to(tree.parent / "out")
    notes = Notes()
    names = [file.relative_to(locate(tree)) for file in locate(tree).files(notes)]
    assert names == ["a", "link/deep/d", "one/b", "two/c"]
    assert notes.left_out == {LOOP: ["self", "loop"]}
    assert list(locate(tree).sizes().values()) == [4, 10, 8, 8]


def test_a_folder_that_cannot_be_listed_does_not_stop_the_rest(tree: Path) -> None:
    (tree / "one").chmod(0)
    with permissions_hold():
        notes = Notes()
        assert _files(tree, notes) == ["a", "two/c"]
        assert notes.failures == {"one": "cannot be listed (Permission denied)"}
        notes = Notes()
        assert len(locate(tree).files(notes)) == 2 and list(notes.failures) == ["one"]
        with pytest.raises(InputError, match="one: cannot be listed"):
            locate(tree).files()
        tree.chmod(0)
        with pytest.raises(InputError, match="Permission denied"):
            locate(tree).files(Notes())
        tree.chmod(0o700)
    (tree / "one").chmod(0o700)


def test_a_folder_that_cannot_be_entered_does_not_stop_the_rest(tree: Path) -> None:
    (tree / "closed").mkdir()
    for name in ("a.png", "b.png"):
        (tree / "closed" / name).touch()
    (tree / "closed").chmod(0o444)
    notes = Notes()
    with permissions_hold():
        files = locate(tree).files(notes)
        with pytest.raises(InputError, match="closed: its files cannot be read"):
            locate(tree).files()
        with pytest.raises(InputError, match="Permission denied"):
            locate(tree / "closed").files(Notes())
    assert files and notes.failures == {"closed": "its files cannot be read (Permission denied)"}


def test_a_failed_folder_whose_name_is_not_utf8_can_be_listed_as_an_error(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir(mode=0)
    notes, output = Notes(), locate(tmp_path / "out")
    with permissions_hold():
        assert locate(tmp_path).files(notes) == []
    with Errors(output, keep=lambda _: False) as errors:
        for name, fault in notes.failures.items():
            errors.add(name, Failure("list", fault))
    assert list(Errors(output, keep=lambda _: True).rows) == [r"caf\xe9"]


def test_names_that_are_not_utf8_are_listed_and_readable(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).touch()
    (tmp_path / "ok").touch()
    assert [file.name for file in locate(tmp_path).files()] == [name, "ok"]
    assert printable(name) == r"caf\xe9.txt" and not is_text(name) and is_text("café")


def test_names_of_a_kind_are_shown_up_to_three() -> None:
    notes = Notes()
    for name in "dbca":
        notes.leave_out(DANGLING, name)
    assert notes.lines() == ["left out: 4 links that lead nowhere (a, b, c, ...)"]


def test_first_bytes_are_read_alone(tmp_path: Path) -> None:
    (locate(tmp_path) / "a").write(b"abcdef")
    (locate(tmp_path) / "empty").write(b"")
    assert (locate(tmp_path) / "a").head(3) == b"abc"
    assert (locate(tmp_path) / "empty").head(3) == b""


# Results


def test_results_that_cannot_be_written_are_found_without_writing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken.png").mkdir()
    check = TargetCheck()
    check.file(tmp_path / "new" / "folder" / "a.png")
    check.file(tmp_path / ("x" * 255))
    for target, words in (
        (tmp_path / "file" / "a.png", r"file cannot be created \(Not a directory\)"),
        (tmp_path / "file" / "new" / "a.png", r"file/new cannot be created"),
        (tmp_path / "taken.png", "a folder has this name"),
        (tmp_path / "new" / ("é" * 128), "256 bytes, and the file system allows 255"),
    ):
        with pytest.raises(OutputError, match=words):
            check.file(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.png"]


def test_a_folder_without_permission_to_write_is_found(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with permissions_hold():
        for folder in (tmp_path / "locked", tmp_path / "locked" / "new"):
            with pytest.raises(OutputError, match=r"locked.* cannot be .*Permission denied"):
                TargetCheck().folder(folder)
