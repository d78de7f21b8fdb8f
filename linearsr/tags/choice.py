"""Which of a tagger's names are said: those in the vocabulary, above their thresholds, a few.

Knows nothing of pictures or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from linearsr.errors import OptionError
from linearsr.tags.base import Tag, TaggerConfig

# Unknown names in one message.
MOST_TOLD = 5


class Choice:
    """Scores in, tags out.

    A threshold in the vocabulary file goes before the config's, and that before the tagger's own,
    `defaults`: one for each of `names`, or one for all.
    """

    def __init__(
        self, names: Sequence[str], config: TaggerConfig, defaults: float | Sequence[float]
    ) -> None:
        own = [defaults] * len(names) if isinstance(defaults, float) else defaults
        asked = read_vocabulary(config.vocabulary) if config.vocabulary else dict.fromkeys(names)
        known = set(names)
        unknown = [name for name in asked if name not in known]
        if unknown:  # mistyped, most likely, and then never said
            told = ", ".join(unknown[:MOST_TOLD]) + (", ..." if unknown[MOST_TOLD:] else "")
            raise OptionError(
                f"{config.vocabulary}: the {config.kind} tagger does not know {told}; check the "
                "spelling, or leave them out"
            )
        self.kept = [i for i, name in enumerate(names) if name in asked]
        self.names = [names[i] for i in self.kept]
        self.most = config.max_tags
        self.thresholds = torch.tensor([_first(asked[names[i]], config, own[i]) for i in self.kept])

    def __call__(self, scores: Tensor) -> list[Tag]:
        """Tags of the scores (number of names,), at most `max_tags`, best first."""
        scores = scores.float().cpu()[self.kept].clamp(0, 1)
        ranked = scores.sort(descending=True, stable=True)
        said = [i for i in ranked.indices.tolist() if scores[i] >= self.thresholds[i]]
        return [Tag(self.names[i], float(scores[i])) for i in said[: self.most]]


def _first(own: float | None, config: TaggerConfig, default: float) -> float:
    if own is not None:
        return own
    return default if config.threshold is None else config.threshold


def read_vocabulary(path: str | Path) -> dict[str, float | None]:
    """Names, and their thresholds where the file has one: a name a line, a tab, a number.

    Empty lines and those that start with # are passed over. Raises OptionError naming the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: not a readable UTF-8 text file; one name a line") from error
    found: dict[str, float | None] = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            name, _, threshold = line.partition("\t")
            found[name.strip()] = _threshold(threshold.strip(), f"{path}:{number}")
    if not found:
        raise OptionError(f"{path}: no names; write one a line")
    return found


def _threshold(text: str, place: str) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        value = -1.0
    if value is not None and not 0 <= value <= 1:
        raise OptionError(f"{place}: {text!r} is no threshold; after the tab, a number from 0 to 1")
    return value
