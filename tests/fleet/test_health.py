"""The check of a node without a GPU: gloo stands in for NCCL."""

from __future__ import annotations

import multiprocessing
import sys
import time

import pytest
import torch
import torch.distributed as dist

from linearsr.distributed import health
from linearsr.errors import LinearSRError


def says(*lines: str) -> tuple[str, ...]:
    """Return a command that stands in for nvidia-smi and prints these lines."""
    return (sys.executable, "-c", f"print({chr(10).join(lines)!r})")


def test_check_all_reduce_passes_over_two_ranks_of_gloo() -> None:
    health.check_all_reduce(2, backend="gloo")


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Ranks start by fork, so that they see the patches of the test."""
    monkeypatch.setattr(health, "START", "fork")
    return monkeypatch


def test_a_failing_rank_is_reported_with_its_reason(forked: pytest.MonkeyPatch) -> None:
    def fail(rank: int, *work: object) -> None:
        if rank == 1:
            raise RuntimeError("unhandled system error")
        time.sleep(60)

    forked.setattr(health, "_all_reduce", fail)
    with pytest.raises(LinearSRError, match=r"(?s)nccl does not work.*unhandled system error"):
        health.check_all_reduce(2)


def test_ranks_that_hang_are_killed_after_the_deadline(forked: pytest.MonkeyPatch) -> None:
    forked.setattr(health, "_all_reduce", lambda *work: time.sleep(60))
    with pytest.raises(LinearSRError, match=r"nccl all-reduce did not finish within 0\.2 s"):
        health.check_all_reduce(2, seconds=0.2)
    assert not multiprocessing.active_children()


def test_check_all_reduce_reports_a_wrong_sum(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda numbers: numbers[7:9].add_(1))
    with pytest.raises(RuntimeError, match=r"^all-reduce gave 2 wrong sums of \d+, not 1$"):
        health._all_reduce(0, 1, "gloo", f"file://{tmp_path}/meet", 30.0)


def test_check_driver_refuses_a_missing_gpu() -> None:
    assert health.check_driver(2, says("L40S, 580", "L40S, 580")) == ["L40S, 580", "L40S, 580"]
    with pytest.raises(LinearSRError, match="lists 1 of 2 GPUs"):
        health.check_driver(2, says("L40S, 580"))


def test_a_silent_driver_is_reported() -> None:
    broken = (sys.executable, "-c", "print('NVML: Driver/library mismatch'); raise SystemExit(18)")
    with pytest.raises(LinearSRError, match=r"check NVIDIA's driver.*Driver/library mismatch"):
        health.check_driver(2, broken)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_node_without_gpus_must_not_join(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LinearSRError, match="torch"):
        health.check_torch(1)
    assert health.main(["--gpus", "1"]) == 1
    assert "must not join: nvidia-smi not found" in capsys.readouterr().err
