"""One expert takes its steps on the tiles of several requests at once.

    the first tile of every request, then the second, ...
        -> groups of tiles that fit through the model together
        -> one tensor per group, sampled over the segment
        -> each tile's own result

Knows nothing of pictures, options or the stages before and after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linearsr.denoiser.model import LinearSR, TagKeys
from linearsr.diffusion.experts import Segment
from linearsr.diffusion.path import clean_guess
from linearsr.diffusion.solvers import SolverState, sample, uses_previous
from linearsr.imaging.tiles import Tile
from linearsr.pipeline.state import AnyState, DenoiseState


class TileTask(NamedTuple):
    """One tile of one request, and the steps to take on it.

    owner: index of the request in the batch. number: index of the tile in the request.
    tags: keys and values of the request's tags, the same for all tiles and steps.
    """

    owner: int
    state: DenoiseState
    segment: Segment
    number: int
    tags: TagKeys | None

    @property
    def tile(self) -> Tile:
        """The tile's place in the latent grid."""
        return self.state.tiles[self.number]

    @property
    def solver_state(self) -> SolverState:
        """The latent (1, C, th, tw) before the segment, and what the solver remembers of it."""
        state, i = self.state, self.number
        return SolverState(
            state.latents[i],
            state.previous[i] if state.previous else None,
            state.guess[i] if state.guess else None,
        )

    @property
    def keeps_guess(self) -> bool:
        """Whether the clean latent that this segment's first step guesses is kept."""
        return self.state.blends and self.segment.start == 0

    @property
    def steps_behind(self) -> int:
        """How many steps before the segment the solver looks back on: 0 or 1."""
        return 1 if self.state.previous else 0

    @property
    def keeps_previous(self) -> bool:
        """Whether the step after the segment looks back on the segment's last step."""
        return uses_previous(self.state.solver, self.state.timesteps, self.segment.stop)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Start of each step, including those `steps_behind`, and the end of the last one."""
        return self.state.timesteps[self.segment.start - self.steps_behind : self.segment.stop + 1]

    @property
    def group_key(self) -> tuple[object, ...]:
        """Properties that tiles must share to go through the model together."""
        state = self.state
        tags = None if state.tags is None else state.tags.shape
        shape = state.latents[self.number].shape
        return shape, tags, len(self.timesteps), state.solver, self.steps_behind


def denoise_batch(
    model: LinearSR,
    batch: Sequence[tuple[AnyState, Segment]],
    *,
    factor: int,
    encode: Callable[[Tensor], Tensor] | None,
    cells: int,
    wanted: Callable[[int], bool],
    on_step: Callable[[int], None],
) -> list[AnyState]:
    """Return requests after one expert's segment of steps on each; see `Upscaler.denoise_batch`.

    factor: pixels per latent cell along a side. encode: from bicubic pictures (B, 3, H, W) to the
    latents that condition the model; None for a model without them.
    """
    weight = model.embed.weight
    tags = [
        None if state.tags is None else model.tag_keys(state.tags.to(weight.device, weight.dtype))
        for state, _ in batch
    ]
    results: list[list[SolverState]] = [[] for _ in batch]
    for number in range(max(len(state.tiles) for state, _ in batch)):
        tasks = (
            TileTask(owner, state, segment, number, tags[owner])
            for owner, (state, segment) in enumerate(batch)
            if number < len(state.tiles) and wanted(owner)
        )
        for group in group_tiles(tasks, cells):
            for task, result in zip(
                group, _denoise_group(model, group, factor, encode, on_step), strict=True
            ):
                results[task.owner].append(result)
    return [
        dataclasses.replace(
            state,
            latents=tuple(tile.latent for tile in tiles),
            previous=tuple(tile.previous for tile in tiles if tile.previous is not None),
            guess=tuple(tile.guess for tile in tiles if tile.guess is not None),
        )
        if len(tiles) == len(state.tiles)  # otherwise the request is no longer wanted
        else state
        for (state, _), tiles in zip(batch, results, strict=True)
    ]


def group_tiles(tasks: Iterable[TileTask], cells: int) -> Iterator[list[TileTask]]:
    """Yield groups of equal `group_key` with at most `cells` latent cells, or with one tile."""
    alike: dict[tuple[object, ...], list[TileTask]] = {}
    for task in tasks:
        alike.setdefault(task.group_key, []).append(task)
    for group in alike.values():
        tile = group[0].tile
        most = max(1, cells // (tile.height * tile.width))
        for start in range(0, len(group), most):
            yield group[start : start + most]


def _denoise_group(
    model: LinearSR,
    group: Sequence[TileTask],
    factor: int,
    encode: Callable[[Tensor], Tensor] | None,
    on_step: Callable[[int], None],
) -> list[SolverState]:
    """Sample the segment for a group of tiles; returns tensors (1, C, th, tw) on the CPU."""
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    lr = _stack([task.state.enlarged_lr(task.tile, factor, device) for task in group], device)
    condition = model.condition(lr.to(dtype), encode(lr) if encode else None)
    condition = condition._replace(tags=_stack_tags([task.tags for task in group]))
    guess: Tensor | None = None

    def velocity(latent: Tensor, t: Tensor) -> Tensor:
        nonlocal guess
        for task in group:
            on_step(task.owner)
        v = model(latent, t, condition)
        if guess is None and any(task.keeps_guess for task in group):
            guess = clean_guess(latent, v, t)
        return v

    states = [task.solver_state for task in group]
    previous = [state.previous for state in states if state.previous is not None]
    start = SolverState(
        _stack([state.latent for state in states], device).float(),
        _stack(previous, device).float() if previous else None,
    )
    timesteps = torch.tensor([task.timesteps for task in group]).T
    first = group[0]
    end = sample(first.state.solver, velocity, start, timesteps, first.steps_behind)
    return _split(end._replace(guess=guess), group)


def _stack(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Join (1, C, H, W) tensors along the batch, channels last."""
    return torch.cat(list(parts)).to(device).contiguous(memory_format=torch.channels_last)


def _stack_tags(tags: Sequence[TagKeys | None]) -> TagKeys | None:
    """Join keys and values along the batch; all requests have as many tags, or none has any."""
    known = [keys for keys in tags if keys is not None]
    if not known:
        return None
    blocks = zip(*known, strict=True)
    return [
        (torch.cat([k for k, _ in block]), torch.cat([v for _, v in block])) for block in blocks
    ]


def _split(together: SolverState, group: Sequence[TileTask]) -> list[SolverState]:
    """Return each tile's own state on the CPU, with `previous` and `guess` only if needed again.

    Tensors are copied, so that a tile that travels does not take its neighbours along.
    """
    dtype = group[0].solver_state.latent.dtype
    latents, previous, guesses = (
        [None] * len(group) if tensor is None else tensor.to(dtype).cpu().split(1)
        for tensor in together
    )
    states = []
    for task, latent, last, guess in zip(group, latents, previous, guesses, strict=True):
        assert latent is not None
        states.append(
            SolverState(
                latent.clone(),
                last.clone() if last is not None and task.keeps_previous else None,
                guess.clone()
                if guess is not None and task.keeps_guess
                else task.solver_state.guess,
            )
        )
    return states
