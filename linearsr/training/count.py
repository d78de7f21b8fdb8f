"""Operations and bytes of models, counted on tensors that have shapes and no data.

`linearsr.training.plan` makes plans of these counts, and `python -m benchmarks.sizing` the tables
of docs/guides/sizing.md.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from linearsr.config import LatentConfig, ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.diffusion.experts import plan
from linearsr.diffusion.schedule import schedule
from linearsr.latent.autoencoder import DCAutoencoder, without_weights

# Tokens of a handful of names; the tag encoder could take 300.
TAG_TOKENS = 16


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Let tensors that are made inside have shapes and no data.

    PyTorch's own operations take the place of our kernels, which cannot be counted.
    """
    name = "LINEARSR_KERNELS"
    before = os.environ.get(name)
    os.environ[name] = "torch"
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """Let models that are made inside have this dtype. Without data they cannot be cast later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def counted(prepare: Callable[[], Callable[[], object]]) -> int:
    """Count the operations of the call that `prepare` returns; a multiply-add counts as two."""
    with shapes_only():
        work = prepare()
        with FlopCounterMode(display=False) as counter:
            work()
    return int(counter.get_total_flops())


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is active.

    bytes: those that are alive. peak: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Call the operation, and count the storages of its results."""
        arguments = (args, kwargs or {})
        known = {t.untyped_storage()._cdata for t in tree_leaves(arguments) if _is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(_is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self.alive:
                self.alive.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.bytes -= size


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class Forward(NamedTuple):
    """A model with the inputs of one result."""

    model: LinearSR
    picture: Tensor
    latent: Tensor
    joined: Tensor | None
    tags: Tensor | None

    def condition(self) -> Any:
        """Return the part that an expert computes once."""
        return self.model.condition(self.picture, self.joined, self.tags)

    def step(self, condition: Any) -> Tensor:
        """Return the part that an expert computes at every step."""
        return self.model(self.latent, torch.rand(1), condition)


def forward(config: ModelConfig, side: int, tokens: int = TAG_TOKENS) -> Forward:
    """Make the model and inputs for a result of side x side pixels."""
    shape, dim = config.denoiser, config.denoiser.tag_dim
    model, cells = LinearSR(shape), side // config.latent.factor
    model.use_strips = False
    latent = torch.randn(1, shape.latent_channels, cells, cells)
    tags = None if dim is None else torch.randn(1, tokens, dim)
    picture = torch.randn(1, 3, side, side)
    return Forward(model, picture, latent, latent if shape.condition_latent else None, tags)


@lru_cache(maxsize=64)
def denoiser(config: ModelConfig, side: int, tokens: int = TAG_TOKENS) -> tuple[int, int]:
    """Return the operations of one step, and of the part that an expert computes once."""

    def step() -> Callable[[], object]:
        inputs = forward(config, side, tokens)
        condition = inputs.condition()
        return lambda: inputs.step(condition)

    return counted(step), counted(lambda: forward(config, side, tokens).condition)


@lru_cache(maxsize=64)
def autoencoder(latent: LatentConfig, side: int) -> tuple[int, int]:
    """Return the operations of encoding and of decoding one picture; 0 without a learned latent."""
    if latent.kind == "space-to-depth":
        return 0, 0

    def encode() -> Callable[[], object]:
        model, picture = without_weights(latent), torch.randn(1, 3, side, side)
        return lambda: model.encode(picture, picture)

    def decode() -> Callable[[], object]:
        model, picture = without_weights(latent), torch.randn(1, 3, side, side)
        z = torch.randn_like(model.encode(picture, picture))
        return lambda: model.decode(z, picture)

    return counted(encode), counted(decode)


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


@cache
def size(config: ModelConfig) -> tuple[int, int]:
    """Return the numbers of parameters of one expert and of the autoencoder."""
    with shapes_only():
        learned = without_weights(config.latent)
        count = parameters(learned.model) if isinstance(learned, DCAutoencoder) else 0
        return parameters(LinearSR(config.denoiser)), count


def picture_flops(config: ModelConfig, side: int, steps: int | None = None) -> int:
    """Return the operations of a result: the steps, what each expert computes once, decoding."""
    sampling = config.sampling
    times = schedule(sampling, steps)[:-1]
    step, once = denoiser(config, side)
    experts = len({segment.expert for segment in plan(times, sampling.boundaries)})
    return len(times) * step + experts * once + autoencoder(config.latent, side)[1]
