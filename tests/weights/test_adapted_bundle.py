"""Bundles of a base and adapters: pixels, memory, foreign and damaged files, merging."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from linearsr import weights
from linearsr.config import LoRAConfig, ModelConfig, Options
from linearsr.diffusion.experts import EXPERTS
from linearsr.distributed.models import fingerprint
from linearsr.errors import OutputError, WeightsError
from linearsr.imaging.files import Picture
from linearsr.pipeline.upscaler import Upscaler
from linearsr.weights import merge
from tests.denoiser.test_lora import bytes_of
from tests.helpers.lora import LORA, random_adapters, random_base, save_adapted

OPTIONS = Options(steps=4, seed=3)


@pytest.fixture(scope="module")
def original(small_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapted(tmp_path_factory.mktemp("adapted") / "weights", small_config)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def rewrite(path: Path, change: dict[str, torch.Tensor] | None = None, **metadata: str) -> None:
    with safe_open(path, "pt") as file:
        before = file.metadata()
    save_file({**load_file(path), **(change or {})}, path, {**before, **metadata})


def picture() -> Picture:
    torch.manual_seed(4)
    return Picture(torch.rand(3, 24, 20))


def test_round_trip_keeps_base_adapters_and_provenance(
    original: Path, small_config: ModelConfig
) -> None:
    names = {*(f"{name}.safetensors" for name in EXPERTS), "base.safetensors"}
    assert {file.name for file in original.iterdir()} == names
    assert weights.read_config(original) == small_config
    assert weights.read_lora(original) == LORA
    assert weights.load(original).provenance == {"licence": "test"}
    base = random_base(small_config).state_dict()
    for name, tensor in weights.load_base(original).state_dict().items():
        assert torch.equal(tensor, base[name])
    for number in range(4):
        adapters = weights.load_adapters(original, number)
        assert adapters is not None
        for name, tensor in random_adapters(small_config, number).items():
            assert torch.equal(adapters[name], tensor)


def test_a_base_is_in_memory_once_whatever_the_number_of_experts(original: Path) -> None:
    """Counted over all tensors that are alive, not only over those of the models."""

    def alive() -> int:
        gc.collect()
        kinds = (torch.Tensor, torch.nn.Parameter)
        found = [t for t in gc.get_objects() if type(t) in kinds and not t.is_meta]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        return sum(storages.values())

    base = bytes_of(weights.load_base(original))
    one = 4 * sum(t.numel() for t in (weights.load_adapters(original, 0) or {}).values())
    before = alive()
    experts = weights.load(original).experts
    assert alive() - before == base + 4 * one == bytes_of(*experts)
    del experts
    single = weights.load(original, only={2}).experts
    assert alive() - before == base, "a single expert is the base with its adapters merged"
    assert [expert.embed.weight.is_meta for expert in single] == [True, True, False, True]
    assert all(expert.embed.weight.is_meta for expert in weights.load(original, only=()).experts)


def test_together_split_and_merged_make_the_same_picture(original: Path, tmp_path: Path) -> None:
    """Replicas of one expert each have the bits of one process with all of them."""
    together = Upscaler.load(original, "cpu")
    expected = together.upscale(picture(), OPTIONS).pixels
    state = together.prepare(picture(), OPTIONS)
    assert len(state.segments) > 2
    for segment in state.segments:
        replica = Upscaler.load(original, "cpu", only={segment.expert})
        state = replica.denoise(state, segment)
    assert torch.equal(together.finish(state).pixels, expected)
    assert merge.main([str(original), "--out", str(tmp_path / "merged")]) == 0
    assert weights.read_lora(tmp_path / "merged") is None
    assert weights.load(tmp_path / "merged").provenance == {"licence": "test"}
    merged = Upscaler.load(tmp_path / "merged", "cpu").upscale(picture(), OPTIONS).pixels
    # The merged weights are in bfloat16 in their files.
    torch.testing.assert_close(merged, expected, rtol=0, atol=0.02)
    base = weights.load_base(original)
    plain = Upscaler(weights.Bundle(together.config, [base] * 4, {})).upscale(picture(), OPTIONS)
    assert (plain.pixels - expected).abs().mean() > 10 * (merged - expected).abs().mean()


def test_bfloat16_experts_on_a_base_are_within_its_error_of_merged_ones(
    small_config: ModelConfig, tmp_path: Path
) -> None:
    adapted = save_adapted(tmp_path / "adapted", small_config, dtype=torch.bfloat16)
    merge.merge(adapted, tmp_path / "merged")
    results = []
    for folder, dtype in (
        (adapted, torch.bfloat16),
        (tmp_path / "merged", torch.bfloat16),
        (adapted, torch.float32),
    ):
        upscaler = Upscaler(weights.load(folder, "cpu", dtype))
        results.append(upscaler.upscale(picture(), OPTIONS).pixels)
    ours, merged, exact = results
    error = (merged - exact).abs().mean()
    assert 0 < (ours - exact).abs().mean() < 1.5 * error
    assert (ours - merged).abs().mean() < 2 * error


def test_other_weights_have_another_fingerprint(folder: Path) -> None:
    before = fingerprint(str(folder))
    path = folder / "texture.safetensors"
    rewrite(path, {name: 2 * tensor for name, tensor in load_file(path).items()})
    assert fingerprint(str(folder)) != before


def foreign(small_config: ModelConfig, folder: Path) -> dict[str, Callable[[], object]]:
    """Return each kind of a file that does not belong, by what its refusal says."""
    texture = folder / "texture.safetensors"
    other = folder.parent / "other"

    def from_bundle(file: str, rank: int | None = None) -> None:
        lora = LORA if rank is None else LoRAConfig(rank=rank, alpha=8)
        save_adapted(other, small_config, lora)
        shutil.copy(other / file, folder)

    def from_other_base() -> None:
        base = weights.load_base(folder).state_dict()
        base["out.bias"] = base["out.bias"] + 1
        experts = [random_adapters(small_config, n) for n in range(4)]
        weights.save_adapted(other, small_config, base, LORA, experts, {})
        shutil.copy(other / texture.name, folder)

    def whole() -> None:
        model = random_base(small_config).state_dict()
        weights.save(other, small_config, [model] * 4, {})
        shutil.copy(other / texture.name, folder)

    def other_base() -> None:
        base = load_file(folder / "base.safetensors")
        rewrite(folder / "base.safetensors", {"out.bias": base["out.bias"] + 1})

    name = next(iter(load_file(texture)))
    bad = load_file(texture)[name]
    bad[0, 0] = torch.nan
    wide = json.dumps({**LORA.model_dump(), "layers": ["embed"]})
    huge = json.dumps({**LORA.model_dump(), "rank": 10**9})
    return {
        r"texture.*shape of its adapters.*differs": lambda: from_bundle(texture.name, rank=2),
        r"texture.*base of its adapters differs": from_other_base,
        r"texture.*shape of its adapters.*do not mix": whole,
        r"base\.safetensors.*trained on another base": other_base,
        r"texture\.safetensors: this expert's file is missing": texture.unlink,
        r"base\.safetensors.*base is missing": (folder / "base.safetensors").unlink,
        r"texture.*holds NaN": lambda: rewrite(texture, {name: bad}),
        r"texture.*another shape: 1, such as": lambda: rewrite(texture, {name: bad[:1]}),
        r"texture.*too many.*stranger": lambda: rewrite(texture, {"stranger": torch.zeros(1)}),
        r"texture.*cannot be read as LinearSR weights": lambda: rewrite(texture, lora=wide),
        r"texture.*cannot be read as LinearSR": lambda: rewrite(texture, lora=huge),
        r"texture.*damaged|texture.*cannot be read": lambda: texture.write_bytes(
            texture.read_bytes()[:-100]
        ),
    }


@pytest.mark.parametrize("kind", range(12))
def test_files_that_do_not_belong_are_refused_in_one_line(
    folder: Path, small_config: ModelConfig, kind: int
) -> None:
    kinds = foreign(small_config, folder)
    assert len(kinds) == 12
    message, change = list(kinds.items())[kind]
    change()
    with pytest.raises(WeightsError, match=message) as error:
        weights.load(folder)
    assert "\n" not in str(error.value)


def test_adapters_of_more_memory_than_the_file_has_are_refused_unmade(folder: Path) -> None:
    """The config allows rank 1024 and 1000 blocks; nothing of that size is made."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["linearsr"])
        config["denoiser"]["depth"] = 1000
        lora = LoRAConfig(rank=1024).model_dump_json()
        rewrite(
            path, linearsr=json.dumps(config), **({} if path.stem == "base" else {"lora": lora})
        )
    with pytest.raises(WeightsError, match="16 tensors for 1000 blocks"):
        weights.load(folder)


