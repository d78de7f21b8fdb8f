"""Recognize Anything (RAM, Zhang et al. 2023, 2306.03514) from a local checkpoint, eval only.

A Swin backbone sees the picture; every tag of a fixed list is a query that looks at it through
cross-attention and becomes one probability. Sizes come from the checkpoint's shapes, so Swin-B and
Swin-L files load alike. DAPE (SeeSR, 2311.16518) is RAM with LoRA weights for degraded pictures.

It knows nothing of RAM's captioning half, nor of RAM++.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearsr.errors import OptionError, WeightsError, one_line, require
from linearsr.tags.base import Tag, TaggerConfig
from linearsr.tags.choice import Choice
from linearsr.tags.views import SQUEEZABLE, seen_twice, squares

Tensors = dict[str, Tensor]

# Files of the repository that belong to a checkpoint and are looked for beside it.
TAG_LIST, THRESHOLDS = "ram_tag_list.txt", "ram_tag_list_threshold.txt"
# Of tags without one of their own.
THRESHOLD = 0.68
# q2l_config.json; no shape tells it.
HEADS, EPSILON = 4, 1e-12
# A patch is 4 px, and loralib's default alpha is 1.
PATCH, LORA, LORA_ALPHA = 4, ".lora_", 1.0
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What tagging needs; the rest of a checkpoint writes captions.
_PARTS = ("visual_encoder.", "image_proj.", "wordvec_proj.", "tagging_head.", "fc.", "label_embed")
_BUFFERS = ("relative_position_index", "attn_mask")


class RamTagger:
    """Probabilities of every tag in the checkpoint's list, each with its own threshold."""

    def __init__(self, config: TaggerConfig, device: str = "cpu") -> None:
        if config.source is None:
            raise OptionError("the ram tagger needs a model: the checkpoint file")
        require("tags", "timm")
        tensors = _read(config.source)
        if config.adapter is not None:
            tensors = merge_lora({**tensors, **_lora(config.adapter)})
        self.device = device
        self.model = _build(tensors, config.source).to(device)
        names, thresholds = _lists(Path(config.source).parent, len(self.model.label_embed))
        self.choose = Choice(names, config, thresholds)
        self.mean, self.spread = (
            torch.tensor(v, device=device)[:, None, None] for v in (MEAN, SPREAD)
        )

    @torch.inference_mode()
    def __call__(self, picture: Tensor) -> list[Tag]:
        """Tags of a picture (3, H, W) in [0, 1], of any size; best first, none when unsure."""
        size = (self.model.side, self.model.side)
        views = [
            F.interpolate(view[None].float(), size, mode="bilinear", antialias=True)
            for view in squares(picture, SQUEEZABLE)
        ]
        seen = torch.cat(views).clamp(0, 1).to(self.device)
        return self.choose(seen_twice(self.model((seen - self.mean) / self.spread).sigmoid()))


class Ram(nn.Module):
    """The tagging half, under the checkpoint's own names; shapes as in `tensors`."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.side, self.visual_encoder = _swin(tensors)
        self.image_proj = _linear(tensors, "image_proj")
        self.wordvec_proj = _linear(tensors, "wordvec_proj")
        self.label_embed = nn.Parameter(torch.empty_like(tensors["label_embed"]))
        layers = nn.ModuleList(_Layer(tensors, prefix) for prefix in _layers(tensors))
        self.tagging_head = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": layers})})
        self.fc = _linear(tensors, "fc")

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (B, tags) of normalised pictures (B, 3, side, side)."""
        patches = self.visual_encoder(pictures).flatten(1, 2)
        seen = self.image_proj(torch.cat([patches.mean(1, keepdim=True), patches], dim=1))
        tags = F.relu(self.wordvec_proj(self.label_embed)).expand(len(pictures), -1, -1)
        encoder: Any = self.tagging_head["encoder"]
        for layer in encoder["layer"]:
            tags = layer(tags, seen)
        return self.fc(tags).squeeze(-1)


