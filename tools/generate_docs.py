"""Write docs/reference from docstrings, parsers and configs: a page for each job, and the recipes.

    python -m tools.generate_docs

A test compares the pages with what this gives, so they cannot differ from the code.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from inspect import cleandoc
from pathlib import Path
from textwrap import dedent
from typing import Any

from linearsr.cli import job
from linearsr.cli import serve as serve_command
from linearsr.cli.flags import Parser, help_text
from linearsr.config import Config, FileOptions, Options
from linearsr.distributed.datasets.evaluate import EvaluationConfig
from linearsr.distributed.datasets.shards.config import ShardConfig
from linearsr.distributed.datasets.tag import TagConfig
from linearsr.distributed.datasets.upscale import UpscaleConfig
from linearsr.distributed.serve import ServeConfig
from linearsr.distributed.train.config import ClusterConfig
from linearsr.evaluation.run import Request
from linearsr.tags.base import TaggerConfig
from linearsr.training import recipes
from linearsr.training.config import PerceptualConfig, TrainConfig
from linearsr.training.latents import LatentsConfig
from linearsr.web.service import JobLimits, Limits

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
# The configs that check each job's flags: their fields have the flags' names.
JOBS: dict[str, tuple[type[Config], ...]] = {
    "build_shards": (ShardConfig, LatentsConfig),
    "tag_dataset": (TagConfig, TaggerConfig),
    "plan": (),
    "pretrain": (ClusterConfig,),
    "finetune_experts": (ClusterConfig,),
    "upscale_dataset": (UpscaleConfig, Options, FileOptions),
    "evaluate": (EvaluationConfig, Request),
    "deploy": (),
}
NOTICE = "<!-- Written by `python -m tools.generate_docs` from the code; change it there. -->"
Schema = Mapping[str, Any]


def pages() -> dict[str, str]:
    """Return every page of docs/reference, by its name."""
    pages = {name: _job(name, configs) for name, configs in JOBS.items()}
    return {**pages, "serve": _serve(), "recipe": _recipe()}


def _job(name: str, configs: Iterable[type[Config]]) -> str:
    parser = job.parser(name.replace("_", "-"))
    parts = [f"# {name}", NOTICE, markdown(parser.description), "## Flags"]
    parts.append(_flags(parser, configs))
    if any(action.dest == "recipe" for action in parser._actions):
        parts.append("`--set` takes every field of the [recipe](recipe.md).")
    return _page(parts)


def _serve() -> str:
    commands = Parser().add_subparsers()
    serve_command.add(commands)
    parser = commands.choices["serve"]
    parts = ["# serve", NOTICE, markdown(serve_command.__doc__), "## Flags of `linearsr serve`"]
    parts += [
        _flags(parser, (), _prefixed()),
        markdown(parser.epilog),
        "## Fields of a ServeConfig",
    ]
    return _page([*parts, *_sections(ServeConfig.model_json_schema())])


def _recipe() -> str:
    configs = {name: make() for name, make in recipes.RECIPES.items()}
    lines = (f"- `{name}`: {_line(make.__doc__)}" for name, make in recipes.RECIPES.items())
    stages = "`pretrain`, `experts.0` to `experts.3`, `finetune.0` to `finetune.3`"
    judged = "`perceptual.0` to `perceptual.2`, of the experts 1 to 3"
    parts = ["# Recipes", NOTICE, markdown(recipes.__doc__, "text"), "\n".join(lines), "## Fields"]
    parts += ["`--set PATH=VALUE` sets any of them, as in `--set pretrain.steps=1000`."]
    parts += _sections(recipes.Recipe.model_json_schema(), skip=("pretrain", "perceptual_data"))
    parts += [f"## Fields of a stage: {stages}", *_sections(TrainConfig.model_json_schema())]
    parts += [f"## Further fields of {judged}"]
    parts += ["`perceptual_data` has the fields of `data`, for these stages alone."]
    parts += [*_sections(PerceptualConfig.model_json_schema(), without=TrainConfig)]
    leaves_of = {
        name: dict(_leaves(recipe.model_dump(mode="json"))) for name, recipe in configs.items()
    }
    rows = []
    for path in dict.fromkeys(path for leaves in leaves_of.values() for path in leaves):
        values = [leaves.get(path) for leaves in leaves_of.values()]
        if any(value != values[0] for value in values):
            rows.append([f"`{path}`", *map(_value, values)])
    parts += ["## Where they differ", _table(["", *(f"`{name}`" for name in leaves_of)], rows)]
    return _page(parts)


def _prefixed() -> dict[str, Schema]:
    """Return the schemas of the fields of `linearsr serve` whose flags have a prefix."""
    return {
        f"{prefix}{name}".replace("-", "_"): schema
        for prefix, config in ((serve_command.LIMITS, Limits), (serve_command.JOBS, JobLimits))
        for name, schema in config.model_json_schema()["properties"].items()
    }


def _flags(
    parser: argparse.ArgumentParser,
    configs: Iterable[type[Config]],
    fields: Mapping[str, Schema] | None = None,
) -> str:
    known = dict(fields or {})
    for config in configs:
        known.update(config.model_json_schema()["properties"])
    rows = []
    for action in parser._actions:
        if action.dest != "help":
            name = (
                ", ".join(f"`{flag}`" for flag in action.option_strings)
                or f"`{action.metavar or action.dest}`"
            )
            text = help_text(action) % {"default": action.default}
            rows.append(
                [name + (" (required)" if action.required else ""), _accepted(action, known), text]
            )
    return _table(["flag", "value", ""], rows)


def _accepted(action: argparse.Action, known: Mapping[str, Schema]) -> str:
    """Return the values that a flag accepts, as its table cell shows them."""
    if action.nargs == 0:
        return ""
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    if isinstance(action.metavar, str) and action.metavar.startswith("{"):
        return ", ".join(f"`{choice}`" for choice in action.metavar.strip("{}").split(","))
    if isinstance(action.metavar, str):
        return f"`{action.metavar}`"
    if action.dest in known:
        return _range(known[action.dest])
    return {int: "integer", float: "number"}.get(action.type, "text")  # type: ignore[call-overload]


def _sections(
    schema: Schema,
    defs: Schema | None = None,
    at: str = "",
    skip: tuple[str, ...] = (),
    without: type[Config] = Config,
) -> Iterator[str]:
    """The description, a table of the fields, and the same of each config inside.

    Fields that `without` has as well are left out.
    """
    known = without.model_fields
    defs = schema.get("$defs", {}) if defs is None else defs
    if at:
        yield f"### `{at}`"
    yield markdown(schema["description"])
    inside, rows = {}, []
    for name, field in schema["properties"].items():
        of = None if name in known else _config(field, defs)
        if of is not None:
            inside[name] = of
        elif name not in ("experts", "finetune", "perceptual", *known):
            default = _value(field["default"]) if "default" in field else ""
            rows.append([f"`{name}`", _range(field), default, _line(field.get("description"))])
    if rows:
        yield _table(["field", "value", "default", ""], rows)
    for name, of in inside.items():
        if name not in skip:
            yield from _sections(of, defs, f"{at}{'.' * bool(at)}{name}")


def _config(field: Schema, defs: Schema) -> Schema | None:
    """The schema of a field that is a config of its own, or may be one."""
    for one in (field, *field.get("anyOf", ())):
        if "$ref" in one:
            definition: Schema = defs[one["$ref"].rpartition("/")[2]]
            return definition
    return None


def _range(schema: Schema) -> str:
    """The values that a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(_range(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{word}`" for word in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        parts = schema.get("prefixItems")
        return (
            f"{len(parts)} of: {_range(parts[0])}"
            if parts
            else f"list of: {_range(schema['items'])}"
        )
    if schema["type"] == "object":
        return f"{_range(schema['additionalProperties'])} by name"
    words = {"string": "text", "boolean": "`true`, `false`"}
    return f"{words.get(schema['type'], schema['type'])}{_bounds(schema)}"


def _bounds(schema: Schema) -> str:
    notes = [
        f"{words} {schema[key]:g}"
        for key, words in (
            ("exclusiveMinimum", "above"),
            ("minimum", "from"),
            ("maximum", "to"),
            ("exclusiveMaximum", "below"),
        )
        if key in schema and schema[key] < 2**63
    ]
    return f" {' '.join(notes)}" if notes else ""


def _leaves(fields: object, at: str = "") -> Iterator[tuple[str, object]]:
    """Every field of a recipe by its path; what the four experts differ in, as a list."""
    if isinstance(fields, list) and fields and isinstance(fields[0], dict):
        several = [dict(_leaves(one, f"{at}.N")) for one in fields]
        for path in several[0]:
            values = [one[path] for one in several]
            yield path, values if any(value != values[0] for value in values) else values[0]
    elif isinstance(fields, dict) and fields:
        for name, value in fields.items():
            yield from _leaves(value, f"{at}{'.' * bool(at)}{name}")
    else:
        yield at, fields


def _value(value: object) -> str:
    return "" if value is None else f"`{json.dumps(value)}`"


def markdown(docstring: str | None, language: str = "sh") -> str:
    """Return a docstring with indented blocks fenced, and pages as links from docs/reference."""
    parts = []
    for part in cleandoc(docstring or "").split("\n\n"):
        if part.startswith("    "):
            part = f"```{language}\n{dedent(part)}\n```"
        parts.append(re.sub(r"docs/(\w+/(\w+\.md))", r"[\2](../\1)", part))
    return "\n\n".join(parts)


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write all pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
