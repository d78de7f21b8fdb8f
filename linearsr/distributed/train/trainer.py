"""One training stage on a Ray cluster: Ray Train runs `linearsr.training.loop` on every worker.

    data actors -> workers (ZeRO-1, checkpoint, report) -> validation task -> knee callback

Knows nothing of what comes before or after the stage: `linearsr.distributed.train.esgf` does.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train import ValidationConfig as RayValidation
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from linearsr.config import LoRAConfig, ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.distributed.compat import progress_bar
from linearsr.distributed.resources import ResourceRequest, check_feasible
from linearsr.distributed.train.config import StageConfig
from linearsr.distributed.train.data import Share, batches, notes_about, open_source
from linearsr.distributed.train.knee import Knee, KneePointCallback, advance, read_knee
from linearsr.distributed.train.start import Start, check_start
from linearsr.distributed.train.validation import validate_checkpoint, validation_pictures
from linearsr.errors import LinearSRError, OptionError, one_line, require
from linearsr.latent import Autoencoder, load_autoencoder
from linearsr.storage.location import Location, check_writable, locate
from linearsr.tags.encoder import tag_encoder
from linearsr.training import loop, lora, perceptual
from linearsr.training.config import PerceptualConfig
from linearsr.training.engine import Engine, ZeroEngine
from linearsr.training.guard import Diverged

MODEL, LORA = "model.json", "lora.json"
ADVICE = "lower learning_rate, or start from an earlier checkpoint"


class Outcome(NamedTuple):
    """The folder of a finished stage, its knee, and its last metrics.

    kept: checkpoint and step of an expert that a stage has left as it was.
    """

    run: Location
    knee: Knee
    metrics: dict[str, Any]
    kept: tuple[Location, int | None] | None = None


def train(stage: StageConfig) -> Outcome:
    """Train a stage to its end and return its outcome; continue a run of that storage and name.

    Raises LinearSRError if `check` does, before anything starts, and if the stage fails; what it
    had reported is kept.
    """
    check(stage)
    callback = KneePointCallback(stage.run, stage.recipe.validation.knee, stage.cluster.patience)
    try:
        result = _trainer(stage, callback).fit()
    except ray.train.TrainingFailedError as error:
        failures = list((getattr(error, "worker_failures", {}) or {}).values()) or [error]
        # An error of ours, not its consequences on other ranks.
        cause = min(failures, key=lambda failure: not isinstance(failure, LinearSRError))
        raise LinearSRError(f"{stage.run.path}: training failed: {one_line(cause)}") from error
    if result.return_value:
        raise LinearSRError(f"{stage.run.path}: {result.return_value}")
    # Once more: some validations ended after the last report.
    return Outcome(stage.run, callback.update(), dict(result.metrics or {}))


def check(stage: StageConfig) -> None:
    """Raise LinearSRError for what cannot work, before any worker starts or GPU is reserved."""
    require("train", "deepspeed", "tensorboard", "matplotlib")
    cluster, recipe = stage.cluster, stage.recipe
    stage.data.micro_batch(cluster.workers, stage.train.accumulation)
    check_writable(locate(cluster.storage))
    open_source(cluster.data, stage.data, stage.train.seed, stage.wanted)
    validation_pictures(cluster.validation, recipe.validation)
    check_start(stage)
    if isinstance(stage.train, PerceptualConfig):
        perceptual.check(stage.train)
    advice = "use fewer workers, or lower worker_cpus, data_cpus, validation_cpus"
    worker = ResourceRequest(cluster.worker_cpus, int(cluster.gpu))
    check_feasible("the stage", ResourceRequest(cluster.cpus(), cluster.gpus()), worker, advice)
    if stage.lora is not None:
        require("train", "peft")
    _claim(stage)


def _claim(stage: StageConfig) -> None:
    """Note the model and the adapters in the run's folder, or refuse a run that has others.

    Their checkpoints would not fit.
    """
    file, model = stage.run / MODEL, stage.recipe.model
    note, adapters = stage.run / LORA, None if stage.lora is None else stage.lora.model_dump_json()
    if not file.exists():
        if adapters is not None:
            note.write(adapters.encode())
        file.write(model.model_dump_json().encode())
        return
    if ModelConfig.model_validate_json(file.read()) != model:
        raise OptionError(
            f"{stage.run.path}: this run was started with a different model config; choose another "
            "--name, or the settings it was started with"
        )
    known = LoRAConfig.model_validate_json(note.read()) if note.exists() else None
    if known != stage.lora:
        raise OptionError(
            f"{stage.run.path}: this run was started with another lora; choose another --name, or "
            "the settings it was started with"
        )


def _trainer(stage: StageConfig, callback: KneePointCallback) -> TorchTrainer:
    cluster = stage.cluster
    storage = locate(cluster.storage)
    return TorchTrainer(
        _worker,
        train_loop_config={"stage": stage.model_dump_json()},
        torch_config=TorchConfig(backend="nccl" if cluster.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpu,
            resources_per_worker={
                "CPU": cluster.worker_cpus,
                **({"GPU": 1} if cluster.gpu else {}),
            },
        ),
        run_config=RunConfig(
            name=cluster.name,
            storage_path=storage.path,
            storage_filesystem=storage.filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=cluster.keep),
            callbacks=[callback],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        validation_config=RayValidation(
            fn=partial(validate_checkpoint, stage_json=stage.model_dump_json()),
            ray_remote_kwargs={
                "num_cpus": cluster.validation_cpus,
                "num_gpus": cluster.validation_gpus,
            },
        ),
    )


# In the workers


def _worker(config: dict[str, str]) -> str | None:
    """Train this rank's part, from the last checkpoint if there is one.

    Returns the reason if it gave up: Ray Train would retry after an exception, in vain.
    """
    job = StageConfig.model_validate_json(config["stage"])
    context = ray.train.get_context()
    share = Share(context.get_world_rank(), context.get_world_size(), job.cluster.data_cpus)
    with _Reporter(job, share) as reporter:
        try:
            state = _build(job)
        except OptionError as error:
            return str(error)
        if checkpoint := ray.train.get_checkpoint():
            with Location(checkpoint.filesystem, checkpoint.path).local() as folder:
                state.load(folder)
        while not reporter.stops():
            try:
                seen, steps = state.progress.seen, job.train.steps - state.progress.step
                source = job.cluster.data, job.data, job.train.seed
                with closing(batches(*source, seen, steps, share, job.wanted)) as data:
                    loop.run(state, data, reporter)
                return None
            except Diverged as error:
                reason = str(error)
            progress = state.progress
            if progress.attempt >= job.train.guard.restarts:
                return f"{reason}; gave up after {progress.attempt} restarts: {ADVICE}"
            state.engine.close()
            del state  # before its successor is built: both may not fit
            state = _restart(job, progress, reason, reporter)
    return None


def _build(job: StageConfig) -> loop.TrainState:
    torch.manual_seed(job.train.seed)
    train, config, expert = job.train, job.recipe.model, job.expert or 0
    objective: loop.Objective | None = None
    origin: lora.Origin | None = None
    start = Start(job)
    if job.start is None:
        model = LinearSR(config.denoiser)
    elif job.lora is not None:
        model, origin = start.adapted(expert, job.lora)
    else:
        model = start.expert(expert).requires_grad_(True).train()
    device = get_device()
    engine = ZeroEngine(model, train, device)
    if isinstance(train, PerceptualConfig):
        frozen: Callable[[int], LinearSR] = start.expert
        if origin is not None:  # experts on the base that the engine already holds
            frozen = lora.sharing(engine.module, origin.config, start.adapters)
        objective = perceptual.objective(config, train, expert, frozen, engine)
    autoencoder, encoder = _autoencoder(job, engine), tag_encoder(config, device)
    return loop.TrainState.start(engine, autoencoder, train, encoder, objective, origin)


def _autoencoder(job: StageConfig, engine: Engine) -> Autoencoder:
    """Load the autoencoder: on the CPU if all that it would do is done in the shards.

    Raises OptionError if other weights have made the shards' latents or embeddings.
    """
    config = job.recipe.model
    notes = notes_about(job.cluster.data, job.data)
    idle = notes is not None and not job.train.pixels
    autoencoder = load_autoencoder(config.latent, "cpu" if idle else engine.device, engine.dtype)
    if notes is not None:
        notes.check_weights(config, autoencoder.digest())
    return autoencoder


def _restart(
    job: StageConfig, failed: loop.Progress, reason: str, reporter: _Reporter
) -> loop.TrainState:
    """After a divergence, go back to the knee or to the start, at a lower rate and on new data."""
    state = _build(job)
    # The copy that the controller keeps: retention may have deleted the checkpoint itself.
    knee = broadcast_from_rank_zero(read_knee(job.run).checkpoint if reporter.leads else None)
    if knee is not None:
        with Location(job.run.filesystem, knee).local() as folder:
            state.load(folder)
    state.progress.attempt, state.progress.seen = failed.attempt + 1, failed.seen
    state.progress.minutes = failed.minutes
    if reporter.leads:
        print(
            f"{job.cluster.name}: {reason}; back to step {state.progress.step} at a lower rate "
            f"(attempt {state.progress.attempt})",
            flush=True,
        )
    reporter.checkpoint(state, {"diverged": reason}, validation=False)
    return state


class _Reporter:
    """Reports of a rank: checkpoints from all ranks, progress and curves from rank 0."""

    def __init__(self, job: StageConfig, share: Share) -> None:
        self.job = job
        self.leads = share.rank == 0
        self.local = Path(tempfile.mkdtemp(prefix="linearsr-"))
        if self.leads:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.local))
            self.bar = progress_bar(job.cluster.name, job.train.steps, "step")
            self.bar.step = 0
        # Read once: Ray does not report checkpoints that retention has deleted.
        self.last_knee = read_knee(job.run) if self.leads else Knee()
        self.began, self.stalled = time.perf_counter(), 0.0
        self.warned: list[str] = []

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.leads:
            self.bar.close()
        shutil.rmtree(self.local, ignore_errors=True)

    def __call__(self, state: loop.TrainState, report: loop.Report) -> bool:
        """Report, on all ranks alike; True ends the stage: its knee and the patience are past."""
        if self.leads:
            self._show(report)
        notice = ray.train.get_preemption_info()
        # Once per notice: the nodes named in it have minutes, and an upload takes its time.
        preempted = notice is not None and notice.preempted_node_ids != self.warned
        self.warned = notice.preempted_node_ids if notice else []
        due = report.step % state.config.checkpoint_every == 0 or state.finished
        if not (due or preempted):
            return False
        self.checkpoint(state, report._asdict(), validation=due)
        return self.stops()

    def stops(self) -> bool:
        """Return, on all ranks alike, whether the patience after the confirmed knee is spent."""
        return broadcast_from_rank_zero(self._knee().stop if self.leads else None)

    def _knee(self) -> Knee:
        """Return the knee according to the checkpoints that Ray Train has recorded by now."""
        # Without waiting for uploads and validations that are on their way.
        reported = ray.train.get_all_reported_checkpoints(timeout_s=0)
        self.last_knee = advance(
            self.last_knee,
            [(each.checkpoint, each.metrics) for each in reported],
            self.job.recipe.validation.knee,
            self.job.cluster.patience,
        )
        return self.last_knee

    def checkpoint(
        self, state: loop.TrainState, metrics: dict[str, Any], *, validation: bool
    ) -> None:
        """Save this rank's part on this machine; Ray uploads it while training goes on.

        The report's `stall` is the fraction of the time so far that checkpoints have kept steps
        waiting.
        """
        began = time.perf_counter()
        folder = Path(tempfile.mkdtemp(prefix="linearsr-checkpoint-"))
        state.save(folder)
        progress = state.progress
        position: dict[str, float] = {
            "step": progress.step,
            "seen": progress.seen,
            "attempt": progress.attempt,
            "stall": self.stalled / (began - self.began),
        }
        ray.train.report(
            {**metrics, **position},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            validation=validation,
        )
        if self.leads:
            self.board.flush()
            locate(self.local).copy_to(self.job.run / "tensorboard")
        self.stalled += time.perf_counter() - began

    def _show(self, report: loop.Report) -> None:
        for name, value in report._asdict().items():
            self.board.add_scalar(f"train/{name}", value, report.step)
        knee = self._knee()
        known = "rising" if knee.step is None else f"{knee.status} at {knee.step}"
        self.bar.set_description(
            f"{self.job.cluster.name} loss {report.loss:.4f} "
            f"{report.images_per_second:.1f} images/s knee {known}"
        )
        self.bar.update(report.step - self.bar.step)
        self.bar.step = report.step