class _Layer(nn.Module):
    """BERT's layer after self-attention is taken out: cross-attention, then the feed-forward."""

    def __init__(self, tensors: Tensors, prefix: str) -> None:
        super().__init__()
        look = {k: _linear(tensors, f"{prefix}crossattention.self.{k}") for k in _LOOK}
        self.crossattention = nn.ModuleDict(
            {"self": nn.ModuleDict(look), "output": _output(tensors, f"{prefix}crossattention.")}
        )
        hidden = _linear(tensors, f"{prefix}intermediate.dense")
        self.intermediate = nn.ModuleDict({"dense": hidden})
        self.output = _output(tensors, prefix)

    def forward(self, tags: Tensor, seen: Tensor) -> Tensor:
        look: Any = self.crossattention["self"]
        sources = zip(_LOOK, (tags, seen, seen), strict=True)
        query, key, value = (look[k](x).unflatten(-1, (HEADS, -1)) for k, x in sources)
        heads = (x.transpose(1, 2) for x in (query, key, value))
        found = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        tags = _add(self.crossattention["output"], found, tags)
        return _add(self.output, F.gelu(self.intermediate["dense"](tags)), tags)


_LOOK = ("query", "key", "value")


def _add(output: Any, found: Tensor, tags: Tensor) -> Tensor:
    return output["LayerNorm"](output["dense"](found) + tags)


def _output(tensors: Tensors, prefix: str) -> nn.ModuleDict:
    dense = _linear(tensors, f"{prefix}output.dense")
    norm = nn.LayerNorm(dense.out_features, eps=EPSILON)
    return nn.ModuleDict({"dense": dense, "LayerNorm": norm})


def _linear(tensors: Tensors, name: str) -> nn.Linear:
    width_out, width_in = tensors[f"{name}.weight"].shape
    return nn.Linear(width_in, width_out)


def _layers(tensors: Tensors) -> list[str]:
    """Prefixes of the head's layers, in order."""
    pattern = re.compile(r"(tagging_head\.encoder\.layer\.(\d+)\.)")
    found = {m[1]: int(m[2]) for m in map(pattern.match, tensors) if m}
    return sorted(found, key=found.__getitem__)


def _swin(tensors: Tensors) -> tuple[int, nn.Module]:
    """The side of its input, and the backbone: (B, 3, side, side) to (B, h, w, C)."""
    from timm.models.swin_transformer import SwinTransformer

    tables: dict[int, list[Tensor]] = {}
    for name, tensor in tensors.items():
        stage = re.match(r"visual_encoder\.layers\.(\d+)\..*relative_position_bias_table$", name)
        if stage:
            tables.setdefault(int(stage[1]), []).append(tensor)
    stages = [tables[i] for i in sorted(tables)]
    window = (math.isqrt(stages[0][0].shape[0]) + 1) // 2
    # RAM's pictures are of such a size that the last stage is one window: 384 for one of 12.
    side = window * PATCH * 2 ** (len(stages) - 1)
    return side, SwinTransformer(
        img_size=side,
        patch_size=PATCH,
        window_size=window,
        embed_dim=tensors["visual_encoder.patch_embed.proj.weight"].shape[0],
        depths=tuple(len(stage) for stage in stages),
        num_heads=tuple(stage[0].shape[1] for stage in stages),
        num_classes=0,
        global_pool="",
    )


