"""Ids of models on a hub, with and without a revision."""

from __future__ import annotations

from pathlib import Path

import pytest

from linearsr.hub import split_revision


def test_revision_stands_after_the_id_and_folders_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b").mkdir()
    assert split_revision("owner/model@0123abc") == ("owner/model", "0123abc")
    assert split_revision("owner/model") == ("owner/model", None)
    assert split_revision("a@b") == ("a@b", None)
