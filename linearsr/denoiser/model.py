"""`LinearSR`: the one denoiser class behind every model size.

Knows nothing of pictures, samplers or experts: an expert is just another set of these weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linearsr.config import DenoiserConfig
from linearsr.cuda_graph import Graphs
from linearsr.denoiser import cpu_block
from linearsr.denoiser.blocks import Block, TagAttention
from linearsr.denoiser.conditioning import LRStem, TagProjection, TimestepEmbedding
from linearsr.diffusion.path import Preconditioning
from linearsr.errors import OptionError
from linearsr.kernels import modulate

TagKeys = list[tuple[Tensor, Tensor]]


class Condition(NamedTuple):
    """Tensors that an expert derives from a request once and uses at every step.

    embedded: (B, h, w, width), the LR picture's part of the embedded input.
    tags: keys and values of the tags, a pair per block; None if there are no tags.
    tag_mask: (B, T), True where a tag is real; None when all are.
    """

    embedded: Tensor
    tags: TagKeys | None = None
    tag_mask: Tensor | None = None


class LinearSR(nn.Module):
    """Flow-matching transformer with linear attention for super-resolution (arXiv 2510.08771).

    If `embed` has zero weights for the LR picture, as after a conversion, and `prediction` is
    "velocity", this is diffusers' `SanaTransformer2DModel` at `t * timestep_scale`.
    """

    # Whether a CPU runs blocks strip by strip; benchmarks turn it off to measure the gain.
    use_strips = True
    # Whether the backward pass computes the blocks again instead of keeping their activations.
    checkpoint_blocks = False

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        width, latent = config.width, config.latent_channels
        condition = config.stem_channels[-1] + latent * config.condition_latent
        self.stem = LRStem(config.stem_channels, config.stem_strides)
        self.embed = nn.Linear(latent + condition, width)
        self.time = TimestepEmbedding(width, config.timestep_scale)
        self.tags = None if config.tag_dim is None else TagProjection(config.tag_dim, width)
        tag_heads = None if config.tag_dim is None else config.tag_heads
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.head_dim,
                config.ffn_ratio,
                config.qk_norm,
                tag_heads,
                config.local_kernel,
            )
            for _ in range(config.depth)
        )
        self.modulation = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.out = nn.Linear(width, latent)
        self._graphs: Graphs | None = None
        self._initialise()

    def _initialise(self) -> None:
        """Start with a zero output (as DiT), so that training begins at the LR picture itself.

        The tags' share starts at zero too (as PixArt), and stays there if training has no tags.
        """
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        nn.init.normal_(self.time.modulation.weight, std=0.02)
        nn.init.zeros_(self.time.modulation.bias)
        for attention in self._tag_attentions():
            nn.init.zeros_(attention.out.weight)
            nn.init.zeros_(attention.out.bias)

    def condition(
        self,
        lr_picture: Tensor,
        lr_latent: Tensor | None = None,
        tags: Tensor | None = None,
        tag_mask: Tensor | None = None,
    ) -> Condition:
        """Return the tensors that stay the same over all steps of a request.

        lr_picture: (B, 3, H, W) in [-1, 1], upsampled to the output's size.
        lr_latent: (B, latent_channels, h, w), the same picture encoded, if the config needs it.
        tags: (B, T, tag_dim) embeddings; tag_mask: (B, T), True where real.
        Raises OptionError if the model was trained without tags and gets some, or if it needs a
        latent and gets none.
        """
        if tag_mask is not None and tag_mask.dtype != torch.bool:
            raise ValueError(
                f"tag_mask must be bool (True for a tag, False for padding), not {tag_mask.dtype}"
            )
        features = self.stem(lr_picture)
        if self.config.condition_latent:
            if lr_latent is None:
                raise OptionError("this model needs the encoded LR picture (lr_latent)")
            features = torch.cat([features, lr_latent.to(features.dtype)], dim=1)
        # One matrix over latent and features is a sum over both; this part does not depend on t.
        weight = self.embed.weight[:, self.config.latent_channels :]
        embedded = F.linear(features.permute(0, 2, 3, 1), weight, self.embed.bias)
        if tags is None:
            return Condition(embedded)
        return Condition(embedded, self.tag_keys(tags), tag_mask)

    def tag_keys(self, tags: Tensor) -> TagKeys:
        """Return keys and values of embeddings (B, T, tag_dim), a pair for each block.

        Raises OptionError on a model trained without tags.
        """
        if self.tags is None:
            raise OptionError("this model was trained without tags; leave them out (--tags)")
        projected = self.tags(tags)
        return [attention.keys_values(projected) for attention in self._tag_attentions()]

    def compile_blocks(self) -> None:
        """Let torch.compile fuse the blocks, once for each picture size.

        All blocks share the compiled code, and the next process finds it in a cache on disk. On a
        CPU this needs a C++ compiler, and replaces `cpu_block`, which is faster
        (docs/guides/speed.md). PyTorch compiles for eight sizes
        (torch._dynamo.config.recompile_limit), then no more.
        """
        self.use_strips = False
        for block in self.blocks:
            block.compile(dynamic=False)

    def record_graphs(self) -> None:
        """Run forwards as CUDA graphs from now on, for the shapes of latents that come again.

        Forwards then may come from one thread at a time, and none may ask for gradients.
        """
        self._graphs = Graphs(self._recorded)

    def drop_graphs(self) -> None:
        """Free the memory of the CUDA graphs, if there are any."""
        if self._graphs is not None:
            self._graphs.clear()

    def _recorded(self, latent: Tensor, t: Tensor, embedded: Tensor, *tags: Tensor) -> Tensor:
        """Return the velocity. tags: keys and values of each block in turn, if there are any."""
        keys_values = list(zip(tags[::2], tags[1::2], strict=True))
        return self._velocity(latent, t, Condition(embedded, keys_values or None))

    def _tag_attentions(self) -> list[TagAttention]:
        attentions = (cast(Block, block).tag_attention for block in self.blocks)
        return [attention for attention in attentions if attention is not None]

    def forward(self, latent: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the velocity (B, C, h, w) at noisy `latent` and timesteps `t` (B,) in [0, 1]."""
        if self._graphs is None or condition.tag_mask is not None:
            return self._velocity(latent, t, condition)
        tags = [part for keys_values in condition.tags or [] for part in keys_values]
        return self._graphs(latent, t, condition.embedded, *tags)

    def _velocity(self, latent: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if self.config.prediction == "velocity":
            return self._network(latent, t, condition)
        c = Preconditioning.at(t.to(latent.dtype))
        completed = self._network(c.input_scale * latent, t, condition)
        return torch.addcmul(c.skip * latent, c.output_scale, completed)

    def _runner(self, x: Tensor) -> Callable[..., Tensor]:
        """Return the function that calls a block, with the block as its first argument."""
        if self.use_strips and cpu_block.supports(x):
            return cpu_block.forward_
        if self.checkpoint_blocks and torch.is_grad_enabled():
            # A block draws no random numbers.
            return partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        return Block.__call__

    def _network(self, latent: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = self.embed.weight.dtype
        weight = self.embed.weight[:, : self.config.latent_channels]
        x = F.linear(latent.to(dtype).permute(0, 2, 3, 1), weight).add_(condition.embedded)
        modulation, embedding = self.time(t)
        run = self._runner(x)
        for i, block in enumerate(self.blocks):
            tags = None if condition.tags is None else condition.tags[i]
            x = run(cast(Block, block), x, modulation, tags, condition.tag_mask)
        shift, scale = (self.modulation + embedding[:, None])[:, :, None, None].unbind(1)
        return self.out(modulate(x, shift, scale)).permute(0, 3, 1, 2).to(latent.dtype)
