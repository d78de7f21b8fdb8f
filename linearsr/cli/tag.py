"""`linearsr tag`: what pictures show; its options choose the tagger of jobs as well."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from linearsr.cli.report import OK, SOME_FAILED, complain
from linearsr.errors import InputError, LinearSRError, OptionError, WeightsError, one_line
from linearsr.tags.base import TAGGERS, TaggerConfig, check_used

if TYPE_CHECKING:
    from linearsr.tags.base import Tag, Tagger


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "tag",
        help="name what pictures show",
        epilog="The default tagger knows ImageNet's objects and needs no download; it says nothing "
        "rather than something wrong. docs/guides/tags.md tells what each tagger can know.",
    )
    parser.set_defaults(run=_tag)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="files or folders")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    add_tagger_options(parser)


def add_tagger_options(add: argparse.ArgumentParser) -> None:
    """Which tagger, and when it speaks: here and in ray_jobs/tag_dataset.py."""
    add.add_argument(
        "--tagger",
        choices=TAGGERS,
        default="imagenet",
        help="docs/guides/tags.md; default imagenet",
    )
    add.add_argument(
        "--tagger-model", metavar="PATH", help="a CLIP or SigLIP folder or id; a RAM checkpoint"
    )
    add.add_argument("--tagger-adapter", metavar="FILE", help="LoRA weights on RAM's, as DAPE's")
    add.add_argument(
        "--vocabulary", metavar="FILE", help="the only names to say, one a line; TAB threshold"
    )
    add.add_argument("--threshold", type=float, help="least score, 0 to 1; default: the tagger's")
    add.add_argument("--max-tags", type=int, default=5, help="of a picture; default 5")


def tagger_config(arguments: argparse.Namespace) -> TaggerConfig:
    """What `add_tagger_options` added, checked. Raises OptionError."""
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


def _tag(arguments: argparse.Namespace) -> int:
    from linearsr.tags import load_tagger

    tagger = load_tagger(tagger_config(arguments), arguments.device)
    failed = 0
    for given in arguments.inputs:
        try:
            for path in _pictures(given):
                failed += not _told(tagger, path, arguments.json)
        except InputError as error:
            failed += 1
            complain(error, SOME_FAILED)
    return SOME_FAILED if failed else OK


def _pictures(given: Path) -> Iterator[Path]:
    """A file, or the pictures in a folder. Raises InputError when there are none."""
    from linearsr.imaging.files import find_images

    found = find_images(given) if given.is_dir() else [given]
    if not found:
        raise InputError(f"{given}: no picture in this folder")
    yield from found


def _told(tagger: Tagger, path: Path, as_json: bool) -> bool:
    """Print one picture's tags; False for one that cannot be read."""
    from linearsr.imaging.files import read

    try:
        tags = tagger(read(path).pixels)
    except (OptionError, WeightsError):
        raise  # the next one would fail as well
    except LinearSRError as error:
        complain(error, SOME_FAILED)
        return False
    except Exception as error:  # torch, codecs and models have their own ways
        told = f"{path}: {type(error).__name__}: {one_line(error)}"
        complain(LinearSRError(told), SOME_FAILED)
        return False
    print(_json(path, tags) if as_json else f"{path}: {_line(tags)}", flush=True)
    return True


def _line(tags: list[Tag]) -> str:
    return ", ".join(f"{tag.name} {tag.score:.2f}" for tag in tags) or "no tags"


def _json(path: Path, tags: list[Tag]) -> str:
    named = [{"name": tag.name, "score": round(tag.score, 4)} for tag in tags]
    return json.dumps({"file": str(path), "tags": named})
