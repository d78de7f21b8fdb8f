"""The files from which a dataset job resumes: its settings and the list of failures."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from linearsr.distributed.datasets.resume import CRASH, Errors, Failure, Summary, claim
from linearsr.errors import OptionError
from linearsr.storage.location import locate


def test_claim_accepts_the_same_settings_and_names_other_ones(tmp_path: Path) -> None:
    output = locate(tmp_path / "out")
    settings = {"steps": 1, "tags": ("a", "b"), "pictures": "8f3a"}
    for _ in range(2):
        claim(output, settings, hidden="pictures")
    with pytest.raises(
        OptionError, match=r"settings: steps \(1, now 2\), pictures; choose another"
    ):
        claim(output, {**settings, "steps": 2, "pictures": "77"}, hidden="pictures")


def test_claim_takes_defaults_for_settings_that_an_earlier_run_did_not_know(tmp_path: Path) -> None:
    output = locate(tmp_path)
    claim(output, {"steps": 1})
    claim(output, {"steps": 1, "detail": 1.0}, defaults={"detail": 1.0})
    with pytest.raises(OptionError, match=r"settings: detail \(1\.0, now 0\.5\)"):
        claim(output, {"steps": 1, "detail": 0.5}, defaults={"detail": 1.0})


@pytest.mark.parametrize("text", ["{", "7"])
def test_claim_refuses_a_damaged_note_and_a_foreign_folder(tmp_path: Path, text: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OptionError, match="not empty"):
        claim(locate(tmp_path), {}, new=True)
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(OptionError, match=r"job\.json: cannot be read as the settings of an"):
        claim(locate(tmp_path), {})


def test_errors_survive_an_exception_and_vanish_when_mended(tmp_path: Path) -> None:
    file = tmp_path / "errors" / "errors.parquet"
    output = locate(tmp_path)

    def interrupted() -> None:
        with Errors(output, keep=lambda _: True) as errors:
            errors.add("b.png", CRASH)
            errors.add("a.png", Failure("read", "truncated"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert pq.read_table(file).to_pylist() == [
        {"id": "a.png", "stage": "read", "error": "truncated"},
        {"id": "b.png", "stage": "crash", "error": CRASH.error},
    ]
    with Errors(output, keep=lambda row: row["id"] == "b.png") as errors:
        assert set(errors.rows) == {"b.png"}
        errors.remove("b.png")
    assert not file.exists()


def test_summary_counts_each_picture_once() -> None:
    summary = Summary("pictures", "upscaled", total=6, earlier=3, done=2, failed=1)
    assert str(summary) == "6 pictures: 2 upscaled, 3 done earlier, 1 failed"
