"""Give tensors other names, or drop them, by a mapping that the user wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from linearsr.config import LINEARSR_1_6B
from linearsr.errors import OptionError, did_you_mean
from linearsr.weights.convert.layout import DROP, LAYOUTS, places
from linearsr.weights.convert.recognise import components


def rename(
    source: Mapping[str, Tensor], mapping: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under the names of a mapping, and the names that it drops.

    A key of the mapping is a name in the source, in which `*` stands for any text and `{}` for a
    number. Its value is "drop", or a name that ends in one of LinearSR's, Sana's or diffusers',
    in which `*` and `{}` are the texts and numbers of the key, in order. The first key that fits a
    name counts.

    Raises OptionError for a key that fits no tensor, a value that is no such name, and two tensors
    of one name.
    """
    rules = {key: (_pattern(key), _checked(key, value)) for key, value in mapping.items()}
    unused = dict.fromkeys(rules)
    renamed: dict[str, Tensor] = {}
    dropped = []
    for name, tensor in source.items():
        key = next((key for key, (pattern, _) in rules.items() if pattern.fullmatch(name)), None)
        target = name
        if key is not None:
            unused.pop(key, None)
            pattern, value = rules[key]
            target = _filled(value, pattern.fullmatch(name))
        if target == DROP:
            dropped.append(name)
        elif target in renamed:
            raise OptionError(f"mapping: two tensors would be {target!r}, the second is {name!r}")
        else:
            renamed[target] = tensor
    for key in unused:
        raise OptionError(f"mapping: no tensor has the name {key!r}{did_you_mean(key, source)}")
    return renamed, dropped


def _pattern(key: str) -> re.Pattern[str]:
    text = re.escape(key).replace(r"\*", "(.*)").replace(r"\{\}", r"(\d+)")
    return re.compile(text)


def _checked(key: str, value: object) -> str:
    """Return the value of a mapping's key. Raises OptionError unless it is a name, or "drop"."""
    known = _known_names()
    if not isinstance(value, str):
        raise OptionError(f"mapping: the value of {key!r} must be a name or {DROP!r}")
    parts = components(re.sub(r"(?<=\.)\d+(?=\.)", "{}", value))
    if value != DROP and not any(".".join(parts[start:]) in known for start in range(len(parts))):
        raise OptionError(
            f"mapping: {value!r} ends in no name of LinearSR, Sana or diffusers"
            f"{did_you_mean(value, known)}"
        )
    wildcards = re.findall(r"\*|\{\}", key)
    if value != DROP and re.findall(r"\*|\{\}", value) != wildcards:
        raise OptionError(f"mapping: {value!r} must have the same * and {{}} as {key!r}, in order")
    return value


def _known_names() -> set[str]:
    config = LINEARSR_1_6B.denoiser
    stem = {f"stem.convs.{{}}.{leaf}" for leaf in ("weight", "bias")}
    names = {name for layout in LAYOUTS.values() for name in places(config, layout)}
    numbered = {re.sub(r"\.\d+\.", ".{}.", name) for name in names}
    return {*stem, *names, *numbered}


def _filled(value: str, match: re.Match[str] | None) -> str:
    found = iter(match.groups() if match else ())
    return re.sub(r"\*|\{\}", lambda _: next(found), value)
