"""The two training jobs as users start them: as a script, and with `ray job submit`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus

from linearsr import weights
from linearsr.cli.job import parser
from linearsr.cli.jobs.shared import configs
from linearsr.diffusion.experts import EXPERTS, ranges
from linearsr.distributed.train.config import ClusterConfig
from linearsr.distributed.train.esgf import check_stages, export_outcomes, run_stage, stages_of
from linearsr.distributed.train.knee import read_knee
from linearsr.distributed.train.trainer import Outcome
from linearsr.errors import OptionError, WeightsError
from linearsr.pipeline.upscaler import Upscaler
from linearsr.storage.location import locate
from linearsr.training.perceptual import DISCRIMINATOR
from linearsr.training.recipes import Recipe, override, tiny_cpu
from tests.helpers.cluster import ROOT, Jobs
from tests.helpers.processes import until
from tests.helpers.runs import SMALL, STEPS, checkpoints, losses, reported, stage_of

# The fields of an expert's short training.
EXPERT = ("steps=2", "warmup=1", "report_every=1", "checkpoint_every=2")


# A small discriminator and small pairs.
JUDGED = ("channels=[8, 8, 8, 8, 8]", "gan_warmup=1", "detour=0.5")
JUDGED_DATA = tuple(f"perceptual_data.{name}" for name in ("patch=32", "batch=4", "margin=8"))


def _command(job: str, photos: Path, runs: Path, name: str, *more: str) -> list[str]:
    """Return the command of a job with two experts, which are enough for these assertions."""
    fields = _two_experts(tiny_cpu()).model_dump(mode="json")
    lists = (f"{kind}={json.dumps(fields[kind])}" for kind in ("experts", "finetune", "perceptual"))
    two = ("model.sampling.boundaries=[0.5]", "model.sampling.plans=[]", *lists)
    short = (f"experts.{i}.{field}" for i in range(2) for field in EXPERT)
    settings = [*SMALL, *STEPS, *two, *short]
    return [
        sys.executable,
        f"ray_jobs/{job}.py",
        "--recipe=tiny_cpu",
        f"--data={photos}",
        f"--validation={photos}",
        f"--storage={runs}",
        f"--name={name}",
        *(part for setting in settings for part in ("--set", setting)),
        *more,
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def driver(photos: Path, runs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The pretraining job as a script, which starts a cluster of its own."""
    with tempfile.TemporaryDirectory(prefix="lsr-", ignore_cleanup_errors=True) as folder:
        alone = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        started = subprocess.Popen(
            _command("pretrain", photos, runs, "pretrain"),
            cwd=ROOT,
            env={**alone, "RAY_TMPDIR": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        yield started
        _kill(started)


def _kill(driver: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to the driver and everything that it started."""
    if driver.poll() is None:
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=60)
    driver.wait()


@pytest.mark.thorough
def test_a_job_whose_machine_died_goes_on_when_submitted_again(
    driver: subprocess.Popen[bytes], jobs: Jobs, photos: Path, runs: Path, whole: Outcome
) -> None:
    """The first job has one worker and the second two; the result is that of two throughout."""
    run = runs / "pretrain"
    until(lambda: bool(reported(run)) or driver.poll() is not None, "a first checkpoint")
    _kill(driver)
    before = [m["step"] for m in reported(run)]
    assert before and before[-1] < 24, f"not killed in between: {before}, {driver.returncode}"
    again = _command("pretrain", photos, runs, "pretrain", "--workers=2")
    status, _, output = jobs.end(jobs.submit(again))
    assert status == JobStatus.SUCCEEDED, output
    assert [m["step"] for m in reported(run)] == [6, 12, 18, 24]
    assert losses(run) == pytest.approx(losses(Path(whole.run.path)), rel=1e-3)
    assert f"{run}: no knee yet after" in output and "still rising" in output
    assert {v.step for v in read_knee(locate(run)).history} >= {12, 18, 24}


def _fine_tuning(photos: Path, runs: Path, start: Outcome, *more: str) -> list[str]:
    # Both runs fit on the cluster at once.
    flags = (f"--from={start.run.path}", "--worker-cpus=1", "--stages", "experts")
    return _command("finetune_experts", photos, runs, "experts", *flags, *more)


@pytest.mark.thorough
def test_experts_are_fine_tuned_from_a_run_into_weights_that_upscale(
    jobs: Jobs, photos: Path, runs: Path, whole: Outcome, photograph: Image.Image
) -> None:
    command = _fine_tuning(photos, runs, whole, "--i-know-this-is-not-the-knee")
    status, _, output = jobs.end(jobs.submit(command))
    assert status == JobStatus.SUCCEEDED, output
    folders = {folder.name for folder in (runs / "experts").glob("experts-[0-9]*")}
    assert folders == {"experts-0-expert-0", "experts-1-expert-1"}
    upscaler = Upscaler.load(runs / "experts" / "weights", "cpu")
    assert upscaler(photograph, steps=4).size == (256, 192)


def test_the_runs_of_four_experts_have_the_papers_names(
    recipe: Recipe, photos: Path, tmp_path: Path
) -> None:
    home = stage_of(recipe, photos, tmp_path, "experts").cluster
    stages = stages_of("experts", recipe, home, locate(tmp_path / "start"))
    names = [f"experts-{i}-{name}" for i, name in enumerate(EXPERTS)]
    assert [stage.cluster.name for stage in stages] == names
    assert [stage.expert for stage in stages] == [0, 1, 2, 3]
    stages = stages_of("perceptual", recipe, home, locate(tmp_path / "start"))
    assert [stage.cluster.name for stage in stages] == [
        "perceptual-1-refinement",
        "perceptual-2-texture",
        "perceptual-3-polish",
    ]


@pytest.mark.thorough
def test_the_perceptual_stage_trains_all_experts_but_the_first(
    cluster: Cluster,
    recipe: Recipe,
    photos: Path,
    photograph: Image.Image,
    whole: Outcome,
    tmp_path: Path,
    lpips_trunk: Path,
) -> None:
    """One of two experts is trained; both start from the same pretraining."""
    fields = (*EXPERT, *JUDGED, f"trunk={lpips_trunk}")
    settings = [f"perceptual.0.{field}" for field in fields]
    two = override(_two_experts(recipe), [*settings, *JUDGED_DATA])
    home = stage_of(two, photos, tmp_path, "experts").cluster
    outcomes = run_stage("perceptual", two, home, [locate(whole.run.path)] * 2, anyway=True)
    (run,) = (tmp_path / "experts").glob("perceptual-[0-9]-*")
    assert run.name == "perceptual-1-expert-1"
    assert [m["step"] for m in reported(run)] == [2] and reported(run)[0]["psnr@1"] > 5
    assert read_knee(locate(run)).history
    assert all((c / DISCRIMINATOR).exists() for c in checkpoints(run))
    export_outcomes(outcomes, two, locate(tmp_path / "weights"))
    start = weights.load(tmp_path / "experts" / "perceptual-start")
    upscaler = Upscaler.load(tmp_path / "weights", "cpu")
    assert upscaler(photograph, steps=4).size == (256, 192)
    kept = [
        all(map(torch.equal, before.parameters(), after.parameters()))
        for before, after in zip(start.experts, upscaler.experts, strict=True)
    ]
    assert kept == [True, False]


def _two_experts(recipe: Recipe) -> Recipe:
    """The recipe with the timesteps in two ranges."""
    fields = recipe.model_dump()
    fields["model"]["sampling"].update(boundaries=(0.5,), plans=())
    spans = ranges((0.5,))
    for kind in ("experts", "finetune", "perceptual"):
        chosen = zip(fields[kind][-len(spans) :], spans, strict=True)
        stages = [
            {**stage, "timesteps": {"low": low, "high": high}} for stage, (low, high) in chosen
        ]
        fields[kind] = stages[1:] if kind == "perceptual" else stages
    return Recipe.model_validate(fields)


def test_an_impossible_stage_is_refused_before_the_stages_ahead_of_it_run(
    recipe: Recipe, tmp_path: Path
) -> None:
    missing = override(recipe, [f"perceptual.{i}.trunk={tmp_path}/gone.pth" for i in range(3)])
    with pytest.raises(WeightsError, match=r"gone\.pth"):
        check_stages(["experts", "perceptual"], missing)
    with pytest.raises(OptionError, match="no perceptual stage"):
        check_stages(["experts", "perceptual"], override(recipe, ["perceptual=[]"]))
    check_stages(["experts", "finetune"], missing)


def test_job_errors_are_one_line_with_an_exit_code(
    jobs: Jobs, photos: Path, runs: Path, whole: Outcome
) -> None:
    wrong = {
        ("not confirmed", 2): _fine_tuning(photos, runs, whole),
        ("no pictures and no .parquet shards", 1): _command(
            "pretrain", runs / "nowhere", runs, "missing"
        ),
        ("lies in the job's working_dir, a temporary copy", 2): _command(
            "pretrain", photos, Path("runs"), "lost"
        ),
    }
    submitted = {expected: jobs.submit(command) for expected, command in wrong.items()}
    for (message, expected), job in submitted.items():
        status, code, output = jobs.end(job)
        assert (status, code) == (JobStatus.FAILED, expected), output
        errors = [line for line in output.splitlines() if line.startswith("linearsr: ")]
        assert len(errors) == 1 and message in errors[0] and "Traceback" not in output


def _parsed(*flags: str) -> tuple[object, ClusterConfig]:
    places = ["--data=d", "--validation=/v", "--storage=s3://b/s"]
    return configs(parser("pretrain").parse_args([*places, *flags]))


def test_flags_become_the_cluster_config() -> None:
    _, cluster = _parsed("--workers=3", "--gpu", "--keep=20", "--worker-cpus=1.5", "--name=n")
    assert (cluster.workers, cluster.gpu, cluster.keep, cluster.worker_cpus) == (3, True, 20, 1.5)
    assert (cluster.validation, cluster.storage, cluster.name) == ("/v", "s3://b/s", "n")
    # Workers have working folders of their own.
    assert cluster.data == str(Path("d").absolute())
    assert _parsed()[1].keep is None


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--keep=3", "--keep: .*greater than or equal to 16"),
        ("--workers=0", "--workers"),
        ("--max-failures=many", "--max-failures"),
        ("--set=pretrain.steps", "settings look like"),
        ("--set=pretrain.steps=-1", r"pretrain\.steps"),
        ("--set=pretrain.stepz=1", r"pretrain\.stepz: no such field"),
        # The whole stage is not shown.
        (
            "--set=pretrain.checkpoint_every=75",
            "^pretrain: checkpoint_every 75 must be a multiple of report_every 50$",
        ),
    ],
)
def test_wrong_flags_are_named_in_the_error(flag: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        _parsed(flag)
