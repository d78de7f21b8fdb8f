"""The ablations of the knee, the experts and their boundaries, at equal training, over seeds.

    python -m benchmarks.ablation --photos PHOTOS --data BSD100 --out RUNS/ablation

Each seed pretrains a small model at a constant rate, as the paper does, validates its checkpoints
and has the detector find the knee. It fine-tunes each of `ARMS` from the knee or from the last
checkpoint. All arms train on the same pairs: each of four experts on a quarter of them, a single
model on all of them. The knee and the results are judged on different pictures, and all results
take the plain schedule, since plans of the bundled model suit its own boundaries.

OUT/results.jsonl gets a line for each part as it ends: the same command goes on from there, with
more --seeds it only trains what is new, and several may share the seeds among them. LPIPS needs
its trunk (docs/guides/evaluation.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.markdown import markdown
from linearsr import weights
from linearsr.cli.flags import JobHelpFormatter, Parser, add_fields
from linearsr.cli.report import exit_code
from linearsr.config import Config, ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.diffusion.experts import boundaries, ranges
from linearsr.errors import InputError, OptionError, WeightsError
from linearsr.imaging.files import read
from linearsr.imaging.listing import find_images
from linearsr.latent import load_autoencoder
from linearsr.metrics.measure import unavailable
from linearsr.training import export, loop
from linearsr.training.config import TimestepConfig, TrainConfig
from linearsr.training.data import Batch, Batches, DataConfig, Photos, load_photos
from linearsr.training.engine import TorchEngine
from linearsr.training.guard import GuardConfig
from linearsr.training.knee import detect
from linearsr.training.recipes import ValidationConfig, tiny_cpu
from linearsr.training.validation import validate

SETTING, RESULTS, PRETRAIN = "setting.json", "results.jsonl", "pretrain"
KNEE = {"psnr@1": True, "lpips@2": False}
JUDGED = ("psnr@1", "lpips@1", "lpips@2", "psnr@4", "lpips@4")
# Fine-tuning has pairs of its own: pretraining has seen those of the seed itself.
TUNING = 1000
State = dict[str, Tensor]
Pictures = list[tuple[str, Tensor]]
Record = dict[str, Any]
Checkpoint = dict[str, float]


class Setting(Config):
    """The size of everything: a results file holds parts of one setting only."""

    width: int = 32
    """Channels of a token."""
    depth: int = 2
    """Blocks of the denoiser."""
    patch: int = 32
    """Side in pixels of the training crops."""
    batch: int = 8
    """Pairs of a step."""
    pretrain: int = 9600
    """Steps of pretraining."""
    rate: float = 8e-3
    """The constant learning rate of pretraining."""
    checkpoints: int = 24
    """Checkpoints of pretraining, each validated."""
    expert: int = 300
    """Steps of fine-tuning for each of four experts."""
    watched: int = 12
    """Pictures that tell the knee."""
    judged: int = 40
    """Pictures that judge the results."""
    size: int = 128
    """Side in pixels that these pictures are cut to."""

    @property
    def every(self) -> int:
        """The steps from one checkpoint to the next."""
        return self.pretrain // self.checkpoints

    @property
    def model(self) -> ModelConfig:
        """The bundled architecture at this width and depth, without experts and without plans."""
        config = tiny_cpu().model
        shape = {"width": self.width, "depth": self.depth, "head_dim": min(32, self.width // 2)}
        sampling = config.sampling.model_copy(update={"boundaries": (), "plans": ()})
        denoiser = config.denoiser.model_copy(update=shape)
        return config.model_copy(update={"denoiser": denoiser, "sampling": sampling})

    @property
    def data(self) -> DataConfig:
        """Crops of these sizes at the largest scale only, shrunk by bicubic and not damaged."""
        sizes = {"patch": self.patch, "batch": self.batch, "scales": (4.0, 4.0)}
        return tiny_cpu().data.model_copy(update={**sizes, "degradations": {"clean": 1.0}})


class Arm(NamedTuple):
    """One of the ways that are compared: where it starts, who denoises what, whether it trains."""

    name: str
    start: Literal["knee", "last"]
    bounds: tuple[float, ...] = ()
    tuned: bool = True


ARMS = (
    Arm("four experts from the knee", "knee", boundaries()),
    Arm("four experts from the last checkpoint", "last", boundaries()),
    Arm("four experts from the knee, uniform boundaries", "knee", (0.25, 0.5, 0.75)),
    Arm("one model from the knee, as many steps", "knee"),
    Arm("the knee itself", "knee", tuned=False),
    Arm("the last checkpoint itself", "last", tuned=False),
)


def main() -> None:
    """Train and judge what is missing of each seed, then print the tables."""
    options = _options()
    setting = Setting.parse(**{name: getattr(options, name) for name in Setting.model_fields})
    _check_lpips()
    bench = Bench(setting, options.photos, options.data, Results(options.out, setting))
    for seed in options.seeds:
        bench.run(seed)
    print("\n" + report(bench.results, options.seeds), flush=True)


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=JobHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder to train on")
    parser.add_argument("--data", type=Path, required=True, help="folder of validation pictures")
    parser.add_argument("--out", type=Path, required=True, help="where results and weights go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_fields(parser, Setting, Setting.model_fields)
    return parser.parse_args()


def _check_lpips() -> None:
    if reasons := unavailable(["lpips"]):
        raise WeightsError(f"lpips: {reasons['lpips']}")


class Results:
    """The finished parts in a folder; a part is a seed's pretraining or one of its arms."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        before, text = folder / SETTING, setting.model_dump_json()
        if before.is_file() and before.read_text() != text:
            raise OptionError(
                f"{folder}: holds results of {before.read_text()}: take another --out"
            )
        before.write_text(text)

    def add(self, seed: int, part: str, **values: object) -> Record:
        """Write and print the record of a part that has just ended, and return it."""
        record = {"seed": seed, "part": part, **values}
        line = json.dumps(record)
        with (self.folder / RESULTS).open("a") as file:
            file.write(f"{line}\n")
        print(line, flush=True)
        return record

    def find(self, seed: int, part: str) -> Record | None:
        """Return the record of a finished part."""
        path = self.folder / RESULTS
        lines = path.read_text().splitlines() if path.is_file() else []
        records = (json.loads(line) for line in lines)
        return next((r for r in records if (r["seed"], r["part"]) == (seed, part)), None)

    def get(self, seed: int, part: str) -> Record:
        """Return the record of a part. Raises InputError if the part is not finished."""
        record = self.find(seed, part)
        if record is None:
            raise InputError(f"{self.folder}: {part} of seed {seed} is not finished")
        return record

    def checkpoint(self, seed: int, step: int) -> Path:
        """Return the folder of a pretraining's averaged weights at that step."""
        return self.folder / f"seed-{seed}" / f"step-{step:08d}"


