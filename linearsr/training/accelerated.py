"""All stages of the small model on one GPU, in the minutes that there are.

    python -m linearsr.training.accelerated --photos PHOTOS --out OUT --stages pretrain=150 ...

Pairs are cut and degraded on the GPU, blocks are compiled, each stage takes its seconds and leaves
the averaged weights in OUT/STAGE.pt. A later call goes on from what it finds there. Needs torch,
triton, pillow, numpy and pydantic; lpips for the perceptual stages.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from linearsr.config import TINY
from linearsr.denoiser import LinearSR, blocks, model as denoiser_model
from linearsr.training.device_pairs import Atlas, pairs

NETWORK = TINY.denoiser
UNIT = TINY.latent.scale
MIXES = {
    "flow": {"clean": 0.4, "mild": 0.15, "camera": 0.15, "seesr": 0.12, "web": 0.18},
    "perceptual": {"clean": 0.32, "mild": 0.15, "camera": 0.18, "seesr": 0.15, "web": 0.2},
}
STARTED = time.perf_counter()


def say(*words: object) -> None:
    print(f"[{time.perf_counter() - STARTED:6.1f}]", *words, flush=True)


# ---------------------------------------------------------------- the network, for training


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=1e-6), 1 + scale)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q.relu(), k.relu(), v))
    state = k.mT @ v
    z = k.float().sum(2)[:, :, None, :]
    weight = (q.float() * z).sum(-1, keepdim=True)
    return ((q @ state).float() / (weight + (weight == 0))).to(v.dtype).transpose(1, 2)


def triton_gate(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from linearsr.kernels.depthwise import depthwise

    value, gate = depthwise(hidden, weight, bias).chunk(2, -1)
    return value * F.silu(gate)


def cudnn_gate(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = F.conv2d(hidden.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
    value, gate = x.permute(0, 2, 3, 1).chunk(2, -1)
    return value * F.silu(gate)


def triton_neighbours(self: blocks.LinearAttention, values: Tensor) -> Tensor:
    from linearsr.kernels.depthwise import depthwise

    weight = self.local.weight
    return depthwise(values, weight, torch.zeros(len(weight), device=weight.device))


def prepare_ops(device: torch.device) -> None:
    """Functions of the blocks that compile well and have fast gradients."""
    blocks.modulate = denoiser_model.modulate = modulate
    blocks.relu_linear_attention = attention
    blocks.depthwise_gate = cudnn_gate
    if device.type != "cuda":
        return
    times = {}
    for name, gate in (("cudnn", cudnn_gate), ("triton", triton_gate)):
        try:
            x = torch.randn(32, 40, 40, 640, device=device, dtype=torch.bfloat16, requires_grad=True)
            w = torch.randn(640, 1, 3, 3, device=device, requires_grad=True)
            b = torch.randn(640, device=device, requires_grad=True)
            for i in range(6):
                with torch.autocast("cuda", torch.bfloat16):
                    gate(x, w, b).float().square().sum().backward()
                torch.cuda.synchronize()
                if i == 0:
                    began = time.perf_counter()
            times[name] = (time.perf_counter() - began) / 5, w.grad.norm().item(), x.grad.float().norm().item()
        except Exception as error:  # noqa: BLE001
            say("depthwise", name, "failed:", repr(error)[:300])
    say("depthwise forward and backward (s, norms):", times)
    if "triton" in times and times["triton"][0] < times.get("cudnn", (math.inf,))[0]:
        blocks.depthwise_gate = triton_gate
        blocks.LinearAttention.neighbours = triton_neighbours


def compiled(network: LinearSR) -> LinearSR:
    network.in_strips = False
    if next(network.parameters()).is_cuda:
        for block in network.blocks:
            block.compile(dynamic=False)
    return network


def guess(network: LinearSR, latent: Tensor, t: Tensor, bicubic: Tensor) -> Tensor:
    """The clean latent that the network sees in `latent` at `t`."""
    with torch.autocast(latent.device.type, torch.bfloat16, enabled=latent.is_cuda):
        condition = network.condition(bicubic, F.pixel_unshuffle(bicubic, 4))
        v = network(latent, t, condition)
    return latent - t.view(-1, 1, 1, 1) * v.float()


def encode(hr: Tensor, bicubic: Tensor) -> Tensor:
    return F.pixel_unshuffle((hr - bicubic) / UNIT, 4)


def decode(latent: Tensor, bicubic: Tensor) -> Tensor:
    return bicubic + F.pixel_shuffle(latent, 4) * UNIT


class Average:
    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self.live = decay, list(network.parameters())
        self.values = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.values, self.live, 1 - min(self.decay, (1 + step) / (10 + step)))

    def state(self, network: nn.Module) -> dict[str, Tensor]:
        state = {k: v.detach().clone() for k, v in network.state_dict().items()}
        for (name, _), value in zip(network.named_parameters(), self.values, strict=True):
            state[name] = value.clone()
        return state


# ---------------------------------------------------------------- judging


class Judge:
    """PSNR-Y and LPIPS on fixed pictures, as val/x4's score.py."""

    def __init__(self, folder: Path, device: torch.device, lpips: nn.Module | None) -> None:
        self.device, self.lpips = device, lpips
        self.sets: dict[str, list[tuple[str, Tensor, Tensor]]] = {}
        for kind in ("clean", "degraded"):
            groups: dict[tuple[int, ...], list[tuple[str, Tensor, Tensor]]] = {}
            for path in sorted((folder / "hr").glob("*.png")):
                hr = load(path).to(device)
                lr = load(folder / kind / path.name).to(device)
                groups.setdefault(tuple(hr.shape), []).append((path.name, hr, lr))
            self.sets[kind] = [
                ([n for n, _, _ in g], torch.stack([h for _, h, _ in g]), torch.stack([x for _, _, x in g]))
                for g in groups.values()
            ]

    @torch.no_grad()
    def __call__(self, nets: Sequence[LinearSR], times: Sequence[float], keep: Path | None = None) -> dict[str, float]:
        """Euler over `times`, the i-th step by nets[i]."""
        scores = {}
        for kind, groups in self.sets.items():
            values: list[tuple[float, float]] = []
            for names, hr, lr in groups:
                bicubic = F.interpolate(lr, size=hr.shape[-2:], mode="bicubic", antialias=True)
                out = decode(walk(nets, times, bicubic), bicubic).clamp(-1, 1)
                out = ((out + 1) * 127.5).round() / 127.5 - 1
                far = self.lpips(out, hr).flatten().tolist() if self.lpips else [0.0] * len(hr)
                weights = torch.tensor([65.481, 128.553, 24.966], device=hr.device).view(3, 1, 1) / 2
                error = ((out - hr) * weights).sum(1)[:, 4:-4, 4:-4]
                psnr = 10 * torch.log10(255**2 / error.square().mean((1, 2)))
                values += list(zip(psnr.tolist(), far, strict=True))
                if keep is not None:
                    for name, picture in zip(names, out, strict=True):
                        keep.joinpath(kind).mkdir(parents=True, exist_ok=True)
                        array = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
                        Image.fromarray(array).save(keep / kind / name)
            scores[f"{kind} psnr"], scores[f"{kind} lpips"] = (round(float(x), 4) for x in np.mean(values, 0))
        return scores


