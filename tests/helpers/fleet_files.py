"""The fleet's files, as their tests read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TOP = Path(__file__).parents[2]
MANIFESTS = ("raycluster", "rayjob", "rayservice")
# Where each manifest holds the spec of its cluster.
SPEC_AT = {"raycluster": (), "rayjob": ("rayClusterSpec",), "rayservice": ("rayClusterConfig",)}


def read(name: str) -> Any:
    """A YAML file from the repository's top."""
    return yaml.safe_load((TOP / name).read_text())


def manifest(name: str) -> dict[str, Any]:
    """A manifest of deploy/kubernetes/."""
    return dict(read(f"deploy/kubernetes/{name}.yaml"))


def spec(name: str) -> dict[str, Any]:
    """The RayCluster inside a manifest."""
    found = manifest(name)["spec"]
    for key in SPEC_AT[name]:
        found = found[key]
    return dict(found)


def pinned(package: str) -> str:
    """The version in constraints.txt."""
    for line in (TOP / "constraints.txt").read_text().splitlines():
        if line.startswith(f"{package}=="):
            return line.split(";")[0].split("==")[1].strip()
    raise LookupError(package)