def _build(tensors: Tensors, source: str) -> Ram:
    """The model with its weights. Raises WeightsError naming every tensor that is amiss."""
    kept = {k: v.float() for k, v in tensors.items() if k.startswith(_PARTS)}
    try:
        model = Ram(kept)
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(f"{source}: no RAM checkpoint: {one_line(error)} is amiss") from error
    if "reweight_scale" in tensors:
        raise WeightsError(f"{source}: this is RAM++, which is not supported; give RAM's own")
    try:
        amiss = model.load_state_dict(_renamed(kept), strict=False)
    except RuntimeError as error:
        raise WeightsError(f"{source}: {one_line(error)}") from error
    wrong = [f"{n} is missing" for n in amiss.missing_keys]
    wrong += [f"{n} is unknown" for n in amiss.unexpected_keys]
    if wrong:
        raise WeightsError(f"{source}: no RAM checkpoint: {', '.join(wrong)}")
    return model.eval()


def _renamed(tensors: Tensors) -> Tensors:
    """timm merges patches at the start of a stage, Microsoft's names do at the end of the last."""

    def moved(name: str) -> str:
        return re.sub(r"layers\.(\d+)\.downsample", _next_stage, name)

    return {moved(k): v for k, v in tensors.items() if not k.endswith(_BUFFERS)}


def _next_stage(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) + 1}.downsample"


def merge_lora(tensors: Tensors) -> Tensors:
    """Weights with loralib's low-rank changes added: W + (alpha / rank) B A.

    B has fewer rows than a joint qkv weight when only query and value are changed. Raises
    WeightsError naming the layer whose A, B or W is missing or of another shape.
    """
    merged = {k: v for k, v in tensors.items() if LORA not in k}
    for name in dict.fromkeys(k.partition(LORA)[0] for k in tensors if LORA in k):
        try:
            merged[f"{name}.weight"] = _changed(tensors, name)
        except (LookupError, RuntimeError, ValueError, ZeroDivisionError) as error:
            raise WeightsError(
                f"the adapter's LoRA weights of {name} do not fit: {one_line(error)} is amiss; "
                "give the adapter of this checkpoint"
            ) from error
    return merged


def _changed(tensors: Tensors, name: str) -> Tensor:
    weight = tensors[f"{name}.weight"].float()
    down, up = tensors[f"{name}.lora_A"].float(), tensors[f"{name}.lora_B"].float()
    rank, parts = up.shape[1], down.shape[0] // up.shape[1]
    pairs = zip(down.chunk(parts), up.chunk(parts), strict=True)
    changes = [LORA_ALPHA / rank * b @ a for a, b in pairs]
    if parts == 2:
        changes.insert(1, torch.zeros_like(changes[0]))
    change = torch.cat(changes)
    if change.shape != weight.shape:  # adding would stretch one to the other
        raise ValueError(f"a change of {tuple(change.shape)} for {tuple(weight.shape)}")
    return weight + change


def _lora(path: str) -> Tensors:
    found = _read(path)
    if not any(LORA in name for name in found):
        raise WeightsError(f"{path}: no LoRA weights in it; give an adapter's file, as DAPE's")
    return found


def _read(path: str) -> Tensors:
    """Tensors of a checkpoint file; nothing else in it is run. Raises WeightsError."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives raise anything
        raise WeightsError(f"{path}: no readable checkpoint: {one_line(error)}") from error
    found = found.get("model", found) if isinstance(found, dict) else {}
    return {k: v for k, v in found.items() if isinstance(v, Tensor)}


def _lists(folder: Path, count: int) -> tuple[list[str], list[float]]:
    """Names and thresholds from the files beside the checkpoint. Raises WeightsError."""
    names = _lines(folder / TAG_LIST)
    beside = folder / THRESHOLDS
    try:
        own = [float(line) for line in _lines(beside)] if beside.exists() else [THRESHOLD] * count
    except ValueError as error:
        raise WeightsError(f"{beside}: {one_line(error)}; one number a line") from error
    if not len(names) == len(own) == count:
        raise WeightsError(
            f"{folder}: {len(names)} names in {TAG_LIST} and {len(own)} thresholds in "
            f"{THRESHOLDS}, but the checkpoint knows {count} tags; take the files of its release"
        )
    return names, own


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: needed beside the checkpoint: {one_line(error)}") from error
