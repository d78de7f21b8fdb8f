"""Convert .pth and .safetensors files: Sana's own, or a release of a LinearSR-like model.

A release has one expert or several, in files of their own or in one, under any prefixes, with or
without copies of averaged weights (EMA), and with or without an LR stem. A mapping of names places
or drops what is not recognised. Nothing is left out in silence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from linearsr.config import DenoiserConfig
from linearsr.errors import WeightsError
from linearsr.weights.bundle import LazyExperts
from linearsr.weights.convert.experts import choose, title
from linearsr.weights.convert.files import SUFFIXES, Read, read_file, read_json, read_shards
from linearsr.weights.convert.layout import (
    WHY,
    assemble,
    check_shapes,
    column_sizes,
    denoiser_config,
    fresh_keys,
    some,
)
from linearsr.weights.convert.mapping import apply
from linearsr.weights.convert.recognise import Found, Group, components, groups, recognise

# Tensors of Sana's layout that no output depends on: the position buffer (all zeros unless
# positions are used, which is refused), the caption of classifier-free guidance, and training's
# weighting of the loss.
_IDLE = (
    "pos_embed",
    "y_embedder.y_embedding",
    "logvar_linear.weight",
    "logvar_linear.bias",
)

# Shapes do not show the heads of cross-attention, so this has them by width for every model that
# NVlabs released.
_TAG_HEADS = {1152: 16, 2240: 20}

_INDEX = ".safetensors.index.json"


class Unseen(NamedTuple):
    """Facts about a release that its weights do not show.

    tag_heads: heads of cross-attention; None for NVlabs' number at this width.
    head_dim: channels of a head of linear attention.
    stem_strides: strides of the LR stem's convolutions, if there is a stem.
    inputs: what the columns of `embed` take, in order: "latent", "stem" (the LR stem's features),
        "lr_latent" (the encoded LR picture), and last "drop" for columns to leave out. None is that
        order, as far as the number of columns allows it.
    """

    tag_heads: int | None = None
    head_dim: int = 32
    stem_strides: tuple[int, int, int] | None = None
    inputs: tuple[str, ...] | None = None


class Release(NamedTuple):
    """Converted experts, from highest noise to lowest.

    config: the shape of each.
    labels: the place of each in the source.
    experts: full float32 state dicts of `LinearSR(config)`, made one at a time when they are read.
    dropped: the names in the source that LinearSR does not use.
    fresh: our keys that the source has no tensors for, with new values.
    """

    config: DenoiserConfig
    labels: tuple[str, ...]
    experts: Sequence[Mapping[str, Tensor]]
    dropped: tuple[str, ...]
    fresh: tuple[str, ...]


def from_files(
    path: str | Path | Sequence[Path],
    mapping: Mapping[str, str] | None = None,
    experts: Sequence[str] = (),
    unseen: Unseen | None = None,
    count: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Release:
    """Convert a file, several, or all weights files of a folder.

    mapping: what tensors are, or "drop": see `mapping.apply`.
    experts: the places of the experts in the source, highest noise first, to use these alone. By
        default all are used, of averaged copies and others the averaged ones, in the order of
        their names (structure, refinement, texture, polish) or numbers.
    count: the number of experts; by default, 1 or 4.
    say: takes a line about each thing that was recognised or could not be placed.

    Raises OptionError for a wrong mapping. Raises WeightsError, by name, for files that are
    missing, damaged or not tensors alone; for tensors that are missing, without a place, or of
    another shape; for experts that are missing, differ in shape, or whose order is unknown; for
    what LinearSR cannot represent (patches, positions, guidance embeddings); and, when an expert is
    read, for values that are not finite.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else list(path)
    where = paths[0] if len(paths) == 1 else paths[0].parent
    unseen = unseen or Unseen()
    source, dropped, ordered = _pool(where, paths, say)
    source, roles, gone = apply(source, mapping or {})
    dropped += gone + _idle(where, source)
    everyone = groups(source)
    chosen = choose(where, everyone, experts, count)
    found = [recognise(source, group, roles, ordered) for group in chosen]
    dropped += [
        f"all of {title(group, where)} ({sum(map(len, group.blocks.values()))} tensors in blocks)"
        for group in everyone
        if group not in chosen
    ]
    dropped += _of_others(everyone, chosen)
    for group, one in zip(chosen, found, strict=True):
        say(_summary(group, one, where))
    _refuse_incomplete(where, source, chosen, found, say)
    config, inputs = _config(where, source, chosen, found, unseen)
    say(_assumptions(config, inputs, len(found)))
    for one in found:
        check_shapes(where, source, one.recipe, config, inputs)
    return Release(
        config,
        tuple(title(group, where) for group in chosen),
        LazyExperts(len(found), lambda n: assemble(where, source, found[n].recipe, config, inputs)),
        tuple(dict.fromkeys(dropped)),
        fresh_keys(found[0].recipe, config, inputs),
    )


# Reading


def _pool(
    where: Path, paths: Sequence[Path], say: Callable[[str], None]
) -> tuple[dict[str, Tensor], list[str], bool]:
    """Return all tensors, what else is in the files, and whether all files keep the order.

    With several files, a name begins with the file's path below their common folder.
    """
    files = [file for path in paths for file in _files(path, say)]
    if not files:
        raise WeightsError(f"{where}: holds no weights ({', '.join(SUFFIXES)})")
    read = {file: _read(file) for file in files}
    if len(read) == 1:
        (content,) = read.values()
        return dict(content.tensors), list(content.dropped), content.ordered
    top = os.path.commonpath([file.parent for file in files])
    named = {Path(os.path.relpath(file, top)).as_posix(): one for file, one in read.items()}
    tensors = {
        f"{file}:{name}": x for file, one in named.items() for name, x in one.tensors.items()
    }
    dropped = [f"{file}:{name}" for file, one in named.items() for name in one.dropped]
    return tensors, dropped, all(one.ordered for one in read.values())


def _files(path: Path, say: Callable[[str], None]) -> list[Path]:
    """Return the weights files of a folder: of two formats of one file the safetensors."""
    if not path.is_dir():
        return [path]
    indexes = sorted(path.glob(f"*{_INDEX}"))
    shards = {name for index in indexes for name in read_json(index).get("weight_map", {}).values()}
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
    files = [file for file in files if file.name not in shards]
    safe = {file.stem for file in files if file.suffix == ".safetensors"}
    twins = [file for file in files if file.suffix != ".safetensors" and file.stem in safe]
    if twins:
        say(f"left out, since there are safetensors too: {', '.join(f.name for f in twins)}")
    return [*indexes, *(file for file in files if file not in twins)]


def _read(file: Path) -> Read:
    if file.name.endswith(_INDEX):
        return Read(read_shards(file), [], ordered=False)
    return read_file(file)


def _idle(where: Path, source: dict[str, Tensor]) -> list[str]:
    """Take tensors that no output depends on out of the source, and return their names.

    Raises WeightsError for tensors that say that LinearSR cannot represent the model.
    """
    idle = []
    for name, tensor in list(source.items()):
        path = ".".join(components(name))
        if re.search(r"(^|\.)cfg_embedder\.", path):
            raise WeightsError(f"{where}: {name}: cfg_embedder is {WHY['guidance_embeds']}")
        patch = re.search(r"(^|\.)(x_embedder|patch_embed)\.proj\.weight$", path)
        if patch and tuple(tensor.shape[2:]) not in ((), (1, 1)):
            raise WeightsError(f"{where}: {name} has {WHY['patch_size']}")
        if any(path == end or path.endswith(f".{end}") for end in _IDLE):
            # Sana fills this buffer only in models that use it.
            if path.endswith("pos_embed") and tensor.any():
                raise WeightsError(f"{where}: {name} is {WHY['interpolation_scale']}")
            idle.append(name)
            del source[name]
    return idle


# The report


def _of_others(everyone: Sequence[Group], chosen: Sequence[Group]) -> list[str]:
    """Return the names outside of blocks that belong to other copies of the experts alone."""
    used = {name for group in chosen for name in group.around}
    return [name for group in everyone for name in group.around if name not in used]


def _summary(group: Group, found: Found, where: Path) -> str:
    total = sum(map(len, found.recipe.values()))
    stem = ", with an LR stem" if "stem.convs.0.weight" in found.recipe else ""
    return (
        f"{title(group, where)}: {len(group.blocks)} blocks, layout of {found.layout}{stem}: "
        f"{total} tensors, {found.named} by name and {total - found.named} by shape and place"
    )


def _refuse_incomplete(
    where: Path,
    source: Mapping[str, Tensor],
    chosen: Sequence[Group],
    found: Sequence[Found],
    say: Callable[[str], None],
) -> None:
    """Raise WeightsError for places without a tensor and tensors without a place."""
    used = {name for one in found for names in one.recipe.values() for name in names}
    left = [
        name for name in dict.fromkeys(n for one in found for n in one.left) if name not in used
    ]
    missing = [
        name if len(chosen) == 1 else f"{title(group, where)}: {name}"
        for group, one in zip(chosen, found, strict=True)
        for name in one.missing
    ]
    for name in left:
        say(f"not placed: {name} {tuple(source[name].shape)}")
    for name in missing:
        say(f"missing: {name}")
    complaints = [f"{len(missing)} missing: {some(missing)}"] if missing else []
    complaints += [f"{len(left)} without a place: {some(left)}"] if left else []
    if any(source[name].ndim == 4 and source[name].shape[1] == 3 for name in left):
        complaints.append("an LR stem that LinearSR takes has three 3x3 convolutions with biases")
    if complaints:
        raise WeightsError(
            f"{where}: its tensors differ from those of a Sana model of this size: "
            f"{'; '.join(complaints)}. Place or drop them by a mapping"
        )


def _config(
    where: Path,
    source: Mapping[str, Tensor],
    chosen: Sequence[Group],
    found: Sequence[Found],
    unseen: Unseen,
) -> tuple[DenoiserConfig, tuple[str, ...]]:
    """Return the experts' config, and what the columns of `embed` take."""
    shapes = [(one.config, one.columns, _stem_channels(source, one)) for one in found]
    for group, shape in zip(chosen, shapes, strict=True):
        if shape != shapes[0]:
            raise WeightsError(
                f"{where}: {title(group, where)} has another shape than "
                f"{title(chosen[0], where)}; experts of one model must have one shape"
            )
    shown, columns, stem = shapes[0]
    heads = unseen.tag_heads or _TAG_HEADS.get(shown.width)
    if heads is None and shown.tag_dim is not None:
        raise WeightsError(
            f"{where}: width {shown.width} is not one of NVlabs' Sana models "
            f"({', '.join(map(str, _TAG_HEADS))}), and the weights do not show the number of "
            "cross-attention heads; give it by --tag-heads"
        )
    fields = shown.model_dump(exclude={"stem_channels", "stem_strides"})
    fields |= {"head_dim": unseen.head_dim, "tag_heads": heads or shown.tag_heads}
    if stem is not None:
        if unseen.stem_strides is None:
            raise WeightsError(
                f"{where}: the weights do not show the strides of the LR stem; give them by "
                "--stem-strides, as in 4 4 2, whose product is 32"
            )
        fields |= {"stem_channels": stem, "stem_strides": unseen.stem_strides}
    config = denoiser_config(where, **fields)
    inputs = unseen.inputs or _inputs(where, config, columns, stem is not None)
    return config.model_copy(update={"condition_latent": "lr_latent" in inputs}), inputs


def _stem_channels(source: Mapping[str, Tensor], found: Found) -> tuple[int, ...] | None:
    names = [found.recipe.get(f"stem.convs.{i}.weight") for i in range(3)]
    return tuple(len(source[name[0]]) for name in names if name) or None


def _inputs(where: Path, config: DenoiserConfig, columns: int, stem: bool) -> tuple[str, ...]:
    """Return what the columns of `embed` take, if their number says it."""
    sizes = column_sizes(config)
    orders = [("latent", "stem"), ("latent", "stem", "lr_latent")]
    if not stem:
        orders = [("latent",), ("latent", "lr_latent")]
    for order in orders:
        if columns == sum(sizes[name] for name in order):
            return order
    features = f", the stem's features {sizes['stem']}" if stem else ""
    raise WeightsError(
        f"{where}: embed takes {columns} channels, and a latent has {sizes['latent']}{features}; "
        "say what they are by --inputs (latent, stem, lr_latent, drop)"
    )


def _assumptions(config: DenoiserConfig, inputs: Sequence[str], count: int) -> str:
    """Return a line of what the weights do not show."""
    order = "" if count == 1 else "experts in the order above, highest noise first; "
    stem = f"; stem strides {config.stem_strides}" if "stem" in inputs else ""
    return (
        f"taken as given, for weights do not show it: {order}velocity prediction, timesteps on "
        f"[0, {config.timestep_scale:g}], {config.tag_heads} heads of cross-attention, heads of "
        f"{config.head_dim} channels; embed joins {', '.join(inputs)}{stem}"
    )
