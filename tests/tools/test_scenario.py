"""The commands of the rehearsal fit the parsers and recipes of the jobs. The rehearsal itself is
`make rehearse`.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image
from ray.autoscaler._private.util import prepare_config, validate_config

from linearsr.cli import job
from linearsr.cli.jobs.shared import configs
from linearsr.distributed.serve import ServeConfig
from tools.rehearsal.__main__ import main
from tools.rehearsal.machine import CLUSTER, Target, scaled_down
from tools.rehearsal.run import Failed, run
from tools.rehearsal.scenario import Step, scenario

TARGET = Target("http://127.0.0.1:1", "http://127.0.0.1:2", "s3://bucket/folder")


@pytest.mark.parametrize("gpu", [False, True])
def test_the_parser_of_each_job_accepts_its_flags(gpu: bool) -> None:
    for step in scenario(TARGET, gpu=gpu):
        script, *flags = shlex.split(step.command)
        name = script.removesuffix(".py").replace("_", "-")
        options = job.parser(name).parse_args(flags)
        if script in ("pretrain.py", "finetune_experts.py"):
            recipe, cluster = configs(options)
            assert cluster.gpu == gpu
            assert recipe.data.batch % cluster.workers == 0
        if script == "deploy.py":
            settings = dict(setting.split("=", 1) for setting in options.set)
            assert ServeConfig.parse(**settings) and options.on_head


def test_each_step_reads_results_of_an_earlier_one() -> None:
    there = {f"{TARGET.storage}/{name}" for name in ("train", "validation", "small")}
    for step in scenario(TARGET):
        words = shlex.split(step.command)
        for flag in ("--input", "--data", "--validation", "--hr", "--from", "--model"):
            if flag in words:
                assert words[words.index(flag) + 1] in there, f"{step.name}: {flag}"
        there.add(step.results)


def test_the_rehearsal_machine_has_the_node_types_of_cluster_yaml(tmp_path: Path) -> None:
    cluster = yaml.safe_load(CLUSTER.read_text())
    config = prepare_config(scaled_down(cluster, "127.0.0.2:6379", tmp_path))
    validate_config(config)
    workers = set(cluster["available_node_types"]) - {cluster["head_node_type"]}
    assert workers < set(config["available_node_types"])
    assert config["idle_timeout_minutes"] == cluster["idle_timeout_minutes"]
    assert not config["available_node_types"][config["head_node_type"]]["resources"]["CPU"]


def test_the_table_names_a_failed_step(tmp_path: Path) -> None:
    """Nothing listens at the address, and `ray job submit` itself reports that."""
    step = Step(
        "tag", "tag_dataset.py --help", "s3://bucket/shards", lambda: Image.new("1", (1, 1))
    )
    with pytest.raises(Failed, match="tag: no word of rehearsal-"):
        run([step, step], TARGET, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| tag | failed: no word of" in page and "1-tag_dataset.log" in page
    assert (tmp_path / "1-tag_dataset.log").stat().st_size
    assert not (tmp_path / "2-tag_dataset.log").exists()


def test_missing_results_fail_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.rehearsal.run._submit", lambda *_: "")
    nothing: list[Image.Image] = []
    step = Step("tag", "tag_dataset.py", "s3://bucket/shards", lambda: next(iter(nothing)))
    with pytest.raises(Failed, match="tag: StopIteration"):
        run([step], TARGET, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu"], "--gpu is for a real cluster"),
        (["--storage=s3://b/f", "--endpoint=http://host/"], r"--endpoint is http://HOST:PORT"),
    ],
)
def test_wrong_flags_are_refused_before_the_first_step(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["rehearsal", f"--output={tmp_path}", *flags])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in capsys.readouterr().err
