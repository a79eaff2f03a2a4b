"""The kernels of ops that are in Python, and the autograd nodes that they record.

The dispatcher calls such a kernel once for each level of torch.func's transforms that are active.
torch.autograd.Function would go through these levels itself; its base class records a node at one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd.function import _SingleLevelFunction

from fusedrnn import dynamo


class Node(_SingleLevelFunction):
    """`apply` of a subclass records it at the dispatcher's level, outside of transforms only."""

    def __init_subclass__(cls) -> None:
        for name in {"forward", "backward", "jvp"} & cls.__dict__.keys():
            dynamo.leave(getattr(cls, name))

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *arguments: Any) -> Any: ...

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple:
        return (ctx._autograd_function_id,)


_library = torch.library.Library("fusedrnn", "IMPL")


def register(op: str, kernel: Callable[..., Any], key: str) -> None:
    """Makes `kernel`, which takes the key set first, the op's for a dispatch key."""
    dynamo.leave(kernel)
    _library.impl(op, kernel, key, with_keyset=True)


def apply(node: type[Node], *arguments: Any) -> tuple:
    """Records `node` at the dispatcher's level, inside of torch.func's transforms or not."""
    if torch._C._are_functorch_transforms_active():
        with enable_single_level_autograd_function():
            return node.apply(*arguments)
    return node.apply(*unwrap_dead_wrappers(arguments))