def walk(nets: Sequence[LinearSR], times: Sequence[float], bicubic: Tensor) -> Tensor:
    """The clean latent after Euler's steps from noise of a fixed seed."""
    shape = (len(bicubic), 48, bicubic.shape[2] // 4, bicubic.shape[3] // 4)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(bicubic.device)
    for net, t, after in zip(nets, times, (*times[1:], 0.0), strict=True):
        clean = guess(net, latent, torch.full((len(latent),), t, device=latent.device), bicubic)
        latent = clean + after / t * (latent - clean)
    return latent


def load(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def lpips_loss(trunk: Path, device: torch.device) -> nn.Module:
    import lpips

    net = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    tensors = torch.load(trunk, weights_only=True)
    for i in range(1, 8):
        part = getattr(net.net, f"slice{i}")
        part.load_state_dict({k: tensors[k] for k in part.state_dict()})
    return net.eval().requires_grad_(False).to(device)


class Discriminator(nn.Module):
    """Patches of HR or result beside the bicubic picture, judged at two scales."""

    def __init__(self, channels: Sequence[int] = (64, 64, 128, 256, 256)) -> None:
        super().__init__()

        def scale() -> nn.Sequential:
            layers: list[nn.Module] = []
            for i, (a, b) in enumerate(zip((6, *channels[:-1]), channels, strict=True)):
                layers += [spectral_norm(nn.Conv2d(a, b, 3, 1 + (i in (1, 2, 3)), 1)), nn.LeakyReLU(0.2)]
            return nn.Sequential(*layers, spectral_norm(nn.Conv2d(channels[-1], 1, 3, 1, 1)))

        self.scales = nn.ModuleList([scale(), scale()])

    def forward(self, picture: Tensor, bicubic: Tensor) -> list[Tensor]:
        x = torch.cat([picture, bicubic], 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return [self.scales[0](x).float(), self.scales[1](F.avg_pool2d(x, 2)).float()]


# ---------------------------------------------------------------- stages


class Trainer:
    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.o, self.device, self.out = options, device, options.out
        self.lpips = lpips_loss(options.trunk, device) if options.trunk else None
        self.judge = Judge(options.val, device, self.lpips) if options.val else None
        files = sorted(p for folder in options.photos for p in Path(folder).glob("*.jpg"))

        def read(path: Path) -> Tensor:
            return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)

        with ThreadPoolExecutor(16) as pool:
            photos = list(pool.map(read, files))
        say(len(photos), "photographs decoded")
        self.atlas = Atlas(photos, options.shrinks, device, options.seed)
        say(f"atlas of {len(self.atlas.pixels) / 1e6:.0f} MP")
        self.history: list[dict[str, object]] = []

    def network(self, start: str | None = None) -> LinearSR:
        torch.manual_seed(self.o.seed)
        network = LinearSR(NETWORK).to(self.device).to(memory_format=torch.channels_last)
        if start:
            network.load_state_dict(self.state(start))
        return network

    def state(self, name: str) -> dict[str, Tensor]:
        return torch.load(self.out / f"{name}.pt", weights_only=True, map_location=self.device)

    def batches(self, kind: str) -> Iterator[tuple[Tensor, Tensor]]:
        return pairs(self.atlas, self.o.patch, self.o.batch, MIXES[kind], 0.72, self.o.seed + len(self.history))

    def frozen(self, name: str) -> LinearSR:
        network = self.network(name).requires_grad_(False).eval()
        network.in_strips = False
        return network

    def save(self, name: str, state: dict[str, Tensor]) -> None:
        torch.save({k: v.cpu() for k, v in state.items()}, self.out / f"{name}.tmp")
        (self.out / f"{name}.tmp").replace(self.out / f"{name}.pt")
        (self.out / "history.json").write_text(json.dumps(self.history))

    def run(self, name: str, seconds: float) -> None:
        start = {"pretrain": None, "structure": "pretrain", "refinement": "pretrain",
                 "texture": "pretrain", "polish": "texture"}[name]  # fmt: skip
        if (self.out / f"{name}.pt").exists():
            start = name
        say(f"== {name} for {seconds:.0f} s from {start}")
        network = self.network(start)
        ready = compiled(network)
        if name in ("texture", "polish"):
            self.perceptual(name, ready, seconds)
        else:
            self.flow(name, ready, seconds)

    def flow(self, name: str, network: LinearSR, seconds: float) -> None:
        rate = {"pretrain": self.o.rate, "structure": 0.5 * self.o.rate, "refinement": 0.3 * self.o.rate}[name]
        optimizer = torch.optim.AdamW(network.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        average, data, step = Average(network, 0.999), self.batches("flow"), 0
        began = said = judged = None
        last = 0
        low, high = {"pretrain": (0.0, 1.0), "structure": (0.939, 1.0), "refinement": (0.875, 0.939)}[name]
        at_one = {"pretrain": 0.5, "structure": 0.85, "refinement": 0.0}[name]
        total = torch.zeros((), device=self.device)
        while True:
            now = time.perf_counter()
            used = 0.0 if began is None else (now - began) / seconds
            if used >= 1:
                break
            # A straight line down: the pretraining's only to a third, for the stages that follow.
            floor = 0.25 if name == "pretrain" else 0.0
            factor = min(1.0, (step + 1) / 200) * (floor + (1 - floor) * min(1.0, (1 - used) / 0.75))
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            hr, bicubic = next(data)
            clean = encode(hr, bicubic)
            t = torch.sigmoid(0.3 + torch.randn(len(hr), device=self.device)) if name == "pretrain" else (
                low + (high - low) * torch.rand(len(hr), device=self.device))  # fmt: skip
            t = torch.where(torch.rand(len(hr), device=self.device) < at_one, 1.0, t.clamp(low + 1e-3, high))
            noise = torch.randn_like(clean)
            latent = torch.lerp(clean, noise, t.view(-1, 1, 1, 1))
            found = guess(network, latent, t, bicubic)
            far = found - clean
            if name == "pretrain":
                # The velocity's error is that of the clean latent over t.
                loss = (far / t.view(-1, 1, 1, 1).clamp(min=0.05)).square().mean() + 0.5 * far.abs().mean()
            else:
                loss = far.abs().mean() + 0.3 * far.square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            average.update(step)
            total += loss.detach()
            if began is None or step == 5:
                # Compiling does not count.
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                began = said = judged = time.perf_counter()
                last = step
                total.zero_()
            elif now - said > self.o.say_every:
                speed = (now - said) / max(1, step - last)
                say(f"{name} {step}  loss {total.item() / (step - last):.4f}  {1e3 * speed:.1f} ms/step")
                said, last = now, step
                total.zero_()
            if now - judged > self.o.judge_every and self.judge and name != "refinement":
                self.judged(name, step, average.state(network))
                judged = time.perf_counter()
        state = average.state(network)
        self.judged(name, step, state)
        self.save(name, state)

    def judged(self, name: str, step: int, state: dict[str, Tensor], others: Sequence[LinearSR] = ()) -> None:
        if self.judge is None:
            return
        network = self.network()
        network.in_strips = False
        network.load_state_dict(state)
        for times in {"texture": ((1.0, 0.5), (1.0, 0.3)), "polish": ((1.0, 0.5, 0.2),)}.get(name, ((1.0,),)):
            nets = (*others, network)
            row = {"stage": name, "step": step, "times": times, **self.judge(nets, times)}
            self.history.append(row)
            say(row)

    def perceptual(self, name: str, network: LinearSR, seconds: float) -> None:
        structure = compiled(self.frozen("structure"))
        texture = compiled(self.frozen("texture")) if name == "polish" else None
        others = [self.frozen(n) for n in (("structure", "texture") if name == "polish" else ("structure",))]
        judge_net = Discriminator().to(self.device).to(memory_format=torch.channels_last)
        if (self.out / "discriminator.pt").exists():
            judge_net.load_state_dict(self.state("discriminator"))
        rate = 3e-4 if name == "texture" else 1.5e-4
        g = torch.optim.AdamW(network.parameters(), rate, betas=(0.5, 0.99), weight_decay=0.0, fused=True)
        d = torch.optim.AdamW(judge_net.parameters(), 4e-4, betas=(0.5, 0.99), weight_decay=0.0, fused=True)
        average, data, step, last = Average(network, 0.998), self.batches("perceptual"), 0, 0
        rng = np.random.default_rng(self.o.seed)
        began = said = judged = None
        sums = torch.zeros(5, device=self.device)
        while True:
            now = time.perf_counter()
            used = 0.0 if began is None else (now - began) / seconds
            if used >= 1:
                break
            factor = min(1.0, (step + 1) / 100) * min(1.0, (1 - used) / 0.4)
            for optimizer, base in ((g, rate), (d, 4e-4)):
                for group in optimizer.param_groups:
                    group["lr"] = base * factor
            hr, bicubic = next(data)
            count = len(hr)
            with torch.no_grad():
                noise = torch.randn(count, 48, hr.shape[2] // 4, hr.shape[3] // 4, device=self.device)
                ones = torch.ones(count, device=self.device)
                clean = guess(structure, noise, ones, bicubic)
                u = torch.rand(count, device=self.device)
                wide = torch.rand(count, device=self.device) < 0.4
                t = torch.where(wide, 0.23 + 0.645 * u, 0.25 + 0.35 * u)
                latent = torch.lerp(clean, noise, t.view(-1, 1, 1, 1))
                if name == "polish" or rng.random() < 0.2:
                    # Another step between: what more steps bring there.
                    between = texture if texture is not None else network
                    clean = guess(between, latent, t, bicubic)
                    if name == "polish":
                        after = 0.02 + 0.203 * torch.rand(count, device=self.device)
                    else:
                        after = 0.23 + (t - 0.23) * torch.rand(count, device=self.device)
                    latent = clean + (after / t).view(-1, 1, 1, 1) * (latent - clean)
                    t = after
            picture = decode(guess(network, latent, t, bicubic), bicubic)
            real, fake = judge_net(hr, bicubic), judge_net(picture.detach(), bicubic)
            d_loss = sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)) / 2
            d_loss.backward()
            d.step()
            d.zero_grad()
            judge_net.requires_grad_(False)
            pixels = (picture - hr).abs().mean()
            far = self.lpips(picture, hr).mean()
            fooled = -sum(f.mean() for f in judge_net(picture, bicubic)) / 2
            loss = self.o.l1 * pixels + self.o.lp * far + self.o.gan * min(1.0, step / 150) * fooled
            loss.backward()
            judge_net.requires_grad_(True)
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            g.step()
            g.zero_grad()
            step += 1
            average.update(step)
            sums += torch.stack([pixels, far, fooled, d_loss, loss]).detach()
            if began is None or step == 5:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                began = said = judged = time.perf_counter()
                last = step
                sums.zero_()
            elif now - said > self.o.say_every:
                l1, far_, fooled_, d_, _ = (sums / (step - last)).tolist()
                speed = 1e3 * (now - said) / (step - last)
                say(f"{name} {step}  l1 {l1:.4f}  lpips {far_:.4f}  fooled {fooled_:.3f}  d {d_:.3f}  {speed:.1f} ms/step")
                said, last = now, step
                sums.zero_()
            if now - judged > self.o.judge_every:
                self.judged(name, step, average.state(network), others[-1:] if name == "texture" else others)
                judged = time.perf_counter()
        state = average.state(network)
        self.judged(name, step, state, others)
        self.save(name, state)
        self.save("discriminator", judge_net.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--photos", nargs="+", required=True)
    parser.add_argument("--val", type=Path)
    parser.add_argument("--trunk", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", default=[])
    parser.add_argument("--patch", type=int, default=160)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--shrinks", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--l1", type=float, default=4.0)
    parser.add_argument("--lp", type=float, default=1.0)
    parser.add_argument("--gan", type=float, default=0.03)
    parser.add_argument("--say-every", type=float, default=8.0)
    parser.add_argument("--judge-every", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100000)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False
    options.out.mkdir(parents=True, exist_ok=True)
    prepare_ops(device)
    trainer = Trainer(options, device)
    for stage in options.stages:
        name, _, seconds = stage.partition("=")
        trainer.run(name, float(seconds))
    if trainer.judge and (options.out / "texture.pt").exists():
        nets = [trainer.frozen(n) for n in ("structure", "texture")]
        for t in (0.25, 0.35, 0.5, 0.65):
            say("two steps", t, trainer.judge(nets, (1.0, t)))


if __name__ == "__main__":
    main()
