"""Engines step the weights: one process in plain torch, or many with DeepSpeed ZeRO-1.

The loop asks for a step and gets the gradient norm back; only the engine knows which rank holds
which optimizer state. Loading the files of TorchEngine never runs code from them. DeepSpeed's files
are pickles, so a ZeRO checkpoint is resumed only from storage that the run itself wrote.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import pickle
import socket
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from linearsr.denoiser import LinearSR
from linearsr.errors import WeightsError, one_line
from linearsr.pipeline.device import best_dtype
from linearsr.training.config import TrainConfig
from linearsr.training.lora import trained

# DeepSpeed's folder inside a checkpoint, followed by the number of ranks that wrote it.
TAG = "zero-of-"
# Numbers in the buffer that DeepSpeed allocates for gradients; by default ten times as many.
BUCKET = 50_000_000

UNREAD = "{}: cannot be resumed from: another rank could not read it"

# Errors of torch and DeepSpeed for files that are missing, cut short, or of another model.
DAMAGED = (
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    AssertionError,
    pickle.UnpicklingError,
)


class Engine(Protocol):
    """A model and its optimizer, over one rank or many."""

    module: LinearSR
    device: torch.device
    dtype: torch.dtype  # that forward passes compute in
    rank: int
    world: int

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context for forward passes."""
        ...

    def share(self, mean: float, largest: float) -> tuple[float, float]:
        """Return the mean of `mean`, and the maximum of `largest`, over all ranks."""
        ...

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all ranks; they must have the same shapes there."""
        ...

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradients of a loss to those since the last step.

        last: whether no further loss is added before the step; the ranks share gradients then.
        """
        ...

    def step(self, rate: float) -> float:
        """Update the weights by the gradients of all ranks.

        Return the norm of the whole gradient before clipping. If it is not finite, the weights do
        not change.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights and optimizer into a checkpoint folder."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises WeightsError if it is damaged or of another model."""
        ...

    def close(self) -> None:
        """Free the engine's memory."""
        ...


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return torch's AdamW: DeepSpeed's would have to be compiled on the user's machine.

    It has no state for frozen parameters.
    """
    return torch.optim.AdamW(
        trained(model).values(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=config.betas,
        fused=True,
    )


class TorchEngine:
    """The engine of a single process; mixed precision by autocast over float32 weights."""

    rank, world = 0, 1

    def __init__(self, model: LinearSR, config: TrainConfig, device: torch.device) -> None:
        self.module = model.to(device).to(memory_format=torch.channels_last)
        self.module.checkpoint_blocks = config.activation_checkpointing
        self.device = device
        self.config = config
        self.dtype = torch.bfloat16 if in_bfloat16(config, device) else torch.float32
        self.optimizer = adamw(self.module, config)

    def precision(self) -> AbstractContextManager[Any]:
        """Return an autocast to bfloat16, if the config or, with "auto", the processor wants it."""
        enabled = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def share(self, mean: float, largest: float) -> tuple[float, float]:
        """Return both numbers: there is one rank."""
        return mean, largest

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Change nothing: there is one rank."""

    def backward(self, loss: Tensor, *, last: bool = True) -> None:  # noqa: ARG002
        """Run the backward pass."""
        loss.backward()

    def step(self, rate: float) -> float:
        """Clip, and step AdamW."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip).item()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def save(self, folder: Path) -> None:
        """Write the trained weights and the optimizer into one file."""
        weights = {name: p.detach() for name, p in trained(self.module).items()}
        payload = {"model": weights, "optimizer": self.optimizer.state_dict()}
        torch.save(payload, folder / "torch.pt")

    def load(self, folder: Path) -> None:
        """Read the file that `save` wrote; only tensors are unpickled."""
        with as_weights_error(folder):
            path = folder / "torch.pt"
            payload = torch.load(path, weights_only=True, map_location=self.device)
            if payload["model"].keys() != trained(self.module).keys():
                raise LookupError("it has weights of other layers")
            self.module.load_state_dict(payload["model"], strict=False)
            self.optimizer.load_state_dict(payload["optimizer"])

    def close(self) -> None:
        """Do nothing: all memory belongs to the object."""


class ZeroEngine:
    """The engine of one rank of the torch.distributed group; each keeps its part of AdamW's state.

    In bfloat16 the weights are bfloat16 too, and ZeRO shards their float32 masters as well.
    """

    def __init__(self, model: LinearSR, config: TrainConfig, device: torch.device) -> None:
        # Before the import: DeepSpeed would take a GPU that it sees, whatever the model is on.
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        import deepspeed
        import torch.distributed as dist

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Its operations would be compiled when first used; gloo does without them.
        deepspeed.ops.__compatible_ops__ = {}
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = device
        # Ranks sum their gradients, so one slow processor decides for all.
        _, slowest = self.share(0.0, float(not in_bfloat16(config, device)))
        self.dtype = torch.float32 if slowest else torch.bfloat16
        model = model.to(device)
        model.checkpoint_blocks = config.activation_checkpointing
        self.zero, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw(model, config),
            config=zero_config(config, bfloat16=not slowest),
            dist_init_required=False,
        )
        self.module: LinearSR = self.zero.module

    def precision(self) -> AbstractContextManager[Any]:
        """Return an empty context: ZeRO holds the weights in the right precision."""
        return contextlib.nullcontext()

    def share(self, mean: float, largest: float) -> tuple[float, float]:
        """Return mean and maximum by one small all-reduce each."""
        import torch.distributed as dist

        total, peak = (torch.tensor(x, device=self.device) for x in (mean, largest))
        dist.all_reduce(total)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        return total.item() / self.world, peak.item()

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Average all tensors by one all-reduce."""
        import torch.distributed as dist

        joined = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(joined)
        parts = (joined / self.world).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Run the backward pass; the last one lets DeepSpeed average gradients over ranks."""
        # Set at each call: DeepSpeed's own count would be wrong after a checkpoint that was
        # written with another accumulation.
        self.zero.set_gradient_accumulation_boundary(last)
        self.zero.backward(loss)

    def step(self, rate: float) -> float:
        """Let DeepSpeed clip, and step this rank's partition."""
        for group in self.zero.optimizer.param_groups:
            group["lr"] = rate
        self.zero.step()
        return float(self.zero.get_global_grad_norm())

    def save(self, folder: Path) -> None:
        """Write this rank's ZeRO shard and, on rank 0, the trained weights.

        All ranks must call it.
        """
        self.zero.save_checkpoint(
            str(folder),
            tag=f"{TAG}{self.world:05d}",
            save_latest=False,
            exclude_frozen_parameters=True,
        )

    def load(self, folder: Path) -> None:
        """Read a checkpoint of any number of ranks, in either precision.

        All ranks must call it: either all raise or none does.
        """
        problem: WeightsError | None = None
        with tempfile.TemporaryDirectory(prefix="linearsr-") as scratch:
            try:
                with as_weights_error(folder):
                    self._load(_zero_folder(folder), Path(scratch))
            except WeightsError as error:
                problem = error
            # Other ranks may read this rank's scratch folder until all have come here.
            failed, _ = self.share(float(problem is not None), 0.0)
        if problem:
            raise problem
        if failed:
            raise WeightsError(UNREAD.format(folder))

    def _load(self, saved: Path, scratch: Path) -> None:
        # DeepSpeed read its configuration long before; the precision is known only now.
        shards = "bf16_zero_*" if self.zero.bfloat16_enabled() else "zero_*"
        universal = saved.name != f"{TAG}{self.world:05d}" or not any(saved.glob(shards))
        self.zero._config.load_universal_checkpoint = universal
        source = self._universal(saved, scratch) if universal else saved
        # A frozen base is not in the checkpoint; the shards have all weights that are trained.
        frozen = any(not p.requires_grad for p in self.module.parameters())
        loaded, _ = self.zero.load_checkpoint(
            str(source.parent), tag=source.name, load_module_strict=not frozen
        )
        if loaded is None:  # DeepSpeed only logs it
            raise WeightsError(f"{saved}: this checkpoint has no weights")

    def _universal(self, saved: Path, scratch: Path) -> Path:
        """Convert a checkpoint for any number of ranks and either precision; return its folder.

        The first rank of each machine converts the ZeRO shards, and the others there wait for it.
        """
        import torch.distributed as dist

        machines, copies = [""] * self.world, [""] * self.world
        dist.all_gather_object(machines, socket.gethostname())
        first = machines.index(machines[self.rank])
        copy = ""
        try:
            if first == self.rank:
                copy = _convert(saved, scratch / "universal")
        finally:  # The other ranks wait for it and must know if it failed.
            dist.all_gather_object(copies, copy)
        if not copies[first]:
            raise WeightsError(UNREAD.format(saved))
        return Path(copies[first])

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model and free its buffers."""
        self.zero.destroy()


def in_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """Return whether this rank would compute in bfloat16; "auto" leaves it to the processor."""
    if config.bfloat16 == "auto":
        return best_dtype(device) == torch.bfloat16
    return config.bfloat16


def zero_config(config: TrainConfig, *, bfloat16: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration. It ignores keys that it does not know: keep them few."""
    return {
        # The loss is a mean already; DeepSpeed only requires a number here.
        "train_micro_batch_size_per_gpu": 1,
        # ZeroEngine says itself which loss is the last one of a step.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": BUCKET},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bfloat16},
    }


def _zero_folder(folder: Path) -> Path:
    """Return the ZeRO folder of a checkpoint, which must have the shards of all its ranks."""
    folders = list(folder.glob(f"{TAG}*"))
    if len(folders) != 1:
        raise WeightsError(
            f"{folder}: not a checkpoint of DeepSpeed: expected one folder {TAG}*, found "
            f"{len(folders)}"
        )
    shards = len(list(folders[0].glob("*_optim_states.pt")))
    expected = int(folders[0].name.removeprefix(TAG))
    if shards != expected:
        raise WeightsError(
            f"{folders[0]}: incomplete checkpoint: found {shards} of {expected} files "
            "*_optim_states.pt"
        )
    return folders[0]


def _convert(saved: Path, target: Path) -> str:
    """Convert ZeRO shards to DeepSpeed's universal form in `target`, and return it."""
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(saved),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        ds_to_universal.main(options)
    return str(target)


@contextlib.contextmanager
def as_weights_error(folder: Path) -> Any:
    """Turn errors of reading a checkpoint's files into WeightsError."""
    try:
        yield
    except DAMAGED as error:
        raise WeightsError(f"{folder}: cannot be resumed from: {one_line(error)}") from error
