"""Taggers, which name the objects in a picture, and encoders of such tags."""

from __future__ import annotations

from linearsr.tags.base import Tagger, TaggerConfig, check_used

__all__ = ["load_tagger"]


def load_tagger(config: TaggerConfig, device: str = "cpu") -> Tagger:
    """Load a tagger. Raises OptionError, or WeightsError if its model cannot be loaded."""
    check_used(config)
    if config.kind == "zero-shot":
        from linearsr.tags.zero_shot import ZeroShotTagger

        return ZeroShotTagger(config, device)
    if config.kind == "ram":
        from linearsr.tags.ram import RamTagger

        return RamTagger(config, device)
    from linearsr.tags.imagenet import ImageNetTagger

    return ImageNetTagger(config, device)
