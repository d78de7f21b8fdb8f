"""All stages of linearsr-tiny on one GPU, each within a given number of seconds.

    python -m tools.train_bundled --photos PHOTOS --out OUT \\
        --stages pretrain=165 structure=105 texture=210 polish=35 refinement=12

Pairs are cut and degraded on the device, blocks are compiled, and each stage writes its averaged
weights to OUT/STAGE.pt, from which a later call continues. Needs torch, numpy, pillow, pydantic and
safetensors, and lpips for the perceptual stages. Knows nothing of Ray, of recipes and of knees; it
has no guard and no exact resuming, as a stage takes minutes. Without a GPU it is for tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from linearsr import weights
from linearsr.config import TINY
from linearsr.denoiser import LinearSR, blocks
from linearsr.diffusion.path import add_noise, clean_guess, euler_step
from linearsr.errors import LinearSRError, OptionError, WeightsError, one_line
from linearsr.imaging.degradation import Preset
from linearsr.imaging.resample import resize
from linearsr.latent import SpaceToDepth
from linearsr.metrics import lpips
from linearsr.storage import atomic
from linearsr.training.discriminator import Discriminator, fooled, hinge
from linearsr.training.ema import EMA
from tools.train_bundled.pairs import Atlas, pairs, uniform

MODEL = TINY
LATENT = SpaceToDepth(MODEL.latent)
AT_FOUR = 0.72  # share of pairs at scale 4
FLOW_MIX: dict[Preset, float]
FLOW_MIX = {"clean": 0.4, "mild": 0.15, "camera": 0.15, "seesr": 0.12, "web": 0.18}
PERCEPTUAL_MIX: dict[Preset, float]
PERCEPTUAL_MIX = {"clean": 0.32, "mild": 0.15, "camera": 0.18, "seesr": 0.15, "web": 0.2}
DISCRIMINATOR = "discriminator"  # the name of its file
CHANNELS = (64, 64, 128, 256, 256)
DISCRIMINATOR_RATE = 4e-4
GAN_WARMUP = 150  # steps
STARTED = time.perf_counter()


class Flow(NamedTuple):
    """A stage that learns clean latents at timesteps of (low, high], a share `at_one` of them at 1.

    begins: stage whose weights it starts with. rate: multiple of --rate; it falls to the share
    `floor` of itself. velocities: train all timesteps by the error of the velocity.
    """

    begins: str | None
    rate: float
    low: float
    high: float
    at_one: float
    floor: float = 0.0
    velocities: bool = False
    decay: float = 0.999
    mix: Mapping[Preset, float] = FLOW_MIX


class Perceptual(NamedTuple):
    """A stage that learns from its pictures, after the frozen experts `before`."""

    begins: str
    rate: float
    before: tuple[str, ...]
    decay: float = 0.998
    mix: Mapping[Preset, float] = PERCEPTUAL_MIX


# The pretraining's rate stays above zero for the stages that follow it.
STAGES: dict[str, Flow | Perceptual] = {
    "pretrain": Flow(None, 1.0, 0.0, 1.0, at_one=0.5, floor=0.25, velocities=True),
    "structure": Flow("pretrain", 0.5, 0.939, 1.0, at_one=0.85),
    "refinement": Flow("pretrain", 0.3, 0.875, 0.939, at_one=0.0),
    "texture": Perceptual("pretrain", 3e-4, ("structure",)),
    "polish": Perceptual("texture", 1.5e-4, ("structure", "texture")),
}
# Timesteps of the sampling that measures a stage; the last one is the stage's own.
PLANS = {
    "pretrain": ((1.0,),),
    "structure": ((1.0,),),
    "texture": ((1.0, 0.5), (1.0, 0.3)),
    "polish": ((1.0, 0.5, 0.2),),
}


def say(text: str) -> None:
    """Print a line with the seconds since the program started."""
    print(f"{time.perf_counter() - STARTED:6.1f} s  {text}", flush=True)


# The network


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return ReLU linear attention of (B, N, H, D), with products in the precision of v.

    It computes the same as `relu_linear_attention`, without protection against overflow, in
    operations that compile into few passes over memory, forward and backward.
    """
    q, k, v = (x.transpose(1, 2) for x in (q.relu(), k.relu(), v))
    state = k.mT @ v
    z = k.float().sum(2)[:, :, None, :]
    weight = (q.float() * z).sum(-1, keepdim=True)
    return ((q @ state).float() / (weight + (weight == 0))).to(v.dtype).transpose(1, 2)