class Bench:
    """All that the seeds share: the setting, the photographs, the pictures and the results."""

    def __init__(self, setting: Setting, photos: Path, data: Path, results: Results) -> None:
        self.setting, self.folder, self.results = setting, photos, results
        self.watched, self.judged = _pictures(data, setting)

    @cached_property
    def photos(self) -> Photos:
        """The photographs, which are only read if there is something to train."""
        return load_photos(self.folder, self.setting.data, seed=0)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield the endless batches of a seed."""
        return iter(Batches(Photos(self.photos.photos, self.setting.data, seed), start=0))

    def run(self, seed: int) -> None:
        """Train and judge all parts of a seed that are not finished."""
        before = self.results.find(seed, PRETRAIN) or self.pretrained(seed)
        missing = [arm for arm in ARMS if not self.results.find(seed, arm.name)]
        # The very same pairs for all arms; made once, as they cost a quarter of a step.
        length = 4 * self.setting.expert if any(arm.tuned for arm in missing) else 0
        batches = list(islice(self.batches(TUNING + seed), length)) if length else []
        for arm in missing:
            began = time.monotonic()
            checkpoint = self.results.checkpoint(seed, before[arm.start])
            bundle = self.bundle(arm, checkpoint, batches, seed)
            values = _values(bundle, self.judged, JUDGED, self.setting.size)
            self.results.add(seed, arm.name, values=values, minutes=_minutes(began))

    def pretrained(self, seed: int) -> Record:
        """Return the pretraining of a seed: its validated checkpoints, and the knee among them."""
        began, model = time.monotonic(), self.setting.model
        torch.manual_seed(seed)
        start = LinearSR(model.denoiser).state_dict()
        history: list[Checkpoint] = []

        def validated(stage: loop.TrainState, report: loop.Report) -> None:
            history.append(self.checkpoint(seed, stage, report))
            print(f"seed {seed}  {json.dumps(history[-1])}", flush=True)

        _trained(model, start, _pretraining(self.setting, seed), self.batches(seed), validated)
        state = detect([(int(c["step"]), c) for c in history], KNEE)
        half, last = (int(history[i]["step"]) for i in (len(history) // 2 - 1, -1))
        steps = {"knee": state.step or half, "last": last, "status": state.status}
        evidence = {"evidence": state.evidence, "history": history, "minutes": _minutes(began)}
        return self.results.add(seed, PRETRAIN, **steps, **evidence)

    def checkpoint(self, seed: int, stage: loop.TrainState, report: loop.Report) -> Checkpoint:
        """Return the checkpoint that a stage has come to, saved and validated."""
        folder = self.results.checkpoint(seed, report.step)
        folder.mkdir(parents=True, exist_ok=True)
        stage.ema.save(folder)
        bundle = _bundle(self.setting.model, [stage.ema.average])
        values = _values(bundle, self.watched, tuple(KNEE), self.setting.size)
        return {"step": report.step, "loss": report.loss, **values}

    def bundle(
        self, arm: Arm, checkpoint: Path, batches: Sequence[Batch], seed: int
    ) -> weights.Bundle:
        """Return the model of an arm: an expert for each range, trained on part of the batches."""
        config = export.with_boundaries(self.setting.model, arm.bounds)
        start = export.average(checkpoint, config)
        if not arm.tuned:
            return _bundle(config, [start])
        spans = ranges(arm.bounds)
        share = len(batches) // len(spans)
        states = []
        for i, span in enumerate(spans):
            train, mine = _tuning(span, share, seed), batches[i * share : (i + 1) * share]
            states.append(_trained(config, start, train, iter(mine)))
        return _bundle(config, states)


def _values(
    bundle: weights.Bundle, pictures: Pictures, metrics: tuple[str, ...], size: int
) -> dict[str, float]:
    """The means of these metrics over pictures whose LR is clean."""
    config = ValidationConfig(metrics=metrics, knee={metrics[0]: True}, size=size)
    return validate(bundle.config, bundle.experts.__getitem__, pictures, config)[0]


def _pictures(folder: Path, setting: Setting) -> tuple[Pictures, Pictures]:
    """The pictures that tell the knee, and others that judge the results."""
    paths = find_images(folder)
    watching, judging = paths[::2][: setting.watched], paths[1::2][: setting.judged]
    if len(watching) < setting.watched or len(judging) < setting.judged:
        raise InputError(
            f"{folder}: {len(paths)} pictures are too few for {setting.watched} watched and "
            f"{setting.judged} judged ones"
        )
    watched, judged = ([(p.name, read(p).pixels[:3]) for p in part] for part in (watching, judging))
    return watched, judged


def _pretraining(setting: Setting, seed: int) -> TrainConfig:
    """The recipe's pretraining, but for what would never let it come to a plateau.

    A falling rate would move the plateau to where the rate ends, and an average over ever more
    steps is a falling rate in disguise.
    """
    changes = {"steps": setting.pretrain, "learning_rate": setting.rate, "seed": seed}
    # Activations of a network that starts with layers at zero are no measure of later ones.
    guard = GuardConfig(activation_factor=1e4)
    constant = {"decay": 0.0, "ema": 0.99, "guard": guard}
    intervals = {"report_every": setting.every, "checkpoint_every": setting.every}
    return tiny_cpu().pretrain.model_copy(update={**changes, **constant, **intervals})


def _tuning(span: tuple[float, float], steps: int, seed: int) -> TrainConfig:
    """The recipe's fine-tuning of an expert; a single model keeps pretraining's timesteps."""
    low, high = span
    recipe = tiny_cpu()
    whole = recipe.pretrain.timesteps
    at_one = recipe.experts[0].timesteps.at_one if span != (whole.low, whole.high) else whole.at_one
    timesteps = TimestepConfig(low=low, high=high, at_one=at_one)
    changes = {"steps": steps, "seed": TUNING + seed, "timesteps": timesteps}
    return recipe.experts[0].model_copy(update={**changes, "report_every": steps})


def _trained(
    config: ModelConfig,
    start: State,
    train: TrainConfig,
    batches: Iterator[Batch],
    report: Callable[[loop.TrainState, loop.Report], None] = lambda *_: None,
) -> State:
    """The averaged weights after a stage that began with `start`."""
    model = LinearSR(config.denoiser)
    model.load_state_dict(start)
    engine = TorchEngine(model, train, torch.device("cpu"))
    stage = loop.TrainState.start(engine, load_autoencoder(config.latent, "cpu"), train)
    return loop.run(stage, batches, report).ema.average


def _bundle(config: ModelConfig, states: Sequence[State]) -> weights.Bundle:
    return weights.Bundle(config, [_frozen(config, state) for state in states], {})


def _frozen(config: ModelConfig, state: State) -> LinearSR:
    model = LinearSR(config.denoiser)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def _minutes(began: float) -> float:
    return round((time.monotonic() - began) / 60, 2)


def report(results: Results, seeds: Sequence[int]) -> str:
    """Return tables of finished seeds: knees, means, and paired differences from the first arm."""
    per_arm = {arm.name: [results.get(seed, arm.name)["values"] for seed in seeds] for arm in ARMS}
    base = per_arm[ARMS[0].name]
    differences = {
        name: [{m: v[m] - b[m] for m in JUDGED} for v, b in zip(values, base, strict=True)]
        for name, values in per_arm.items()
        if name != ARMS[0].name
    }
    return "\n\n".join(
        [
            "The knees; where the detector says rising there is none, and the checkpoint half-way "
            "stands in:",
            _knees(results, seeds),
            f"Means over {len(seeds)} seeds ± standard error:",
            _table(per_arm, _mean),
            f"Difference from {ARMS[0].name}, paired by seed, ± standard error; bold where it is "
            "over two standard errors (chance does that in 18% of the cells with three seeds, in "
            "12% with five):",
            _table(differences, _difference),
        ]
    )


def _knees(results: Results, seeds: Sequence[int]) -> str:
    records = [results.get(seed, PRETRAIN) for seed in seeds]
    return markdown(
        ["seed", "knee", "its detector says", "last checkpoint"],
        [[str(r["seed"]), str(r["knee"]), r["status"], str(r["last"])] for r in records],
    )


def _table(rows: dict[str, list[dict[str, float]]], cell: Callable[[Sequence[float]], str]) -> str:
    lines = [[name, *(cell([v[m] for v in rows[name]]) for m in JUDGED)] for name in rows]
    return markdown(["", *JUDGED], lines)


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f} ± {_error(values):.4f}"


def _difference(values: Sequence[float]) -> str:
    mean, error = statistics.fmean(values), _error(values)
    text = f"{mean:+.4f} ± {error:.4f}"
    return f"**{text}**" if abs(mean) > 2 * error else text


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean; not a number for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


if __name__ == "__main__":
    sys.exit(exit_code(main, "start it again to continue"))
