"""A container's memory limit counts, and not the memory of its machine."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from linearsr.config import Options
from linearsr.errors import TooLarge
from linearsr.imaging.files import Picture
from linearsr.pipeline import memory

MIB = 2**20


def _system(folder: Path, group: str, files: dict[str, object]) -> Path:
    """Write the files of a system whose process is in a control group; return its root."""
    for name, text in {"proc/self/cgroup": group, **files}.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return folder


def _v2(place: str, most: object, used: int) -> dict[str, object]:
    folder = f"sys/fs/cgroup{place}"
    stat = f"anon 1\ninactive_file {2 * MIB}\nactive_file 5"
    return {
        f"{folder}/memory.max": most,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": stat,
    }


def test_limit_of_the_own_control_group_counts(tmp_path: Path) -> None:
    root = _system(tmp_path, "0::/", _v2("", 10 * MIB, 7 * MIB))
    assert memory.free_memory(root) == 5 * MIB


def test_limits_of_outer_groups_count(tmp_path: Path) -> None:
    files = _v2("/a.slice", 8 * MIB, 5 * MIB) | _v2("/a.slice/b", "max", MIB)
    root = _system(tmp_path, "1:name=systemd:/x\n0::/a.slice/b", files)
    assert memory.free_memory(root) == 5 * MIB


@pytest.mark.parametrize("place", ["", "/docker/1"])
def test_limit_of_version_1_counts(tmp_path: Path, place: str) -> None:
    folder = f"sys/fs/cgroup/memory{place}"
    files = {
        f"{folder}/memory.limit_in_bytes": 10 * MIB,
        f"{folder}/memory.usage_in_bytes": 9 * MIB,
        f"{folder}/memory.stat": f"inactive_file 7\ntotal_inactive_file {MIB}",
    }
    root = _system(tmp_path, "5:cpu,memory:/docker/1\n2:cpuset:/docker/1\n0::/docker/1", files)
    assert memory.free_memory(root) == 2 * MIB


def test_used_up_limit_leaves_nothing(tmp_path: Path) -> None:
    assert memory.free_memory(_system(tmp_path, "0::/", _v2("", MIB, 9 * MIB))) == 0


@pytest.mark.parametrize("files", [{}, _v2("", "max", MIB), _v2("", "garbage", MIB)])
def test_without_a_limit_the_machine_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, object]
) -> None:
    available = psutil.virtual_memory()._replace(available=123)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    assert memory.free_memory(_system(tmp_path, "0::/", files)) == 123
    assert memory.free_memory(tmp_path / "another system") == 123


def test_a_picture_that_exceeds_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: MIB)
    picture = Picture(torch.zeros(3, 64, 64))
    with pytest.raises(TooLarge, match=r"0\.0 GiB are free"):
        memory.check_memory(picture, Options(), (256, 256), tiled=True)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="measured as on Linux")
def test_freed_memory_of_a_large_picture_goes_back_to_linux() -> None:
    memory.keep_freed_memory()
    tiles = [torch.ones(2 * MIB) for _ in range(40)]
    last = torch.ones(MIB)  # at the end of the heap, which therefore cannot shrink
    process = psutil.Process()
    held = process.memory_info().rss
    tiles.clear()
    memory.give_back_freed_memory()
    assert held - process.memory_info().rss > 250 * MIB
    assert last.sum() == MIB
