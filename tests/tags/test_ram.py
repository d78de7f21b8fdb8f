"""A tiny random checkpoint in RAM's layout, against other libraries' Swin and attention."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearsr.errors import LinearSRError, MissingExtra, OptionError, WeightsError
from linearsr.tags import load_tagger
from linearsr.tags.base import TaggerConfig
from linearsr.tags.ram import RamTagger, merge_lora
from tests.helpers.pictures import photo
from tests.helpers.tag_models import (
    RAM_MEMORY,
    RAM_WIDTH,
    dape_tensors,
    ram_swin,
    ram_tensors,
    save_ram,
)

NAMES = ["cat", "cup", "grass", "sky", "wall"]


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return ram_tensors(len(NAMES))


def _save(folder: Path, tensors: dict[str, Tensor], names: list[str] = NAMES) -> TaggerConfig:
    return TaggerConfig(kind="ram", source=str(save_ram(folder, names, tensors)), threshold=0.0)


def _attention(tensors: dict[str, Tensor], layer: str) -> nn.MultiheadAttention:
    """Return torch's attention with the weights of a layer."""
    look = [tensors[f"{layer}self.{k}.weight"] for k in ("query", "key", "value")]
    attention = nn.MultiheadAttention(
        RAM_WIDTH, 4, kdim=RAM_MEMORY, vdim=RAM_MEMORY, batch_first=True
    )
    q, k, v = (nn.Parameter(weight) for weight in look)
    attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight = q, k, v
    bias = [tensors[f"{layer}self.{k}.bias"] for k in ("query", "key", "value")]
    attention.in_proj_bias = nn.Parameter(torch.cat(bias))
    attention.out_proj.weight = nn.Parameter(tensors[f"{layer}output.dense.weight"])
    attention.out_proj.bias = nn.Parameter(tensors[f"{layer}output.dense.bias"])
    return attention


