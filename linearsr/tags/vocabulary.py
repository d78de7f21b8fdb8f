"""Choose which of a tagger's names to report. Knows nothing of pictures or models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from linearsr.errors import OptionError
from linearsr.tags.base import Tag, TaggerConfig

# The most unknown names that one error message lists.
MAX_LISTED = 5


class Vocabulary:
    """The names that a tagger may report, each with the score it needs."""

    def __init__(
        self, names: Sequence[str], config: TaggerConfig, defaults: float | Sequence[float]
    ) -> None:
        """Restrict a tagger's names to the vocabulary file, if the config has one.

        A threshold in that file precedes the config's, and that precedes the tagger's `defaults`:
        one for each of `names`, or one for all. Raises OptionError for a name in the file that the
        tagger does not know.
        """
        allowed = read_vocabulary(config.vocabulary) if config.vocabulary else dict.fromkeys(names)
        known = set(names)
        unknown = [name for name in allowed if name not in known]
        if unknown:  # Most likely mistyped; it would never be reported.
            listed = ", ".join(unknown[:MAX_LISTED]) + (", ..." if unknown[MAX_LISTED:] else "")
            raise OptionError(
                f"{config.vocabulary}: the {config.kind} tagger does not know {listed}; check the "
                "spelling, or leave them out"
            )
        self.kept = [i for i, name in enumerate(names) if name in allowed]
        self.names = [names[i] for i in self.kept]
        self.max_tags = config.max_tags
        if config.threshold is not None:
            defaults = config.threshold
        thresholds = []
        for i, name in zip(self.kept, self.names, strict=True):
            default = defaults if isinstance(defaults, float) else defaults[i]
            own = allowed[name]
            thresholds.append(default if own is None else own)
        self.thresholds = torch.tensor(thresholds)

    def select(self, scores: Tensor) -> list[Tag]:
        """Return at most `max_tags` tags, best first, of scores with shape (number of names,)."""
        scores = scores.float().cpu()[self.kept].clamp(0, 1)
        ranked = scores.sort(descending=True, stable=True).indices.tolist()
        sure = [i for i in ranked if scores[i] >= self.thresholds[i]]
        return [Tag(self.names[i], float(scores[i])) for i in sure[: self.max_tags]]


def read_vocabulary(path: str | Path) -> dict[str, float | None]:
    """Return the names in a text file, each with its threshold, or with None if it has none.

    A line is a name, or a name, a tab and a number. Empty lines and those that start with # are
    skipped. Raises OptionError naming the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{path}: not a readable UTF-8 text file; give one with a name per line"
        ) from error
    names: dict[str, float | None] = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            name, _, threshold = line.partition("\t")
            names[name.strip()] = _threshold(threshold.strip(), f"{path}:{number}")
    if not names:
        raise OptionError(f"{path}: contains no names; write one per line")
    return names


def _threshold(text: str, line: str) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        value = -1.0
    if value is not None and not 0 <= value <= 1:
        raise OptionError(
            f"{line}: {text!r} is not a threshold; write a number from 0 to 1 after the tab"
        )
    return value
