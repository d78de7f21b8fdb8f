"""Flags made from the fields of a config, and how `--help` and docs/reference show flags."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from linearsr.config import Config


class HelpFormatter(argparse.HelpFormatter):
    """Begins each help text with a capital and ends it with the default, if there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return help_text(action)


class JobHelpFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Also keeps the line breaks of the script's docstring."""


def help_text(action: argparse.Action) -> str:
    """Return a flag's help text with its default, as in --help and docs/reference."""
    text = action.help or ""
    if text.split(" ")[0].isalpha():  # not "s3://..." or a path
        text = text[0].upper() + text[1:]
    default = action.default
    if default in (None, "", [], (), argparse.SUPPRESS) or default is False or "default" in text:
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    return f"{text} (default: {shown})"


def add_fields(
    parser: argparse.ArgumentParser,
    config: type[Config],
    names: Iterable[str] | None = None,
    prefix: str = "",
) -> None:
    """Add a flag for each of these fields (all by default), with its description as help text.

    Values stay text: the config converts and checks them. prefix: begins the names of the flags.
    """
    for name in config.model_fields if names is None else names:
        field = config.model_fields[name]
        flag = f"--{prefix}{name.replace('_', '-')}"
        text = " ".join((field.description or "").split()).removesuffix(".").replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif field.is_required():
            parser.add_argument(flag, required=True, help=text)
        else:
            # Shown, not enforced: the config may take other spellings of them.
            choices = _choices(field.annotation)
            metavar = f"{{{','.join(choices)}}}" if choices else None
            parser.add_argument(flag, default=field.default, metavar=metavar, help=text)


def _choices(annotation: Any) -> tuple[str, ...] | None:
    """The words of a Literal, also of one with validators or that may be None; else None."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if get_origin(annotation) in (Union, UnionType) and len(kinds) == 1:
        annotation = kinds[0]
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_args(annotation) if get_origin(annotation) is Literal else None
