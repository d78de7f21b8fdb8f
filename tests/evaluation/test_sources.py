"""Pictures of an evaluation come from files or shards, without Ray or boto3."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from linearsr.errors import InputError
from linearsr.evaluation.config import Source
from linearsr.evaluation.sources import list_pictures, read_source
from linearsr.imaging import files


def test_folders_are_listed_with_their_subfolders(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "in" / "a.png")
    (tmp_path / "notes.txt").write_text("")
    pictures = list_pictures(str(tmp_path), "hr")
    assert list(pictures) == ["in/a.png"]
    assert read_source(pictures["in/a.png"]).startswith(b"\x89PNG")


def test_an_empty_folder_and_a_lost_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no picture"):
        list_pictures(str(tmp_path), "hr")
    with pytest.raises(InputError, match=r"gone\.png: there is no such file"):
        read_source(Source(folder=str(tmp_path), file="gone.png"))


def test_shards_are_read_at_the_first_column_they_have(tmp_path: Path) -> None:
    table = pa.table({"id": ["x"], "image": [b"1"], "lr": [b"2"]})
    pq.write_table(table, tmp_path / "0.parquet")
    pictures = list_pictures(str(tmp_path), "hr", "image")
    assert read_source(pictures["x"]) == b"1"


def test_evaluate_reads_shards_where_ray_and_boto3_are_missing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    png = files.encode(files.from_pil(Image.fromarray(noise)), "png")
    (tmp_path / "hr").mkdir()
    pq.write_table(pa.table({"id": ["x"], "hr": [png]}), tmp_path / "hr/0.parquet")
    words = f"evaluate --hr {tmp_path / 'hr'} --lr clean --models --metrics psnr -o {tmp_path}"
    code = (
        "import sys; sys.modules['ray'] = sys.modules['boto3'] = None; "
        f"from linearsr.cli import main; sys.exit(main({words.split()!r}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert pq.read_table(tmp_path / "metrics.parquet").num_rows == 1
