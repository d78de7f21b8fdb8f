"""What a deployment is told, before it is; the deployment itself is in tests/drills."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.cluster_utils import Cluster

from linearsr.distributed.serve.deploy import deploy, read_file
from linearsr.errors import LinearSRError, OptionError, WeightsError
from ray_jobs.deploy import _settings

FILE = Path(__file__).parents[3] / "ray_jobs" / "serve.yaml"


def test_fields_are_set_and_the_rest_is_the_file() -> None:
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
def test_what_is_wrong_is_known_before(
    settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_file(FILE, settings)


@pytest.mark.parametrize("text", ["", "applications: []", "- 1", "applications: [1]"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "serve.yaml").write_text(text)
    with pytest.raises(OptionError, match=r"serve\.yaml: not a Serve config file"):
        read_file(tmp_path / "serve.yaml", {})
    with pytest.raises(OptionError, match=r"gone\.yaml"):
        read_file(tmp_path / "gone.yaml", {})


def test_a_value_that_is_not_yaml_is_refused() -> None:
    with pytest.raises(OptionError, match="not YAML"):
        _settings(["replicas=[4, 2"])


def test_an_application_without_a_name_has_the_one_that_serve_gives_it(tmp_path: Path) -> None:
    file = yaml.safe_load(FILE.read_text())
    del file["applications"][0]["name"]
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(file))
    assert read_file(tmp_path / "serve.yaml", {})["applications"][0]["name"] == "default"


def test_what_serve_does_not_take_is_told_in_one_line(cluster: Cluster) -> None:
    with pytest.raises(LinearSRError, match=r"Serve rejected the config: .*applications"):
        deploy({"applications": [{"name": "nothing"}]}, f"http://{cluster.webui_url}", 10)
