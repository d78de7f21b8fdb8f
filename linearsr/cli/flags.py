"""The parser of all commands: one line per error, flags from configs, texts of `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from linearsr.config import Config
from linearsr.errors import did_you_mean

Parsed = TypeVar("Parsed", bound=Config)


class HelpFormatter(argparse.HelpFormatter):
    """Begins each help text with a capital and ends it with the default, if there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return help_text(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the option or word that was probably meant."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        settings.setdefault("formatter_class", HelpFormatter)
        super().__init__(*arguments, **settings)

    def error(self, message: str) -> NoReturn:
        """Print the error on one line and end the process with code 2."""
        message = " ".join(message.split())
        print(f"linearsr: {message} (help: {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse as argparse does, but refuse an unknown option before the command."""
        args = sys.argv[1:] if args is None else list(args)
        if self._subparsers and args:
            self._check_known(super()._parse_optional(args[0]))
        return super().parse_known_args(args, namespace)

    def _parse_optional(self, arg_string: str) -> Any:
        # Refused here, and not after all words were parsed: a required option that was misspelt
        # would be reported as missing.
        option = super()._parse_optional(arg_string)
        if not self._subparsers:  # whose options may be those of a command
            self._check_known(option)
        return option

    def _check_known(self, option: Any) -> None:
        # Newer versions of argparse return a list of all options that begin so.
        action, word, *_ = (option[0] if isinstance(option, list) else option) or (self, "")
        if action is None:
            name = word.partition("=")[0]
            self.error(f"unknown option {name}{did_you_mean(name, self._option_string_actions)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = list(map(str, action.choices))
        advice = did_you_mean(str(value), known) or f"; known are {', '.join(known)}"
        if isinstance(action, argparse._SubParsersAction):
            self.error(f"unknown command {str(value)!r}{advice}")
        raise argparse.ArgumentError(action, f"unknown choice {str(value)!r}{advice}")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


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


def read_fields(arguments: argparse.Namespace, config: type[Parsed], prefix: str = "") -> Parsed:
    """Return the config whose flags `add_fields` has added. Raises OptionError."""
    names = {name: f"{prefix}{name}".replace("-", "_") for name in config.model_fields}
    return config.parse(**{name: getattr(arguments, flag) for name, flag in names.items()})


def _choices(annotation: Any) -> tuple[str, ...] | None:
    """The words of a Literal, also of one with validators or that may be None; else None."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if get_origin(annotation) in (Union, UnionType) and len(kinds) == 1:
        annotation = kinds[0]
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_args(annotation) if get_origin(annotation) is Literal else None
