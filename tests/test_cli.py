"""The command as a user types it: outputs, exit codes, one line per error, no partial file."""

from __future__ import annotations

import os
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from linearsr import cli
from linearsr.imaging.files import read_provenance


@pytest.fixture
def photos(tmp_path: Path, photograph: Image.Image) -> Path:
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    photograph.save(folder / "a.png")
    photograph.save(folder / "trip" / "b.jpg")
    return folder


@pytest.fixture
def run(small_bundle: Path, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Call `linearsr upscale` with the small model; return exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        common = ["upscale", "--model", small_bundle, "--steps", 1, "--device", "cpu"]
        try:
            code = cli.main([str(a) for a in [*common, *arguments]])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_upscale_writes_one_file_with_provenance(run, photos: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run(photos / "a.png", "-o", tmp_path / "out.png")
    assert code == 0 and "256x192" in out
    assert Image.open(tmp_path / "out.png").size == (256, 192)
    provenance = read_provenance(tmp_path / "out.png")
    assert provenance is not None
    assert provenance["model"] == "small" and provenance["seed"] == "0"
    assert provenance["steps"] == "1" and provenance["scale"] == "4"


def test_solver_is_used_and_recorded(run, photos: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for solver in ("euler", "dpm", "adams"):
        flags = ("--steps", 4, "--solver", solver)
        assert run(photos / "a.png", "-o", tmp_path / f"{solver}.png", *flags)[0] == 0
        provenance = read_provenance(tmp_path / f"{solver}.png")
        assert provenance is not None and provenance["solver"] == solver
    pictures = [np.asarray(Image.open(tmp_path / f"{s}.png")) for s in ("euler", "dpm", "adams")]
    assert not any(np.array_equal(a, b) for a, b in combinations(pictures, 2))


def test_scale_and_detail_are_used_and_recorded(  # type: ignore[no-untyped-def]
    run, photos: Path, tmp_path: Path, scaling_bundle: Path
) -> None:
    flags = ("--model", scaling_bundle, "--steps", 4, "--scale", 1.5, "--detail", 0.5)
    code, out, _ = run(photos / "a.png", "-o", tmp_path / "out.png", *flags)
    assert code == 0 and "96x72" in out and "computed" not in out
    provenance = read_provenance(tmp_path / "out.png")
    assert provenance is not None
    assert provenance["scale"] == "1.5" and provenance["detail"] == "0.5"


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (("--scale", 2), "x4, then shrunk"),
        (("--width", 300), "x4, then enlarged"),
    ],
)
def test_untrained_scale_is_noted(  # type: ignore[no-untyped-def]
    run, photos: Path, tmp_path: Path, flags: tuple[object, ...], note: str
) -> None:
    code, out, _ = run(photos / "a.png", "-o", tmp_path / "out.png", *flags)
    assert code == 0 and f"computed at {note}" in out


def test_output_folder_keeps_the_inputs_structure(run, photos: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert run(photos, "-o", tmp_path / "out", "--scale", 2)[0] == 0
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert names == {"a.png", "trip/b.jpg"}
    assert Image.open(tmp_path / "out/trip/b.jpg").size == (128, 96)


def test_bad_file_is_named_and_the_others_are_written(  # type: ignore[no-untyped-def]
    run, photos: Path, tmp_path: Path
) -> None:
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:200])
    (photos / "empty.jpg").write_bytes(b"")
    code, _, err = run(photos, "-o", tmp_path / "out")
    assert code == 1
    assert "broken.png" in err and "empty.jpg" in err and "2 failed" in err
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.*")) == ["a.png", "b.jpg"]


def test_empty_folder_does_not_stop_the_other_inputs(run, photos, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "empty").mkdir()
    code, _, err = run(tmp_path / "empty", photos / "a.png", "-o", tmp_path / "out")
    assert code == 1
    assert "empty: no picture" in err
    assert (tmp_path / "out/a.png").exists()


def test_results_inside_the_input_folder_are_not_upscaled_again(run, photos) -> None:  # type: ignore[no-untyped-def]
    for _ in range(2):
        assert run(photos, "-o", photos / "out")[0] == 0
    assert not (photos / "out" / "out").exists()


