"""The APIs of KubeRay and Kubernetes as one JSON schema that refuses unknown fields."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from kubernetes.client import models
from pydantic.json_schema import models_json_schema

TABLE = Path(__file__).with_name("kuberay.yaml")


@cache
def validator(kind: str) -> Draft202012Validator:
    """Return the validator of RayCluster, RayJob, RayService, or a type of Kubernetes (V1...)."""
    table = yaml.safe_load(TABLE.read_text())
    ours = {name: _object(fields) for name, fields in table.items()}
    names = {*re.findall(r"\bV1\w+", TABLE.read_text()), "V1ServiceAccount"}
    _, theirs = models_json_schema(
        [(getattr(models, name), "validation") for name in sorted(names)], by_alias=True
    )
    return Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": {**theirs["$defs"], **ours}})


def _object(fields: dict[str, str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: _schema(type_.rstrip("!")) for name, type_ in fields.items()},
        "required": [name for name, type_ in fields.items() if type_.endswith("!")],
        "additionalProperties": False,
    }


def _schema(type_: str) -> dict[str, Any]:
    """Return the JSON schema of a type in the notation of the table."""
    if type_[0] == "[":
        return {"type": "array", "items": _schema(type_[1:-1])}
    if type_[0] == "{":
        return {"type": "object", "additionalProperties": _schema(type_[1:-1])}
    if type_ in ("string", "integer", "number", "boolean"):
        return {"type": type_}
    if "|" in type_ or type_ in ("ray.io/v1", "RayCluster", "RayJob", "RayService"):
        return {"enum": type_.split("|")}
    return {"$ref": f"#/$defs/{type_}"}
