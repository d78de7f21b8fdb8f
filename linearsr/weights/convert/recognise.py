"""Recognise a denoiser's tensors under unknown names: by name, or by shape and place.

A denoiser is a numbered list of blocks, each with one 3x3 depthwise convolution and one parameter
of six rows, and the tensors around that list. Any prefix may stand before the names of a layout. A
tensor without a known name is recognised if its shape fits one free place alone, or by its order
among those of the same shape, where the file keeps the order of layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise, takewhile
from typing import NamedTuple

from torch import Tensor

from linearsr.config import DenoiserConfig
from linearsr.weights.convert.layout import (
    LAYOUTS,
    Layout,
    Place,
    denoiser_config,
    places,
    ratio,
    squeezed,
)
from linearsr.weights.convert.mapping import Role

Source = Mapping[str, Tensor]
_TIME_CHANNELS = 256  # of Sana's sinusoids


class Group(NamedTuple):
    """The tensors of one denoiser.

    label: what stands before the names of its blocks.
    blocks: the names in each block, by its number.
    around: the names outside of the blocks.
    """

    label: str
    blocks: dict[int, list[str]]
    around: list[str]


class Found(NamedTuple):
    """The places of a group's tensors.

    layout: the name of the layout that fits best.
    config: the shape; heads, prediction and stem are not those of the source.
    columns: the number of input channels of `embed`.
    recipe: as for `layout.assemble`.
    named: the number of tensors that were recognised by name, not by shape and place.
    missing: the layout's names for which there is no tensor.
    left: the names of tensors without a place.
    """

    layout: str
    config: DenoiserConfig
    columns: int
    recipe: dict[str, list[str]]
    named: int
    missing: list[str]
    left: list[str]


def components(name: str) -> tuple[str, ...]:
    """Split "file:a.b.0" into ("file", "a", "b", "0"); a file's name may have dots."""
    file, colon, rest = name.rpartition(":")
    return (*((file,) if colon else ()), *rest.split("."))


def groups(source: Source) -> list[Group]:
    """Return the denoisers in a source. A tensor outside of all blocks belongs to its nearest."""
    paths = _lists(source)
    blocks: dict[tuple[str, ...], dict[int, list[str]]] = {path: {} for path in paths}
    outside = []
    for name in source:
        path = next((p for p in paths if _number(name, p) is not None), None)
        if path is None:
            outside.append(name)
        else:
            blocks[path].setdefault(int(components(name)[len(path)]), []).append(name)
    return [
        Group(
            _label(path[:-1]),
            dict(sorted(blocks[path].items())),
            [name for name in outside if path in _nearest(name, paths)],
        )
        for path in paths
    ]


def _lists(source: Source) -> list[tuple[str, ...]]:
    """Return the components before the numbers of blocks, for each list of blocks."""
    convs = [components(name) for name, x in source.items() if tuple(x.shape[1:]) == (1, 3, 3)]
    inside = Counter(conv[: end + 1] for conv in convs for end in range(len(conv)))
    six = [components(name) for name, x in source.items() if x.ndim == 2 and len(x) == 6]
    modulated = {parts[:end] for parts in six for end in range(len(parts))}
    found: dict[tuple[str, ...], None] = {}
    for conv in convs:
        ends = [
            end
            for end, part in enumerate(conv)
            if part.isdigit() and inside[conv[: end + 1]] == 1 and conv[: end + 1] in modulated
        ]
        if ends:
            found[conv[: ends[0]]] = None
    return list(found)


def _label(parts: tuple[str, ...]) -> str:
    """Join components as in a name; only a file's has dots."""
    file = parts[:1] if "." in "".join(parts[:1]) else ()
    return ":".join(filter(None, ["".join(file), ".".join(parts[len(file) :])]))


def _number(name: str, path: tuple[str, ...]) -> int | None:
    """Return the number of the block that a tensor lies in, if the list is that of `path`."""
    parts = components(name)
    inside = parts[: len(path)] == path and len(parts) > len(path) + 1
    return int(parts[len(path)]) if inside and parts[len(path)].isdigit() else None


