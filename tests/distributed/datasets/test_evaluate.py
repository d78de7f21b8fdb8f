"""The evaluation job: the numbers of `linearsr evaluate`, shards, resuming, exit codes."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.cluster_utils import Cluster
from safetensors.torch import save_file
from spandrel.architectures.Compact import Compact

from linearsr.cli import job, main
from linearsr.distributed.datasets import evaluate as evaluation
from linearsr.distributed.datasets.evaluate import EvaluationConfig, evaluate
from linearsr.errors import InputError, WeightsError
from linearsr.evaluation.config import Score
from linearsr.evaluation.run import Request, plan
from linearsr.evaluation.sources import list_pictures
from linearsr.storage.location import locate

ROOT = Path(__file__).parents[3]
# Metrics with a truth, and one without, which takes each process seconds to import.
METRICS = ("psnr", "ssim")
ALL = (*METRICS, "piqe")


def _request(small_bundle: Path, hr: Path, **more: object) -> Request:
    models = {"small": str(small_bundle)}
    return Request.parse(hr=str(hr), models=models, steps=(1,), **{"metrics": METRICS, **more})


def _job(request: Request, output: Path, actors: int = 1) -> EvaluationConfig:
    return EvaluationConfig(request=request, output=str(output), actors=actors, actor_cpus=0.5)


def _rows(output: Path) -> list[dict[str, object]]:
    return pq.read_table(output / "metrics.parquet").to_pylist()


def _pairs(photos: Path, folder: Path) -> tuple[Path, Path]:
    """Write HR, cut to whole LR pixels, and LR under the same names."""
    (folder / "hr").mkdir(), (folder / "lr").mkdir()
    for path in photos.iterdir():
        hr = Image.open(path).crop((0, 0, 96, 64))
        hr.save(folder / "hr" / path.name)
        hr.resize((24, 16), Image.Resampling.BICUBIC).save(folder / "lr" / path.name)
    return folder / "hr", folder / "lr"


def test_actors_give_the_scores_of_one_process(
    cluster: Cluster, photos: Path, small_bundle: Path, tmp_path: Path
) -> None:
    request = _request(small_bundle, photos, lr="degraded", metrics=ALL)
    report = evaluate(_job(request, tmp_path / "job", 2))
    words = f"evaluate --hr {photos} --lr degraded --models small={small_bundle} --steps 1 "
    words += f"--device cpu --metrics {' '.join(ALL)} -o {tmp_path / 'plain'}"
    assert main(words.split()) == 0 and not report.failures
    assert _rows(tmp_path / "job") == _rows(tmp_path / "plain")
    texts = [(tmp_path / kind / "report.md").read_text() for kind in ("job", "plain")]
    assert texts[0] == texts[1]
    assert (tmp_path / "job" / "contact.jpg").read_bytes()[:2] == b"\xff\xd8"
    assert not list((tmp_path / "job").glob("parts-*"))


@pytest.mark.thorough
def test_actors_load_checkpoints_of_other_programs(
    cluster: Cluster, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "compact.safetensors"
    save_file(Compact(num_feat=8, num_conv=2, upscale=2).state_dict(), file)
    monkeypatch.chdir(tmp_path)  # actors run in other folders
    models = {"compact": file.name}
    request = Request.parse(hr=str(photos), models=models, metrics=("psnr",))
    report = evaluate(_job(request, tmp_path / "job"))
    words = f"evaluate --hr {photos} --models {file} --device cpu --metrics psnr"
    assert main([*words.split(), "-o", str(tmp_path / "plain")]) == 0
    assert _rows(tmp_path / "job") == _rows(tmp_path / "plain") and not report.failures
    assert {row["method"] for row in _rows(tmp_path / "job")} == {"bicubic", "compact"}


@pytest.mark.thorough
def test_shards_give_the_scores_of_their_pictures(
    cluster: Cluster, photos: Path, small_bundle: Path, tmp_path: Path
) -> None:
    hr, lr = _pairs(photos, tmp_path)
    rows = [
        {"id": p.name, "hr": p.read_bytes(), "lr": (lr / p.name).read_bytes()}
        for p in sorted(hr.iterdir())
    ]
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shards" / "0.parquet", row_group_size=1)
    (tmp_path / "other").mkdir()
    shutil.copy(hr / "coffee.png", tmp_path / "other")
    others = {"other": str(tmp_path / "other")}
    request = _request(small_bundle, tmp_path / "shards", results=others)
    report = evaluate(_job(request, tmp_path / "job"))
    words = f"evaluate --hr {hr} --lr {lr} --models small={small_bundle} --steps 1 --device cpu "
    words += f"--results other={tmp_path / 'other'} --metrics {' '.join(METRICS)} "
    assert main([*words.split(), "-o", str(tmp_path / "plain")]) == 1
    assert _rows(tmp_path / "job") == _rows(tmp_path / "plain")
    # A second run finds no partner either, so it has nothing to do.
    assert report.failures == ["astronaut.png (other): left out: no result picture matches"]
    assert not list((tmp_path / "job").glob("parts-*"))


def test_the_command_reads_shards(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    buffer = io.BytesIO()
    Image.open(photos / "coffee.png").save(buffer, "PNG")
    low = io.BytesIO()
    Image.new("RGB", (40, 30)).save(low, "PNG")
    row = {"id": "one", "hr": buffer.getvalue(), "lr": low.getvalue()}
    # upscale_dataset writes results into subfolders; its list of errors is no result.
    for name in ("shards/more", "mine/data", "mine/errors"):
        (tmp_path / name).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "shards" / "more" / "0.parquet")
    result = pa.table({"id": ["one"], "image": [buffer.getvalue()], "width": [160]})
    pq.write_table(result, tmp_path / "mine" / "data" / "part-0.parquet")
    pq.write_table(pa.table({"id": ["two"]}), tmp_path / "mine" / "errors" / "errors.parquet")
    words = f"evaluate --hr {tmp_path / 'shards'} --results mine={tmp_path / 'mine'} --models "
    assert main([*words.split(), "--metrics", "psnr", "-o", str(tmp_path / "out")]) == 0
    values = {row["method"]: row["value"] for row in _rows(tmp_path / "out")}
    assert set(values) == {"bicubic", "mine"} and values["mine"] == pytest.approx(80)


def test_damaged_parts_are_refused(tmp_path: Path) -> None:
    parts = locate(tmp_path / "parts")
    kept = [[Score("a", "HR", "piqe", 0.1), Score("a", "m", "psnr", None, "too small")]]
    evaluation._write_part(parts, kept)
    assert list(evaluation._read_parts(parts)) == [("a", kept[0])]
    rows = [{"id": "b", "scores": text} for text in ("{", "[[1, 2]]", "7")]
    for table in (*(pa.Table.from_pylist([row]) for row in rows), pa.table({"other": [1]})):
        pq.write_table(table, tmp_path / "parts" / "x.parquet")
        with pytest.raises(InputError, match=r"x\.parquet: cannot be read as the scores of an"):
            list(evaluation._read_parts(parts))


@pytest.mark.parametrize(
    ("words", "device"),
    [("", "cpu"), ("--gpu", "cuda"), ("--gpu --device cpu", "cpu"), ("--device cuda:1", "cuda:1")],
)
def test_models_run_on_the_chosen_device(words: str, device: str) -> None:
    arguments = job.parser("evaluate").parse_args(["-o", "out", *words.split()])
    config = EvaluationConfig(
        request=Request(), output="out", gpu=arguments.gpu, device=arguments.device
    )
    assert config.model_device == device


def test_settings_that_change_scores_have_a_fingerprint_of_their_own(
    small_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    prints = set()
    for more in ({}, {"lr": "degraded"}, {"seed": 1}, {"scale": 2}, {"every": 2}):
        request = _request(small_bundle, photos, **more)
        config, settings = _job(request, tmp_path), plan(request, list_pictures).settings
        prints.add(evaluation._fingerprint(config, settings))
    assert len(prints) == 4, "every only chooses among the pictures"
    elsewhere = config.model_copy(update={"device": "cuda"})
    assert evaluation._fingerprint(elsewhere, settings) not in prints


def test_wrong_models_and_inputs_are_refused_before_any_work(
    photos: Path, small_bundle: Path, tmp_path: Path
) -> None:
    request = _request(small_bundle, photos)
    with pytest.raises(WeightsError, match="nowhere"):
        evaluate(_job(request.model_copy(update={"models": {"x": "nowhere"}}), tmp_path / "out"))
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    damaged = request.model_copy(update={"models": {"x": str(broken)}})
    with pytest.raises(WeightsError, match=r"broken\.pth: .* is damaged"):
        evaluate(_job(damaged, tmp_path / "out"))
    with pytest.raises(InputError, match="no pictures"):
        evaluate(_job(_request(small_bundle, tmp_path / "empty"), tmp_path / "out"))


def test_the_job_names_failures_and_a_second_run_retries_only_them(
    cluster: Cluster, photos: Path, small_bundle: Path, tmp_path: Path
) -> None:
    hr, output = tmp_path / "hr", tmp_path / "out"
    shutil.copytree(photos, hr)
    (hr / "coffee.png").write_bytes(b"no picture")
    words = f"ray_jobs/evaluate.py --hr {hr} --models small={small_bundle} --steps 1 "
    words += f"--metrics {' '.join(METRICS)} --actor-cpus 0.5 --output {output}"
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words.split()]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 1, run.stderr
    assert "coffee.png: not a picture" in run.stderr and "| small, 1 step" in run.stdout
    judged = _rows(output)
    assert {row["id"] for row in judged} == {"astronaut.png"}
    (error,) = pq.read_table(output / "errors").to_pylist()
    assert error["id"] == "coffee.png" and "not a picture" in error["error"]

    shutil.copy(photos / "coffee.png", hr)
    (hr / "astronaut.png").write_bytes(b"judged already: never read again for numbers")
    request = _request(small_bundle, hr)
    planned, config = plan(request, list_pictures), _job(request, output)
    parts = locate(output) / f"parts-{evaluation._fingerprint(config, planned.settings)}"
    scores = evaluation._scores(planned, config, parts)
    assert not [score for score in scores if score.failed]
    assert {score.id for score in scores} == {"astronaut.png", "coffee.png"}
    kept = {(s.id, s.method, s.metric): s.value for s in scores}
    assert all(kept[row["id"], row["method"], row["metric"]] == row["value"] for row in judged)
