"""A model on disk: a folder with a safetensors file per expert.

The config and provenance are in the files' metadata, so loading needs nothing but the folder.
Experts that share a base have only their adapters (LoRA) in their files; the base is in a file of
its own, and each adapter names its digest. Knows nothing of training states or of Ray.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from linearsr.config import LoRAConfig, ModelConfig, explain
from linearsr.denoiser import LinearSR
from linearsr.denoiser.lora import Adapters, adapt, empty_adapters, merge_
from linearsr.diffusion.experts import EXPERTS
from linearsr.digests import digest_tensors
from linearsr.errors import OutputError, WeightsError, did_you_mean, one_line
from linearsr.storage import atomic

BUNDLED = Path(__file__).parent
BASE = "base.safetensors"
_PROVENANCE: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])


class Bundle(NamedTuple):
    """A loaded model; `experts` from highest noise to lowest.

    Several experts that share a base share its tensors in memory too.
    """

    config: ModelConfig
    experts: list[LinearSR]
    provenance: dict[str, str]


class LazyExperts(Sequence[Mapping[str, Tensor]]):
    """State dicts of experts, each loaded anew whenever it is read, since all may not fit.

    load: returns the state dict of the expert of a number, counted from 0.
    """

    def __init__(self, count: int, load: Callable[[int], Mapping[str, Tensor]]) -> None:
        self._numbers, self._load = range(count), load

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Tensor] | list[Mapping[str, Tensor]]:
        if isinstance(index, slice):
            return [*map(self._load, self._numbers[index])]
        return self._load(self._numbers[index])


class _Metadata(NamedTuple):
    """Metadata of a file. lora: the adapters' config; base: the digest of their base."""

    config: ModelConfig
    provenance: dict[str, str]
    lora: LoRAConfig | None
    base: str | None


def expert_names(config: ModelConfig) -> list[str]:
    """Return the experts' file stems, highest noise first; one expert without `boundaries`."""
    count = len(config.sampling.boundaries) + 1
    return list(EXPERTS) if count == len(EXPERTS) else [f"expert-{i}" for i in range(count)]


def available() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(p.name for p in BUNDLED.iterdir() if any(p.glob("*.safetensors")))


def find(name_or_folder: str | Path) -> Path:
    """Return the folder of a bundled model, or a folder itself. Raises WeightsError for others."""
    if str(name_or_folder) in available():
        return BUNDLED / name_or_folder
    if os.path.isdir(name_or_folder):  # unlike Path.is_dir, False for a name that is too long
        return Path(name_or_folder)
    raise WeightsError(
        f"unknown model {str(name_or_folder)!r}: bundled are {', '.join(available()) or 'none'}; "
        "anything else must be a folder of safetensors"
        f"{did_you_mean(str(name_or_folder), available())}"
    )