def _nearest(name: str, paths: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the lists that share the most leading components with a name."""
    parts = components(name)
    same = {path: [a == b for a, b in zip(parts, path, strict=False)] for path in paths}
    shared = {path: len([*takewhile(bool, equal)]) for path, equal in same.items()}
    return [path for path, count in shared.items() if count == max(shared.values())]


def recognise(source: Source, group: Group, roles: Mapping[str, Role], ordered: bool) -> Found:
    """Find the layout that leaves the fewest tensors without a place and places without a tensor.

    roles: what some tensors are, whatever their names say.
    ordered: whether the source's order is that of the model's layers.

    Raises WeightsError for sizes that LinearSR cannot have.
    """
    found = [
        _fit(_Clues(source, roles, ordered), group, title, qk_norm, tagged)
        for title in LAYOUTS
        for tagged in (True, False)
        for qk_norm in (False, True)
    ]
    return min(found, key=lambda one: (len(one.missing) + len(one.left), len(one.left)))


class _Clues(NamedTuple):
    """A source with what is known about it: see `recognise`."""

    source: Source
    roles: Mapping[str, Role]
    ordered: bool

    def named(self, names: Iterable[str], wanted: Mapping[str, Place]) -> dict[str, str]:
        """Return the tensors whose roles are wanted, or whose names end in a wanted one.

        Any prefix may stand before it; the longest end counts.
        """
        roles = {(place.key, place.part): leaf for leaf, place in wanted.items()}
        found: dict[str, str] = {}
        for name in names:
            parts = components(name)
            tails = (".".join(parts[start:]) for start in range(len(parts)))
            leaf = next((tail for tail in tails if tail in wanted), None)
            if name in self.roles:
                leaf = roles.get(self.roles[name])
            if leaf is not None:
                found.setdefault(leaf, name)
        return found


def _fit(clues: _Clues, group: Group, title: str, qk_norm: bool, tagged: bool) -> Found:
    sizes = _Sizes(clues, group, LAYOUTS[title])
    config = sizes.config(qk_norm, tagged)
    known = places(config, LAYOUTS[title])
    known = {
        name: place._replace(shape=(config.width, sizes.columns))
        if place.key == "embed.weight"
        else place
        for name, place in known.items()
    }
    around = {name: place for name, place in known.items() if "{}" not in name}
    block = {name.split("{}.")[1]: (name, place) for name, place in known.items() if "{}" in name}
    recipe: dict[str, list[str]] = {}
    missing, named = [], 0
    inner = {leaf: place for leaf, (_, place) in block.items()}
    parts = [(group.around, around, None), *((x, inner, n) for n, x in group.blocks.items())]
    for names, wanted, number in parts:
        by_name, by_shape = _assign(clues, names, wanted)
        named += len(by_name)
        for leaf, place in wanted.items():
            name = by_name.get(leaf) or by_shape.get(leaf)
            if name is None:
                missing.append(leaf if number is None else block[leaf][0].format(number))
            else:
                recipe.setdefault(place.key.format(number), []).append(name)
    used = {name for names in recipe.values() for name in names}
    left = [name for names, _, _ in parts for name in names if name not in used]
    stem = _stem(clues, left)
    recipe |= stem
    left = [name for name in left if [name] not in stem.values()]
    return Found(title, config, sizes.columns, recipe, named, missing, left)


class _Sizes:
    """The sizes of a model that its tensors show; 1 stands for a size that they do not show."""

    def __init__(self, clues: _Clues, group: Group, layout: Layout) -> None:
        self.clues, self.layout = clues, layout
        self.label, self.around = group.label, group.around
        source = clues.source
        self.depth = len(group.blocks)
        inside = [source[name] for names in group.blocks.values() for name in names]
        self.width = _most([x.shape[1] for x in inside if x.ndim == 2 and len(x) == 6])
        self.hidden = _most([len(x) for x in inside if tuple(x.shape[1:]) == (1, 3, 3)]) // 2
        wide = self.width
        self.columns = self._of("embed", 1, lambda s: s[0] == wide and s[2:] == (1, 1))
        self.latent = self._of("out", 0, lambda s: s[1:] == (wide,) and s[0] % wide != 0)
        hidden = {wide, _TIME_CHANNELS}
        self.tags = self._of("tags.hidden", 1, lambda s: s[:1] == (wide,) and {*s[1:]} - hidden)

    def _of(self, layer: str, axis: int, fits: Callable[[tuple[int, ...]], object]) -> int:
        """Return a side of a layer's weight: the one of that name, or the only one that fits."""
        weights = [name for name in self.around if _kind(name) == "weight"]
        wanted = {f"{self.layout[layer][0]}.weight": Place(f"{layer}.weight", 0, ())}
        named = [*self.clues.named(weights, wanted).values()]
        shapes = [tuple(self.clues.source[name].shape) for name in named or weights]
        sides = {s[axis] for s in shapes if len(s) in (2, 4) and (named or _plain(layer, s, fits))}
        return sides.pop() if len(sides) == 1 else 1

    def config(self, qk_norm: bool, tagged: bool) -> DenoiserConfig:
        return denoiser_config(
            self.label or "this source",
            latent_channels=self.latent,
            depth=self.depth,
            width=self.width,
            head_dim=self.width,
            ffn_ratio=ratio(self.hidden, self.width),
            qk_norm=qk_norm,
            tag_dim=self.tags if tagged else None,
            tag_heads=1,
        )


def _plain(layer: str, shape: tuple[int, ...], fits: Callable[[tuple[int, ...]], object]) -> bool:
    """Return whether a shape may be that of a layer: `embed` is a convolution, others are not."""
    return len(shape) == (4 if layer == "embed" else 2) and bool(fits(shape))


def _most(values: Sequence[int]) -> int:
    return Counter(values).most_common(1)[0][0]


def _assign(
    clues: _Clues, names: Sequence[str], wanted: Mapping[str, Place]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the tensors of the wanted places: those found by name, and those found by shape.

    Weights come before biases, because a bias has its place beside its weight.
    """
    by_name = clues.named(names, wanted)
    by_shape: dict[str, str] = {}
    for kind in ("weight", "bias", ""):
        taken = {*by_name.values()}
        free: dict[tuple[int, ...], list[str]] = {}
        rest: dict[tuple[int, ...], list[str]] = {}
        for leaf, place in wanted.items():
            if leaf not in by_name and _kind(leaf) == kind:
                free.setdefault(place.shape, []).append(leaf)
        for name in names:
            if name not in taken and name not in clues.roles and _kind(name) == kind:
                rest.setdefault(squeezed(clues.source[name]), []).append(name)
        for shape, leaves in free.items():
            found = {**by_name, **by_shape}
            by_shape |= _pairs(leaves, rest.get(shape, []), found, clues.ordered)
    return by_name, by_shape


def _pairs(
    leaves: Sequence[str], names: Sequence[str], found: Mapping[str, str], ordered: bool
) -> dict[str, str]:
    """Return the tensors of places of one shape: beside a found weight, alone, or in order."""
    weights = {leaf: found.get(f"{leaf.removesuffix('bias')}weight") for leaf in leaves}
    beside = {leaf: f"{name.removesuffix('weight')}bias" for leaf, name in weights.items() if name}
    pairs = {leaf: name for leaf, name in beside.items() if name in names}
    leaves = [leaf for leaf in leaves if leaf not in pairs]
    names = [name for name in names if name not in pairs.values()]
    fits = len(leaves) == len(names) and (ordered or len(names) == 1)
    return {**pairs, **dict(zip(leaves, names, strict=True))} if fits else pairs


def _kind(name: str) -> str:
    """Return "weight" or "bias" for the tensors of a layer, and "" for a bare parameter."""
    last = name.rpartition(".")[2]
    return last if last in ("weight", "bias") else ""


def _stem(clues: _Clues, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the recipe of an LR stem: three 3x3 convolutions in a row, the first from RGB.

    Their names, or roles, differ in a number alone.
    """
    rows: dict[str, dict[str, str]] = {}
    for name in names:
        if clues.source[name].ndim == 4 and _kind(name) == "weight":
            role, _ = clues.roles.get(name, (name, 0))
            rows.setdefault(re.sub(r"\d+", "{}", role), {})[role] = name
    for row in rows.values():
        order = sorted(row, key=lambda role: [int(n) for n in re.findall(r"\d+", role)])
        convs = [row[role] for role in order]
        channels = [3, *(len(clues.source[name]) for name in convs)]
        wanted = [(o, i, 3, 3) for i, o in pairwise(channels)]
        biases = [f"{name.removesuffix('weight')}bias" for name in convs]
        fits = [tuple(clues.source[name].shape) for name in convs] == wanted and len(convs) == 3
        if fits and all(name in clues.source for name in biases):
            leaves = {"weight": convs, "bias": biases}
            return {f"stem.convs.{i}.{x}": [leaves[x][i]] for x in leaves for i in range(3)}
    return {}
