"""`python -m benchmarks.gpu`: all stages at toy sizes on the CPU, and what a cut-off run keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.gpu.__main__ import STAGES
from benchmarks.gpu.goals import NAME, goals
from benchmarks.gpu.stage import read_rows, record, rows_file
from tests.helpers.processes import until

STAGE_NAMES = [stage.name for stage in STAGES]
COMMAND = [sys.executable, "-m", "benchmarks.gpu"]
# Packages that the command does without.
EXTRAS = ("diffusers", "ray", "deepspeed", "pyiqa", "matplotlib", "psutil", "skimage", "pytest")


def run(out: Path, *arguments: str, blocked: tuple[str, ...] = ()) -> dict[str, str]:
    """Run the command; return how each stage ended."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    if blocked:
        site = out.parent / "blocked"
        site.mkdir(exist_ok=True)
        for name in blocked:
            (site / f"{name}.py").write_text("raise ModuleNotFoundError(__name__)")
        environment["PYTHONPATH"] = f"{site}:{environment.get('PYTHONPATH', '')}"
    subprocess.run([*COMMAND, "--out", str(out), *arguments], env=environment, check=False)
    stages = json.loads((out / "stages.json").read_text())
    return {stage["name"]: stage["outcome"] for stage in stages}


def test_all_stages_run_on_a_cpu_and_leave_rows_and_a_page(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        Image.effect_noise((300, 300), 60).convert("RGB").save(photos / f"{number}.jpg")
    out = tmp_path / "out"
    outcomes = run(out, "--minutes", "12", "--photos", str(photos), "--only", *STAGE_NAMES)
    assert outcomes == dict.fromkeys(STAGE_NAMES, "done")
    page = (out / "README.md").read_text()
    for text in ("CUDA graph", "pictures/s", "ZeRO-1", "structure", "DC-AE decodes"):
        assert text in page
    assert (out / "weights" / "structure.pt").exists()
    compared = next(row for row in read_rows(out, "bundled") if "PSNR" in row["what"])
    assert compared["value"] > 40


@pytest.mark.thorough
def test_missing_packages_are_named_and_the_rest_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcomes = run(out, "--minutes", "10", blocked=EXTRAS)
    assert outcomes == dict.fromkeys(STAGE_NAMES, "done")
    notes = [row["note"] for stage in STAGE_NAMES for row in read_rows(out, stage) if "note" in row]
    for package in ("pytest", "diffusers", "deepspeed"):
        assert f"not measured: {package} is not installed" in notes
    assert [row for row in read_rows(out, "forward") if "ms" in row]


def test_killed_run_keeps_the_rows_that_were_measured(tmp_path: Path) -> None:
    """All rows but the last are whole lines, and the page of the finished stages is there."""
    command = [*COMMAND, "--out", str(tmp_path), "--only", "machine", "forward"]
    with subprocess.Popen(command, start_new_session=True) as process:
        until(lambda: read_rows(tmp_path, "forward"), "the first row of the second stage")
        os.killpg(process.pid, signal.SIGKILL)
    _end_stage(tmp_path)
    assert read_rows(tmp_path, "machine")[0]["what"] == "name"
    assert read_rows(tmp_path, "forward")
    (stage,) = json.loads((tmp_path / "stages.json").read_text())
    assert stage["name"] == "machine" and stage["outcome"] == "done"
    assert "# " in (tmp_path / "README.md").read_text()


def _end_stage(out: Path) -> None:
    """Kill the stage that outlived the command, which could not end it."""
    import psutil

    for process in psutil.process_iter():
        try:
            if str(out) in process.cmdline():
                process.kill()
        except psutil.Error:
            continue


def test_goals_take_the_best_row_that_was_measured_at_their_size(tmp_path: Path) -> None:
    ours = [("LinearSR", 1024, 9.5), ("LinearSR, CUDA graph", 1024, 7.25), ("LinearSR", 512, 1.0)]
    forwards = [{"what": f"{NAME}: {what}", "side": side, "ms": ms} for what, side, ms in ours]
    forwards += [{"what": f"{NAME}: softmax attention", "side": 1024, "ms": 0.1}]
    record(tmp_path, "forward", iter(forwards))
    record(tmp_path, "picture", iter([{"what": NAME, "side": 1024, "steps": 20, "ms": 321.0}]))
    lines = goals(tmp_path).splitlines()[2:]
    measured = [line.rstrip(" |").rsplit("| ", 1)[1] for line in lines]
    assert measured == ["7.25 ms", "321 ms", *["not measured"] * 3]


def test_page_of_results_shows_the_goals_that_nobody_has_measured(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "benchmarks/results/README.md").read_text()
    assert goals(tmp_path) in page


def test_stage_that_takes_too_long_is_cut_off(tmp_path: Path) -> None:
    outcomes = run(tmp_path / "out", "--minutes", "0.05", "--only", "machine")
    assert outcomes["machine"].startswith("cut off after")
    assert (tmp_path / "out" / "README.md").exists()


def test_row_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    record(tmp_path, "forward", iter([{"what": "a", "ms": 1.0}, {"what": "b"}]))
    file = rows_file(tmp_path, "forward")
    file.write_bytes(file.read_bytes()[:-4])
    assert read_rows(tmp_path, "forward") == [{"what": "a", "ms": 1.0}]