@contextmanager
def light_attention() -> Iterator[None]:
    """Make the blocks use `attention` within the context."""
    name = "relu_linear_attention"
    before = getattr(blocks, name)
    setattr(blocks, name, attention)
    try:
        yield
    finally:
        setattr(blocks, name, before)


def velocity(network: LinearSR, latent: Tensor, t: Tensor, bicubic: Tensor) -> Tensor:
    """Return the velocity (B, C, h, w) at latents of that shape and t (B,), in float32."""
    with torch.autocast(latent.device.type, torch.bfloat16, enabled=latent.is_cuda):
        condition = network.condition(bicubic, LATENT.condition(bicubic))
        return network(latent, t, condition).float()


def guess(network: LinearSR, latent: Tensor, t: Tensor, bicubic: Tensor) -> Tensor:
    """Return the network's guess of the clean latent, from `latent` at t."""
    return clean_guess(latent, velocity(network, latent, t, bicubic), t)


def noise_for(bicubic: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return noise of the latent's shape; with a CPU generator, the same on every device."""
    count, _, height, width = bicubic.shape
    cells = height // LATENT.factor, width // LATENT.factor
    device = bicubic.device if generator is None else None
    shape = (count, MODEL.denoiser.latent_channels, *cells)
    return torch.randn(shape, generator=generator, device=device).to(bicubic.device)


# Measuring


class Judge:
    """PSNR on Y and LPIPS of results at scale 4, on fixed pictures.

    folder: `hr/*.png`, and `clean` and `degraded` with their LR pictures of the same names.
    """

    def __init__(self, folder: Path, device: torch.device, distance: nn.Module | None) -> None:
        self.distance = distance
        # HR and LR, each (B, 3, H, W) in [-1, 1]: for each kind, pictures of one size together.
        self.sets: dict[str, list[tuple[Tensor, Tensor]]] = {}
        names = [path.name for path in sorted((folder / "hr").glob("*.png"))]
        if not names:
            raise OptionError(f"--val: no hr/*.png in {folder}")
        for kind in ("clean", "degraded"):
            groups: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for name in names:
                hr, lr = (
                    read(folder / part / name).to(device).float() / 127.5 - 1
                    for part in ("hr", kind)
                )
                groups.setdefault(hr.shape, []).append((hr, lr))
            self.sets[kind] = [
                (torch.stack([hr for hr, _ in group]), torch.stack([lr for _, lr in group]))
                for group in groups.values()
            ]

    @torch.no_grad()
    def __call__(self, nets: Sequence[LinearSR], times: Sequence[float]) -> dict[str, float]:
        """Return means over the pictures, after Euler steps at `times`, the i-th by nets[i]."""
        scores = {}
        for kind, groups in self.sets.items():
            values: dict[str, list[float]] = {}
            for hr, lr in groups:
                bicubic = resize(lr, *hr.shape[-2:])
                picture = LATENT.decode(walk(nets, times, bicubic), bicubic).clamp(-1, 1)
                picture = ((picture + 1) * 127.5).round() / 127.5 - 1
                values.setdefault("psnr", []).extend(psnr(picture, hr).tolist())
                if self.distance is not None:
                    far = self.distance(picture, hr).flatten()
                    values.setdefault("lpips", []).extend(far.tolist())
            for metric, each in values.items():
                scores[f"{kind} {metric}"] = round(float(np.mean(each)), 4)
        return scores


def psnr(picture: Tensor, hr: Tensor) -> Tensor:
    """Return PSNR in dB (B,) of pictures (B, 3, H, W) in [-1, 1]: Y of BT.601, 4 px cropped."""
    luma = torch.tensor([65.481, 128.553, 24.966], device=hr.device).view(3, 1, 1) / 2
    error = ((picture - hr) * luma).sum(1)[:, 4:-4, 4:-4]
    return 10 * torch.log10(255**2 / error.square().mean((1, 2)))


def walk(nets: Sequence[LinearSR], times: Sequence[float], bicubic: Tensor) -> Tensor:
    """Return the clean latent after Euler steps from fixed noise."""
    latent = noise_for(bicubic, torch.Generator().manual_seed(0))
    for network, begin, end in zip(nets, times, (*times[1:], 0.0), strict=True):
        t, after = (torch.full((len(latent),), x, device=latent.device) for x in (begin, end))
        latent = euler_step(latent, velocity(network, latent, t, bicubic), t, after)
    return latent


def read(path: Path) -> Tensor:
    """Read a picture's pixels, (3, H, W) uint8."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


# A stage: its time, its log, its steps


class Clock:
    """The time of a stage; it restarts after a few steps, since compiling does not count."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.seconds, self.device = seconds, device
        self.began: float | None = None
        self.steps = 0

    def used(self) -> float:
        """Return the share of the stage's seconds that has passed."""
        return 0.0 if self.began is None else (time.perf_counter() - self.began) / self.seconds

    def tick(self) -> bool:
        """Count a step; return whether the stage's time has just started."""
        self.steps += 1
        if self.steps not in (1, 5):
            return False
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.began = time.perf_counter()
        return True


class Log:
    """Prints the mean losses of a stage's steps and the time of a step, every few seconds."""

    def __init__(self, name: str, every: float) -> None:
        self.name, self.every = name, every
        self.restart()

    def restart(self) -> None:
        """Start new means."""
        self.began, self.steps = time.perf_counter(), 0
        self.sums: dict[str, Tensor] = {}

    def add(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of a step, and print a line when it is time for one."""
        self.steps += 1
        self.sums = {k: v + self.sums[k] if k in self.sums else v for k, v in losses.items()}
        seconds = time.perf_counter() - self.began
        if seconds > self.every:
            means = "  ".join(f"{k} {v.item() / self.steps:.4f}" for k, v in self.sums.items())
            say(f"{self.name} {step}  {means}  {1e3 * seconds / self.steps:.1f} ms a step")
            self.restart()


class Objective(Protocol):
    """The training step of a stage."""

    def step(self, hr: Tensor, bicubic: Tensor, clock: Clock) -> dict[str, Tensor]:
        """Update the network with a batch; return the losses."""
        ...


def _adamw(model: nn.Module, rate: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), rate, betas, weight_decay=0.0, fused=True)


def _update(optimizer: torch.optim.AdamW, rate: float, clip: float | None = None) -> None:
    """Step the optimizer at that learning rate, and clear the gradients."""
    (group,) = optimizer.param_groups
    if clip is not None:
        nn.utils.clip_grad_norm_(group["params"], clip)
    group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


class FlowObjective:
    """The network guesses clean latents from noisy ones at the stage's timesteps."""

    def __init__(self, stage: Flow, network: LinearSR, rate: float) -> None:
        self.stage, self.network, self.rate = stage, network, rate * stage.rate
        self.optimizer = _adamw(network, self.rate, (0.9, 0.99))

    def step(self, hr: Tensor, bicubic: Tensor, clock: Clock) -> dict[str, Tensor]:
        """Update the network; return its loss."""
        clean = LATENT.encode(hr, bicubic)
        t = self._timesteps(len(hr), hr.device)
        latent = add_noise(clean, torch.randn_like(clean), t)
        loss = self._loss(guess(self.network, latent, t, bicubic) - clean, t)
        loss.backward()
        floor = self.stage.floor
        fall = floor + (1 - floor) * min(1.0, (1 - clock.used()) / 0.75)
        _update(self.optimizer, self.rate * min(1.0, (clock.steps + 1) / 200) * fall, clip=1.0)
        return {"loss": loss.detach()}

    def _timesteps(self, count: int, device: torch.device) -> Tensor:
        low, high = self.stage.low, self.stage.high
        if self.stage.velocities:
            t = torch.sigmoid(0.3 + torch.randn(count, device=device))
        else:
            t = low + (high - low) * torch.rand(count, device=device)
        at_one = torch.rand(count, device=device) < self.stage.at_one
        return torch.where(at_one, 1.0, t.clamp(low + 1e-3, high))

    def _loss(self, error: Tensor, t: Tensor) -> Tensor:
        """Return the loss of clean latents' errors (B, C, h, w) at t (B,)."""
        if self.stage.velocities:
            # The velocity's error is that of the clean latent over t.
            wrong = error / t.view(-1, 1, 1, 1).clamp(min=0.05)
            return wrong.square().mean() + 0.5 * error.abs().mean()
        return error.abs().mean() + 0.3 * error.square().mean()


class PerceptualObjective:
    """L1, LPIPS and a discriminator compare pictures, which start where sampling would.

    first: the structure expert. between: the texture expert if the polish expert is trained.
    """

    def __init__(
        self,
        stage: Perceptual,
        network: LinearSR,
        first: LinearSR,
        between: LinearSR | None,
        discriminator: Discriminator,
        distance: nn.Module,
        options: argparse.Namespace,
    ) -> None:
        self.network, self.first, self.between = network, first, between
        self.discriminator, self.distance, self.options = discriminator, distance, options
        self.rate = stage.rate
        self.optimizer = _adamw(network, self.rate, (0.5, 0.99))
        self.critic = _adamw(discriminator, DISCRIMINATOR_RATE, (0.5, 0.99))
        self.rng = np.random.default_rng(options.seed)

    def step(self, hr: Tensor, bicubic: Tensor, clock: Clock) -> dict[str, Tensor]:
        """Update the discriminator, then the network; return their losses."""
        fall = min(1.0, (clock.steps + 1) / 100) * min(1.0, (1 - clock.used()) / 0.4)
        with torch.no_grad():
            latent, t = self._arrive(bicubic)
        picture = LATENT.decode(guess(self.network, latent, t, bicubic), bicubic)
        real, fake = (self._scores(x, bicubic) for x in (hr, picture.detach()))
        critic_loss = hinge(real, fake)
        critic_loss.backward()
        _update(self.critic, DISCRIMINATOR_RATE * fall)
        self.discriminator.requires_grad_(False)
        pixels, far = (picture - hr).abs().mean(), self.distance(picture, hr).mean()
        fooling = fooled(self._scores(picture, bicubic)).mean()
        gan = self.options.gan * min(1.0, clock.steps / GAN_WARMUP)
        (self.options.l1 * pixels + self.options.lp * far + gan * fooling).backward()
        self.discriminator.requires_grad_(True)
        _update(self.optimizer, self.rate * fall, clip=1.0)
        losses = {"l1": pixels, "lpips": far, "fooling": fooling, "discriminator": critic_loss}
        return {name: loss.detach() for name, loss in losses.items()}

    def _scores(self, picture: Tensor, bicubic: Tensor) -> list[Tensor]:
        with torch.autocast(picture.device.type, torch.bfloat16, enabled=picture.is_cuda):
            return [scores.float() for scores in self.discriminator(picture, bicubic)]

    def _arrive(self, bicubic: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents that sampling in a few steps brings to t (B,), and t."""
        count, device = len(bicubic), bicubic.device
        noise, one = noise_for(bicubic), torch.ones(count, device=device)
        u, wide = torch.rand(count, device=device), torch.rand(count, device=device) < 0.4
        # The texture expert's whole range, and more often where the second of two steps starts.
        t = torch.where(wide, 0.23 + 0.645 * u, 0.25 + 0.35 * u)
        latent = euler_step(noise, velocity(self.first, noise, one, bicubic), one, t)
        if self.between is not None:
            after = uniform(count, (0.02, 0.223), device).flatten()
        elif self.rng.random() < 0.2:
            # One more step of its own, as in sampling with more steps.
            after = 0.23 + (t - 0.23) * torch.rand(count, device=device)
        else:
            return latent, t
        v = velocity(self.between or self.network, latent, t, bicubic)
        return euler_step(latent, v, t, after), after


# The program


class Trainer:
    """Trains the stages of one call; they share photographs, judge and files."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device, self.out = options, device, options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.distance: nn.Module | None = None
        if options.trunk or any(isinstance(STAGES[name], Perceptual) for name, _ in options.stages):
            self.distance = lpips.load(options.trunk).to(device)
        self.judge = Judge(options.val, device, self.distance) if options.val else None
        history = self.out / "history.json"
        self.history: list[dict[str, object]] = (
            json.loads(history.read_text()) if history.exists() else []
        )
        if options.stages:
            self.atlas = self._atlas()

    def _atlas(self) -> Atlas:
        folders = (Path(folder) for folder in self.options.photos)
        files = sorted(p for f in folders for end in ("jpg", "png") for p in f.glob(f"*.{end}"))
        if not files:
            raise OptionError(f"--photos: no *.jpg or *.png in {', '.join(self.options.photos)}")
        with ThreadPoolExecutor(16) as pool:
            photos = list(pool.map(read, files))
        atlas = Atlas(photos, self.options.shrinks, self.device, self.options.seed)
        say(f"{len(photos)} photographs, {len(atlas.pixels) / 1e6:.0f} megapixels at all sizes")
        return atlas

    def run(self, name: str, seconds: float) -> None:
        """Train one stage and write its file."""
        stage = STAGES[name]
        begins = name if self._path(name).exists() else stage.begins
        say(f"{name}: {seconds:g} s, from {begins or 'random weights'}")
        torch.manual_seed(self._seed(name))
        network = self._ready(self._network(begins))
        average = EMA(network, stage.decay)
        objective: Objective
        if isinstance(stage, Perceptual):
            critic = self._discriminator()
            objective = self._perceptual(stage, network, critic)
        else:
            objective = FlowObjective(stage, network, self.options.rate)
        self._train(name, objective, average, seconds)
        self._save(name, average.average)
        if isinstance(stage, Perceptual):
            self._save(DISCRIMINATOR, critic.state_dict())

    def _train(self, name: str, objective: Objective, average: EMA, seconds: float) -> None:
        options, mix = self.options, STAGES[name].mix
        data = pairs(self.atlas, options.patch, options.batch, mix, AT_FOUR, self._seed(name))
        clock, log = Clock(seconds, self.device), Log(name, options.say_every)
        judged = saved = time.perf_counter()
        while clock.used() < 1:
            losses = objective.step(*next(data), clock)
            began = clock.tick()
            average.update(clock.steps)
            if began:
                log.restart()
                judged = time.perf_counter()
            else:
                log.add(clock.steps, losses)
            if time.perf_counter() - judged > options.judge_every:
                self._judge(name, clock.steps, average.average)
                judged = time.perf_counter()
            if time.perf_counter() - saved > options.save_every:
                self._save(name, average.average)
                saved = time.perf_counter()
        self._judge(name, clock.steps, average.average)
        say(f"{name}: done after {clock.steps} steps")

    def _judge(self, name: str, step: int, state: Mapping[str, Tensor]) -> None:
        if self.judge is None:
            return
        network, stage = self._network(None), STAGES[name]
        network.load_state_dict(state)
        before = stage.before if isinstance(stage, Perceptual) else ()
        nets = (*map(self._network, before), network)
        for times in PLANS.get(name, ()):
            scores = self.judge(nets, times)
            self.history.append({"stage": name, "step": step, "times": times, **scores})
            say(f"{name} {step} at {times}: {scores}")

    def two_steps(self) -> None:
        """Print the scores of two steps, with the second one at several timesteps."""
        if self.judge is not None and self._path("texture").exists():
            nets = [self._network(name) for name in ("structure", "texture")]
            for t in (0.25, 0.35, 0.5, 0.65):
                say(f"two steps, the second at {t}: {self.judge(nets, (1.0, t))}")

    def bundle(self, folder: Path) -> None:
        """Write the four experts to a folder of weights. Raises WeightsError if one is missing."""
        states = [self._state(name) for name in weights.expert_names(MODEL)]
        stages = " ".join(f"{name}={seconds:g}" for name, seconds in self.options.stages)
        provenance = {"program": "tools.train_bundled", "stages": stages}
        weights.save(folder, MODEL, states, provenance)
        say(f"wrote {folder}")

    def _perceptual(
        self, stage: Perceptual, network: LinearSR, discriminator: Discriminator
    ) -> PerceptualObjective:
        assert self.distance is not None
        frozen = [self._network(name).requires_grad_(False).eval() for name in stage.before]
        first, between = (*map(self._ready, frozen), None)[:2]
        assert first is not None
        return PerceptualObjective(
            stage, network, first, between, discriminator, self.distance, self.options
        )

    def _ready(self, network: LinearSR) -> LinearSR:
        """Compile the network's blocks if there is a GPU, and return it."""
        if self.device.type == "cuda":
            network.compile_blocks()
        return network

    def _network(self, name: str | None) -> LinearSR:
        network = LinearSR(MODEL.denoiser)
        if name is not None:
            self._fill(network, name)
        return network.to(self.device).to(memory_format=torch.channels_last)

    def _discriminator(self) -> Discriminator:
        network = Discriminator(CHANNELS)
        if self._path(DISCRIMINATOR).exists():
            self._fill(network, DISCRIMINATOR)
        return network.to(self.device).to(memory_format=torch.channels_last)

    def _fill(self, network: nn.Module, name: str) -> None:
        try:
            network.load_state_dict(self._state(name))
        except RuntimeError as error:
            raise WeightsError(
                f"{self._path(name)}: of another network; use another --out ({one_line(error)})"
            ) from error

    def _seed(self, name: str) -> int:
        """Return a seed of the stage's own."""
        return int(self.options.seed) + list(STAGES).index(name)

    def _path(self, name: str) -> Path:
        return Path(self.out, f"{name}.pt")

    def _state(self, name: str) -> dict[str, Tensor]:
        path = self._path(name)
        if not path.exists():
            raise WeightsError(f"{path}: not there yet; train it first (--stages {name}=SECONDS)")
        return torch.load(path, weights_only=True, map_location="cpu")

    def _save(self, name: str, state: Mapping[str, Tensor]) -> None:
        path = self._path(name)
        with atomic.replace_file(path) as temporary:
            torch.save({key: tensor.cpu() for key, tensor in state.items()}, temporary)
        atomic.write(self.out / "history.json", json.dumps(self.history).encode())


def _stage(text: str) -> tuple[str, float]:
    """Parse "pretrain=165" to ("pretrain", 165.0). Raises ValueError for anything else."""
    name, _, seconds = text.partition("=")
    if name not in STAGES or not float(seconds) > 0:
        raise ValueError(text)
    return name, float(seconds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--photos", nargs="+", default=[], help="folders of *.jpg or *.png")
    add("--val", type=Path, help="validation pictures: *.png in hr/, clean/ and degraded/")
    add("--trunk", type=Path, help="file of SqueezeNet 1.1 for LPIPS (default: see the docs)")
    add("--out", type=Path, required=True, help="folder for the stages' weights")
    order = f"stages to train, in this order: any of {', '.join(STAGES)}"
    add("--stages", nargs="+", type=_stage, default=[], metavar="STAGE=SECONDS", help=order)
    add("--bundle", type=Path, metavar="FOLDER", help="write the four experts there at the end")
    add("--patch", type=int, default=160, choices=range(32, 193, 32), help="side of HR in pixels")
    add("--batch", type=int, default=64, help="patches in a batch")
    add("--shrinks", type=int, default=6, help="smaller copies of each photograph")
    add("--rate", type=float, default=1.5e-3, help="learning rate of the pretraining")
    add("--l1", type=float, default=4.0, help="weight of L1 in the perceptual stages")
    add("--lp", type=float, default=1.0, help="weight of LPIPS in them")
    add("--gan", type=float, default=0.03, help="weight of the discriminator in them")
    add("--say-every", type=float, default=8.0, help="seconds between lines of the log")
    add("--judge-every", type=float, default=20.0, help="seconds between validations")
    add("--save-every", type=float, default=60.0, help="seconds between savings of a stage")
    add("--seed", type=int, default=int(time.time()) % 100000, help="seed (default: from the time)")
    options = parser.parse_args()
    if options.stages and not options.photos:
        parser.error("--photos is needed to train")
    return options


def main() -> int:
    """Train the chosen stages, then write the bundle."""
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        with light_attention():
            trainer = Trainer(options, device)
            for name, seconds in options.stages:
                trainer.run(name, seconds)
            trainer.two_steps()
        if options.bundle:
            trainer.bundle(options.bundle)
    except (LinearSRError, OSError) as error:
        print(f"tools.train_bundled: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
