"""Batched gradients of torch.autograd.grad(is_grads_batched=True).

Torch batches them by an older vmap than torch.func's, for whose tensors no rule can be registered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

MOST_LEVELS = 64  # of that vmap


def are_batched(tensors: tuple[Any, ...]) -> bool:
    return any(t is not None and _functorch.is_legacy_batchedtensor(t) for t in tensors)


def _size(tensors: tuple[Any, ...], level: int) -> int:
    """Of a level's batch; 0 where no tensor has the level."""
    found = (torch._remove_batch_dim(t, level, 0, 0).shape[0] for t in tensors if t is not None)
    return next((size for size in found if size), 0)


def over_batched(function: Callable[..., tuple], tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """function(*tensors) by torch.func.vmap, over the members of all levels of the older one.

    Empty results come back as they are.
    """
    sizes = {}
    for level in range(MOST_LEVELS):
        if not are_batched(tensors):
            break
        size = _size(tensors, level)
        if size:
            tensors = tuple(
                None if t is None else torch._remove_batch_dim(t, level, size, 0) for t in tensors
            )
            sizes[level] = size
    shape = tuple(reversed(sizes.values()))  # the level that was removed last comes first
    given = [t for t in tensors if t is not None]

    def call(*members: Tensor) -> tuple:
        each = iter(members)
        return function(*(None if t is None else next(each) for t in tensors))

    found = torch.func.vmap(call)(*(t.flatten(0, len(shape) - 1) for t in given))

    def wrapped(t: Tensor) -> Tensor:
        t = t.unflatten(0, shape)
        for i, level in enumerate(sizes):  # torch wants them in this order
            t = torch._add_batch_dim(t, len(sizes) - 1 - i, level)
        return t

    return tuple(wrapped(t) for t in found)
