"""Choose the experts of a release, and put them in order, highest noise first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from linearsr.diffusion.experts import EXPERTS
from linearsr.errors import WeightsError
from linearsr.weights.convert.layout import some
from linearsr.weights.convert.recognise import Group

# A part of a name that says that the weights are averages (EMA).
_AVERAGED = re.compile(r"(^|[.:_-])ema($|[.:_-])", re.IGNORECASE)


def choose(
    where: Path, everyone: list[Group], experts: Sequence[str], count: int | None
) -> list[Group]:
    """Return the experts to use, highest noise first."""
    if not everyone:
        raise WeightsError(
            f"{where}: no denoiser was recognised: there is no numbered list of blocks with a 3x3 "
            "depthwise convolution and a parameter of six rows each; name the tensors by a mapping"
        )
    if experts:
        chosen = [_by_name(where, everyone, name) for name in experts]
    else:
        chosen = _in_order(where, _one_copy(where, everyone), count)
    if len(chosen) != (count or len(chosen)) or (count is None and len(chosen) not in (1, 4)):
        raise WeightsError(
            f"{where}: {len(chosen)} experts were found ({titles(chosen, where)}), and "
            f"{count or f'LinearSR has {len(EXPERTS)}, or 1'}"
            f"{' are needed' if count else ''}; add the missing files, choose experts with "
            "--experts, or give another number by --boundaries"
        )
    for group in chosen:
        gaps = sorted(set(range(max(group.blocks) + 1)) - set(group.blocks))
        if gaps:
            raise WeightsError(
                f"{where}: {title(group, where)}: of {max(group.blocks) + 1} blocks these are "
                f"missing: {some([str(gap) for gap in gaps])}"
            )
    return chosen


def _by_name(where: Path, everyone: Sequence[Group], name: str) -> Group:
    fitting = [g for g in everyone if name in (title(g, where), *_aliases(g))]
    if len(fitting) != 1:
        raise WeightsError(
            f"{where}: {name!r} names {len(fitting)} experts of {titles(everyone, where)}"
        )
    return fitting[0]


def _aliases(group: Group) -> tuple[str, ...]:
    """Return other names of an expert: its file's, with and without the suffix."""
    file = group.label.partition(":")[0]
    return (file, Path(file).stem)


def _one_copy(where: Path, everyone: list[Group]) -> list[Group]:
    """Return the averaged copies of all experts if there are any, which sampling uses."""
    averaged = [group for group in everyone if _AVERAGED.search(group.label)]
    plain = [group for group in everyone if group not in averaged]
    if averaged and plain and len(averaged) != len(plain):
        raise WeightsError(
            f"{where}: {len(averaged)} experts are averaged (EMA) and {len(plain)} are not: "
            f"{titles(everyone, where)}; choose with --experts, highest noise first"
        )
    return averaged or plain


def _in_order(where: Path, found: list[Group], count: int | None) -> list[Group]:
    """Return experts by their names or numbers, highest noise first."""
    if len(found) == 1:
        return found
    words = [[name for name in EXPERTS if name in group.label.lower()] for group in found]
    if all(len(one) == 1 for one in words):
        names = [one[0] for one in words]
        missing = [name for name in EXPERTS if name not in names]
        if missing and count is None:
            raise WeightsError(
                f"{where}: these experts are missing: {', '.join(missing)} (found: "
                f"{titles(found, where)})"
            )
        return [group for _, group in sorted(zip(map(EXPERTS.index, names), found, strict=True))]
    return _by_number(where, found)


def _by_number(where: Path, found: list[Group]) -> list[Group]:
    numbers = [[int(n) for n in re.findall(r"\d+", group.label)] for group in found]
    columns = list(zip(*numbers, strict=False)) if len({len(n) for n in numbers}) == 1 else []
    telling = [column for column in columns if len(set(column)) == len(found)]
    if len(telling) != 1:
        raise WeightsError(
            f"{where}: the order of these experts is unknown: {titles(found, where)}; give them "
            "with --experts, highest noise first"
        )
    missing = sorted(set(range(min(1, *telling[0]), max(telling[0]) + 1)) - set(telling[0]))
    if missing:
        raise WeightsError(
            f"{where}: of the experts {titles(found, where)}, these numbers are missing: "
            f"{', '.join(map(str, missing))}; add them, or choose with --experts"
        )
    return [group for _, group in sorted(zip(telling[0], found, strict=True))]


def title(group: Group, where: Path) -> str:
    """Return the place of an expert: what stands before the names of its blocks, or the file."""
    return group.label or where.name


def titles(found: Sequence[Group], where: Path) -> str:
    """Return the places of several experts."""
    return ", ".join(title(group, where) for group in found)
