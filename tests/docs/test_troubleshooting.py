"""The messages that docs/guides/troubleshooting.md quotes exist in the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS, _, RAYS = (
    (ROOT / "docs" / "guides" / "troubleshooting.md").read_text().partition("## Ray's own")
)
QUOTED = re.findall(r"^\| (?:\d{3} )?`([^`]+)` \|", OURS, re.M)


def _text(node: ast.AST) -> str:
    """Return the text of a string, with … for each inserted value."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return "…"


@cache
def _messages() -> list[str]:
    files = [*(ROOT / "linearsr").rglob("*.py"), *(ROOT / "ray_jobs").rglob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return [_text(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]


def said(quoted: str) -> bool:
    """Return whether one message of the package has all the pieces between …, in this order."""
    pieces = [re.escape(piece) for piece in quoted.split("…") if piece.strip()]
    assert sum(map(len, pieces)) > 10, f"{quoted}: too little to be found by"
    pattern = re.compile(".*".join(pieces), re.S)
    return any(pattern.search(message) for message in _messages())


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_messages_exist_in_the_code(quoted: str) -> None:
    assert said(quoted)


def test_quoted_messages_that_do_not_exist_are_detected() -> None:
    assert len(QUOTED) > 40 and RAYS
    assert not said("…: not a picture this program likes; give PNG")
    assert not said("allowed than the … more bytes, has the upload")


def test_every_row_about_this_project_quotes_a_message() -> None:
    rows = [r for r in OURS.splitlines() if r.startswith("| ") and " message |" not in r]
    assert len(rows) == len(QUOTED)
