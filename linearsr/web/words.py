"""Say in plain words what is wrong with the fields of a form or a query."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from linearsr.errors import did_you_mean

# By pydantic's type of error; the placeholders are the error's context.
WORDS: Mapping[str, str] = {
    "missing": "is required",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "finite_number": "must be a number",
    "literal_error": "must be {expected}",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must look like {pattern}",
    "string_type": "must be text",
    "string_unicode": "must be text",
}
# Longer values are not repeated in messages.
SHOWN = 40


def plain_words(error: ValidationError, fields: Iterable[str]) -> list[tuple[str, str]]:
    """Return the name of each wrong field and what is wrong with it, in the order of the fields.

    fields: the names that may be sent, among which a misspelt one is looked for.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for one in error.errors():
        # A form has no null, so a field that may be absent never "should be None". A field whose
        # name is not Unicode has no location.
        if one["type"] != "none_required":
            found.setdefault(str((*one["loc"], "a field")[0]), []).append(dict(one))
    return [(name, _field(name, errors, tuple(fields))) for name, errors in found.items()]


def _field(name: str, errors: list[dict[str, Any]], fields: tuple[str, ...]) -> str:
    if errors[0]["type"] == "extra_forbidden":
        return "is not known" + (did_you_mean(name, fields) or "; leave it out")
    # A field of several kinds has an error for each.
    words = " or ".join(dict.fromkeys(map(_words, errors))).replace(" or must be ", ", or ")
    value = errors[0]["input"]
    shown = isinstance(value, (str, int, float)) and len(str(value)) <= SHOWN
    return f"{words}, not {str(value)!r}" if shown else words


def _words(error: Mapping[str, Any]) -> str:
    words = WORDS.get(error["type"])
    if words is None:
        return str(error["msg"])
    context = error.get("ctx", {}).items()
    return words.format(**{k: f"{v:g}" if isinstance(v, float) else v for k, v in context})
