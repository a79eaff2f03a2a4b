"""Who is measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import fusedrnn


@dataclass(frozen=True)
class Peer:
    """One implementation.

    ``build`` makes of torch.nn's layer a module of the same weights that is called in the same way.
    It must leave the layer it is given alone.
    """

    name: str
    build: Callable[[nn.RNNBase], nn.Module]


def _fused(layer: nn.RNNBase) -> nn.Module:
    return fusedrnn.swap(copy.deepcopy(layer))


# The first one is what the others are compared with.
PEERS = (Peer("torch.nn", copy.deepcopy), Peer("fusedrnn", _fused))
