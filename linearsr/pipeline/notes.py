"""Notes for a user about a picture that was read, for all code that uses one page of its file."""

from __future__ import annotations

from collections.abc import Sequence

from linearsr.imaging.files import Picture


def notes_of(picture: Picture) -> tuple[str, ...]:
    """Return the notes of a picture's file, with one for the pages that were not read."""
    return picture.notes if picture.pages == 1 else (*picture.notes, pages_note(picture.pages))


def notes_of_pages(pages: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the notes of the pages of one result, each once, without that of further pages."""
    further = pages_note(len(pages))
    return tuple(dict.fromkeys(note for notes in pages for note in notes if note != further))


def pages_note(pages: int) -> str:
    """Return the note for a file with several pages."""
    return f"only the first of {pages} pages"