def _norm(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, (RAM_WIDTH,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-12)


def _linear(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def _expected(tensors: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """Return RAM's logits, computed with transformers' Swin and torch's attention."""
    patches = ram_swin()(pictures).last_hidden_state
    features = torch.cat([patches.mean(1, keepdim=True), patches], 1)
    features = _linear(features, tensors, "image_proj")
    tags = _linear(tensors["label_embed"], tensors, "wordvec_proj").relu()
    tags = tags.expand(len(pictures), -1, -1)
    for i in range(2):
        layer = f"tagging_head.encoder.layer.{i}."
        output = _attention(tensors, f"{layer}crossattention.")(tags, features, features)[0]
        tags = _norm(output + tags, tensors, f"{layer}crossattention.output.LayerNorm")
        hidden = F.gelu(_linear(tags, tensors, f"{layer}intermediate.dense"))
        out = _linear(hidden, tensors, f"{layer}output.dense")
        tags = _norm(out + tags, tensors, f"{layer}output.LayerNorm")
    return _linear(tags, tensors, "fc")[..., 0]


@torch.no_grad()
def test_logits_equal_those_of_other_libraries(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    model = RamTagger(_save(tmp_path, tensors)).model
    assert model.side == 32
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    patches = ram_swin()(pictures).last_hidden_state
    torch.testing.assert_close(model.visual_encoder(pictures).flatten(1, 2), patches)
    expected = _expected(tensors, pictures)
    assert expected.std(1).min() > 0.01 and expected.std(0).min() > 0.01
    torch.testing.assert_close(model(pictures), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (32, 48), (200, 20), (10, 8000)])
def test_pictures_of_any_size_get_tags(
    tmp_path: Path, tensors: dict[str, Tensor], size: tuple[int, int]
) -> None:
    picture = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    tags = load_tagger(_save(tmp_path, tensors))(picture)
    assert {tag.name for tag in tags} == set(NAMES)
    assert all(0 <= tag.score <= 1 for tag in tags)


def test_thresholds_are_read_from_the_file_beside_the_checkpoint(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    config = _save(tmp_path, tensors)
    scores = dict(load_tagger(config)(photo("coffee", 8)))
    own = [scores["cat"] - 0.01, *[1.0] * (len(NAMES) - 1)]
    (tmp_path / "ram_tag_list_threshold.txt").write_text("\n".join(map(str, own)))
    tags = load_tagger(config.model_copy(update={"threshold": None}))(photo("coffee", 8))
    assert [tag.name for tag in tags] == ["cat"]


def test_merge_lora_updates_the_parts_it_names() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv, down, up = (torch.randn(*s, generator=generator) for s in ((12, 4), (4, 4), (8, 2)))
    base = {"attn.qkv.weight": qkv, "attn.qkv.lora_A": down, "attn.qkv.lora_B": up}
    merged = merge_lora(base)["attn.qkv.weight"]
    torch.testing.assert_close(merged[:4], qkv[:4] + up[:4] @ down[:2] / 2)
    torch.testing.assert_close(merged[4:8], qkv[4:8])
    torch.testing.assert_close(merged[8:], qkv[8:] + up[4:] @ down[2:] / 2)
    plain = {"key.weight": qkv, "key.lora_A": down[:2], "key.lora_B": torch.ones(12, 2)}
    expected = qkv + down[:2].sum(0).expand(12, -1) / 2
    torch.testing.assert_close(merge_lora(plain), {"key.weight": expected})


def _merged(tensors: dict[str, Tensor], update: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the update by loops over rows, W[i] += B[i] A / 8, where A has a half for each part."""
    merged = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, weight in merged.items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or f"{module}.lora_A" not in update:
            continue
        down, up = update[f"{module}.lora_A"], update[f"{module}.lora_B"]
        joint = down.shape[0] == 16
        part = weight.shape[0] // 3 if joint else weight.shape[0]
        for row in range(up.shape[0]):
            half = row // part
            target = row + part if half else row  # the rows of the key lie between
            weight[target] += up[row] @ down[8 * half : 8 * half + 8] / 8
    return merged


@torch.no_grad()
def test_dape_gives_the_logits_of_the_merged_weights(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    update = dape_tensors(tensors)
    assert len(update) == 2 * (4 + 2 * 2 + 1)  # four blocks, two layers of two, and one of captions
    torch.save({"params": update}, tmp_path / "DAPE.pth")
    config = _save(tmp_path, tensors)
    plain = RamTagger(config).model
    dape = RamTagger(config.model_copy(update={"adapter": str(tmp_path / "DAPE.pth")})).model
    (tmp_path / "merged").mkdir()
    merged = RamTagger(_save(tmp_path / "merged", _merged(tensors, update))).model
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(dape(pictures), merged(pictures), atol=1e-5, rtol=1e-5)
    assert (dape(pictures) - plain(pictures)).abs().max() > 0.01


def test_a_head_with_the_name_of_the_first_release_is_read(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    expected = load_tagger(_save(tmp_path, tensors))(photo("coffee", 8))
    renamed = {k.replace("tagging_head.", "vision_multi."): v for k, v in tensors.items()}
    assert load_tagger(_save(tmp_path, renamed))(photo("coffee", 8)) == expected


def test_a_checkpoint_of_an_old_torch_is_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    config = _save(tmp_path, tensors)
    expected = load_tagger(config)(photo("coffee", 8))
    torch.save({"model": tensors}, tmp_path / "ram.pth", _use_new_zipfile_serialization=False)
    assert load_tagger(config)(photo("coffee", 8)) == expected


def test_adapter_is_applied(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    config = _save(tmp_path, tensors)
    name = "tagging_head.encoder.layer.0.crossattention.self.query"
    lora = {f"{name}.lora_A": torch.ones(1, RAM_WIDTH), f"{name}.lora_B": torch.ones(RAM_WIDTH, 1)}
    torch.save(lora, tmp_path / "dape.pth")
    adapted = RamTagger(config.model_copy(update={"adapter": str(tmp_path / "dape.pth")}))
    weight = adapted.model.state_dict()[f"{name}.weight"]
    torch.testing.assert_close(weight, tensors[f"{name}.weight"] + 1)


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        ((1, 4), None, "lora_B is missing"),
        (None, (4, 1), "lora_A is missing"),
        ((1, 3), (4, 1), r"update has shape \(4, 3\), but the weight \(4, 4\)"),
        ((1, 4), (4, 2), "wrong"),
        ((1, 4), (4, 0), "wrong"),
        ((4,), (4,), "wrong"),
    ],
)
def test_adapter_of_wrong_shape_is_named(
    down: tuple[int, ...] | None, up: tuple[int, ...] | None, message: str
) -> None:
    shapes = {"key.weight": (4, 4), "key.lora_A": down, "key.lora_B": up}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items() if shape is not None}
    with pytest.raises(WeightsError, match=f"for key do not fit.*{message}"):
        merge_lora(tensors)
    with pytest.raises(WeightsError, match="other do not fit"):
        merge_lora({"other.lora_A": torch.ones(1, 4), "other.lora_B": torch.ones(4, 1)})


def test_adapter_without_lora_weights_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    config = _save(tmp_path, tensors)
    with pytest.raises(WeightsError, match="no LoRA weights"):
        load_tagger(config.model_copy(update={"adapter": config.source}))


def test_missing_timm_names_the_extra(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"timm: not installed.*\[tags\]"):
        load_tagger(_save(tmp_path, tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.bias": None}, "fc.bias is missing"),
        ({"fc.weight": None}, "fc.weight"),
        ({"label_embed": None}, "label_embed"),
        ({"image_proj.extra": torch.zeros(1)}, "image_proj.extra is unknown"),
        ({"visual_encoder.norm.weight": torch.zeros(3)}, "visual_encoder.norm.weight"),
        ({"reweight_scale": torch.zeros(1)}, "RAM++"),
    ],
)
def test_wrong_tensor_is_named(
    tmp_path: Path, tensors: dict[str, Tensor], change: dict[str, Any], message: str
) -> None:
    wrong = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    with pytest.raises(WeightsError, match=re.escape(message)):
        load_tagger(_save(tmp_path, wrong))


def test_tag_list_of_another_release_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(match="4 names"):
        load_tagger(_save(tmp_path, tensors, NAMES[:4]))


def test_missing_tag_list_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    config = _save(tmp_path, tensors)
    (tmp_path / "ram_tag_list.txt").unlink()
    with pytest.raises(match="ram_tag_list"):
        load_tagger(config)


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize("content", [None, b"no zip", _Evil()])
def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "ram.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsError, match="checkpoint"):
        load_tagger(TaggerConfig(kind="ram", source=str(path)))


def test_missing_source_is_refused() -> None:
    with pytest.raises(LinearSRError, match="needs a model") as caught:
        load_tagger(TaggerConfig(kind="ram"))
    assert isinstance(caught.value, OptionError)
