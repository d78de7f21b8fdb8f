"""The files that describe a fleet: cluster.yaml, manifests, pinned versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TOP = Path(__file__).parents[2]
MANIFESTS = ("raycluster", "rayjob", "rayservice")
# The path to the spec of the cluster in each manifest.
SPEC_AT = {"raycluster": (), "rayjob": ("rayClusterSpec",), "rayservice": ("rayClusterConfig",)}


def read(name: str) -> Any:
    """Return the contents of a YAML file, whose path is relative to the repository."""
    return yaml.safe_load((TOP / name).read_text())


def manifest(name: str) -> dict[str, Any]:
    """Return a manifest of deploy/kubernetes/."""
    return dict(read(f"deploy/kubernetes/{name}.yaml"))


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