def test_saving_refuses_what_cannot_be_used(small_config: ModelConfig, tmp_path: Path) -> None:
    base = random_base(small_config).state_dict()
    experts = [random_adapters(small_config, n) for n in range(4)]
    with pytest.raises(WeightsError, match="asks for 4 experts, got 3"):
        weights.save_adapted(tmp_path / "bad", small_config, base, LORA, experts[:3], {})
    next(iter(experts[2].values()))[0, 0] = torch.inf
    with pytest.raises(WeightsError, match="texture"):
        weights.save_adapted(tmp_path / "bad", small_config, base, LORA, experts, {})
    assert not list(tmp_path.glob("bad/*"))


def test_whole_experts_over_adapters_are_whole_and_the_reverse(
    folder: Path, small_config: ModelConfig
) -> None:
    """A job exports to the same folder after each stage."""
    whole = [random_base(small_config).state_dict()] * 4
    weights.save(folder, small_config, whole, {})
    assert weights.read_lora(folder) is None and len(weights.load(folder).experts) == 4
    save_adapted(folder, small_config)
    assert weights.read_lora(folder) == LORA and len(weights.load(folder).experts) == 4


def test_merging_says_what_it_cannot_do(
    original: Path, small_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge.main([str(small_bundle), "--out", str(tmp_path / "new")]) == 1
    assert "nothing to merge" in capsys.readouterr().err
    with pytest.raises(OutputError, match="already holds weights"):
        merge.merge(original, small_bundle)
    with pytest.raises(WeightsError, match="do not share a base"):
        weights.load_base(small_bundle)
    assert weights.load_adapters(small_bundle, 0) is None
