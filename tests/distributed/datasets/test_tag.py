"""Tagging a tiny shard dataset: finished shards stay, bad rows are listed, in place is allowed."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import skimage.data
from PIL import Image
from ray.cluster_utils import Cluster

from linearsr.cli import job
from linearsr.distributed.datasets import tag as tagging
from linearsr.distributed.datasets.shards.build import SCHEMA
from linearsr.distributed.datasets.tag import (
    NOTE,
    TagConfig,
    _Shard,
    _write_notes,
    tag_dataset,
    tag_shard,
)
from linearsr.errors import InputError, OptionError, WeightsError
from linearsr.storage.location import locate
from linearsr.storage.walk import Notes
from linearsr.tags.base import Tag, TaggerConfig
from tests.helpers.permissions import permissions_hold


def _png(folder: Path, name: str, shrink: int) -> bytes:
    image = Image.fromarray(np.asarray(getattr(skimage.data, name)()))
    image.resize((image.width // shrink, image.height // shrink)).save(folder / "one.png")
    return (folder / "one.png").read_bytes()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards: a cat and a cup, a row group each; gravel, and bytes that are no picture."""
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    cat, cup, gravel = (_png(tmp_path, name, 2) for name in ("chelsea", "coffee", "gravel"))
    rows = [{"id": "cat", "lr": cat, "hr": cup}, {"id": "cup", "lr": cup, "hr": cat}]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, folder / "shard-00000.parquet", row_group_size=1)
    rows = [{"id": "gravel", "lr": gravel}, {"id": "bad", "lr": b"no picture"}]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, folder / "more" / "shard-00001.parquet")
    return folder


def _tags(file: Path) -> dict[str, list[str]]:
    table = pq.read_table(file, columns=["id", "tags"])
    return dict(zip(*(table.column(c).to_pylist() for c in ("id", "tags")), strict=True))


def _always(picture: object) -> list[Tag]:
    return [Tag("thing", 0.5)]


# Without a cluster


def test_tagging_changes_only_the_tags(shards: Path) -> None:
    file = pq.ParquetFile(shards / "shard-00000.parquet")
    data, note = tag_shard(file, TagConfig(input="", output=""), _always)
    after = pq.ParquetFile(pa.BufferReader(data))
    assert after.schema_arrow.equals(SCHEMA)
    assert after.num_row_groups == 2 and note["tagged"] == 2
    names = [name for name in SCHEMA.names if name not in ("tags", "tag_scores")]
    assert after.read(names).equals(file.read(names))
    tags = after.read(["tags", "tag_scores"]).to_pylist()
    assert tags == [{"tags": ["thing"], "tag_scores": [0.5]}] * 2


def test_tagging_twice_gives_the_same_bytes(shards: Path) -> None:
    """The note in the footer is replaced, not added."""
    config = TagConfig(input="", output="")
    once, _ = tag_shard(pq.ParquetFile(shards / "shard-00000.parquet"), config, _always)
    twice, _ = tag_shard(pq.ParquetFile(pa.BufferReader(once)), config, _always)
    assert twice == once


