"""The blocks of commands in the project's pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

TOP = Path(__file__).parents[3]
LANGUAGES = ("sh", "python")
# A command begins like this; a line of output or a tree of folders does not.
COMMAND = re.compile(
    r"(linearsr|python|ray|serve|make|pip|docker|kubectl|helm|aws|curl|export) [\w'./-]"
)


class Block(NamedTuple):
    """A fenced block: its language, its text, the line of its page where it begins."""

    language: str
    text: str
    line: int


def pages() -> list[str]:
    """Return every page, README first."""
    folders = ("docs", "deploy/kubernetes", "examples", "tools")
    paths = [*TOP.glob("*.md"), TOP / "linearsr/weights/linearsr-tiny/README.md"]
    paths += sorted(page for folder in folders for page in (TOP / folder).rglob("*.md"))
    return sorted((str(p.relative_to(TOP)) for p in paths), key=lambda name: name != "README.md")


def blocks(text: str) -> Iterator[Block]:
    """Yield all blocks of commands. Raise ValueError for commands that no test would see."""
    for token in MarkdownIt().parse(text):
        if token.type not in ("fence", "code_block"):
            continue
        line = (token.map or [0])[0] + 1
        if token.info in LANGUAGES:
            yield Block(token.info, token.content, line)
        elif token.info not in ("", "text") or COMMAND.match(token.content):
            raise ValueError(f"line {line}: commands are in ```sh or ```python, not {token.info!r}")
