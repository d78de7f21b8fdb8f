"""The interface of every tagger: a picture in, a few object names with scores out.

The paper's TAG guidance needs precision more than volume: a name that is not in the picture
misleads the denoiser, while a missing one only leaves it unguided. Thresholds are set accordingly.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import Field

from linearsr.config import Config
from linearsr.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

TAGGERS = ("imagenet", "zero-shot", "ram")


class Tag(NamedTuple):
    """The name of an object in a picture, and how sure the tagger is.

    score: the tagger's confidence in [0, 1], not comparable between kinds of tagger.
    """

    name: str
    score: float


class Tagger(Protocol):
    """A function that names what a picture shows."""

    def __call__(self, picture: Tensor) -> list[Tag]:
        """Return the tags of a picture (3, H, W) in [0, 1], of any size.

        The best comes first. The list is empty if the tagger is sure of nothing.
        """


class TaggerConfig(Config):
    """A tagger, and the confidence from which it names an object."""

    kind: Literal["imagenet", "zero-shot", "ram"] = "imagenet"
    """Kind of tagger: one of ImageNet's classes, a CLIP or SigLIP, or Recognize Anything."""
    source: str | None = None
    """The model: a folder (also s3://) or hub id of a CLIP or SigLIP for "zero-shot", or a
    Recognize-Anything checkpoint file for "ram". The weights of "imagenet" come in a package."""
    adapter: str | None = None
    """LoRA weights on top of a "ram" source, such as DAPE's for degraded pictures."""
    vocabulary: str | None = None
    """A file of the only names to use, one per line; a tab and a number set a name's threshold."""
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """The least score of a name without its own threshold; None is the tagger's default."""
    max_tags: int = Field(default=5, ge=1, le=100)
    """Maximum number of tags of a picture."""

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that the tags depend on, for the record of a job.

        Raises OptionError for an unreadable vocabulary.
        """
        settings = self.model_dump(mode="json")
        if self.vocabulary is not None:
            try:
                words = Path(self.vocabulary).read_bytes()
            except OSError as error:
                raise OptionError(
                    f"{self.vocabulary}: cannot be read ({error.strerror}); check --vocabulary"
                ) from error
            settings["vocabulary"] = hashlib.sha256(words).hexdigest()
        return settings


def check_used(config: TaggerConfig) -> None:
    """Raise OptionError for a model or adapter that this kind of tagger would ignore."""
    if config.kind == "imagenet" and config.source is not None:
        raise OptionError("the imagenet tagger has its own model; leave the tagger model out")
    if config.kind != "ram" and config.adapter is not None:
        raise OptionError(
            f"the {config.kind} tagger takes no adapter; leave --tagger-adapter out, or choose ram"
        )
