"""Both layouts of Sana become LinearSR; tensors that do not fit are refused by name.

Releases of several experts are in test_release.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linearsr import weights
from linearsr.denoiser import LinearSR
from linearsr.errors import WeightsError
from linearsr.weights.convert import Release, Unseen, from_diffusers, from_files
from linearsr.weights.convert.__main__ import main
from linearsr.weights.convert.layout import ratio

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
DEPTH = 2


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by diffusers: a small Sana with QK norm and random weights."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.SanaTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=DEPTH,
        num_cross_attention_heads=2,
        cross_attention_head_dim=64,
        cross_attention_dim=128,
        caption_channels=24,
        mlp_ratio=1.5,
        qk_norm="rms_norm_across_heads",
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    folder = tmp_path_factory.mktemp("sana")
    model.save_pretrained(folder)
    return folder


def original(d: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return diffusers' tensors under the keys of NVlabs' code, written out key by key."""
    out = {
        "pos_embed": torch.zeros(1, 64, 128),
        "y_embedder.y_embedding": torch.randn(300, 24),
        "logvar_linear.weight": torch.randn(1, 128),
        "logvar_linear.bias": torch.randn(1),
        "x_embedder.proj.weight": d["patch_embed.proj.weight"],
        "x_embedder.proj.bias": d["patch_embed.proj.bias"],
        "t_embedder.mlp.0.weight": d["time_embed.emb.timestep_embedder.linear_1.weight"],
        "t_embedder.mlp.0.bias": d["time_embed.emb.timestep_embedder.linear_1.bias"],
        "t_embedder.mlp.2.weight": d["time_embed.emb.timestep_embedder.linear_2.weight"],
        "t_embedder.mlp.2.bias": d["time_embed.emb.timestep_embedder.linear_2.bias"],
        "t_block.1.weight": d["time_embed.linear.weight"],
        "t_block.1.bias": d["time_embed.linear.bias"],
        "y_embedder.y_proj.fc1.weight": d["caption_projection.linear_1.weight"],
        "y_embedder.y_proj.fc1.bias": d["caption_projection.linear_1.bias"],
        "y_embedder.y_proj.fc2.weight": d["caption_projection.linear_2.weight"],
        "y_embedder.y_proj.fc2.bias": d["caption_projection.linear_2.bias"],
        "attention_y_norm.weight": d["caption_norm.weight"],
        "final_layer.scale_shift_table": d["scale_shift_table"],
        "final_layer.linear.weight": d["proj_out.weight"],
        "final_layer.linear.bias": d["proj_out.bias"],
    }
    for i in range(DEPTH):
        a, b = f"blocks.{i}.", f"transformer_blocks.{i}."
        qkv = [d[f"{b}attn1.to_{x}.weight"] for x in "qkv"]
        out |= {
            a + "scale_shift_table": d[b + "scale_shift_table"],
            a + "attn.qkv.weight": torch.cat(qkv),
            a + "attn.q_norm.weight": d[b + "attn1.norm_q.weight"],
            a + "attn.k_norm.weight": d[b + "attn1.norm_k.weight"],
            a + "attn.proj.weight": d[b + "attn1.to_out.0.weight"],
            a + "attn.proj.bias": d[b + "attn1.to_out.0.bias"],
            a + "cross_attn.q_linear.weight": d[b + "attn2.to_q.weight"],
            a + "cross_attn.q_linear.bias": d[b + "attn2.to_q.bias"],
            a + "cross_attn.q_norm.weight": d[b + "attn2.norm_q.weight"],
            a + "cross_attn.k_norm.weight": d[b + "attn2.norm_k.weight"],
            a + "cross_attn.proj.weight": d[b + "attn2.to_out.0.weight"],
            a + "cross_attn.proj.bias": d[b + "attn2.to_out.0.bias"],
            a + "mlp.inverted_conv.conv.weight": d[b + "ff.conv_inverted.weight"],
            a + "mlp.inverted_conv.conv.bias": d[b + "ff.conv_inverted.bias"],
            a + "mlp.depth_conv.conv.weight": d[b + "ff.conv_depth.weight"],
            a + "mlp.depth_conv.conv.bias": d[b + "ff.conv_depth.bias"],
            a + "mlp.point_conv.conv.weight": d[b + "ff.conv_point.weight"],
        }
        for part in ("weight", "bias"):
            pair = [d[f"{b}attn2.to_{x}.{part}"] for x in "kv"]
            out[f"{a}cross_attn.kv_linear.{part}"] = torch.cat(pair)
    return out