def save(
    folder: Path,
    config: ModelConfig,
    experts: Sequence[Mapping[str, Tensor]],
    provenance: Mapping[str, str],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write one safetensors per expert into `folder`; each is complete before it gets its name.

    Experts are taken one at a time, twice in all, and not kept, so the sequence may load them then.
    Raises WeightsError for a wrong number of experts or values that are not finite, and OutputError
    if a file cannot be written.
    """
    metadata = {"linearsr": config.model_dump_json(), "provenance": json.dumps(dict(provenance))}
    _save_experts(folder, config, experts, metadata, dtype)


def save_adapted(
    folder: Path,
    config: ModelConfig,
    base: Mapping[str, Tensor],
    lora: LoRAConfig,
    experts: Sequence[Adapters],
    provenance: Mapping[str, str],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a base once, and one safetensors of adapters per expert, into `folder`.

    base: the state dict that all experts share. Raises what `save` raises.
    """
    _check_finite(base, "base")
    metadata = {"linearsr": config.model_dump_json(), "provenance": json.dumps(dict(provenance))}
    adapted = {"lora": lora.model_dump_json(), "base": digest_tensors(base)}
    _save_experts(folder, config, experts, {**metadata, **adapted}, dtype)
    _write(folder / BASE, base, metadata, dtype)


def _save_experts(
    folder: Path,
    config: ModelConfig,
    experts: Sequence[Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> None:
    names = expert_names(config)
    if len(names) != len(experts):
        raise WeightsError(f"the config asks for {len(names)} experts, got {len(experts)}")
    for number, name in enumerate(names):
        _check_finite(experts[number], name)
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        path = folder / f"{name}.safetensors"
        _write(path, experts[number], {**metadata, "expert": name}, dtype)


def _write(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], dtype: torch.dtype
) -> None:
    tensors = {k: v.detach().to(dtype).contiguous() for k, v in tensors.items()}
    try:
        with atomic.replace_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written: {one_line(error)}") from error


def load(
    name_or_folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    only: Collection[int] | None = None,
) -> Bundle:
    """Load a bundle.

    only: the numbers of the experts to load; the others are a `placeholder`. None loads all.

    Raises WeightsError naming a file that is missing, damaged, of a wrong shape or not finite.
    """
    folder = find(name_or_folder)
    first, files = _read_folder(folder)
    config = first.config
    wanted = [n for n in range(len(files)) if only is None or n in only]
    if first.lora is None:
        loaded = {n: _load_expert(files[n], first).to(device, dtype) for n in wanted}
    else:
        loaded = _load_adapted(folder, first, {n: files[n] for n in wanted}, device, dtype)
    experts = [loaded[n] if n in loaded else placeholder(config) for n in range(len(files))]
    return Bundle(config, experts, first.provenance)


def load_base(folder: str | Path) -> LinearSR:
    """Load the model, in float32, that all experts of a folder share, or its only expert.

    Raises WeightsError as `load` does, and if the experts share nothing.
    """
    first, files = _read_folder(find(folder))
    if first.lora is not None:
        return _load_base(find(folder), first)
    if len(files) > 1:
        raise WeightsError(
            f"{folder}: these {len(files)} experts do not share a base: each has all weights"
        )
    return _load_expert(files[0], first)


def load_adapters(folder: str | Path, expert: int) -> dict[str, Tensor] | None:
    """Load the adapters of one expert; None if the folder has no adapters.

    Raises WeightsError as `load` does. The base stays unread.
    """
    first, files = _read_folder(find(folder))
    return None if first.lora is None else _read_adapters(files[expert], first)


def _load_adapted(
    folder: Path,
    first: _Metadata,
    files: Mapping[int, Path],
    device: str | torch.device,
    dtype: torch.dtype,
) -> dict[int, LinearSR]:
    """Load experts that share a base. A single one is the base with its adapters merged into it."""
    assert first.lora is not None
    adapters = {n: _read_adapters(path, first) for n, path in files.items()}
    if not adapters:
        return {}
    base = _load_base(folder, first).to(device, dtype)
    if len(adapters) == 1:
        return {n: merge_(base, own, first.lora) for n, own in adapters.items()}
    return {n: adapt(base, own, first.lora) for n, own in adapters.items()}


def _load_base(folder: Path, first: _Metadata) -> LinearSR:
    model = _load_expert(folder / BASE, first._replace(lora=None, base=None))
    if digest_tensors(model.state_dict()) != first.base:
        raise WeightsError(
            f"{folder / BASE}: the adapters in this folder were trained on another base; copy the "
            "whole folder again"
        )
    return model


def placeholder(config: ModelConfig) -> LinearSR:
    """Return an expert on the "meta" device: it needs no memory and cannot be run."""
    with torch.device("meta"):
        return LinearSR(config.denoiser).requires_grad_(False).eval()


def read_config(name_or_folder: str | Path) -> ModelConfig:
    """Return a bundle's config without loading tensors.

    Raises WeightsError, also for a missing expert.
    """
    return _read_folder(find(name_or_folder))[0].config


def read_lora(name_or_folder: str | Path) -> LoRAConfig | None:
    """Return the shape of a bundle's adapters without loading tensors; None if it has none.

    Raises WeightsError as `read_config` does.
    """
    return _read_folder(find(name_or_folder))[0].lora


def read_provenance(name_or_folder: str | Path) -> dict[str, str]:
    """Return a bundle's provenance without loading tensors. Raises WeightsError likewise."""
    return _read_folder(find(name_or_folder))[0].provenance


def _read_folder(folder: Path) -> tuple[_Metadata, list[Path]]:
    """Return the metadata of the first expert's file, and the file of each expert."""
    present = sorted(path for path in folder.glob("*.safetensors") if path.name != BASE)
    if not present:
        raise WeightsError(f"{folder}: no .safetensors file of an expert in this folder")
    config = _read_metadata(present[0]).config
    files = [folder / f"{name}.safetensors" for name in expert_names(config)]
    for path in files:
        if not os.path.isfile(path):
            raise WeightsError(
                f"{path}: this expert's file is missing; copy the whole folder again"
            )
    first = _read_metadata(files[0])
    if first.lora is not None and not os.path.isfile(folder / BASE):
        raise WeightsError(
            f"{folder / BASE}: the experts' common base is missing; copy the whole folder again"
        )
    return first, files


def _read_metadata(path: Path) -> _Metadata:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        config = ModelConfig.model_validate_json(metadata["linearsr"])
        provenance = _PROVENANCE.validate_json(metadata["provenance"])
        if "lora" not in metadata:
            return _Metadata(config, provenance, None, None)
        lora = LoRAConfig.model_validate_json(metadata["lora"])
        return _Metadata(config, provenance, lora, metadata["base"])
    except KeyError:
        raise WeightsError(
            f"{path}: no LinearSR config inside; convert it first (linearsr.weights.convert)"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        reason: Exception | str = error
        if isinstance(error, ValidationError):
            reason = ": ".join(filter(None, explain(error)))
        raise WeightsError(
            f"{path}: cannot be read as LinearSR weights: {one_line(reason)}"
        ) from error


def _load_expert(path: Path, first: _Metadata) -> LinearSR:
    tensors = _read_tensors(path, first, lambda: placeholder(first.config).state_dict())
    model = LinearSR(first.config.denoiser)
    model.load_state_dict(tensors)
    return model.float().requires_grad_(False).eval()


def _read_adapters(path: Path, first: _Metadata) -> dict[str, Tensor]:
    lora, shape = first.lora, first.config.denoiser
    assert lora is not None
    return _read_tensors(path, first, lambda: empty_adapters(shape, lora))


def _read_tensors(
    path: Path, first: _Metadata, expected: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Read a file of the folder whose first expert's file has the metadata `first`."""
    _check_alike(path, _read_metadata(path), first)
    try:
        with safe_open(path, "pt") as file:
            _check_shapes(file, first.config.denoiser.depth, expected, path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged: {one_line(error)}") from error
    _check_finite(tensors, path)
    return tensors


def _check_alike(path: Path, ours: _Metadata, first: _Metadata) -> None:
    """Raise WeightsError unless a file belongs to the same model as the folder's first one."""
    parts = (
        ("its config", ours.config, first.config),
        ("the shape of its adapters (LoRA)", ours.lora, first.lora),
        ("the base of its adapters", ours.base, first.base),
    )
    for part, mine, other in parts:
        if mine != other:
            raise WeightsError(
                f"{path}: {part} differs from that of the other files in this folder; do not mix "
                "files of different models"
            )


def _check_shapes(
    file: Any, depth: int, expected: Callable[[], Mapping[str, Tensor]], path: Path
) -> None:
    """Raise WeightsError unless an open file has the expected tensors, before any is read.

    A config may ask for more than fits into memory, so `expected` makes them on "meta"; and for
    more blocks than the file has tensors, so these are counted first.
    """
    names = set(file.keys())
    if len(names) < depth:
        raise WeightsError(
            f"{path}: does not fit its config: {len(names)} tensors for {depth} blocks"
        )
    tensors = expected()
    odd = sorted(names ^ tensors.keys())
    odd += [k for k in names & tensors.keys() if _shape(file, k) != tuple(tensors[k].shape)]
    if odd:
        raise WeightsError(
            f"{path}: does not fit its config: tensors that are missing, too many or of another "
            f"shape: {len(odd)}, such as {odd[0]}"
        )


def _shape(file: Any, name: str) -> tuple[int, ...]:
    return tuple(file.get_slice(name).get_shape())


def _check_finite(tensors: Mapping[str, Tensor], where: str | Path) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{where}: {key} holds NaN or infinity; this file is not usable")
