"""A user who follows the pages: a clone with pictures in it, S3, programs and a shell."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from spandrel.architectures.Compact import Compact

from linearsr.storage.location import locate
from tests.helpers.pages.blocks import TOP, Block
from tests.helpers.processes import free_port, until
from tests.pages import tables
from tools import s3_server as swift
from tools import stand_in

SECONDS = 600
# The folders that a user has, and the side of their pictures in pixels.
FOLDERS = {
    **dict.fromkeys(("PHOTOS", "s3://bucket/photos", "s3://photos/cities"), 256),
    "s3://photos/nature": 512,
    **dict.fromkeys(("VAL", "s3://bucket/validation", "s3://bucket/hr", "s3://data/DIV2K"), 96),
    **dict.fromkeys(("Set5", "BSD100", "DIV2K_HR", "OTHER/results", "pictures"), 96),
    **dict.fromkeys(("holiday", "DIV2K_LR_x4", "s3://bucket/in", "s3://photos/holiday"), 24),
}
BUCKETS = {*re.findall(r"s3://(\w+)", " ".join(FOLDERS)), "shards", "reports", "runs"}


class User:
    """A user who follows the pages, in a folder that is a clone of the project."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.clone, self.data = home / "linearsr", home / "data"
        self.bin = self.clone / ".venv" / "bin"
        self.port = free_port()
        self.places = {"data": str(self.data), "http": str(self.port), "s3": "", "dashboard": ""}
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_ADDRESS"))},
            "HOME": str(home),
            "TORCH_HOME": os.environ.get("TORCH_HOME", str(Path.home() / ".cache" / "torch")),
            "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", str(Path.home() / ".cache/matplotlib")),
            "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(Path.home() / ".cache" / "uv")),
            "PATH": str(self.bin),
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": str(home),
        }

    def here(self, text: str) -> str:
        """Return the text with this user's paths and ports."""
        for pattern, place in tables.PLACES.items():
            text = re.sub(pattern, place.format(**self.places), text, flags=re.M)
        return text

    def follow(self, block: Block) -> subprocess.CompletedProcess[str]:
        """Run a block as it stands, in a new terminal, until a command fails."""
        text = self.here(block.text)
        if block.language == "sh":
            waits = '\nfor job in $(jobs -p); do wait "$job"; done\n'
            command = ["bash", "-euo", "pipefail", "-c", text + waits]
        else:
            command = ["bash", "-c", 'python - <<< "$0"', text]
        return subprocess.run(
            command,
            cwd=self.clone,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )


def make_clone(user: User) -> None:
    def left_out(folder: str, names: list[str]) -> set[str]:
        hidden = {n for n in names if n.startswith(".") and not n.endswith(("ignore", ".yaml"))}
        return {*hidden, "__pycache__", "results", "runs", "demo", "build", "dist"}

    shutil.copytree(TOP, user.clone, ignore=left_out)
    subprocess.run(["git", "init", "-q", user.clone], check=True)
    config = user.clone / "ray_jobs" / "serve.yaml"
    config.write_text(user.here(config.read_text()))


def install_programs(user: User) -> None:
    """Fill PATH with the programs of the tables; no other command is found."""
    done = user.home / "done"
    done.mkdir()
    context = user.home / "context.json"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {"path": path, "done": str(done), "http": user.port}
    settings |= {"added": tables.ADDED, "refuses": tables.REFUSES, "gpu": tables.GPU}
    context.write_text(json.dumps({**settings, "stand_ins": tables.STAND_INS}))
    user.bin.mkdir(parents=True)
    run = f"{sys.executable} {Path(__file__).with_name('program.py')} {context}"
    for name in {*tables.REAL, *(program.split()[0] for program in tables.STAND_INS)}:
        _script(user.bin / name, f'{run} {name} "$@"')
    for name in (*tables.TOOLS, "bash", "cat"):
        (user.bin / name).symlink_to(str(shutil.which(name)))


def _script(path: Path, command: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nexec {command}\n")
    path.chmod(0o755)


def _pictures(folder: Path, side: int) -> None:
    folder.mkdir(parents=True)
    for name in ("astronaut", "coffee"):
        picture = Image.fromarray(np.asarray(getattr(skimage.data, name)()))
        picture.crop((0, 0, 400, 400)).resize((side, side)).save(folder / f"{name}.png")


def place_belongings(user: User, weights: Path) -> None:
    """Write small pictures and models to all places that a page reads from."""
    for name, side in FOLDERS.items():
        folder = user.data / name.replace("s3://", "s3/")
        _pictures(folder, side)
        if name.startswith("s3://"):
            locate(folder).copy_to(locate(name))
        elif name not in ("PHOTOS", "VAL", "OTHER/results"):  # the others are named by path
            shutil.copytree(folder, user.clone / name)
    for suffix in ("jpg", "png"):
        Image.open(user.data / "holiday/coffee.png").save(user.clone / f"photo.{suffix}")
    locate(weights).copy_to(locate("s3://runs/experts/weights"))
    compact = Compact(num_feat=8, num_conv=2, upscale=4).state_dict()
    torch.save({"params_ema": compact}, user.clone / "RealESRGAN_x4plus.pth")
    save_file(compact, user.clone / "4x-ClearRealityV1.safetensors")
    stand_in.write(user.data / "stand-ins")
    user.environment["STAND_INS"] = str(user.data / "stand-ins")
    places = {"sana": "SANA_FOLDER", "sana.pth": "SANA.pth", "release": "RELEASE"}
    for name, place in places.items():
        (user.data / place).symlink_to(user.data / "stand-ins" / name)


@contextlib.contextmanager
def serve_bucket(user: User) -> Iterator[None]:
    """Run `make s3` of docs/guides/datasets.md, but on a free port."""
    port, folder = swift.free_port(), user.clone / ".venv-s3"
    user.places["s3"] = str(port)
    python = swift._commands() / "python"
    _script(folder / "bin" / "python", f'{python} "$@" --port {port}')
    _script(user.bin / "uv", "false")
    (folder / "stamp").touch()
    server = subprocess.Popen(
        ["make", "s3"],
        cwd=user.clone,
        env={**os.environ, "LINEARSR_SWIFT_BIN": str(python.parent)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until(lambda: swift._healthy(port) or server.poll() is not None, "make s3", 120)
        yield
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(60)
