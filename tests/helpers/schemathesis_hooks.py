"""Hooks for Schemathesis: pictures for its forms, and no forms with empty values."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.forms import saved

for kind in ("png", "jpeg", "webp", "tiff", "avif", "gif"):
    picture = saved(Image.new("RGB", (3, 2)), kind)
    schemathesis.openapi.media_type(f"image/{kind}", st.just(picture))


@schemathesis.hook
def filter_body(_: schemathesis.HookContext, body: Any) -> bool:
    """Return whether the body has no empty values: they would not be sent, or count as absent."""
    fields = getattr(body, "body", body)
    return not isinstance(fields, dict) or all(v not in ("", [], {}) for v in fields.values())