def edited(sana: Path, folder: Path, settings: dict[str, Any], **tensors: Tensor | None) -> Path:
    """Return a copy of the folder; keys and tensors are replaced, added or (None) removed."""
    content = {**load_file(sana / WEIGHTS), **tensors}
    save_file({k: v for k, v in content.items() if v is not None}, folder / WEIGHTS)
    config = json.loads((sana / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def refusal(convert: Callable[[], object]) -> str:
    with pytest.raises(WeightsError) as caught:
        convert()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Diffusers' layout


def test_a_diffusers_folder_gives_its_config_and_tensors(sana: Path) -> None:
    config, tensors, dropped, fresh = from_diffusers(sana)
    assert (config.depth, config.width, config.head_dim) == (DEPTH, 128, 32)
    assert (config.tag_dim, config.tag_heads, config.qk_norm) == (24, 2, True)
    assert (config.ffn_ratio, config.latent_channels) == (1.5, 32)
    assert (config.prediction, config.timestep_scale) == ("velocity", 1000.0)
    assert dropped == ()
    LinearSR(config).load_state_dict(tensors)
    source = load_file(sana / WEIGHTS)
    embed, patch = tensors["embed.weight"], source["patch_embed.proj.weight"]
    assert torch.equal(embed[:, :32], patch[..., 0, 0])
    assert not embed[:, 32:].any()
    assert embed.shape[1] == 32 + config.stem_channels[-1]
    assert {name for name in fresh if name.startswith("stem.")} == {
        f"stem.convs.{i}.{part}" for i in range(3) for part in ("weight", "bias")
    }
    assert all(tensors[name].any() for name in fresh if name.startswith("stem."))


def test_two_conversions_are_equal_and_leave_the_generator_alone(sana: Path) -> None:
    torch.manual_seed(1)
    first = from_diffusers(sana).tensors
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    second = from_diffusers(sana).tensors
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_shards_variants_and_pipelines_are_the_same_model(sana: Path, tmp_path: Path) -> None:
    whole, source = from_diffusers(sana), load_file(sana / WEIGHTS)
    settings = (sana / "config.json").read_bytes()
    shards = tmp_path / "pipeline" / "transformer"
    shards.mkdir(parents=True)
    (shards / "config.json").write_bytes(settings)
    names = sorted(source)
    pieces = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files = {key: pieces[i % 2] for i, key in enumerate(names)}
    for file in pieces:
        save_file({key: source[key] for key in names if files[key] == file}, shards / file)
    (shards / INDEX).write_text(json.dumps({"weight_map": files}))
    variant = tmp_path / "variant"
    variant.mkdir()
    (variant / "config.json").write_bytes(settings)
    save_file(source, variant / "diffusion_pytorch_model.fp16.safetensors")
    for folder in (shards, tmp_path / "pipeline", variant):
        again = from_diffusers(folder)
        assert again.config == whole.config
        assert all(torch.equal(again.tensors[key], whole.tensors[key]) for key in whole.tensors)


def test_missing_or_incomplete_shard_is_named(sana: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((sana / "config.json").read_bytes())
    source = load_file(sana / WEIGHTS)
    index = {"weight_map": dict.fromkeys(source, "a.safetensors")}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "a.safetensors" in refusal(lambda: from_diffusers(tmp_path))
    del source["proj_out.bias"]
    save_file(source, tmp_path / "a.safetensors")
    message = refusal(lambda: from_diffusers(tmp_path))
    assert "no weights file holds these tensors of the index: proj_out.bias" in message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("transformer_blocks.1.attn1.to_k.weight", None, "1 missing"),
        ("transformer_blocks.1.attn1.norm_k.weight", None, "1 missing"),
        ("patch_embed.pos_embed", torch.zeros(1, 64, 128), "1 unexpected"),
        ("transformer_blocks.2.scale_shift_table", torch.zeros(6, 128), "1 unexpected"),
        ("transformer_blocks.0.attn2.to_v.bias", torch.zeros(64), "is (64,), not (128,)"),
        ("transformer_blocks.0.ff.conv_point.weight", torch.zeros(9, 192, 1, 1), "not (128, 192)"),
        ("transformer_blocks.0.ff.conv_point.weight", torch.zeros(128, 192, 3, 3), "3, 3), not"),
        ("patch_embed.proj.weight", torch.zeros(128, 16, 1, 1), "is (128, 16, 1, 1)"),
        ("scale_shift_table", torch.full((2, 128), torch.nan), "NaN"),
        ("proj_out.bias", torch.zeros(32, dtype=torch.int8), "quantised"),
    ],
)
def test_wrong_tensors_are_named(
    sana: Path, tmp_path: Path, key: str, value: Tensor | None, words: str
) -> None:
    message = refusal(lambda: from_diffusers(edited(sana, tmp_path, {}, **{key: value})))
    assert key in message
    assert words in message


def test_tensors_of_wrong_shape_but_right_count_are_refused(sana: Path, tmp_path: Path) -> None:
    """Queries of 64, keys of 192 and values of 128 rows have the right sum of 384."""
    names = [f"transformer_blocks.0.attn1.to_{x}.weight" for x in "qk"]
    wrong = dict(zip(names, (torch.zeros(64, 128), torch.zeros(192, 128)), strict=True))
    message = refusal(lambda: from_diffusers(edited(sana, tmp_path, {}, **wrong)))
    assert all(name in message for name in names)


def test_long_lists_are_cut_but_counted(sana: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((sana / "config.json").read_bytes())
    save_file({"nothing": torch.zeros(1)}, tmp_path / WEIGHTS)
    message = refusal(lambda: from_diffusers(tmp_path))
    assert "more; 1 unexpected: nothing" in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("patch_size", 2, "patches"),
        ("guidance_embeds", True, "guidance"),
        ("interpolation_scale", 1.0, "sincos"),
        ("attention_bias", True, "attention_bias"),
        ("norm_eps", 1e-5, "norm_eps"),
        ("qk_norm", "layer_norm", "layer_norm"),
        ("out_channels", 64, "out_channels 64"),
        ("cross_attention_head_dim", 32, "needs all three equal"),
        ("num_cross_attention_heads", None, "attention_heads must be a number"),
        ("num_layers", 0, "shape"),
        ("rope_theta", 10000, "rope_theta"),
        ("_class_name", "PixArtTransformer2DModel", "PixArtTransformer2DModel"),
    ],
)
def test_configs_that_cannot_be_represented_are_refused(
    sana: Path, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    message = refusal(lambda: from_diffusers(edited(sana, tmp_path, {key: value})))
    assert words in message
    assert "config.json" in message


def test_missing_and_damaged_files_are_named(sana: Path, tmp_path: Path) -> None:
    assert "config.json" in refusal(lambda: from_diffusers(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert "JSON object" in refusal(lambda: from_diffusers(tmp_path))
    (tmp_path / "config.json").write_bytes((sana / "config.json").read_bytes())
    assert "variants found: none" in refusal(lambda: from_diffusers(tmp_path))
    (tmp_path / WEIGHTS).write_bytes((sana / WEIGHTS).read_bytes()[:999])
    assert WEIGHTS in refusal(lambda: from_diffusers(tmp_path))


# Sana's own layout


@pytest.fixture
def nvlabs(sana: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return original(load_file(sana / WEIGHTS))


def saved(tensors: dict[str, Any], folder: Path) -> Path:
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "sana.pth")
    return folder / "sana.pth"


TWO_HEADS = Unseen(tag_heads=2)


def from_sana(path: Path) -> Release:
    return from_files(path, unseen=TWO_HEADS)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_original_and_diffusers_layouts_give_the_same_model(
    sana: Path, tmp_path: Path, nvlabs: dict[str, Tensor], suffix: str
) -> None:
    theirs = from_diffusers(sana)
    path = tmp_path / "sana.safetensors"
    if suffix == "pth":
        path = saved(nvlabs, tmp_path)
    else:
        save_file(nvlabs, path)
    ours = from_sana(path)
    assert (ours.config, ours.fresh) == (theirs.config, theirs.fresh)
    (tensors,) = ours.experts
    assert set(tensors) == set(theirs.tensors)
    assert all(torch.equal(tensors[key], theirs.tensors[key]) for key in theirs.tensors)
    caption = {"pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias"}
    beside = {"epoch"} if suffix == "pth" else set()
    assert {name.removeprefix("state_dict.") for name in ours.dropped} == caption | beside


def test_heads_of_cross_attention_must_be_given_for_an_unknown_width(
    tmp_path: Path, nvlabs: dict[str, Tensor]
) -> None:
    message = refusal(lambda: from_files(saved(nvlabs, tmp_path)))
    assert "width 128" in message and "--tag-heads" in message


@pytest.mark.parametrize("width", [1152, 2240, 96, 77])
def test_mlp_ratio_gives_back_the_hidden_size(width: int) -> None:
    assert all(int(width * ratio(hidden, width)) == hidden for hidden in range(1, 4 * width))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("blocks.1.mlp.point_conv.conv.weight", None, "1 missing"),
        ("blocks.0.attn.qkv.bias", torch.zeros(384), "1 without a place"),
        ("blocks.0.cross_attn.kv_linear.weight", torch.zeros(128, 128), "not (256, 128)"),
        ("x_embedder.proj.weight", torch.zeros(128, 32, 2, 2), "patches"),
        ("x_embedder.proj.weight", None, "1 missing"),
        ("cfg_embedder.mlp.0.weight", torch.zeros(128, 256), "guidance"),
        ("blocks.1.scale_shift_table", None, "1 missing"),
        ("blocks.1.mlp.depth_conv.conv.weight", None, "1 missing"),
        ("proj_out.weight", torch.zeros(128, dtype=torch.int8), "1 without a place"),
        ("final_layer.linear.bias", torch.zeros(32, dtype=torch.int8), "quantised"),
        ("pos_embed", torch.ones(1, 64, 128), "sincos"),
        ("attention_y_norm.weight", torch.full((128,), torch.inf), "NaN or infinity"),
    ],
)
def test_wrong_original_tensors_are_named(
    tmp_path: Path, nvlabs: dict[str, Tensor], key: str, value: Tensor | None, words: str
) -> None:
    content = {k: v for k, v in {**nvlabs, key: value}.items() if v is not None}
    message = refusal(lambda: list(from_sana(saved(content, tmp_path)).experts))
    assert key in message
    assert words in message


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_named_and_not_run(
    tmp_path: Path, nvlabs: dict[str, Tensor], zipped: bool
) -> None:
    target, path = tmp_path / "ran", tmp_path / "sana.pth"
    content = {"state_dict": nvlabs, "bomb": Bomb(target)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(lambda: from_sana(path))
    assert not target.exists()
    assert "weights_only" not in message
    assert "this pickle calls" in message and "getattr" in message


def test_file_of_old_pytorch_is_read(sana: Path, tmp_path: Path, nvlabs: dict[str, Tensor]) -> None:
    torch.save(nvlabs, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert from_sana(tmp_path / "old.pth").config == from_diffusers(sana).config


def test_files_that_are_no_sana_are_refused(tmp_path: Path) -> None:
    assert "nowhere.pth" in refusal(lambda: from_sana(tmp_path / "nowhere.pth"))
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint")
    assert "damaged" in refusal(lambda: from_sana(tmp_path / "noise.pth"))
    (tmp_path / "empty.pth").touch()
    assert "damaged" in refusal(lambda: from_sana(tmp_path / "empty.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    assert "no state dict" in refusal(lambda: from_sana(tmp_path / "list.pth"))
    torch.save({"weight": torch.zeros(3, 3)}, tmp_path / "layer.pth")
    assert "no denoiser was recognised" in refusal(lambda: from_sana(tmp_path / "layer.pth"))
    (tmp_path / "folder").mkdir()
    assert "holds no weights" in refusal(lambda: from_sana(tmp_path / "folder"))


# Command line


def test_command_line_writes_a_bundle(
    sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert main([str(sana), "--out", str(out), "--name", "converted"]) == 0
    printed = capsys.readouterr().out
    assert "dropped: nothing" in printed
    assert "fresh: stem.convs.0.weight" in printed
    bundle = weights.load(out)
    assert bundle.config.name == "converted"
    assert bundle.config.latent.kind == "dc-ae"
    assert bundle.config.sampling.boundaries == ()
    assert bundle.provenance["layout"] == "diffusers"
    expected = from_diffusers(sana)
    assert bundle.config.denoiser == expected.config
    (expert,) = bundle.experts
    for key, tensor in expert.state_dict().items():
        torch.testing.assert_close(tensor, expected.tensors[key], rtol=2**-8, atol=0)
    assert main([str(sana), "--out", str(out)]) == 1
    assert "already holds weights" in capsys.readouterr().err


def test_command_line_converts_the_original_layout(
    tmp_path: Path, nvlabs: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = saved(nvlabs, tmp_path), tmp_path / "bundle"
    assert main([str(source), "--out", str(out)]) == 1
    assert "width 128" in capsys.readouterr().err
    assert not out.exists()
    places = ["--dc-ae", "there/dc-ae", "--decoder", "there/lite", "--gemma", "there/gemma"]
    assert main([str(source), "--out", str(out), "--tag-heads", "2", *places]) == 0
    printed = capsys.readouterr().out
    assert "2 blocks, layout of NVlabs: 54 tensors, 54 by name and 0 by shape" in printed
    assert "taken as given" in printed and "2 heads of cross-attention" in printed
    assert "dropped: epoch, state_dict.pos_embed, state_dict.y_embedder.y_embedding" in printed
    config = weights.load(out).config
    assert (config.name, config.latent.source) == ("sana", "there/dc-ae")
    assert config.latent.decoder == "there/lite"
    assert config.tags is not None and config.tags.source == "there/gemma"


def test_command_line_refuses_options_that_the_config_of_diffusers_contradicts(
    sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sana), "--out", str(tmp_path / "bundle"), "--tag-heads", "4"]) == 2
    assert "config.json says 2" in capsys.readouterr().err
    assert main([str(sana), "--out", str(tmp_path / "bundle"), "--inputs", "latent"]) == 2
    assert "--inputs is for .pth and .safetensors files" in capsys.readouterr().err


def test_command_line_refuses_latents_that_dc_ae_does_not_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 1, "num_cross_attention_heads": 1, "num_layers": 1}
    model = diffusers.SanaTransformer2DModel(
        in_channels=6,
        out_channels=6,
        cross_attention_head_dim=32,
        cross_attention_dim=32,
        caption_channels=8,
        **sizes,
    )
    model.save_pretrained(tmp_path / "six")
    assert main([str(tmp_path / "six"), "--out", str(tmp_path / "bundle")]) == 1
    assert "6 channels" in capsys.readouterr().err
