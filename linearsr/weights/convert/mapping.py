"""Read a user's mapping of names: what a tensor is, or that it is dropped."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from linearsr.config import LINEARSR_1_6B
from linearsr.errors import OptionError, did_you_mean
from linearsr.weights.convert.layout import DROP, LAYOUTS, places

Role = tuple[str, int]
"""Our key, with `{}` for a block's number, and which of the tensors that are joined for it."""


def apply(
    source: Mapping[str, Tensor], mapping: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Role], list[str]]:
    """Return the tensors that are not dropped, the roles of those in the mapping, and the dropped.

    A key of the mapping is a name in the source, in which `*` stands for any text and `{}` for a
    number. Its value is "drop", or a name of LinearSR, Sana or diffusers, with `{}` for the number
    of a block: the tensor's own name says which block and expert it belongs to. The first key that
    fits a name counts.

    Raises OptionError for a key that fits no tensor, and for a value that is no such name.
    """
    rules = {re.compile(_pattern(key)): _role(key, value) for key, value in mapping.items()}
    roles = {
        name: next((role for rule, role in rules.items() if rule.fullmatch(name)), None)
        for name in source
    }
    for key in mapping:
        if not any(re.fullmatch(_pattern(key), name) for name in source):
            raise OptionError(f"mapping: no tensor has the name {key!r}{did_you_mean(key, source)}")
    kept = {name: x for name, x in source.items() if roles[name] != (DROP, 0)}
    placed = {name: role for name, role in roles.items() if role and name in kept}
    return kept, placed, [name for name in source if name not in kept]


def _pattern(key: str) -> str:
    return re.escape(key).replace(r"\*", ".*").replace(r"\{\}", r"\d+")


def _role(key: str, value: object) -> Role:
    config = LINEARSR_1_6B.denoiser
    known = {n: (p.key, p.part) for x in LAYOUTS.values() for n, p in places(config, x).items()}
    known |= {
        name: (name, 0)
        for name in (f"stem.convs.{i}.{leaf}" for i in range(3) for leaf in ("weight", "bias"))
    }
    known[DROP] = (DROP, 0)
    if not isinstance(value, str) or value not in known:
        raise OptionError(
            f"mapping: {key!r} is {value!r}, which is neither {DROP!r} nor a name of LinearSR, "
            f"Sana or diffusers{did_you_mean(str(value), known)}"
        )
    return known[value]
