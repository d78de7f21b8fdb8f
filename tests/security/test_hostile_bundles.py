"""Weights from somewhere: each is refused in one line, quickly, and before memory is taken."""

from __future__ import annotations

import json
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from linearsr import weights
from linearsr.errors import WeightsError

MEGABYTE = 1_000_000
Change = Callable[[dict[str, Any]], None]


def at(path: str, value: object) -> Change:
    """Return a function that sets one field of a config."""

    def change(config: dict[str, Any]) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            config = config[parent]
        config[name] = value

    return change


HUGE = 1_000_000_000
CONFIGS: dict[str, Change] = {
    f"{path}={value if len(str(value)) < 30 else 'many'}": at(path, value)
    for path, values in {
        "denoiser.depth": [HUGE, 1000, -1, 0, 1.5, None],
        "denoiser.width": [HUGE, 65_536, 10**30],
        "denoiser.head_dim": [HUGE, 0, 3],
        "denoiser.ffn_ratio": [1e300, 64.0, float("inf"), float("nan")],
        "denoiser.tag_dim": [HUGE, -5],
        "denoiser.local_kernel": [6, 99],
        "denoiser.stem_channels": [[HUGE] * 3, [8] * HUGE.bit_length()],
        "denoiser.stem_strides": [[HUGE, 1, 1], [0, 1, 1]],
        "denoiser.latent_channels": [HUGE, 47],
        "latent.factor": [HUGE, 5],
        "latent.scale": [0, -1],
        "scale": [HUGE, 0],
        "sampling.steps": [HUGE, 0],
        "sampling.boundaries": [[n / 1e5 for n in range(1, 90_000)], [0.5, 0.5], [2.0]],
        "sampling.plans": [[[1.0]] * 90_000, [[1.0, 2.0]]],
        "name": ["x" * 1_000_000],
        "unknown": [1],
    }.items()
    for value in values
}


def content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def rewrite(path: Path, **metadata: str) -> None:
    """Write the tensors of a file again, with other metadata."""
    tensors, before = content(path)
    save_file(tensors, path, {**before, **metadata})


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in small_bundle.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def refused(folder: Path) -> str:
    """Load a bundle, which must be refused in one line, within 2 s and 200 MB; return the line."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises(WeightsError) as error:
        weights.load(folder)
    # The bounds are promises about files from somewhere, not measures of speed.
    assert time.process_time() - started < 2
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 200 * MEGABYTE
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS.keys())
def test_config_out_of_bounds_is_refused(bundle: Path, change: Change) -> None:
    for path in bundle.glob("*.safetensors"):
        config = json.loads(content(path)[1]["linearsr"])
        change(config)
        rewrite(path, linearsr=json.dumps(config))
    assert str(bundle) in refused(bundle)


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, "{" * 200_000, '{"a":' * 200_000, "null", "[1]", '{"a": {}}', "", "\ud800"],
    ids=["brackets", "braces", "nested", "null", "list", "folded", "empty", "surrogate"],
)
@pytest.mark.parametrize("key", ["linearsr", "provenance"])
def test_metadata_of_another_form_is_refused(bundle: Path, key: str, text: str) -> None:
    for path in bundle.glob("*.safetensors"):
        rewrite(path, **{key: text.encode("utf-8", "replace").decode()})
    assert "cannot be read as LinearSR weights" in refused(bundle)


def test_tensors_of_other_shapes_are_refused_before_they_are_read(bundle: Path) -> None:
    path = bundle / "structure.safetensors"
    tensors, metadata = content(path)
    name = next(iter(tensors))
    for changed in ({name: torch.zeros(3, 3)}, {"stranger": torch.zeros(1)}):
        save_file({**tensors, **changed}, path, metadata)
        assert "does not fit its config" in refused(bundle)
    del tensors[name]
    save_file(tensors, path, metadata)
    assert f"such as {name}" in refused(bundle)
    save_file({}, path, metadata)
    assert "0 tensors for 2 blocks" in refused(bundle)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(100),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**8) + b"{" * 1000,
        struct.pack("<Q", 60_000) + b"[" * 60_000,
        struct.pack("<Q", 2) + b"{}",
    ],
    ids=["empty", "zeros", "endless header", "cut header", "brackets", "no config"],
)
def test_files_that_are_no_safetensors_are_refused(bundle: Path, data: bytes) -> None:
    for path in bundle.glob("*.safetensors"):
        path.write_bytes(data)
    refused(bundle)
