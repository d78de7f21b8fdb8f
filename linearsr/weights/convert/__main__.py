"""The command: convert one source, or the files of a release, into a bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from linearsr.config import LINEARSR_1_6B, ModelConfig, SamplingConfig, explain
from linearsr.errors import LinearSRError, OptionError, OutputError, WeightsError, one_line
from linearsr.weights.bundle import expert_names, save
from linearsr.weights.convert.diffusers import find_folder, from_diffusers
from linearsr.weights.convert.files import read_json
from linearsr.weights.convert.layout import DROP, column_sizes
from linearsr.weights.convert.release import Release, Unseen, from_files

PROGRAM = "linearsr.weights.convert"


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert weights into a bundle and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _convert(options)
    except LinearSRError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Convert Sana's weights, or those of a LinearSR-like release.",
    )
    add = parser.add_argument
    add("source", nargs="+", type=Path, help="a diffusers folder, .pth or .safetensors files")
    add("--out", type=Path, required=True, help="folder to write the bundle to")
    add("--name", help="name of the model (default: the source's name)")
    add(
        "--mapping",
        type=Path,
        help='file of JSON, {"name in the source": "our name, or drop"}; in a name of the source '
        "* stands for any text and {} for a number",
    )
    add(
        "--experts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="the experts to use, highest noise first, as the command names them (default: all, "
        "by their names or numbers)",
    )
    add(
        "--boundaries",
        nargs="+",
        type=float,
        metavar="T",
        help="timesteps between experts, ascending (default: the paper's for four experts)",
    )
    add("--tag-heads", type=int, metavar="N", help="heads of cross-attention (default: Sana's)")
    add("--head-dim", type=int, metavar="N", help="channels of a head (default: 32, as in Sana)")
    add(
        "--stem-strides",
        nargs=3,
        type=int,
        metavar="N",
        help="strides of the LR stem's convolutions, which a release with a stem needs",
    )
    add(
        "--inputs",
        nargs="+",
        choices=["latent", "stem", "lr_latent", DROP],
        help="what the columns of the first layer take, in order; drop leaves out the rest",
    )
    add(
        "--dc-ae",
        metavar="SOURCE",
        help="folder, s3:// or hub id of the DC-AE (default: Sana's)",
    )
    add(
        "--decoder",
        metavar="SOURCE",
        help="folder, s3:// or hub id of another DC-AE of the same latents, whose decoder is used",
    )
    add(
        "--gemma",
        metavar="SOURCE",
        help="folder, s3:// or hub id of Gemma 2 (default: Sana's)",
    )
    return parser


def _convert(options: argparse.Namespace) -> None:
    source, out = options.source[0], options.out
    if any(out.glob("*.safetensors")):
        raise OutputError(f"{out}: already holds weights; choose an empty folder")
    folder = find_folder(source) if len(options.source) == 1 else None
    release = _release(options) if folder is None else _of_diffusers(folder, options)
    model = _model(release, options)
    provenance = {
        "source": ", ".join(path.resolve().name for path in options.source),
        "layout": "files" if folder is None else "diffusers",
        "experts": ", ".join(release.labels),
        "dropped": ", ".join(release.dropped),
    }
    try:
        save(out, model, release.experts, provenance)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {one_line(error)}") from error
    for name, label in zip(expert_names(model), release.labels, strict=True):
        print(f"{model.name}: {out / name}.safetensors, from {label}")
    print(f"dropped: {', '.join(release.dropped) or 'nothing'}")
    print(f"fresh: {', '.join(release.fresh) or 'nothing'}")
    if release.fresh:
        print("This is a start for training, not yet a super-resolution model.")


def _release(options: argparse.Namespace) -> Release:
    given = {
        "tag_heads": options.tag_heads,
        "head_dim": options.head_dim,
        "stem_strides": options.stem_strides and tuple(options.stem_strides),
        "inputs": options.inputs and tuple(options.inputs),
    }
    return from_files(
        options.source,
        read_json(options.mapping) if options.mapping else {},
        options.experts,
        Unseen(**{name: value for name, value in given.items() if value is not None}),
        None if options.boundaries is None else len(options.boundaries) + 1,
        print,
    )


def _of_diffusers(folder: Path, options: argparse.Namespace) -> Release:
    config, tensors, dropped, fresh = from_diffusers(folder)
    known = {"tag_heads": config.tag_heads, "head_dim": config.head_dim}
    for name, value in known.items():
        if getattr(options, name) not in (None, value):
            raise OptionError(
                f"--{name.replace('_', '-')}: {folder / 'config.json'} says {value}; leave it out"
            )
    for name in ("mapping", "experts", "boundaries", "stem_strides", "inputs"):
        if getattr(options, name):
            raise OptionError(
                f"--{name.replace('_', '-')} is for .pth and .safetensors files; leave it out, "
                f"because {folder} is a diffusers folder"
            )
    return Release(config, (options.source[0].resolve().name,), [tensors], dropped, fresh)


def _model(release: Release, options: argparse.Namespace) -> ModelConfig:
    like, source = LINEARSR_1_6B, options.source[0]
    config = release.config
    channels = column_sizes(like.denoiser)["latent"]
    if config.latent_channels != channels:
        raise WeightsError(
            f"{source}: these weights take latents of {config.latent_channels} channels, and DC-AE "
            f"f32c32 makes {channels}; convert a Sana model that was trained for it"
        )
    # A folder's name may hold dots ("SANA1.5"), a file's ends in one.
    name = options.name or (source.stem if source.is_file() else source.resolve().name)
    # Sana's own text encoder, if the captions have its width.
    sanas = like.tags if config.tag_dim == like.denoiser.tag_dim else None
    tags = like.tags and like.tags.model_copy(update={"source": options.gemma})
    boundaries = like.sampling.boundaries if len(release.experts) > 1 else ()
    fields: dict[str, Any] = {
        "name": name,
        "denoiser": config,
        "latent": like.latent.model_copy(
            update={"source": options.dc_ae or like.latent.source, "decoder": options.decoder}
        ),
        "tags": tags if options.gemma else sanas,
    }
    try:
        sampling = SamplingConfig(
            steps=like.sampling.steps, boundaries=options.boundaries or boundaries
        )
        return ModelConfig(**fields, sampling=sampling)
    except ValidationError as error:
        raise OptionError(": ".join(filter(None, explain(error)))) from error


if __name__ == "__main__":
    sys.exit(main())