def test_file_name_with_invalid_text_is_upscaled(run, photos, tmp_path) -> None:  # type: ignore[no-untyped-def]
    odd = photos / "trip" / os.fsdecode(b"caf\xe9.png")
    odd.write_bytes((photos / "a.png").read_bytes())
    assert run(photos / "trip", "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / odd.name).exists()


def test_missing_weights_are_named(  # type: ignore[no-untyped-def]
    run, photos, small_bundle: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(small_bundle, tmp_path / "weights"))
    (folder / "polish.safetensors").unlink()
    code, _, err = run(photos / "a.png", "-o", tmp_path / "x.png", "--model", folder)
    assert code == 2
    assert "polish.safetensors" in err


def test_failed_write_names_the_target(run, photos) -> None:  # type: ignore[no-untyped-def]
    code, _, err = run(photos / "a.png", "-o", "/proc/x.png")
    assert code == 1
    assert "/proc/x.png" in err


def test_out_of_memory_names_the_picture(run, photos, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def exhausted(*_: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr("linearsr.pipeline.tiling.tile_grid", exhausted)
    code, _, err = run(photos, "-o", tmp_path / "out")
    assert code == 1
    assert "a.png: out of memory" in err
    assert "b.jpg: out of memory" in err


def test_skip_existing_skips_finished_outputs(run, photos: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert run(photos, "-o", tmp_path / "out")[0] == 0
    (tmp_path / "out/a.png").unlink()
    _, out, _ = run(photos, "-o", tmp_path / "out", "--skip-existing")
    assert "a.png" in out and "b.jpg" not in out


def test_format_sets_the_suffix_of_results(run, photos: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert run(photos, "-o", tmp_path / "out", "--format", "webp")[0] == 0
    assert Image.open(tmp_path / "out/trip/b.webp").format == "WEBP"


@pytest.mark.parametrize("name", ["jpeg", "JPG", ".jpg"])
def test_format_is_known_by_its_usual_spellings(  # type: ignore[no-untyped-def]
    run, photos: Path, tmp_path: Path, name: str
) -> None:
    assert run(photos / "a.png", "-o", tmp_path / "out", "--format", name)[0] == 0
    assert Image.open(tmp_path / "out/a.jpg").format == "JPEG"


def test_unknown_format_is_refused_with_the_known_ones(run, photos: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, _, err = run(photos / "a.png", "-o", tmp_path / "out", "--format", "bmp")
    assert code == 2 and "'png', 'jpg', 'webp' or 'tif'" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.png", "-o", "x.png"], 1, "missing.png"),
        (["{photos}/a.png", "-o", "{photos}/a.png/x.png"], 1, "a.png cannot be created"),
        (["{photos}/a.png", "-o", "x.xyz"], 2, "x.xyz"),
        (["{photos}", "-o", "{photos}/a.png"], 2, "a.png"),
        (["{photos}/a.png", "-o", "x.png", "--steps", "99"], 2, "steps"),
        (["{photos}/a.png", "-o", "x.png", "--tile", "huge"], 2, "tile"),
        (["{photos}/a.png", "-o", "x.png", "--scale", "7"], 2, "scale"),
        (["{photos}/a.png", "-o", "x.png", "--scale", "0.5"], 2, "scale"),
        (["{photos}/a.png", "-o", "x.png", "--detail", "2"], 2, "detail"),
        (["{photos}/a.png", "-o", "x.png", "--tags", "cat"], 2, "tags"),
        (["{photos}/a.png", "-o", "x.png", "--model", "nope"], 2, "nope"),
        (["{photos}/a.png", "-o", "x.png", "--device", "nope"], 2, "nope"),
        (["{photos}/a.png", "-o", "x.png", "--quality", "0"], 2, "quality"),
        (["{photos}/a.png", "-o", "x.png", "--max-pixels", "10"], 1, "--max-pixels"),
        (["{photos}/a.png", "{photos}/a.png", "-o", "{photos}/out"], 2, "both"),
        (["{photos}/a.png", "-o", "{photos}/a.png"], 2, "overwritten"),
        (["{photos}", "-o", "{photos}"], 2, "overwritten"),
        (["{photos}/a.png", "-o", "x.png", "--max-pixels", "0"], 2, "max_pixels"),
        (["{photos}/a.png", "-o", "x.png", "--tile", "3"], 2, "tile"),
        (["{photos}/a.png", "-o", "x.png", "--height", "65000"], 1, "memory"),
        (["x" * 300, "-o", "x.png"], 1, "xxx"),
        (["{photos}/a.png", "-o", "x.png", "--model", "x" * 300], 2, "unknown model"),
        (["-o", "x.png"], 2, "INPUT"),
    ],
)
def test_usage_error_takes_one_line(  # type: ignore[no-untyped-def]
    run,
    photos: Path,
    arguments: list[str],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    got, _, err = run(*(a.format(photos=photos) for a in arguments))
    assert got == code
    assert words in err
    assert err.startswith("usage:") or err.count("\n") == 1
    assert not list(tmp_path.glob("x.*"))


def test_models_lists_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    assert "linearsr-tiny" in capsys.readouterr().out
