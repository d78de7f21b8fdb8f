"""A release of several experts, under unknown names, becomes their bundle, whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from linearsr import weights
from linearsr.config import DenoiserConfig
from linearsr.denoiser import LinearSR
from linearsr.diffusion.experts import EXPERTS
from linearsr.errors import LinearSRError, OptionError, WeightsError
from linearsr.weights.convert import Release, Unseen, from_files
from linearsr.weights.convert.__main__ import main
from linearsr.weights.convert.layout import DIFFUSERS, SANA

Tensors = dict[str, Tensor]
Naming = Callable[[int, str], str]

CONFIG = DenoiserConfig(
    latent_channels=32,
    depth=3,
    width=64,
    head_dim=32,
    ffn_ratio=2.0,
    tag_dim=24,
    tag_heads=2,
    stem_channels=(8, 12, 16),
    stem_strides=(4, 4, 2),
)
UNSEEN = Unseen(tag_heads=2, stem_strides=(4, 4, 2))
# Names that no program has, in the order of NVlabs' layers.
INVENTED = {
    "embed": "patchify",
    "time.hidden": "clock.a",
    "time.embed": "clock.b",
    "time.modulation": "clock.six",
    "tags.hidden": "words.a",
    "tags.out": "words.b",
    "tags.norm": "words.scale",
    "blocks.{}.modulation": "trunk.{}.six",
    "blocks.{}.attention.qkv": "trunk.{}.lin.in3",
    "blocks.{}.attention.out": "trunk.{}.lin.back",
    "blocks.{}.attention.norm_q": "trunk.{}.lin.n1",
    "blocks.{}.attention.norm_k": "trunk.{}.lin.n2",
    "blocks.{}.tag_attention.q": "trunk.{}.txt.in1",
    "blocks.{}.tag_attention.kv": "trunk.{}.txt.in2",
    "blocks.{}.tag_attention.out": "trunk.{}.txt.back",
    "blocks.{}.tag_attention.norm_q": "trunk.{}.txt.n1",
    "blocks.{}.tag_attention.norm_k": "trunk.{}.txt.n2",
    "blocks.{}.ffn.expand": "trunk.{}.mix.up",
    "blocks.{}.ffn.depthwise": "trunk.{}.mix.dw",
    "blocks.{}.ffn.project": "trunk.{}.mix.down",
    "modulation": "last.two",
    "out": "last.lin",
}


def models(count: int = 4, **changes: Any) -> list[Tensors]:
    """Return state dicts of LinearSR in which no two tensors are equal."""
    torch.manual_seed(0)
    config = DenoiserConfig(**{**CONFIG.model_dump(), **changes})
    shapes = LinearSR(config).state_dict()
    return [{key: torch.randn(x.shape) for key, x in shapes.items()} for _ in range(count)]


def renamed(model: Mapping[str, Tensor], layers: Mapping[str, str], prefix: str = "") -> Tensors:
    """Return a model's tensors under other names, its stem as lr_stem.0, .2 and .4.

    Layers on pictures are convolutions, as in Sana.
    """
    found = {}
    for layer, name in layers.items():
        for number in range(CONFIG.depth if "{}" in layer else 1):
            for leaf in (".weight", ".bias", ""):
                key = layer.format(number) + leaf
                if key in model:
                    on_pictures = key == "embed.weight" or ".ffn." in key
                    conv = leaf == ".weight" and on_pictures and model[key].ndim == 2
                    x = model[key][..., None, None] if conv else model[key]
                    found[prefix + name.format(number) + leaf] = x
    for key, x in model.items():
        if key.startswith("stem."):
            _, _, number, leaf = key.split(".")
            found[f"{prefix}lr_stem.{2 * int(number)}.{leaf}"] = x
    return found


NVLABS = {layer: names[0] for layer, names in SANA.items()}


def write(folder: Path, files: Mapping[str, Tensors]) -> Path:
    """Write files of tensors, by the suffix, in a folder."""
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        if name.endswith(".safetensors"):
            save_file({k: x.clone() for k, x in tensors.items()}, folder / name)
        else:
            torch.save(tensors, folder / name)
    return folder


def four_files(suffix: str = "pth", **changes: Any) -> dict[str, Tensors]:
    pairs = zip(EXPERTS, models(**changes), strict=True)
    return {f"{name}.{suffix}": renamed(model, NVLABS, "module.") for name, model in pairs}


def one_file(prefix: str = "experts.{}.", count: int = 4, layers: Any = None) -> Tensors:
    return {
        name: x
        for number, model in enumerate(models(count))
        for name, x in renamed(model, layers or NVLABS, prefix.format(number)).items()
    }


def convert(source: Path, **options: Any) -> Release:
    return from_files(source, **{"unseen": UNSEEN, **options})


def assert_same(release: Release, expected: list[Tensors]) -> None:
    assert len(release.experts) == len(expected)
    for ours, theirs in zip(release.experts, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def refusal(call: Callable[[], object], kind: type[LinearSRError] = WeightsError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Prefixes, files and copies


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_four_files_are_four_experts_in_the_order_of_noise(tmp_path: Path, suffix: str) -> None:
    release = convert(write(tmp_path, four_files(suffix)))
    assert_same(release, models())
    assert release.config == CONFIG
    assert release.labels == tuple(f"{name}.{suffix}:module" for name in EXPERTS)
    assert (release.dropped, release.fresh) == ((), ())


def _apart(number: int, name: str) -> str:
    """Blocks, first and last layers under prefixes of their own."""
    part = "trunk" if "blocks" in name else "ends"
    return f"net.experts.{number}.{part}.{name}"


def _shared_stem(number: int, name: str) -> str:
    return name if "stem" in name else f"experts.{number}.{name}"


@pytest.mark.parametrize(
    "place",
    [
        lambda number, name: f"experts.{number}.{name}",
        lambda number, name: f"module.model.diffusion_model.experts.{number + 1}.net.{name}",
        lambda number, name: f"net_g_{EXPERTS[number]}.{name}",
        _apart,
        _shared_stem,
    ],
    ids=["plain", "nested from 1", "words", "apart", "shared stem"],
)
@pytest.mark.parametrize("layout", [SANA, DIFFUSERS], ids=["nvlabs", "diffusers"])
def test_experts_of_one_file_are_found_under_any_prefix(
    tmp_path: Path, place: Naming, layout: Mapping[str, tuple[str, ...]]
) -> None:
    expected = models()
    for model in expected:  # one stem for all, so that it may be shared
        model |= {k: x for k, x in expected[0].items() if k.startswith("stem.")}
    content = {}
    for number, model in enumerate(expected):
        for layer, names in layout.items():
            for part, name in enumerate(names):
                one = renamed(model, {layer: name})
                for key, x in one.items():
                    if "stem" not in key:
                        content[place(number, key)] = x.chunk(len(names))[part]
        content |= {place(number, k): x for k, x in renamed(model, {}).items()}
    # As in a file of safetensors, the order says nothing.
    shuffled = dict(sorted(content.items(), key=lambda item: hash(item[0]) % 1009))
    save_file({k: x.clone() for k, x in shuffled.items()}, tmp_path / "release.safetensors")
    assert_same(convert(tmp_path), expected)


def test_averaged_copies_are_taken_and_the_others_are_named(tmp_path: Path) -> None:
    plain, averaged = models(8)[:4], models(8)[4:]
    content = {}
    for number in range(4):
        content |= renamed(plain[number], NVLABS, f"model.experts.{number}.")
        content |= renamed(averaged[number], NVLABS, f"model_ema.experts.{number}.")
    write(tmp_path, {"all.pth": content})
    release = convert(tmp_path)
    assert_same(release, averaged)
    assert "all of model.experts.3 (57 tensors in blocks)" in release.dropped
    assert "model.experts.0.final_layer.linear.weight" in release.dropped
    chosen = convert(tmp_path, experts=[f"model.experts.{n}" for n in (3, 2, 1, 0)])
    assert_same(chosen, plain[::-1])
    broken = {k: x for k, x in content.items() if not k.startswith("model_ema.experts.2.")}
    write(tmp_path, {"all.pth": broken})
    message = refusal(lambda: convert(tmp_path))
    assert "3 experts are averaged (EMA) and 4 are not" in message and "--experts" in message


def test_safetensors_are_preferred_to_a_pickle_of_the_same_name(tmp_path: Path) -> None:
    lines: list[str] = []
    files = four_files("safetensors")
    write(tmp_path, files)
    for name in EXPERTS:
        (tmp_path / f"{name}.pth").write_bytes(b"not read")
    assert_same(convert(tmp_path, say=lines.append), models())
    assert "left out, since there are safetensors too: polish.pth, refinement.pth" in lines[0]


def test_files_of_one_name_in_several_folders_are_kept_apart(tmp_path: Path) -> None:
    for name, tensors in four_files().items():
        write(tmp_path / name.removesuffix(".pth"), {"model.pth": tensors})
    folders = sorted(tmp_path.iterdir())
    release = from_files(folders, unseen=UNSEEN)
    assert_same(release, models())
    assert_same(from_files([f / "model.pth" for f in folders], unseen=UNSEEN), models())
    assert release.labels[0] == "structure/model.pth:module"
    assert len(release.experts[1:3]) == 2


def test_shards_with_an_index_are_one_model(tmp_path: Path) -> None:
    (model,) = models(1)
    content = renamed(model, NVLABS)
    where = {name: f"{n % 2}.safetensors" for n, name in enumerate(content)}
    for file in ("0.safetensors", "1.safetensors"):
        write(tmp_path, {file: {k: x for k, x in content.items() if where[k] == file}})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert_same(convert(tmp_path), [model])


# Unknown names


def refused(source: Path, mapping: dict[str, str]) -> list[str]:
    """Return the lines about tensors without a place."""
    lines: list[str] = []
    message = refusal(lambda: convert(source, mapping=mapping, say=lines.append))
    assert "without a place" in message and "mapping" in message
    return [line for line in lines if line.startswith("not placed")]


def test_unknown_names_are_placed_by_shape_and_order(tmp_path: Path) -> None:
    lines: list[str] = []
    write(tmp_path, {"release.pth": one_file(layers=INVENTED)})
    assert_same(convert(tmp_path, say=lines.append), models())
    assert "experts.0: 3 blocks" in lines[0] and "0 by name and 79 by shape" in lines[0]


def test_unknown_names_whose_order_is_lost_are_refused_until_a_mapping_places_them(
    tmp_path: Path,
) -> None:
    source = write(tmp_path, {"release.safetensors": one_file(layers=INVENTED)})
    lines = refused(source, {})
    assert "not placed: experts.2.trunk.1.txt.in1.weight (64, 64)" in lines
    assert not [line for line in lines if ".mix." in line]
    # The rest is recognised by shape, and biases beside weights. Names of all layouts are known.
    mapping = {
        "*.clock.b.weight": "time.embed.weight",
        "*.words.b.weight": "caption_projection.linear_2.weight",
        "*.lin.back.weight": "blocks.{}.attention.out.weight",
        "*.lin.n1.weight": "blocks.{}.attn.q_norm.weight",
        "*.lin.n2.weight": "transformer_blocks.{}.attn1.norm_k.weight",
        "*.txt.in1.weight": "blocks.{}.cross_attn.q_linear.weight",
        "*.trunk.{}.txt.back.weight": "blocks.{}.tag_attention.out.weight",
    }
    (name,) = {re.sub(r"\d+", "{}", line) for line in refused(source, mapping)}
    assert name == "not placed: experts.{}.trunk.{}.txt.n{}.weight ({},)"
    mapping["*.txt.n1.weight"] = "blocks.{}.tag_attention.norm_q.weight"  # n2 is then alone
    assert_same(convert(source, mapping=mapping), models())


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"*.blocks.{}.attn.qqv.weight": "drop"}, "no tensor has the name"),
        ({"*.x_embedder.proj.bias": "embed.bais"}, "did you mean embed.bias"),
        ({"*.x_embedder.proj.bias": 3}, "is 3, which is neither 'drop' nor a name"),
    ],
)
def test_wrong_mappings_are_refused(tmp_path: Path, mapping: Any, words: str) -> None:
    source = write(tmp_path, {"release.pth": one_file()})
    assert words in refusal(lambda: convert(source, mapping=mapping), OptionError)


# Missing, extra, misshapen and non-finite tensors


def test_missing_experts_are_named(tmp_path: Path) -> None:
    files = four_files()
    del files["texture.pth"]
    message = refusal(lambda: convert(write(tmp_path / "words", files)))
    assert "these experts are missing: texture" in message
    gone = {k: x for k, x in one_file().items() if not k.startswith("experts.2.")}
    message = refusal(lambda: convert(write(tmp_path / "numbers", {"a.pth": gone})))
    assert "these numbers are missing: 2" in message
    cut = {k: x for k, x in one_file().items() if not k.startswith("experts.3.")}
    message = refusal(lambda: convert(write(tmp_path / "cut", {"a.pth": cut})))
    assert "3 experts were found (experts.0, experts.1, experts.2)" in message
    assert len(convert(tmp_path / "cut", count=3).experts) == 3


def test_experts_of_unknown_order_must_be_named_in_order(tmp_path: Path) -> None:
    names = ["fine", "rough", "middle", "last"]
    files = {f"{n}.pth": renamed(m, NVLABS) for n, m in zip(names, models(), strict=True)}
    write(tmp_path, files)
    message = refusal(lambda: convert(tmp_path))
    assert "order of these experts is unknown: fine.pth, last.pth" in message
    release = convert(tmp_path, experts=["rough", "middle.pth", "fine", "last"])
    assert_same(release, [models()[n] for n in (1, 2, 0, 3)])
    assert "'gone' names 0 experts" in refusal(lambda: convert(tmp_path, experts=["gone"]))


def test_a_missing_block_is_named(tmp_path: Path) -> None:
    content = {k: x for k, x in one_file(count=1).items() if ".blocks.1." not in k}
    message = refusal(lambda: convert(write(tmp_path, {"a.pth": content})))
    assert "of 3 blocks these are missing: 1" in message


EXTRA = {
    "an adapter": {"experts.1.blocks.2.lora.weight": torch.zeros(4, 64)},
    "a decoder": {"vae.decoder.conv.weight": torch.zeros(3, 8, 3, 3)},
    "an optimizer": {"adam.exp_avg": torch.zeros(64, 64)},
    "a second claim": {"experts.1.old.blocks.2.attn.qkv.weight": torch.zeros(192, 64)},
}


@pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)
def test_extra_tensors_are_named_until_they_are_dropped(tmp_path: Path, extra: Tensors) -> None:
    source = write(tmp_path, {"release.pth": {**one_file(), **extra}})
    (name,) = extra
    lines: list[str] = []
    message = refusal(lambda: convert(source, say=lines.append))
    assert f"1 without a place: {name}" in message
    assert f"not placed: {name} {tuple(extra[name].shape)}" in lines
    release = convert(source, mapping={name: "drop"})
    assert_same(release, models())
    assert release.dropped == (name,)


def test_state_of_training_is_dropped_by_name(tmp_path: Path) -> None:
    content: Any = {"model": one_file(), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    release = convert(write(tmp_path, {"a.pth": {**content, "iteration": 7}}))
    assert_same(release, models())
    assert release.dropped == ("optimizer", "iteration")


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    content = one_file()
    content["experts.2.blocks.1.attn.proj.weight"] = torch.zeros(64, 65)
    message = refusal(lambda: convert(write(tmp_path / "layer", {"a.pth": content})))
    assert "experts.2.blocks.1.attn.proj.weight is (64, 65), not (64, 64)" in message
    files = four_files()
    other = models(1, ffn_ratio=1.5)[0]
    write(tmp_path / "size", {**files, "polish.pth": renamed(other, NVLABS)})
    message = refusal(lambda: convert(tmp_path / "size"))
    assert "polish.pth has another shape than structure.pth:module" in message


def test_missing_tensors_are_named_with_their_expert(tmp_path: Path) -> None:
    content = one_file()
    del content["experts.3.blocks.0.cross_attn.kv_linear.bias"]
    message = refusal(lambda: convert(write(tmp_path, {"a.pth": content})))
    assert "1 missing: experts.3: blocks.0.cross_attn.kv_linear.bias" in message


def test_nan_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = one_file()
    content["experts.3.final_layer.linear.bias"][5] = torch.nan
    source = write(tmp_path / "in", {"release.pth": content})
    flags = ["--tag-heads", "2", "--stem-strides", "4", "4", "2"]
    assert main([str(source), "--out", str(tmp_path / "out"), *flags]) == 1
    assert "experts.3.final_layer.linear.bias holds NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickled_code_in_one_of_the_files_is_named_and_not_run(tmp_path: Path) -> None:
    write(tmp_path, four_files())
    torch.save({"bomb": Bomb(tmp_path / "ran")}, tmp_path / "texture.pth")
    message = refusal(lambda: convert(tmp_path))
    assert "texture.pth: this pickle calls" in message and "nothing of it was run" in message
    assert not (tmp_path / "ran").exists()


def test_sizes_that_linearsr_cannot_have_are_refused(tmp_path: Path) -> None:
    content = {
        f"blocks.{n}.{name}": torch.zeros(shape)
        for n in range(2)
        for name, shape in {"a": (6, 64), "b.weight": (1, 1, 3, 3)}.items()
    }
    message = refusal(lambda: convert(write(tmp_path, {"a.pth": content})))
    assert "LinearSR cannot have this shape" in message


# The first layer and the LR stem


def test_strides_of_a_stem_must_be_given(tmp_path: Path) -> None:
    source = write(tmp_path, {"release.pth": one_file()})
    assert "--stem-strides" in refusal(lambda: convert(source, unseen=Unseen(tag_heads=2)))


def first_layer(columns: int) -> tuple[Tensors, Tensor]:
    """Return a model without a stem whose first layer takes so many channels, and its weight."""
    (model,) = models(1)
    model["embed.weight"] = torch.randn(64, columns)
    return {k: x for k, x in model.items() if not k.startswith("stem.")}, model["embed.weight"]


def test_release_without_a_stem_gets_a_new_one(tmp_path: Path) -> None:
    model, weight = first_layer(32)
    release = convert(write(tmp_path, {"a.pth": renamed(model, NVLABS)}))
    (tensors,) = release.experts
    assert torch.equal(tensors["embed.weight"][:, :32], weight)
    assert not tensors["embed.weight"][:, 32:].any()
    assert "stem.convs.0.weight" in release.fresh and not release.config.condition_latent


def test_encoded_lr_picture_joins_the_latent_without_a_stem(tmp_path: Path) -> None:
    model, weight = first_layer(64)
    source = write(tmp_path, {"a.pth": renamed(model, NVLABS)})
    release = convert(source)
    assert release.config.condition_latent
    (tensors,) = release.experts
    LinearSR(release.config).load_state_dict(tensors)
    stem = release.config.stem_channels[-1]
    assert torch.equal(tensors["embed.weight"][:, :32], weight[:, :32])
    assert not tensors["embed.weight"][:, 32 : 32 + stem].any()
    assert torch.equal(tensors["embed.weight"][:, 32 + stem :], weight[:, 32:])
    (swapped,) = convert(source, unseen=UNSEEN._replace(inputs=("lr_latent", "latent"))).experts
    assert torch.equal(swapped["embed.weight"][:, :32], weight[:, 32:])


def test_inputs_that_the_number_of_columns_does_not_explain_must_be_given(tmp_path: Path) -> None:
    model, weight = first_layer(41)
    source = write(tmp_path, {"a.pth": renamed(model, NVLABS)})
    message = refusal(lambda: convert(source))
    assert "embed takes 41 channels" in message and "--inputs" in message
    (tensors,) = convert(source, unseen=UNSEEN._replace(inputs=("latent", "drop"))).experts
    assert torch.equal(tensors["embed.weight"][:, :32], weight[:, :32])
    wrong = UNSEEN._replace(inputs=("latent", "lr_latent"))
    assert "is (64, 41, 1, 1), not (64, 64)" in refusal(lambda: convert(source, unseen=wrong))


def test_stem_of_another_shape_is_named_and_can_be_dropped(tmp_path: Path) -> None:
    content = one_file(count=1)
    content["experts.0.lr_stem.6.weight"] = torch.zeros(16, 16, 3, 3)
    content["experts.0.lr_stem.6.bias"] = torch.zeros(16)
    source = write(tmp_path, {"a.pth": content})
    message = refusal(lambda: convert(source))
    assert "lr_stem.0.weight" in message and "three 3x3 convolutions" in message
    unseen = Unseen(tag_heads=2, inputs=("latent", "drop"))
    release = convert(source, mapping={"*.lr_stem.*": "drop"}, unseen=unseen)
    assert "stem.convs.0.weight" in release.fresh
    assert len([name for name in release.dropped if "lr_stem" in name]) == 8


# Command


def test_command_writes_four_experts_and_says_what_it_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "release", four_files())
    mapping = tmp_path / "mapping.json"
    extra = {"noise": torch.zeros(3)}
    torch.save({**four_files()["polish.pth"], **extra}, source / "polish.pth")
    out = tmp_path / "bundle"
    flags = ["--out", str(out), "--tag-heads", "2", "--stem-strides", "4", "4", "2"]
    assert main([str(source), *flags]) == 1
    assert "1 without a place: polish.pth:noise" in capsys.readouterr().err
    mapping.write_text(json.dumps({"polish.pth:noise": "drop"}))
    assert main([str(source), *flags, "--mapping", str(mapping)]) == 0
    printed = capsys.readouterr().out
    assert "structure.pth:module: 3 blocks, layout of NVlabs, with an LR stem" in printed
    assert "dropped: polish.pth:noise" in printed and "fresh: nothing" in printed
    bundle = weights.load(out)
    assert bundle.config.sampling.boundaries == (0.223, 0.875, 0.939)
    assert bundle.config.denoiser == CONFIG
    assert bundle.provenance["experts"].startswith("structure.pth:module, refinement.pth")
    for expert, model in zip(bundle.experts, models(), strict=True):
        for key, x in expert.state_dict().items():
            torch.testing.assert_close(x, model[key], rtol=2**-8, atol=0)


def test_command_takes_another_number_of_experts_with_their_boundaries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", {"two.pth": one_file(count=2)})
    out = tmp_path / "out"
    flags = ["--out", str(out), "--tag-heads", "2", "--stem-strides", "4", "4", "2"]
    assert main([str(source), *flags]) == 1
    assert "2 experts were found" in capsys.readouterr().err
    assert main([str(source), *flags, "--boundaries", "0.5"]) == 0
    assert weights.read_config(out).sampling.boundaries == (0.5,)
    wrong = ["--out", str(tmp_path / "no"), *flags[2:], "--boundaries", "1.5"]
    assert main([str(source), *wrong]) == 2
    assert "boundaries must rise" in capsys.readouterr().err
