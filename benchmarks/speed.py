"""Speed and memory, side by side in one run; refuses to time what is not numerically right.

python -m benchmarks.speed forward    denoiser against diffusers' Sana of the same config
python -m benchmarks.speed scaling    seconds against pixels, 256 to 2048 px outputs
python -m benchmarks.speed memory     peak resident memory of a 4000 x 3000 output
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from linearsr.config import TINY, Options
from linearsr.denoiser import LinearSR
from linearsr.imaging.files import Picture
from linearsr.upscaler import Upscaler


def _seconds(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turn so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def forward(rounds: int) -> int:
    """One denoiser forward for a 512 x 512 output (128 x 128 tokens), batch 1, float32."""
    from diffusers import SanaTransformer2DModel

    from linearsr.weights.convert import from_diffusers

    torch.manual_seed(0)
    tiny = TINY.denoiser
    heads = tiny.width // tiny.head_dim
    sana = SanaTransformer2DModel(
        in_channels=tiny.latent_channels,
        out_channels=tiny.latent_channels,
        num_attention_heads=heads,
        attention_head_dim=tiny.head_dim,
        num_layers=tiny.depth,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=tiny.head_dim,
        cross_attention_dim=tiny.width,
        caption_channels=32,
        mlp_ratio=tiny.ffn_ratio,
        qk_norm="rms_norm_across_heads",
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        sana.save_pretrained(folder)
        converted = from_diffusers(Path(folder))
    same = LinearSR(converted.config).eval()
    same.load_state_dict({**same.state_dict(), **converted.tensors})
    ours = LinearSR(tiny).eval()

    latent, t = torch.randn(1, 48, 128, 128), torch.tensor([0.5])
    latent_last = latent.contiguous(memory_format=torch.channels_last)
    tags = torch.randn(1, 1, 32)
    picture = torch.zeros(1, 3, *(n * math.prod(converted.config.stem_strides) for n in (128, 128)))
    condition = same.condition(picture, tags=tags)
    own = ours.condition(torch.randn(1, 3, 512, 512), torch.randn(1, 48, 128, 128))

    def theirs() -> torch.Tensor:
        out: torch.Tensor = sana(latent, tags, t * 1000, return_dict=False)[0]
        return out

    error = (same(latent_last, t, condition) - theirs()).norm() / theirs().norm()
    print(f"relative error to diffusers, converted weights: {error:.1e}")
    if not error <= 1e-4:  # NaN too
        print("not the same function: refusing to time it", file=sys.stderr)
        return 1
    seconds = _seconds(
        {
            "diffusers Sana, one tag": theirs,
            "LinearSR, same weights, one tag": lambda: same(latent_last, t, condition),
            "LinearSR tiny as shipped": lambda: ours(latent_last, t, own),
        },
        rounds,
    )
    base = seconds["diffusers Sana, one tag"]
    for name, value in seconds.items():
        print(f"{name:34} {value * 1e3:8.1f} ms   {base / value:.2f}x")
    return 0


def _picture(height: int, width: int) -> Picture:
    return Picture(torch.rand(3, height, width), None, 8, False, None, None, "png")


def scaling(rounds: int) -> int:
    """Seconds per picture at default options, and the log-log slope over pixels."""
    upscaler = Upscaler.load()
    sides = [256, 512, 1024, 2048]
    runs = {
        str(side): partial(upscaler.upscale, _picture(side // 4, side // 4), Options())
        for side in sides
    }
    seconds = _seconds(runs, rounds)
    for side in sides:
        print(f"{side:5} px  {seconds[str(side)]:8.2f} s")
    x = torch.tensor([math.log(s * s) for s in sides])
    y = torch.tensor([math.log(seconds[str(s)]) for s in sides])
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    print(f"log-log slope against pixels: {slope:.3f}")
    return 0


def memory(_: int) -> int:
    """Peak resident memory of this process after one 4000 x 3000 output."""
    began = time.perf_counter()
    Upscaler.load().upscale(_picture(750, 1000))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"4000 x 3000: {time.perf_counter() - began:.1f} s, peak resident {peak:.2f} GiB")
    return 0


MEASUREMENTS = {"forward": forward, "scaling": scaling, "memory": memory}


def main() -> int:
    """Run one measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=MEASUREMENTS)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with torch.inference_mode():
        return MEASUREMENTS[options.what](options.rounds)


if __name__ == "__main__":
    sys.exit(main())
