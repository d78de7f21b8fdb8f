"""One interface for every tagger: a picture in, a few object names with scores out.

The paper's TAG guidance wants precision over volume: a name that is not in the picture misleads
the denoiser, a missing one only leaves it unguided. Thresholds are set accordingly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Protocol

from pydantic import Field

from linearsr.config import Config
from linearsr.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

TAGGERS = ("imagenet", "zero-shot", "ram")


class Tag(NamedTuple):
    """What is seen, and how surely."""

    name: str
    # In [0, 1]: the tagger's own confidence, not comparable between kinds of tagger.
    score: float


class Tagger(Protocol):
    """Names what a picture shows."""

    def __call__(self, picture: Tensor) -> list[Tag]:
        """Tags of a picture (3, H, W) in [0, 1], of any size; best first, none when unsure."""


class TaggerConfig(Config):
    """Which tagger, and when it speaks.

    `source` is the model: a transformers folder or hub id of a CLIP or SigLIP ("zero-shot"), a
    Recognize-Anything checkpoint file ("ram"), nothing for "imagenet", whose weights come in a
    package.
    """

    kind: Literal["imagenet", "zero-shot", "ram"] = "imagenet"
    source: str | None = None
    adapter: str | None = None
    """LoRA weights on top of a "ram" source, as DAPE's for degraded pictures."""
    vocabulary: str | None = None
    """A file of the only names to say, one a line; a tab and a number after one: its threshold."""
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """The least score of a name without a threshold of its own; None is the tagger's default."""
    max_tags: int = Field(default=5, ge=1, le=100)


def check_used(config: TaggerConfig) -> None:
    """Raise OptionError for a model or an adapter that this kind of tagger would not look at."""
    if config.kind == "imagenet" and config.source is not None:
        raise OptionError("the imagenet tagger has its own model; leave the tagger model out")
    if config.kind != "ram" and config.adapter is not None:
        raise OptionError(
            f"the {config.kind} tagger takes no adapter; leave --tagger-adapter out, or choose ram"
        )


def load_tagger(config: TaggerConfig, device: str = "cpu") -> Tagger:
    """The tagger, ready to use. Raises OptionError or WeightsError."""
    check_used(config)
    if config.kind == "zero-shot":
        from linearsr.tags.zero_shot import ZeroShotTagger

        return ZeroShotTagger(config, device)
    if config.kind == "ram":
        from linearsr.tags.ram import RamTagger

        return RamTagger(config, device)
    from linearsr.tags.imagenet import ImageNetTagger

    return ImageNetTagger(config, device)
