"""Time the endpoint against the same work in one process, on the same cores, in one run.

    python -m benchmarks.serve overhead      one request at a time: the cost of router and handles
    python -m benchmarks.serve throughput    16 at once against one after another in-process
    python -m benchmarks.serve batching      8 equal requests through one expert at once and in turn

Each replica has one thread. In-process, `overhead` has one too, `throughput` and `batching` have
all cores. Pixels are compared before anything is timed. Requests to the endpoint and in-process
calls take turns, so that other load on the machine slows both.
"""

from __future__ import annotations

import asyncio
import io
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.pop("OMP_NUM_THREADS", None)  # replicas have as many as CPUs are reserved for them

import aiohttp
import numpy as np
import ray
import skimage.data
import torch
from PIL import Image
from ray import serve

from linearsr.cli.flags import Parser
from linearsr.config import Options
from linearsr.distributed.serve import ServeConfig, build_app
from linearsr.imaging.files import encode, read
from linearsr.pipeline.upscaler import Upscaler

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    PORT = probe.getsockname()[1]
URL = f"http://127.0.0.1:{PORT}/v1/upscale"
CORES = os.cpu_count() or 1
AT_ONCE = 16


def main() -> int:
    """Measure and print."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("overhead", "throughput", "batching"))
    parser.add_argument(
        "--size", type=int, default=64, help="side of the uploaded picture in pixels"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--count", type=int, default=48, help="number of requests")
    parser.add_argument("--layouts", nargs="+", default=["split", "together"])
    options = parser.parse_args()
    sampling = Options(steps=options.steps)
    picture = _photo(options.size)
    torch.set_num_threads(1 if options.what == "overhead" else CORES)
    upscaler = Upscaler.load()
    if options.what == "batching":
        print(_batching(upscaler, picture, sampling))
        return 0
    ray.init(
        "local", num_cpus=8, log_to_driver=False, logging_level="ERROR", include_dashboard=False
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    work = _overhead if options.what == "overhead" else _throughput
    for layout in options.layouts:
        with _endpoint(layout):
            print(f"{layout}:", asyncio.run(work(upscaler, picture, sampling, options.count)))
    return 0


@contextmanager
def _endpoint(layout: str) -> Iterator[None]:
    """The layouts to time: one replica per expert, or one with all experts per core."""
    together = layout == "together"
    config = ServeConfig.parse(
        layout=layout, replicas=CORES if together else 4, max_ongoing_requests=2 * AT_ONCE
    )
    serve.run(build_app(config))
    yield
    serve.delete("default")


def _photo(size: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(skimage.data.astronaut())[40 : 40 + size, 180 : 180 + size]).save(
        file, "PNG"
    )
    return file.getvalue()


def _alone(upscaler: Upscaler, picture: bytes, options: Options) -> bytes:
    result = upscaler.upscale(read(picture), options)
    return encode(result, "png", provenance=upscaler.describe(options))


async def _ask(session: aiohttp.ClientSession, picture: bytes, options: Options) -> bytes:
    form = aiohttp.FormData({"steps": str(options.steps)})
    form.add_field("image", picture, filename="photo.png")
    async with session.post(URL, data=form) as response:
        assert response.status == 200, await response.text()
        return await response.read()


def _check(one: bytes, other: bytes) -> None:
    """Check that results differ by at most 1 of 255: threads may add in another order."""
    first, second = (np.asarray(Image.open(io.BytesIO(d))).astype(int) for d in (one, other))
    assert np.abs(first - second).max() <= 1, "other pixels: nothing to be timed"


async def _overhead(upscaler: Upscaler, picture: bytes, options: Options, count: int) -> str:
    async with aiohttp.ClientSession() as session:
        _check(await _ask(session, picture, options), _alone(upscaler, picture, options))
        served, inside = [], []
        for _ in range(count):
            began = time.perf_counter()
            await _ask(session, picture, options)
            middle = time.perf_counter()
            _alone(upscaler, picture, options)
            served.append(middle - began)
            inside.append(time.perf_counter() - middle)
    ours, theirs = (1000 * statistics.median(times) for times in (served, inside))
    return (
        f"{ours:.0f} ms by HTTP, {theirs:.0f} ms in-process (medians of {count}): "
        f"{ours - theirs:+.0f} ms, {100 * (ours / theirs - 1):+.0f} %"
    )


async def _throughput(upscaler: Upscaler, picture: bytes, options: Options, count: int) -> str:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE)) as session:
        _check(await _ask(session, picture, options), _alone(upscaler, picture, options))
        rates: list[float] = []
        inside: list[float] = []
        for _ in range(3):
            inside.append(
                _timed(lambda: [_alone(upscaler, picture, options) for _ in range(count)])
            )
            began = time.perf_counter()
            await asyncio.gather(*(_ask(session, picture, options) for _ in range(count)))
            rates.append(time.perf_counter() - began)
    ours, theirs = count / statistics.median(rates), count / statistics.median(inside)
    return (
        f"{ours:.2f} images/s with {AT_ONCE} at once, {theirs:.2f} in turn in-process: "
        f"{ours / theirs:.2f} times"
    )


def _batching(upscaler: Upscaler, picture: bytes, options: Options) -> str:
    """Time the expert with most steps, batched and in turn; medians of five."""
    job = upscaler.prepare(read(picture), options)
    segment = max(job.segments, key=lambda s: s.stop - s.start)
    batch = [(job, segment)] * 8
    upscaler.denoise_batch(batch)
    together, in_turn = [], []
    for _ in range(5):
        together.append(_timed(lambda: upscaler.denoise_batch(batch)))
        in_turn.append(_timed(lambda: [upscaler.denoise(*one) for one in batch]))
    ratio = statistics.median(in_turn) / statistics.median(together)
    return f"8 at once {ratio:.2f} times as fast as 8 in turn ({upscaler.device}, {CORES} threads)"


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
