"""RAM with DAPE's adapter, from a checkpoint to a result: command, shards, training, endpoint."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor

from linearsr import Upscaler, weights
from linearsr.cli import main
from linearsr.config import FileOptions, ModelConfig, Options
from linearsr.denoiser import LinearSR
from linearsr.distributed.datasets.shards.build import SCHEMA
from linearsr.distributed.datasets.tag import TagConfig, tag_shard
from linearsr.distributed.serve import ServeConfig
from linearsr.distributed.serve.router import Router
from linearsr.distributed.train.data import open_source
from linearsr.imaging.files import read
from linearsr.latent import SpaceToDepth
from linearsr.tags import load_tagger
from linearsr.tags.base import TaggerConfig
from linearsr.tags.encoder import tag_encoder
from linearsr.tags.ram import RamTagger
from linearsr.training import loop
from linearsr.training.config import TrainConfig
from linearsr.training.data import Batches, DataConfig
from linearsr.training.engine import TorchEngine
from linearsr.web.service import UpscaleRequest
from tests.helpers.experts import random_experts
from tests.helpers.tag_models import dape_tensors, ram_tensors, save_ram

NAMES = ["cat", "dog", "grass", "woman", "space"]  # known to the config's Gemma


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> TaggerConfig:
    folder = tmp_path_factory.mktemp("ram")
    tensors = ram_tensors(len(NAMES))
    source = save_ram(folder, NAMES, tensors)
    torch.save(dape_tensors(tensors), folder / "DAPE.pth")
    adapter = str(folder / "DAPE.pth")
    return TaggerConfig(kind="ram", source=str(source), adapter=adapter, threshold=0, max_tags=2)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "coffee.png"
    Image.fromarray(np.asarray(skimage.data.coffee())).resize((60, 40)).save(path)
    return path


@pytest.fixture(scope="module")
def names(tagger: TaggerConfig, picture: Path) -> tuple[str, ...]:
    """The tags of the picture."""
    tags = load_tagger(tagger)(read(picture).pixels)
    assert len(tags) == 2
    return tuple(tag.name for tag in tags)


@pytest.fixture(scope="module")
def bundle(tagged_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagged")
    experts = [model.state_dict() for model in random_experts(tagged_config, 4)]
    weights.save(folder, tagged_config, experts, {}, dtype=torch.float32)
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The pictures that RAM is given."""
    pictures: list[Tensor] = []
    tag = RamTagger.__call__

    def counted(self: RamTagger, picture: Tensor) -> object:
        pictures.append(picture)
        return tag(self, picture)

    monkeypatch.setattr(RamTagger, "__call__", counted)
    return pictures


def _flags(tagger: TaggerConfig) -> list[str]:
    files = ["--tagger-model", str(tagger.source), "--tagger-adapter", str(tagger.adapter)]
    return ["--tagger", "ram", *files, "--threshold", "0", "--max-tags", "2"]


def test_the_tag_command_names_what_the_tagger_sees(
    tagger: TaggerConfig,
    picture: Path,
    names: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["tag", str(picture), *_flags(tagger), "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert tuple(tag["name"] for tag in line["tags"]) == names


def test_a_model_learns_from_shards_that_ram_has_tagged(
    tagger: TaggerConfig, tagged_config: ModelConfig, picture: Path, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(skimage.data.coffee())).save(buffer, "png")
    row = {"id": "coffee", "hr": buffer.getvalue(), "lr": picture.read_bytes()}
    pq.write_table(pa.Table.from_pylist([row], schema=SCHEMA), tmp_path / "0.parquet")
    config = TagConfig(input=str(tmp_path), output=str(tmp_path), tagger=tagger)
    file = pq.ParquetFile(tmp_path / "0.parquet")
    data, note = tag_shard(file, config, load_tagger(tagger))
    assert note["tagged"] == 1 and note["settings"]["adapter"] == tagger.adapter
    (tmp_path / "0.parquet").write_bytes(data)
    (tagged,) = pq.read_table(tmp_path / "0.parquet").to_pylist()
    assert len(tagged["tags"]) == 2 and set(tagged["tags"]) < set(NAMES)

    fields = DataConfig(patch=32, batch=2, margin=8, tag_dropout=0, degradations={"clean": 1.0})
    batches = iter(Batches(open_source(str(tmp_path), fields, 0), 0))
    batch = next(batches)
    assert batch.tags == (tuple(tagged["tags"]),) * 2
    train = TrainConfig(steps=3, warmup=1, learning_rate=2e-3, report_every=1, bfloat16=False)
    torch.manual_seed(0)
    model = LinearSR(tagged_config.denoiser)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = TorchEngine(model, train, torch.device("cpu"))
    encoder = tag_encoder(tagged_config)
    state = loop.TrainState.start(engine, SpaceToDepth(tagged_config.latent), train, encoder)
    loop.run(state, itertools.chain([batch], batches), lambda *_: None)
    trained = dict(engine.module.named_parameters())
    # The cross-attention begins with an output of zero, which the first steps change.
    assert any("tag" in name and (trained[name] != before[name]).any() for name in before)


def test_tags_of_a_request_are_the_taggers_and_are_made_once(
    tagger: TaggerConfig,
    picture: Path,
    names: tuple[str, ...],
    bundle: Path,
    tmp_path: Path,
    calls: list[Tensor],
) -> None:
    command = ["upscale", str(picture), "--model", str(bundle), "--device", "cpu", "--steps", "2"]
    auto, named = tmp_path / "auto.png", tmp_path / "named.png"
    assert main([*command, "-o", str(auto), "--tags", "auto", *_flags(tagger)]) == 0
    assert len(calls) == 1
    assert main([*command, "-o", str(named), "--tags", ",".join(names)]) == 0
    assert len(calls) == 1
    assert torch.equal(read(auto).pixels, read(named).pixels)
    other = ",".join(name for name in NAMES if name not in names)
    assert main([*command, "-o", str(named), "--tags", other]) == 0
    assert not torch.equal(read(auto).pixels, read(named).pixels)


def test_an_endpoint_tags_a_request_once_and_keeps_embeddings(
    tagger: TaggerConfig,
    picture: Path,
    names: tuple[str, ...],
    bundle: Path,
    calls: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = Router(ServeConfig(model=str(bundle), tagger=tagger), [], [], None)
    request = UpscaleRequest(
        data=picture.read_bytes(), options=Options(tags="auto"), files=FileOptions()
    )
    loaded, options = asyncio.run(router._read(request, 0))
    assert options.tags == names and len(calls) == 1
    upscaler = router.upscaler
    encode, texts = upscaler.encoder, []
    monkeypatch.setattr(upscaler, "encoder", lambda tags: (texts.append(tags), encode(tags))[1])
    states = [upscaler.prepare(loaded, options, tile) for tile in (None, 16)]
    states.append(upscaler.prepare(loaded, options.model_copy(update={"seed": 5})))
    assert texts == [[names]] and len(calls) == 1
    assert all(torch.equal(state.tags, states[0].tags) for state in states)


def test_a_tagger_without_automatic_tags_is_refused(
    tagger: TaggerConfig, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = ["-o", str(tmp_path / "big.png")]
    assert main(["upscale", str(picture), *result, *_flags(tagger)]) == 2
    assert "add --tags auto" in capsys.readouterr().err
    assert Upscaler.load().tagger == TaggerConfig()
