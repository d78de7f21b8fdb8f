"""Digests of tensors, by which runs and files tell whether they have the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest_tensors(tensors: Mapping[str, Tensor], header: str = "") -> str:
    """Return the SHA-256 digest of `header` and of names, shapes and values.

    Values count as bfloat16. So weights have the same digest in training as in a bundle, which has
    them in bfloat16.
    """
    hasher = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tuple(tensor.shape)} ".encode())
        values = tensor.detach().to("cpu", torch.bfloat16).flatten()
        hasher.update(values.view(torch.uint8).numpy().data)
    return hasher.hexdigest()