def test_foreign_shards_get_the_columns(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"], "lr": pa.array([_png(tmp_path, "coffee", 8)]), "mine": [1]})
    pq.write_table(table, tmp_path / "theirs.parquet")
    config = TagConfig(input="", output="")
    data, _ = tag_shard(pq.ParquetFile(tmp_path / "theirs.parquet"), config, _always)
    row = pq.read_table(pa.BufferReader(data)).to_pylist()[0]
    assert row["mine"] == 1 and row["tags"] == ["thing"] and row["tag_scores"] == [0.5]
    hr = TagConfig(input=str(tmp_path), output=str(tmp_path / "out"), column="hr")
    with pytest.raises(InputError, match="no column 'hr'"):
        tag_dataset(hr)


def test_wrong_inputs_are_refused_before_any_work(tmp_path: Path) -> None:
    config = TagConfig(input=str(tmp_path), output=str(tmp_path / "out"))
    with pytest.raises(InputError, match="shards here"):
        tag_dataset(config)
    (tmp_path / "shard.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(InputError, match="readable Parquet shard"):
        tag_dataset(config)
    (tmp_path / "shard.parquet").unlink()
    pq.write_table(pa.table({"id": ["a"], "lr": [b""]}), tmp_path / "shard.parquet")
    tagger = TaggerConfig(vocabulary=str(tmp_path / "gone.txt"))
    with pytest.raises(OptionError, match="check --vocabulary"):
        tag_dataset(config.model_copy(update={"tagger": tagger}))


def test_a_picture_that_breaks_the_tagger_loses_only_its_tags(shards: Path) -> None:
    pictures: list[object] = []

    def odd(picture: object) -> list[Tag]:
        pictures.append(picture)
        if len(pictures) == 1:
            raise TypeError("no such picture")
        return _always(picture)

    file = pq.ParquetFile(shards / "shard-00000.parquet")
    _, note = tag_shard(file, TagConfig(input="", output=""), odd)
    assert note["errors"] == {"cat": "TypeError: no such picture"} and note["tagged"] == 1


def test_a_folder_that_cannot_be_listed_is_no_folder_without_shards(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir(mode=0)
    notes = Notes()
    with permissions_hold():
        assert tagging._list_shards(locate(tmp_path), "lr", notes) == []
    assert list(notes.failures) == ["more"]


def test_a_picture_that_was_not_read_whole_has_a_note(tmp_path: Path) -> None:
    buffer, page = io.BytesIO(), Image.new("RGB", (8, 8))
    page.save(buffer, "TIFF", save_all=True, append_images=[page])
    pq.write_table(pa.table({"id": ["a"], "lr": [buffer.getvalue()]}), tmp_path / "s.parquet")
    file = pq.ParquetFile(tmp_path / "s.parquet")
    _, note = tag_shard(file, TagConfig(input="", output=""), _always)
    assert note["notes"] == {"a": "only the first of 2 pages"} and note["errors"] == {}
    lines: list[str] = []
    bar = SimpleNamespace(write=lambda line, file: lines.append(line))
    _write_notes(_Shard("s.parquet", 1, ""), note, bar)
    assert lines == ["s.parquet#a: only the first of 2 pages"]


def test_an_error_of_all_pictures_ends_the_shard(shards: Path) -> None:
    def lost(picture: object) -> list[Tag]:
        raise WeightsError("gone")

    with pytest.raises(WeightsError, match="gone"):
        tag_shard(
            pq.ParquetFile(shards / "shard-00000.parquet"), TagConfig(input="", output=""), lost
        )


def _finish(config: TagConfig) -> None:
    """Write a tagged shard as the job does, without a cluster."""
    for file in Path(config.input).rglob("*.parquet"):
        data, _ = tag_shard(pq.ParquetFile(file), config, _always)
        target = Path(config.output) / file.relative_to(config.input)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def _rewritten(file: Path, **columns: list[object]) -> None:
    """Write the shard with other values, as if it had been built again."""
    table = pq.read_table(file)
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array(values, table.schema.field(name).type))
    note = (pq.read_metadata(file).metadata or {}).get(NOTE)
    pq.write_table(table.replace_schema_metadata(note and {NOTE: note}), file)


def _done(config: TagConfig) -> dict[str, bool]:
    listed = tagging._list_shards(locate(config.input), "lr", Notes())
    notes = tagging._read_notes(listed, locate(config.output), config.settings)
    return {shard.name: note is not None for shard, note in zip(listed, notes, strict=True)}


def test_finished_shards_are_found_by_tagger_and_rows(shards: Path, tmp_path: Path) -> None:
    config = TagConfig(input=str(shards), output=str(tmp_path / "out"))
    _finish(config)
    (tmp_path / "out" / "more" / "shard-00001.parquet").unlink()
    assert _done(config) == {"more/shard-00001.parquet": False, "shard-00000.parquet": True}
    other = config.model_copy(update={"tagger": TaggerConfig(threshold=1.0)})
    assert not any(_done(other).values())
    # An input that has been tagged in place meanwhile is still the same dataset.
    _finish(config.model_copy(update={"output": str(shards)}))
    assert _done(config)["shard-00000.parquet"]


@pytest.mark.parametrize(
    "columns",
    [{"id": ["dog", "cup"]}, {"degradation": [{"preset": "seesr", "seed": i} for i in (1, 2)]}],
)
def test_shards_of_another_dataset_are_not_overwritten(
    shards: Path, tmp_path: Path, columns: dict[str, list[object]]
) -> None:
    config = TagConfig(input=str(shards), output=str(tmp_path / "out"))
    _finish(config)
    before = (tmp_path / "out" / "shard-00000.parquet").read_bytes()
    _rewritten(shards / "shard-00000.parquet", **columns)
    with pytest.raises(
        OptionError, match=r"another data set: .*shard-00000.* choose another --output"
    ):
        tag_dataset(config)
    assert (tmp_path / "out" / "shard-00000.parquet").read_bytes() == before


def test_a_note_about_other_rows_is_ignored(shards: Path) -> None:
    """Programs that filter rows copy the footer, so a note may be about other rows."""
    config = TagConfig(input=str(shards), output=str(shards))
    _finish(config)
    _rewritten(shards / "shard-00000.parquet", id=["dog", "cup"])
    assert _done(config) == {"more/shard-00001.parquet": True, "shard-00000.parquet": False}


@pytest.mark.parametrize("text", ["{", "[1]", '{"settings": 1}'])
def test_a_damaged_note_is_refused(shards: Path, text: str) -> None:
    file = shards / "shard-00000.parquet"
    table = pq.read_table(file).replace_schema_metadata({NOTE: text})
    pq.write_table(table, file)
    with pytest.raises(InputError, match=r"shard-00000\.parquet: its metadata entry .* is damaged"):
        tag_dataset(TagConfig(input=str(shards), output=str(shards)))


# On a cluster


def test_a_second_run_tags_only_missing_shards(
    cluster: Cluster, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    config = TagConfig(input=str(shards), output=str(out), actors=2, actor_cpus=0.5)
    result = tag_dataset(config)
    assert (result.total, result.earlier, result.done, result.failed) == (4, 0, 3, 1)
    assert result.detail == "2 have tags, in 2 shards"
    first, second = out / "shard-00000.parquet", out / "more" / "shard-00001.parquet"
    assert _tags(first)["cat"] == ["cat"] and "cup" in _tags(first)["cup"]
    assert _tags(second) == {"gravel": [], "bad": []}
    errors = pq.read_table(out / "errors").to_pylist()
    assert [row["id"] for row in errors] == ["more/shard-00001.parquet#bad"]
    assert errors[0]["error"].startswith("the picture: not a picture")
    assert "bad: the picture: not a picture" in capfd.readouterr().err
    assert _tags(shards / "shard-00000.parquet")["cat"] is None

    # Finished shards stay, missing ones are tagged, and errors are listed again.
    second.unlink()
    before = first.stat().st_mtime_ns
    again = tag_dataset(config)
    assert (again.total, again.earlier, again.done, again.failed) == (4, 2, 1, 1)
    assert first.stat().st_mtime_ns == before and second.exists()
    assert pq.read_table(out / "errors").to_pylist() == errors


def test_the_job_tags_in_place(
    cluster: Cluster,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The job must use the cluster of the tests.
    monkeypatch.setattr("ray.init", functools.partial(ray.init, ignore_reinit_error=True))
    flags = ["--input", str(shards), "--output", str(shards), "--actor-cpus", "0.5"]
    assert job.run("tag-dataset", flags) == 1
    summary = "4 pictures: 3 processed, 1 failed; 2 have tags, in 2 shards"
    assert summary in capsys.readouterr().out
    file = shards / "shard-00000.parquet"
    assert _tags(file)["cat"] == ["cat"]
    before = file.stat().st_mtime_ns
    assert job.run("tag-dataset", flags) == 1
    assert "0 processed, 3 done earlier, 1 failed" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == before
    # Another tagger tags all shards again.
    assert job.run("tag-dataset", [*flags, "--threshold", "1"]) == 1
    assert _tags(file) == {"cat": [], "cup": []}
    note = json.loads(pq.read_metadata(file).metadata[NOTE])
    assert note["settings"]["threshold"] == 1 and note["tagged"] == 0


def test_a_missing_checkpoint_ends_the_job(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    config = TagConfig(
        input=str(shards),
        output=str(tmp_path / "out"),
        actor_cpus=0.5,
        tagger=TaggerConfig(kind="ram", source=str(tmp_path / "gone.pth")),
    )
    with pytest.raises(WeightsError, match="not a readable checkpoint"):
        tag_dataset(config)
