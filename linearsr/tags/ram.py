"""Recognize Anything (RAM, Zhang et al. 2023, 2306.03514) from a local checkpoint.

A Swin backbone encodes the picture. Every tag of a fixed list is a query, which attends to the
picture's features and becomes one probability. Sizes come from the checkpoint's shapes, so files
with Swin-B and Swin-L load alike. DAPE (SeeSR, 2311.16518) is RAM with LoRA weights for degraded
pictures: rank 8, on query and value of the backbone, and on query and key of the tagging head. They
are merged when they are loaded, so DAPE takes the time and memory of RAM. Inference only; RAM's
captioning half and RAM++ are not supported.
"""

from __future__ import annotations

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearsr.errors import OptionError, WeightsError, one_line, require
from linearsr.tags.base import Tag, TaggerConfig
from linearsr.tags.views import MAX_SQUEEZE, combine_views, square_views
from linearsr.tags.vocabulary import Vocabulary

Tensors = dict[str, Tensor]

# Files of RAM's repository that belong in the checkpoint's folder.
TAG_LIST, THRESHOLDS = "ram_tag_list.txt", "ram_tag_list_threshold.txt"
# The threshold of tags without their own.
THRESHOLD = 0.68
# From q2l_config.json: no tensor's shape shows these.
HEADS, EPSILON = 4, 1e-12
# The patch size in pixels, the mark of LoRA's tensors, and loralib's default alpha.
PATCH, LORA, LORA_ALPHA = 4, ".lora_", 1.0
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The tensors for tagging; the rest of a checkpoint is for captions.
_PARTS = ("visual_encoder.", "image_proj.", "wordvec_proj.", "tagging_head.", "fc.", "label_embed")
_BUFFERS = ("relative_position_index", "attn_mask")
# The tagging head's names: in files of the first release, and in RAM's code, which renames them.
_OLD_HEAD, _HEAD = "vision_multi.", "tagging_head."
# The entries of a file that may hold its tensors: RAM's own, and that of BasicSR, which SeeSR uses.
_ENTRIES = ("model", "params")


class RamTagger:
    """A tagger with one probability for each tag in the checkpoint's list."""

    def __init__(self, config: TaggerConfig, device: str = "cpu") -> None:
        if config.source is None:
            raise OptionError("the ram tagger needs a model: the checkpoint file")
        require("tags", "timm")
        tensors = _read(config.source)
        if config.adapter is not None:
            # DAPE's file also has LoRA weights of the captioning half, which training left at zero.
            update = {k: v for k, v in _read(config.adapter).items() if k.startswith(_PARTS)}
            if not any(LORA in name for name in update):
                raise WeightsError(
                    f"{config.adapter}: has no LoRA weights for the tagging half of RAM; give the "
                    "file of an adapter like DAPE"
                )
            tensors = merge_lora({**tensors, **update})
        self.device = device
        self.model = _build(tensors, config.source).to(device)
        names, thresholds = _lists(Path(config.source).parent, len(self.model.label_embed))
        self.vocabulary = Vocabulary(names, config, thresholds)
        self.mean, self.spread = (
            torch.tensor(v, device=device)[:, None, None] for v in (MEAN, SPREAD)
        )

    @torch.inference_mode()
    def __call__(self, picture: Tensor) -> list[Tag]:
        """Return the tags of a picture (3, H, W) in [0, 1] of any size, best first."""
        size = (self.model.side, self.model.side)
        views = [
            F.interpolate(view[None].float(), size, mode="bilinear", antialias=True)
            for view in square_views(picture, MAX_SQUEEZE)
        ]
        inputs = torch.cat(views).clamp(0, 1).to(self.device)
        scores = self.model((inputs - self.mean) / self.spread).sigmoid()
        return self.vocabulary.select(combine_views(scores))


