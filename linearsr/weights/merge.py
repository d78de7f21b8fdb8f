"""Merge adapters into their base: each expert becomes a file with all weights.

    python -m linearsr.weights.merge FOLDER --out MERGED

FOLDER is a bundle whose experts share a base (LoRA). The result is a bundle as of whole experts,
with the same pictures up to the rounding of bfloat16, for programs that know no adapters.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from linearsr.errors import LinearSRError, OutputError, WeightsError
from linearsr.weights.bundle import (
    LazyExperts,
    expert_names,
    load,
    read_config,
    read_lora,
    read_provenance,
    save,
)


def merge(folder: Path, out: Path) -> None:
    """Write a bundle with the merged experts of `folder` into `out`; one is in memory at a time.

    Raises WeightsError if `folder` has no adapters or is damaged, and OutputError if `out` has
    weights already or cannot be written.
    """
    if read_lora(folder) is None:
        raise WeightsError(f"{folder}: these experts have all their weights; nothing to merge")
    if any(out.glob("*.safetensors")):
        raise OutputError(f"{out}: already holds weights; choose an empty folder")
    experts = LazyExperts(
        len(expert_names(read_config(folder))),
        lambda number: load(folder, only={number}).experts[number].state_dict(),
    )
    try:
        save(out, read_config(folder), experts, read_provenance(folder))
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge the adapters of one bundle into their base and return the exit code."""
    parser = argparse.ArgumentParser(
        "linearsr.weights.merge", description="Merge adapters (LoRA) into their base."
    )
    parser.add_argument("folder", type=Path, help="bundle whose experts share a base")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    options = parser.parse_args(arguments)
    try:
        merge(options.folder, options.out)
    except LinearSRError as error:
        print(f"linearsr.weights.merge: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
