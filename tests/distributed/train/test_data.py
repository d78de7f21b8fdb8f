"""Sources of training pairs: refusals, pairs as functions of their number, shares of ranks."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from ray.cluster_utils import Cluster

from linearsr.distributed.train.data import Share, batches, open_source
from linearsr.distributed.train.shards import Shards
from linearsr.errors import InputError
from linearsr.training.data import Batch, Batches, DataConfig, Photos, load_photos

DATA = DataConfig(patch=32, batch=4, margin=8, degradations={"clean": 0.5, "mild": 0.5})
ROWS = (5, 3, 4)


MIXED = DATA.model_copy(update={"scales": (1.0, 4.0), "at_largest": 0.3})


def _png(shade: int, size: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def _shard(path: Path, pictures: Sequence[bytes | None], group: int = 2) -> None:
    table = pa.table({"hr": pa.array(pictures, pa.binary())})
    pq.write_table(table, path, row_group_size=group)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of one colour each in three shards; the colour of a pair tells its row."""
    folder = tmp_path_factory.mktemp("shards")
    shades = iter(range(0, 240, 20))
    for i, rows in enumerate(ROWS):
        _shard(folder / f"{i}.parquet", [_png(next(shades)) for _ in range(rows)])
    return folder


def _order(shards: Path, epoch: int, seed: int = 0) -> list[tuple[str, int, int]]:
    """Return the rows that an epoch visits, in order."""
    source = open_source(str(shards), DATA, seed)
    assert isinstance(source, Shards)
    rows = (source._find(epoch, position) for position in range(source.rows))
    return [(group.file.name, group.number, row) for group, row in rows]


def test_a_folder_without_anything_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no pictures and no \.parquet shards"):
        open_source(str(tmp_path), DATA, 0)
    with pytest.raises(InputError, match="no pictures"):
        open_source(str(tmp_path / "nowhere"), DATA, 0)


def test_pictures_that_are_all_too_small_or_damaged_are_refused(tmp_path: Path) -> None:
    (tmp_path / "small.png").write_bytes(_png(9, 47))
    (tmp_path / "damaged.png").write_bytes(_png(9)[:40])
    with pytest.raises(InputError, match="48 px"):
        open_source(str(tmp_path), DATA, 0)


def test_bad_pictures_among_good_ones_end_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png(100)[:60])
    (tmp_path / "b.png").write_bytes(_png(100, 20))
    (tmp_path / "c.jpg").write_bytes(b"not a picture")
    (tmp_path / "good.png").write_bytes(_png(200))
    source = open_source(str(tmp_path), DATA.model_copy(update={"degradations": {"clean": 1}}), 0)
    for number in range(12):
        hr, lr, _ = source.pair(number)
        assert hr.shape == (3, 32, 32) and lr.shape == (3, 8, 8)
        assert len(hr.unique()) == 1 and hr.min() > 120


def test_results_of_an_earlier_job_beside_pictures_are_no_shards(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png(9))
    pq.write_table(pa.table({"id": ["x"], "error": ["y"]}), tmp_path / "errors.parquet")
    assert isinstance(open_source(str(tmp_path), DATA, 0), Photos)
    _shard(tmp_path / "0.parquet", [_png(9)])
    with pytest.raises(InputError, match=r"both pictures \(a\.png\) and shards \(0\.parquet\)"):
        open_source(str(tmp_path), DATA, 0)


def test_a_folder_gives_the_pairs_that_local_training_gets(photos: Path) -> None:
    """A number gives the same pair on a laptop, on a cluster, and after a restart."""
    first, again = (open_source(str(photos), DATA, 3) for _ in range(2))
    local, other = load_photos(photos, DATA, 3), open_source(str(photos), DATA, 4)
    for number in (0, 7, 100_000):
        for ours, theirs in ((again, "again"), (local, "local")):
            (hr, lr, _), (other_hr, other_lr, _) = first.pair(number), ours.pair(number)
            assert torch.equal(hr, other_hr) and torch.equal(lr, other_lr), theirs
    assert not torch.equal(first.pair(7)[0], other.pair(7)[0])


def test_shards_that_are_damaged_empty_or_of_something_else_are_refused(tmp_path: Path) -> None:
    shard = tmp_path / "0.parquet"
    shard.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"0\.parquet: not a readable Parquet shard"):
        open_source(str(tmp_path), DATA, 0)
    pq.write_table(pa.table({"picture": ["a"]}), shard)
    with pytest.raises(InputError, match="no column 'hr'"):
        open_source(str(tmp_path), DATA, 0)
    # A text would be read as the path of a file on the worker.
    pq.write_table(pa.table({"hr": ["/etc/hostname"]}), shard)
    with pytest.raises(InputError, match=r"0\.parquet: column 'hr' is of type string"):
        open_source(str(tmp_path), DATA, 0)
    _shard(shard, [])
    with pytest.raises(InputError, match="hold no rows"):
        open_source(str(tmp_path), DATA, 0)


def test_rows_that_cannot_be_trained_on_are_passed_over(tmp_path: Path) -> None:
    """A few small, damaged or missing pictures end no run, however often their turn comes."""
    _shard(tmp_path / "0.parquet", [_png(9, 40), _png(9)[:50], None, _png(9)])
    source = open_source(str(tmp_path), DATA, 0)
    assert all(source.pair(number)[0].shape == (3, 32, 32) for number in range(6))
    _shard(tmp_path / "0.parquet", [_png(9, 40), None, _png(9)[:50]])
    with pytest.raises(InputError, match=r"0\.parquet: none of \d+ rows tried"):
        open_source(str(tmp_path), DATA, 0).pair(0)


