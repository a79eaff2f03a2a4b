"""Who is measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

import fusedrnn
from benchmarks import adapters
from benchmarks.cases import Case
from benchmarks.measure import Setting, no_tf32


@dataclass(frozen=True)
class Question:
    """What a peer may have no answer to."""

    case: Case
    mode: str
    dtype: torch.dtype
    device: torch.device


def _anything(question: Question) -> bool:
    return True


def _float32_on_cuda(q: Question) -> bool:
    return q.device.type == "cuda" and q.dtype == torch.float32


def _training(q: Question) -> bool:
    return q.mode == "training"


def _onnx_can(q: Question) -> bool:
    dtypes = (torch.float32, torch.float64)
    return (
        q.device.type == "cpu"
        and q.mode == "inference"
        and q.dtype in dtypes
        and not q.case.shortest
    )


def _flashrnn_can(q: Question) -> bool:
    # Its kernels for CPUs are for checking, and float64 is not among its dtypes.
    plain = q.case.layers == 1 and not q.case.bidirectional and not q.case.shortest
    return q.device.type == "cuda" and q.dtype != torch.float64 and plain


def _compile_can(q: Question) -> bool:
    # It unrolls the steps: some thousands of them would be compiling for minutes.
    steps = q.case.steps * q.case.layers * q.case.directions
    return steps <= 128 and not q.case.shortest


def _loop_can(q: Question) -> bool:
    return not q.case.shortest


@dataclass(frozen=True)
class Peer:
    """One implementation.

    ``build`` makes of torch.nn's layer and an example of its input a module of the same weights
    that is called in the same way, and has the same parameters if it can train. It must leave the
    layer it is given alone. ``can`` says what it is asked at all. ``factor`` is how many times
    torch.nn's own error it may have: fusedrnn promises 2, others never promised anything and are
    held to being right. ``setting`` holds while it runs.
    """

    name: str
    build: Callable[[nn.RNNBase, object], nn.Module]
    can: Callable[[Question], bool] = _anything
    needs: tuple[str, ...] = ()  # packages
    factor: float = 2.0
    setting: Setting = nullcontext

    def missing(self) -> str | None:
        """The package that is needed and not installed, if there is one."""
        absent = (name for name in self.needs if importlib.util.find_spec(name) is None)
        return next(absent, None)


def _torch(layer: nn.RNNBase, example: object) -> nn.Module:
    return adapters.copied(layer)


def _fused(layer: nn.RNNBase, example: object) -> nn.Module:
    return fusedrnn.swap(adapters.copied(layer))


def _recompute(layer: nn.RNNBase, example: object) -> nn.Module:
    module = fusedrnn.swap(adapters.copied(layer))
    module.recompute = True
    return module


RIGHT = 50.0  # times torch.nn's error: approximations pass, mistakes do not

# The first one is what the others are compared with.
PEERS = (
    Peer("torch.nn", _torch),
    Peer("fusedrnn", _fused),
    Peer("torch.nn, no TF32", _torch, _float32_on_cuda, setting=no_tf32),
    Peer("fusedrnn, no TF32", _fused, _float32_on_cuda, setting=no_tf32),
    Peer("fusedrnn, recompute", _recompute, _training),
    Peer("torch.compile", adapters.compiled, _compile_can, (), RIGHT, adapters.compiling),
    Peer("cell loop", adapters.CellLoop, _loop_can, factor=RIGHT),
    Peer("ONNX Runtime", adapters.OnnxRuntime, _onnx_can, ("onnxruntime", "onnx"), factor=RIGHT),
    Peer("FlashRNN", adapters.FlashRNN, _flashrnn_can, ("flashrnn",), factor=RIGHT),
)
QUICK_PEERS = PEERS[:2]


def choose(names: Sequence[str]) -> list[Peer]:
    """The peers of these names, and always the first; all of them without names.

    Raises:
        ValueError: there is no such peer, or what it needs is not installed.
    """
    for name in names:
        peer = next((p for p in PEERS if p.name == name), None)
        if peer is None:
            raise ValueError(f"no peer is '{name}'; there are {', '.join(p.name for p in PEERS)}")
        if peer.missing():
            raise ValueError(f"{name} needs the package {peer.missing()}")
    wanted = [p for p in PEERS if not names or p.name in names or p is PEERS[0]]
    return [p for p in wanted if not p.missing()]