class Ram(nn.Module):
    """RAM's tagging half, with the checkpoint's names and the shapes of `tensors`."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.side, self.visual_encoder = _swin(tensors)
        self.image_proj = _linear(tensors, "image_proj")
        self.wordvec_proj = _linear(tensors, "wordvec_proj")
        self.label_embed = nn.Parameter(torch.empty_like(tensors["label_embed"]))
        pattern = re.compile(r"(tagging_head\.encoder\.layer\.(\d+)\.)")
        numbers = {m[1]: int(m[2]) for m in map(pattern.match, tensors) if m}
        prefixes = sorted(numbers, key=numbers.__getitem__)
        layers = nn.ModuleList(_Layer(tensors, prefix) for prefix in prefixes)
        self.tagging_head = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": layers})})
        self.fc = _linear(tensors, "fc")

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the logits (B, tags) of normalised pictures (B, 3, side, side)."""
        patches = self.visual_encoder(pictures).flatten(1, 2)
        features = self.image_proj(torch.cat([patches.mean(1, keepdim=True), patches], dim=1))
        tags = F.relu(self.wordvec_proj(self.label_embed)).expand(len(pictures), -1, -1)
        encoder: Any = self.tagging_head["encoder"]
        for layer in encoder["layer"]:
            tags = layer(tags, features)
        return self.fc(tags).squeeze(-1)


class _Layer(nn.Module):
    """A BERT layer without its self-attention: cross-attention, then the feed-forward network."""

    def __init__(self, tensors: Tensors, prefix: str) -> None:
        super().__init__()
        projections = {k: _linear(tensors, f"{prefix}crossattention.self.{k}") for k in _QKV}
        self.crossattention = nn.ModuleDict(
            {
                "self": nn.ModuleDict(projections),
                "output": _output(tensors, f"{prefix}crossattention."),
            }
        )
        hidden = _linear(tensors, f"{prefix}intermediate.dense")
        self.intermediate = nn.ModuleDict({"dense": hidden})
        self.output = _output(tensors, prefix)

    def forward(self, tags: Tensor, features: Tensor) -> Tensor:
        projections: Any = self.crossattention["self"]
        sources = zip(_QKV, (tags, features, features), strict=True)
        query, key, value = (projections[k](x).unflatten(-1, (HEADS, -1)) for k, x in sources)
        heads = (x.transpose(1, 2) for x in (query, key, value))
        attention = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        tags = _add(self.crossattention["output"], attention, tags)
        return _add(self.output, F.gelu(self.intermediate["dense"](tags)), tags)


_QKV = ("query", "key", "value")


def _add(output: Any, x: Tensor, tags: Tensor) -> Tensor:
    return output["LayerNorm"](output["dense"](x) + tags)


def _output(tensors: Tensors, prefix: str) -> nn.ModuleDict:
    dense = _linear(tensors, f"{prefix}output.dense")
    norm = nn.LayerNorm(dense.out_features, eps=EPSILON)
    return nn.ModuleDict({"dense": dense, "LayerNorm": norm})


def _linear(tensors: Tensors, name: str) -> nn.Linear:
    width_out, width_in = tensors[f"{name}.weight"].shape
    return nn.Linear(width_in, width_out)


def _swin(tensors: Tensors) -> tuple[int, nn.Module]:
    """Return the side of the input and the backbone, (B, 3, side, side) to (B, h, w, C)."""
    from timm.models.swin_transformer import SwinTransformer

    tables: dict[int, list[Tensor]] = {}
    for name, tensor in tensors.items():
        stage = re.match(r"visual_encoder\.layers\.(\d+)\..*relative_position_bias_table$", name)
        if stage:
            tables.setdefault(int(stage[1]), []).append(tensor)
    stages = [tables[i] for i in sorted(tables)]
    window = (math.isqrt(stages[0][0].shape[0]) + 1) // 2
    # RAM's input size makes the last stage one window: 384 pixels for a window of 12.
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
    """Return the model with its weights. Raises WeightsError naming every wrong tensor."""
    kept = {k: v.float() for k, v in tensors.items() if k.startswith(_PARTS)}
    try:
        model = Ram(kept)
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(
            f"{source}: not a RAM checkpoint ({_fault(error)}); give one, or choose another "
            "--tagger"
        ) from error
    if "reweight_scale" in tensors:
        raise WeightsError(
            f"{source}: this is RAM++, which is not supported; give a RAM checkpoint"
        )
    try:
        keys = model.load_state_dict(_renamed(kept), strict=False)
    except RuntimeError as error:
        raise WeightsError(f"{source}: {one_line(error)}") from error
    wrong = [f"{n} is missing" for n in keys.missing_keys]
    wrong += [f"{n} is unknown" for n in keys.unexpected_keys]
    if wrong:
        raise WeightsError(f"{source}: not a RAM checkpoint: {', '.join(wrong)}")
    return model.eval()


