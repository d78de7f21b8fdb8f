"""Links between pages lead somewhere, and the index names every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*DOCS.rglob("*.md"), ROOT / "README.md"]


def _links(page: Path) -> set[Path]:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    return {(page.parent / link).resolve() for link in links if "://" not in link}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not [str(link.relative_to(ROOT)) for link in _links(page) if not link.exists()]


def test_every_page_is_in_the_index() -> None:
    index = DOCS / "README.md"
    assert {page.resolve() for page in DOCS.rglob("*.md")} - {index} <= _links(index)
