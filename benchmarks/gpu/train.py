"""Training of the bundled model for the rest of the time, by tools.train_bundled."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu.stage import Row, Settings

# The share of the time that each stage gets, in the order in which they depend on each other. The
# first one is left out if there is a run to go on from.
SHARES = {"pretrain": 1.0, "structure": 0.4, "texture": 0.42, "polish": 0.1, "refinement": 0.08}
TOY_STAGES = ("pretrain", "structure")
# Compiling and reading photographs are not part of a stage's seconds.
START_SECONDS = 60.0
TOY_SECONDS = 2.0
TOY = ("--patch", "32", "--batch", "2", "--shrinks", "0")


def rows(settings: Settings) -> Iterator[Row]:
    """Yield a row for each stage that was trained; its weights are in OUT/weights."""
    if not settings.photos:
        yield {"what": "training", "note": "not run: no --photos"}
        return
    began, folder = time.monotonic(), settings.out / "weights"
    if settings.start and not folder.exists():
        shutil.copytree(settings.start, folder)
    seconds = TOY_SECONDS if settings.toy else max(1.0, settings.seconds - START_SECONDS)
    names = [name for name in SHARES if not (settings.toy and name not in TOY_STAGES)]
    if settings.start:
        names.remove("pretrain")
    for name in names:
        share = SHARES[name] / sum(SHARES[one] for one in names)
        command = [sys.executable, "-m", "tools.train_bundled", "--out", str(folder)]
        command += ["--photos", *map(str, settings.photos)]
        command += ["--stages", f"{name}={max(1.0, share * seconds):.0f}", "--save-every", "30"]
        code = subprocess.run([*command, *(TOY if settings.toy else ())], check=False).returncode
        yield {
            "what": name,
            "seconds": round(time.monotonic() - began),
            "note": "done" if code == 0 else f"failed with code {code}",
        }