def _renamed(tensors: Tensors) -> Tensors:
    """Return the tensors under timm's names.

    timm counts the merging of patches to the stage that it begins; Microsoft, to the one it ends.
    """

    def next_stage(match: re.Match[str]) -> str:
        return f"layers.{int(match[1]) + 1}.downsample"

    return {
        re.sub(r"layers\.(\d+)\.downsample", next_stage, name): tensor
        for name, tensor in tensors.items()
        if not name.endswith(_BUFFERS)
    }


def merge_lora(tensors: Tensors) -> Tensors:
    """Return weights with loralib's low-rank updates added: W + (alpha / rank) B A.

    B has fewer rows than a joint qkv weight if only query and value are updated. Raises
    WeightsError naming the layer whose A, B or W is missing or of another shape.
    """
    merged = {k: v for k, v in tensors.items() if LORA not in k}
    for name in dict.fromkeys(k.partition(LORA)[0] for k in tensors if LORA in k):
        try:
            merged[f"{name}.weight"] = _updated(tensors, name)
        except (LookupError, RuntimeError, ValueError, ZeroDivisionError) as error:
            raise WeightsError(
                f"the adapter's LoRA weights for {name} do not fit ({_fault(error)}); give an "
                "adapter made for this checkpoint"
            ) from error
    return merged


def _updated(tensors: Tensors, name: str) -> Tensor:
    weight = tensors[f"{name}.weight"].float()
    down, up = tensors[f"{name}.lora_A"].float(), tensors[f"{name}.lora_B"].float()
    rank, parts = up.shape[1], down.shape[0] // up.shape[1]
    pairs = zip(down.chunk(parts), up.chunk(parts), strict=True)
    updates = [LORA_ALPHA / rank * b @ a for a, b in pairs]
    if parts == 2:  # query and value: the key stays as it is
        updates.insert(1, torch.zeros_like(updates[0]))
    update = torch.cat(updates)
    if update.shape != weight.shape:  # Adding would broadcast one to the other.
        raise ValueError(
            f"the update has shape {tuple(update.shape)}, but the weight {tuple(weight.shape)}"
        )
    return weight + update


def _fault(error: Exception) -> str:
    """Return what is wrong with tensors; a KeyError only names the one that is missing."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return f"wrong shape: {one_line(error)}"


def _read(path: str) -> Tensors:
    """Return the tensors of a checkpoint file without running anything in it.

    They stay in the file until they are used: it also holds captions and an optimizer's state.
    Raises WeightsError.
    """
    try:
        mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 cannot be
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # A damaged archive raises almost anything.
        raise WeightsError(f"{path}: not a readable checkpoint: {one_line(error)}") from error
    content = content if isinstance(content, dict) else {}
    content = next((content[e] for e in _ENTRIES if isinstance(content.get(e), dict)), content)
    return {
        str(k).replace(_OLD_HEAD, _HEAD): v for k, v in content.items() if isinstance(v, Tensor)
    }


def _lists(folder: Path, count: int) -> tuple[list[str], list[float]]:
    """Return names and thresholds from the files beside the checkpoint. Raises WeightsError."""
    names = _lines(folder / TAG_LIST)
    file, thresholds = folder / THRESHOLDS, [THRESHOLD] * count
    if file.exists():
        try:
            thresholds = [float(line) for line in _lines(file)]
        except ValueError as error:
            raise WeightsError(f"{file}: {one_line(error)}; write one number per line") from error
    if not len(names) == len(thresholds) == count:
        raise WeightsError(
            f"{folder}: {len(names)} names in {TAG_LIST} and {len(thresholds)} thresholds in "
            f"{THRESHOLDS}, but the checkpoint knows {count} tags; take the files of its release"
        )
    return names, thresholds


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(
            f"{path}: cannot be read ({one_line(error)}); put this file of RAM's repository next "
            "to the checkpoint"
        ) from error
