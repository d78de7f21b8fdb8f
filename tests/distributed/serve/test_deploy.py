"""Config files for a deployment; tests/drills deploys one on a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.cluster_utils import Cluster

from linearsr.cli.jobs.deploy import _settings
from linearsr.distributed.serve.deploy import deploy, read_file
from linearsr.errors import LinearSRError, OptionError, WeightsError

FILE = Path(__file__).parents[3] / "ray_jobs" / "serve.yaml"


def test_read_file_sets_fields_and_keeps_the_rest() -> None:
    before = yaml.safe_load(FILE.read_text())
    assert read_file(FILE, {}) == before
    config = read_file(FILE, {"replicas": [1, 1, 2, 1]}, port=1234, on_head=True)
    (application,) = before["applications"]
    args = {**application["args"], "replicas": [1, 1, 2, 1], "ingress_node": "head"}
    assert config == {
        **before,
        "proxy_location": "HeadOnly",
        "http_options": {**before["http_options"], "port": 1234},
        "applications": [{**application, "args": args}],
    }


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"replica": 8}, OptionError, "replica: Extra inputs"),
        ({"expert_cpus": -1}, OptionError, "expert_cpus"),
        ({"model": "no-such-model"}, WeightsError, "no-such-model"),
    ],
)
def test_wrong_field_or_model_is_refused_before_deploying(
    settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_file(FILE, settings)


@pytest.mark.parametrize("text", ["", "applications: []", "- 1", "applications: [1]"])
def test_file_that_is_no_serve_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "serve.yaml").write_text(text)
    with pytest.raises(OptionError, match=r"serve\.yaml: not a Serve config file"):
        read_file(tmp_path / "serve.yaml", {})
    with pytest.raises(OptionError, match=r"gone\.yaml"):
        read_file(tmp_path / "gone.yaml", {})


def test_value_that_is_not_yaml_is_refused() -> None:
    with pytest.raises(OptionError, match="not YAML"):
        _settings(["replicas=[4, 2"])


def test_application_without_a_name_gets_the_default_name(tmp_path: Path) -> None:
    file = yaml.safe_load(FILE.read_text())
    del file["applications"][0]["name"]
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(file))
    assert read_file(tmp_path / "serve.yaml", {})["applications"][0]["name"] == "default"


def test_rejection_by_serve_is_reported_on_one_line(cluster: Cluster) -> None:
    with pytest.raises(LinearSRError, match=r"Serve rejected the config: .*applications"):
        deploy({"applications": [{"name": "nothing"}]}, f"http://{cluster.webui_url}", 10)
