"""`linearsr evaluate` on small pictures with a small model: values, ranks, failures, exit codes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
from PIL import Image

from linearsr.cli import main
from linearsr.errors import WeightsError
from linearsr.evaluation.config import Item, Score, Settings
from linearsr.evaluation.judge import DEGRADATIONS, Judge, seeded_lr
from linearsr.evaluation.report import Report, rank, table
from linearsr.evaluation.sources import list_pictures, read_source
from linearsr.metrics import measure as metrics
from linearsr.pipeline.upscaler import Upscaler

SIZES = {"astronaut": (96, 72), "coffee": (67, 50), "chelsea": (64, 64)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, size in SIZES.items():
        photo = Image.fromarray(np.asarray(getattr(skimage.data, name)()))
        photo.resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder


def _values(output: Path) -> dict[tuple[str, str, str], float]:
    rows = pq.read_table(output / "metrics.parquet").to_pylist()
    return {(row["id"], row["method"], row["metric"]): row["value"] for row in rows}


def _bicubic_psnr(photo: Path) -> float:
    """Return the PSNR of bicubic by Pillow and float64, as a reader would check it."""
    hr = Image.open(photo)
    hr = hr.crop((0, 0, hr.width // 4 * 4, hr.height // 4 * 4))
    lr = hr.resize((hr.width // 4, hr.height // 4), Image.Resampling.BICUBIC)
    up = lr.resize(hr.size, Image.Resampling.BICUBIC)
    weights = np.array([65.481, 128.553, 24.966])
    a, b = ((np.asarray(p) / 255) @ weights for p in (up, hr))
    error = np.square(a - b)[4:-4, 4:-4].mean() / 255**2
    return -10 * math.log10(error)


@pytest.fixture(scope="module")
def whole(
    photos: Path, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """One evaluation without failures."""
    output = tmp_path_factory.mktemp("report")
    words = f"evaluate --hr {photos} --models small={small_bundle} --steps 1 2 --device cpu"
    code = main([*words.split(), "--metrics", "psnr", "ssim", "piqe", "-o", str(output)])
    return code, output


def test_bicubic_psnr_equals_pillow_in_float64(whole: tuple[int, Path], photos: Path) -> None:
    code, output = whole
    assert code == 0
    values = _values(output)
    for name in SIZES:
        value = values[f"{name}.png", "bicubic", "psnr"]
        # Pillow computes in fixed point.
        assert value == pytest.approx(_bicubic_psnr(photos / f"{name}.png"), abs=0.03)


def test_methods_have_all_metrics_and_hr_only_those_without_a_reference(
    whole: tuple[int, Path],
) -> None:
    _, output = whole
    keys = set(_values(output))
    methods = {"bicubic", "small, 1 step", "small, 2 steps"}
    wanted = {(m, metric) for m in methods for metric in ("psnr", "ssim", "piqe")}
    wanted.add(("HR", "piqe"))
    assert keys == {(f"{name}.png", *one) for name in SIZES for one in wanted}


def test_parquet_table_records_settings_and_directions(whole: tuple[int, Path]) -> None:
    read = pq.read_table(whole[1] / "metrics.parquet")
    assert read.column_names == ["id", "method", "metric", "value", "better"]
    better = {row["metric"]: row["better"] for row in read.to_pylist()}
    assert better == {"psnr": "higher", "ssim": "higher", "piqe": "lower"}
    note = json.loads(read.schema.metadata[b"linearsr"])
    assert note["settings"]["degradation"] == "clean" and "pyiqa" in note["conventions"]


def test_report_has_conventions_means_and_provenance(whole: tuple[int, Path]) -> None:
    text = (whole[1] / "report.md").read_text()
    values = _values(whole[1])
    mean = sum(values[f"{name}.png", "bicubic", "psnr"] for name in SIZES) / 3
    row = next(line for line in text.splitlines() if line.startswith("| bicubic"))
    assert f" 3 | {mean:.4f} " in row
    for note in ("pyiqa 0.", "with scale pixels cropped", "CRC-32", "licence: test"):
        assert note in text


def test_contact_sheet_has_a_column_per_method(whole: tuple[int, Path]) -> None:
    sheet = Image.open(whole[1] / "contact.jpg")
    assert sheet.width == 4 * (320 + 8) + 8
    assert sheet.height > sum(height for _, height in SIZES.values()), "a row for each picture"
    assert np.asarray(sheet).std() > 20


def test_failed_picture_is_named_and_the_others_are_judged(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lows, hr, output = tmp_path / "lr", tmp_path / "hr", tmp_path / "out"
    lows.mkdir(), hr.mkdir()
    for name, size in SIZES.items():
        (hr / f"{name}.png").write_bytes((photos / f"{name}.png").read_bytes())
        low = (size[0] // 4, size[1] // 4 + (name == "coffee"))
        Image.new("RGB", low).save(lows / f"{name}x4.png")
    (hr / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (lows / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("RGB", (8, 8)).save(lows / "nobody.png")
    words = f"evaluate --hr {hr} --lr {lows} --models --metrics psnr -o {output}"
    assert main(words.split()) == 1
    message = capsys.readouterr().err
    assert "coffee.png: LR is 16x13, but for HR of 67x50 and --scale 4 it must be 16x12" in message
    assert "broken.png: damaged or truncated" in message and "nobody.png (LR)" in message
    assert {id for id, *_ in _values(output)} == {"astronaut.png", "chelsea.png"}
    assert "nobody.png" in (output / "report.md").read_text()


def test_files_that_were_not_read_whole_are_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Image.open(photos / "coffee.png")
    (tmp_path / "hr").mkdir()
    page.save(tmp_path / "hr" / "a.tif", save_all=True, append_images=[page])
    output = tmp_path / "out"
    words = f"evaluate --hr {tmp_path / 'hr'} --models --metrics psnr -o {output}"
    assert main(words.split()) == 0
    captured = capsys.readouterr()
    assert "linearsr: a.tif: only the first of 2 pages" in captured.err.splitlines()
    report = (output / "report.md").read_text()
    assert "## Notes\n\n- a.tif: only the first of 2 pages\n" in report
    assert "could not measure" not in report and {m for _, m, _ in _values(output)} == {"bicubic"}


def test_results_of_other_programs_are_judged_against_hr(photos: Path, tmp_path: Path) -> None:
    results = tmp_path / "mine"
    results.mkdir()
    for name in SIZES:
        Image.open(photos / f"{name}.png").save(results / f"{name}_out.png")
    output = tmp_path / "out"
    words = f"evaluate --hr {photos} --results mine={results} --metrics ssim -o {output}"
    assert main(words.split()) == 0
    values = _values(output)
    assert {method for _, method, _ in values} == {"bicubic", "mine"}
    assert all(v == pytest.approx(1, abs=1e-4) for (_, m, _), v in values.items() if m == "mine")


def test_reference_metrics_are_skipped_without_hr(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["evaluate", str(photos), "--metrics", "psnr", "piqe", "-o", str(output)]) == 0
    assert "skipped: psnr: it compares with the true pictures" in capsys.readouterr().out
    assert {(m, metric) for _, m, metric in _values(output)} == {(photos.name, "piqe")}


def test_models_are_compared_by_naturalness_without_hr(
    photos: Path, small_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = f"evaluate --lr {photos} --every 3 --models small={small_bundle} --steps 1"
    assert main([*words.split(), "--device=cpu", "--metrics", "piqe", "-o", str(output)]) == 0
    methods = {(id, method) for id, method, _ in _values(output)}
    assert methods == {("astronaut.png", "bicubic"), ("astronaut.png", "small, 1 step")}
    assert (output / "contact.jpg").exists()


def test_metric_that_needs_more_pixels_is_reported_not_failed(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = f"evaluate --hr {photos} --models --metrics psnr ms_ssim -o {output}"
    assert main(words.split()) == 0
    text = (output / "report.md").read_text()
    assert "ms_ssim: cannot measure 96x72" in text and "(3 in all)" in text


def test_solvers_flag_adds_a_row_per_solver(
    photos: Path, small_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = f"evaluate --hr {photos} --models small={small_bundle} --steps 3 --every 3"
    flags = ["--solvers", "euler", "adams", "--metrics", "psnr", "--device=cpu"]
    assert main([*words.split(), *flags, "-o", str(output)]) == 0
    euler, adams = (
        _values(output)["astronaut.png", f"small, 3 {solver} steps", "psnr"]
        for solver in ("euler", "adams")
    )
    assert euler != adams


@pytest.mark.parametrize(
    "words",
    [
        "--hr HR --metrics psnr nonsense",
        "--hr HR --metrics psnr --rank ssim",
        "--hr HR --lr no-such-degradation",
        "--hr HR --results folder-without-name",
        "--hr HR --models no-such-model --metrics psnr",
        "--lr clean",
        "--hr HR --steps 51 --metrics psnr",
        "",
    ],
)
def test_wrong_request_exits_with_2_before_any_work(
    words: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = words.replace("HR", str(photos)).split()
    assert main(["evaluate", *arguments, "-o", str(output)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(output.glob("*"))


def test_lr_depends_on_the_pictures_name_alone() -> None:
    hr = torch.rand(3, 32, 32)
    first, again = (seeded_lr(hr, "a.png", 4, DEGRADATIONS["degraded"]) for _ in range(2))
    other = seeded_lr(hr, "b.png", 4, DEGRADATIONS["degraded"])
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_rank_orders_best_to_worst_for_both_directions() -> None:
    for metric, best in (("psnr", "c"), ("niqe", "a")):
        scores = [
            Score(id, "m", metric, value) for id, value in zip("abc", (1.0, 2, 3), strict=True)
        ]
        scores += [Score(id, "bicubic", metric, 0.0) for id in "abc"]
        ranking = rank(Report("t", Settings(metrics=(metric,)), scores))
        assert ranking and ranking.method == "m"
        assert next(iter(ranking.values)) == best
        assert list(ranking.ends(1).values()) == ["1 of 3", "3 of 3"]
        assert len(ranking.ends(2)) == 3


def test_mean_covers_pictures_with_a_value() -> None:
    scores = [Score("a", "m", "psnr", 30.0), Score("b", "m", "psnr", None, "too small")]
    row = table(Report("t", Settings(metrics=("psnr",)), scores)).splitlines()[-1]
    assert row.split("|")[1:4] == [" m  ", "  2 ", " 30.0000 (n=1) "]


@pytest.mark.parametrize(
    ("error", "message"),
    [(MemoryError(), "out of memory"), (TypeError("odd"), "TypeError: odd")],
)
def test_failing_model_costs_only_its_row(
    photos: Path, small_bundle: Path, error: Exception, message: str
) -> None:
    class Full(Upscaler):
        def upscale(self, *_: object, **__: object) -> object:  # type: ignore[override]
            raise error

    settings = Settings(degradation="clean", models={"small": ""}, steps=(1,), metrics=("psnr",))
    judge = Judge(settings, read_source, lambda _: Full.load(small_bundle, "cpu"))
    item = Item(id="astronaut.png", hr=list_pictures(str(photos), "hr")["astronaut.png"])
    scores = judge.scores(item)
    assert [(s.method, s.metric) for s in scores] == [("bicubic", "psnr"), ("small, 1 step", "")]
    assert scores[-1].failed and scores[-1].error == message
    assert [name for name, _ in judge.example(item).details] == ["bicubic", "HR"]


def test_metric_missing_on_a_worker_fails_once_per_picture(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver has the metric, so the request lists it; this worker does not have it."""

    def lost(name: str, crop: int) -> object:
        return WeightsError("piqe: not here") if name == "piqe" else known(name, crop)

    known = metrics._metric
    monkeypatch.setattr(metrics, "_metric", lost)
    judge = Judge(
        Settings(degradation="clean", metrics=("psnr", "piqe")), read_source, Upscaler.load
    )
    scores = judge.scores(
        Item(id="astronaut.png", hr=list_pictures(str(photos), "hr")["astronaut.png"])
    )
    assert [(s.method, s.metric) for s in scores] == [("", ""), ("bicubic", "psnr")]
    report = Report("t", judge.settings, scores)
    assert report.failures == ["astronaut.png: piqe: not here"]
    assert report.methods() == ["bicubic"]