def test_an_epoch_visits_every_row_once_and_the_next_one_in_another_order(shards: Path) -> None:
    first, second = _order(shards, 0), _order(shards, 1)
    assert len(set(first)) == len(first) == sum(ROWS)
    assert set(first) == set(second) and first != second
    assert first == _order(shards, 0) and first != _order(shards, 0, seed=1)


def test_pairs_of_shards_are_cut_from_their_rows(shards: Path) -> None:
    """Each colour occurs once per epoch; exposure and blur may change its shade only."""
    plain = DATA.model_copy(update={"degradations": {"clean": 1.0}})
    source, again = (open_source(str(shards), plain, 5) for _ in range(2))
    for number in range(24):
        assert torch.equal(source.pair(number)[0], again.pair(number)[0])
    for epoch in range(2):
        shades = [source.pair(epoch * 12 + i)[0].float().mean().item() for i in range(12)]
        assert len({round(s) for s in shades}) >= 10 and min(shades) < 5 and max(shades) > 180


def test_tags_of_shards_are_their_rows(tmp_path: Path) -> None:
    """The column of tags is optional, and so are its values."""
    tags = [["red", "round"], [], None, ["blue"]]
    pictures = pa.array([_png(60 * i) for i in range(4)], pa.binary())
    table = pa.table({"hr": pictures, "tags": pa.array(tags, pa.list_(pa.string()))})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=2)
    sure = DATA.model_copy(update={"degradations": {"clean": 1.0}, "tag_dropout": 0.0})
    source = open_source(str(tmp_path), sure, 0)
    pairs = [source.pair(n) for n in range(4)]
    assert sorted(p.tags for p in pairs) == [(), (), ("blue",), ("red", "round")]
    shades = {pair.tags: pair.hr.float().mean().item() for pair in pairs}
    assert shades["red", "round"] < 5 < shades["blue",]
    pq.write_table(pa.table({"hr": pictures, "tags": ["a, b"] * 4}), tmp_path / "0.parquet")
    with pytest.raises(InputError, match="'tags' must hold lists of strings"):
        open_source(str(tmp_path), sure, 0)


@ray.remote(num_cpus=0.25)
def _streams(path: str, parts: dict[str, tuple[int, int, Share]]) -> dict[str, list[Batch]]:
    mixed = list(batches(path, MIXED, 3, 0, 20, Share(0, 1, 0.25)))
    streams = {name: list(batches(path, DATA, 3, *part)) for name, part in parts.items()}
    return {**streams, "mixed": mixed}


@pytest.fixture(scope="module")
def named(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, one of them tagged."""
    folder = tmp_path_factory.mktemp("named")
    shutil.copytree(photos, folder, dirs_exist_ok=True)
    line = {"file": "elsewhere/coffee.png", "tags": ["cup", {"name": "saucer", "score": 0.9}]}
    (folder / "tags.jsonl").write_text(json.dumps(line))
    return folder


@pytest.fixture(scope="module")
def streams(cluster: Cluster, named: Path) -> dict[str, list[Batch]]:
    """Batches of one rank, of both of two ranks, and of one rank that starts later."""
    parts = {
        "one": (0, 20, Share(0, 1, 0.25)),
        "left": (0, 20, Share(0, 2, 0.25)),
        "right": (0, 20, Share(1, 2, 0.25)),
        "later": (16 * DATA.batch, 4, Share(0, 1, 0.25)),
    }
    return ray.get(_streams.remote(str(named), parts))


def test_a_stream_is_the_global_batches_in_order(
    streams: dict[str, list[Batch]], named: Path
) -> None:
    """The stream spans many blocks, so an order that holds only within a block would show."""
    assert [b.numbers.tolist() for b in streams["one"]] == np.arange(80).reshape(20, 4).tolist()
    first = streams["one"][0]
    assert first.hr.shape == (4, 3, 32, 32) and first.lr.shape == (4, 3, 8, 8)
    assert first.hr.abs().max() <= 1 and first.hr.dtype == torch.float32
    hr, _, tags = open_source(str(named), DATA, 3).pair(2)
    assert torch.equal(first.hr[2], hr.float() / 127.5 - 1) and first.tags[2] == tags
    assert {names for batch in streams["one"] for names in batch.tags} == {("cup", "saucer"), ()}


def test_two_ranks_together_see_what_one_rank_sees(streams: dict[str, list[Batch]]) -> None:
    assert len(streams["left"]) == len(streams["right"]) == 20
    parts = zip(streams["one"], streams["left"], streams["right"], strict=True)
    for whole, left, right in parts:
        assert whole.tags == left.tags + right.tags
        for side, a, b in zip(whole[:3], left[:3], right[:3], strict=True):
            assert torch.equal(side, torch.cat([a, b]))


def test_a_stream_that_starts_later_goes_on_exactly(streams: dict[str, list[Batch]]) -> None:
    for ours, theirs in zip(streams["later"], streams["one"][16:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
        assert ours.tags == theirs.tags


def test_batches_of_many_scales_are_those_of_local_training(
    streams: dict[str, list[Batch]], named: Path
) -> None:
    sides = {batch.lr.shape[-1] for batch in streams["mixed"]}
    assert len(sides) > 2 and len(streams["mixed"]) == 20
    local = iter(Batches(load_photos(named, MIXED, 3), 0))
    for ours, theirs in zip(streams["mixed"], local, strict=False):
        assert torch.equal(ours.lr, theirs.lr) and torch.equal(ours.hr, theirs.hr)
