"""Two jobs with different options that start at the same moment: one of them is accepted."""

from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from linearsr.distributed.datasets.resume import claim
from linearsr.distributed.models import fingerprint
from linearsr.errors import OptionError
from linearsr.storage import s3 as s3_module
from linearsr.storage.location import locate
from tests.helpers.s3 import Server

# On S3 fewer: each takes half a second.
PAIRS, ON_S3 = 50, 20


def _claim_all(folder: str, pairs: int, steps: int, barrier: Barrier, accepted: list[int]) -> None:
    s3_module.SETTLE_SECONDS = 0.5
    for number in range(pairs):
        barrier.wait(60)
        try:
            claim(locate(f"{folder}/{number}"), {"steps": steps})
        except OptionError:
            continue
        accepted.append(number)


def _race(folder: str, pairs: int) -> None:
    """Let two processes claim the same folders at the same moments, with other settings."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        barrier = context.Barrier(2)
        accepted = [manager.list(), manager.list()]
        processes = [
            context.Process(
                target=_claim_all, args=(folder, pairs, steps, barrier, accepted[steps])
            )
            for steps in (0, 1)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0, 0]
        assert sorted([*accepted[0], *accepted[1]]) == list(range(pairs))


def test_one_of_two_jobs_gets_a_local_folder(tmp_path: Path) -> None:
    _race(str(tmp_path), PAIRS)


def test_one_of_two_jobs_gets_a_folder_of_a_bucket(s3: Server) -> None:
    _race(s3.bucket(), ON_S3)


def test_store_that_ignores_conditions_keeps_the_last_of_two_claims(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second claim comes while the first one waits to read back what it wrote."""
    note = locate(s3.bucket()) / "job.json"
    nested: list[bool] = []

    def ignoring(path: s3_module.S3Path, data: bytes) -> None:
        path.client.put_object(Bucket=path.bucket, Key=path.key, Body=data)

    def other_comes(_: float) -> None:
        monkeypatch.setattr(s3_module.time, "sleep", lambda _: None)
        nested.append(note.create(b"second"))

    monkeypatch.setattr(s3_module.S3Path, "_put_new", ignoring)
    monkeypatch.setattr(s3_module.time, "sleep", other_comes)
    assert not note.create(b"first")
    assert nested == [True] and note.read() == b"second"


def test_fingerprint_tells_weights_apart(small_bundle: Path, tmp_path: Path, s3: Server) -> None:
    first = fingerprint(str(small_bundle))
    bucket = locate(s3.bucket())
    locate(small_bundle).copy_to(bucket / "weights")
    assert fingerprint(f"s3://{(bucket / 'weights').path}") == first
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in small_bundle.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert fingerprint(str(copy)) == first
    changed = copy / "polish.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\1")
    assert fingerprint(str(copy)) != first
