"""`linearsr tag`: name what pictures show. The tagging job shares the tagger's options."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from linearsr.cli.flags import Commands
from linearsr.cli.inputs import list_folder
from linearsr.cli.report import OK, SOME_FAILED, complain
from linearsr.errors import (
    InputError,
    LinearSRError,
    OptionError,
    WeightsError,
    printable,
    reason,
)
from linearsr.tags.base import TAGGERS, TaggerConfig, check_used

if TYPE_CHECKING:
    from linearsr.tags.base import Tagger

# The flags that may name files.
TAGGER_FILES = ("tagger_model", "tagger_adapter", "vocabulary")


def add(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "tag",
        help="name what pictures show",
        description="Name what pictures show.",
        epilog="The default tagger knows ImageNet's objects and needs no download; it names "
        "nothing rather than something wrong. docs/guides/tags.md compares the taggers.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="picture files, or folders of them"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object per picture")
    parser.add_argument(
        "--device", default="cpu", help="device that the tagger runs on: cpu, cuda or mps"
    )
    add_tagger_options(parser)


def add_tagger_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the flags that choose a tagger; ray_jobs/tag_dataset.py has them too."""
    parser.add_argument(
        "--tagger",
        choices=TAGGERS,
        default="imagenet",
        help="kind of tagger (docs/guides/tags.md)",
    )
    parser.add_argument(
        "--tagger-model",
        metavar="PATH",
        help="weights of the tagger: for zero-shot, a folder or Hugging Face id of a CLIP or "
        "SigLIP; for ram, a checkpoint file of the Recognize Anything Model; imagenet has its own",
    )
    parser.add_argument(
        "--tagger-adapter",
        metavar="FILE",
        help="LoRA weights to add to the checkpoint of --tagger ram, such as DAPE's "
        "(default: none)",
    )
    parser.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="text file with the names to choose from, one per line, each optionally followed by a "
        "tab and its threshold (default: all names the tagger knows; for zero-shot, a built-in "
        "list)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="minimum score for a tag to be kept, 0 to 1, where the vocabulary sets none "
        "(default: the tagger's own)",
    )
    parser.add_argument(
        "--max-tags", type=int, default=5, help="largest number of tags per picture"
    )


def tagger_config(arguments: argparse.Namespace) -> TaggerConfig:
    """Return the config that the flags of `add_tagger_options` describe. Raises OptionError."""
    config = TaggerConfig.parse(
        kind=arguments.tagger,
        source=arguments.tagger_model,
        adapter=arguments.tagger_adapter,
        vocabulary=arguments.vocabulary,
        threshold=arguments.threshold,
        max_tags=arguments.max_tags,
    )
    check_used(config)
    return config


def absolute_paths(arguments: argparse.Namespace) -> None:
    """Make the tagger's files absolute: workers have working folders of their own.

    A hub id stays as it is.
    """
    for name in TAGGER_FILES:
        path = getattr(arguments, name)
        if path is not None and os.path.exists(path):
            setattr(arguments, name, os.path.abspath(path))


def _run(arguments: argparse.Namespace) -> int:
    from linearsr.tags import load_tagger

    tagger = load_tagger(tagger_config(arguments), arguments.device)
    failed = 0
    for path in arguments.inputs:
        try:
            pictures, unlisted = list_folder(path) if path.is_dir() else ([path], 0)
        except InputError as error:
            failed += 1
            complain(error, SOME_FAILED)
            continue
        failed += unlisted
        failed += sum(not _print_tags(tagger, picture, arguments.json) for picture in pictures)
    return SOME_FAILED if failed else OK


def _print_tags(tagger: Tagger, path: Path, as_json: bool) -> bool:
    """Print one picture's tags, or why there are none; False if the picture failed."""
    from linearsr.imaging.files import read
    from linearsr.pipeline.notes import notes_of

    try:
        picture = read(path)
        tags = tagger(picture.pixels)
    except (OptionError, WeightsError):
        raise  # the next picture would fail as well
    except Exception as error:  # torch, codecs and models raise errors of many kinds
        ours = isinstance(error, LinearSRError)
        complain(error if ours else LinearSRError(f"{path}: {reason(error)}"), SOME_FAILED)
        return False
    if as_json:
        named = [{"name": tag.name, "score": round(tag.score, 4)} for tag in tags]
        line = json.dumps({"file": str(path), "tags": named})
    else:
        found = ", ".join(f"{tag.name} {tag.score:.2f}" for tag in tags)
        line = f"{path}: {found or 'no tags'}"
    print(printable(line), flush=True)
    for note in notes_of(picture):
        print(printable(f"linearsr: {path}: {note}"), file=sys.stderr)
    return True
