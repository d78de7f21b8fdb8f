"""The scan of pictures for shards, without a cluster."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import skimage.data
from PIL import Image

from linearsr.distributed.datasets.shards.build import list_notes
from linearsr.distributed.datasets.shards.config import ShardConfig
from linearsr.distributed.datasets.shards.scan import SCAN, scan_picture


def test_pictures_that_were_not_read_whole_are_used_and_named(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.asarray(skimage.data.astronaut()[:128, :128]))] * 2
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    config = ShardConfig(inputs=(str(tmp_path / "in"),), output=str(tmp_path / "out"), crop=64)
    config = config.model_copy(update={"min_size": 64})
    files = {"in/a.tif": buffer.getvalue(), "in/b.tif": b"no picture"}
    rows = [scan_picture(n, name, files.__getitem__, config) for n, name in enumerate(files)]
    assert rows[0]["reason"] is None and rows[0]["boxes"]
    scanned = pa.Table.from_pylist(rows, SCAN)
    assert list_notes(scanned) == ["in/a.tif: only the first of 2 pages"]
