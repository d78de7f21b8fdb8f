"""Pictures are paired by their names alone."""

from __future__ import annotations

import pytest

from linearsr.evaluation.config import Source
from linearsr.evaluation.pairs import Listing, pair


def _listing(*names: str) -> Listing:
    return {name: Source(folder="f", file=name) for name in names}


@pytest.mark.parametrize(
    ("hr", "lr"),
    [
        ("0001.png", "0001.jpg"),
        ("0001.png", "0001x4.png"),
        ("baby.png", "baby_LR.png"),
        ("img_001_SRF_4_HR.png", "img_001_SRF_4_LR.png"),
        ("Canon_001_HR.png", "Canon_001_LR4.png"),
        ("a/b_x1.png", "a/b_x4_out.webp"),
        ("v1.2.png", "v1.2.png"),
    ],
)
def test_pair_ignores_suffixes_of_data_sets_and_programs(hr: str, lr: str) -> None:
    pairs = pair(_listing(hr), _listing(lr), {"other": _listing(lr)})
    assert not pairs.alone
    (item,) = pairs.items
    assert item.lr and item.lr.file == lr and item.results["other"].file == lr


@pytest.mark.parametrize(("hr", "lr"), [("0001.png", "00014.png"), ("a/x.png", "b/x.png")])
def test_different_names_are_left_out_and_reported(hr: str, lr: str) -> None:
    pairs = pair(_listing(hr), _listing(lr), {})
    assert not pairs.items
    assert pairs.alone == {
        hr: "no low-resolution picture matches",
        f"{lr} (LR)": "no HR picture matches",
    }


def test_exact_name_beats_one_with_a_suffix() -> None:
    pairs = pair(_listing("a.png"), _listing("a_x2.png", "a.png"), {})
    assert pairs.items[0].lr == Source(folder="f", file="a.png")


def test_two_matches_are_reported_not_guessed() -> None:
    pairs = pair(_listing("a.png"), _listing("a_x2.png", "a_x4.png"), {})
    assert pairs.alone == {"a.png": "a_x2.png, a_x4.png all match; keep one"}


def test_crops_of_shards_match_their_own_results() -> None:
    """`upscale_dataset` appends the suffix to such ids."""
    ids = ["p/cat.jpg#0", "p/cat.jpg#1"]
    results = _listing(*(f"{id}.png" for id in ids), "p/cat.png")
    pairs = pair(_listing(*ids), {}, {"mine": results})
    assert not pairs.alone
    assert {i.id: i.results["mine"].file for i in pairs.items} == {id: f"{id}.png" for id in ids}
    whole = pair(_listing(*ids), {}, {"mine": _listing("p/cat.png")})
    assert set(whole.alone) == {f"{id} (mine)" for id in ids}


def test_missing_result_costs_only_that_result() -> None:
    pairs = pair(_listing("a.png", "b.png"), {}, {"other": _listing("a.png")})
    assert [sorted(item.results) for item in pairs.items] == [["other"], []]
    assert pairs.alone == {"b.png (other)": "no result picture matches"}


def test_results_without_hr_and_lr_are_items() -> None:
    pairs = pair({}, {}, {"mine": _listing("a.png")})
    assert pairs.items[0].hr is None and pairs.items[0].results["mine"].file == "a.png"
