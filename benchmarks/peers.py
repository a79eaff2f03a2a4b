"""The implementations that are measured."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable, Sequence
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
    """A measurement that a peer may not support."""

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


def _cpu_inference(q: Question) -> bool:
    return q.device.type == "cpu" and q.mode == "inference"


def _onnx_can(q: Question) -> bool:
    dtypes = (torch.float32, torch.float64)
    return _cpu_inference(q) and q.dtype in dtypes and not q.case.shortest


def _openvino_can(q: Question) -> bool:
    return _onnx_can(q) and q.dtype == torch.float32


def _quantized(q: Question) -> bool:
    return _cpu_inference(q) and q.dtype == torch.float32


def _torch_int8_can(q: Question) -> bool:
    return _quantized(q) and q.case.cell != "RNN"  # which it does not know


def _flashrnn_can(q: Question) -> bool:
    # Its CPU kernels are for checks only, and it has no float64.
    plain = q.case.layers == 1 and not q.case.bidirectional and not q.case.shortest
    return q.device.type == "cuda" and q.dtype != torch.float64 and plain


def _compile_can(q: Question) -> bool:
    # It unrolls the steps; thousands of them would compile for minutes.
    steps = q.case.steps * q.case.layers * q.case.directions
    return steps <= 128 and not q.case.shortest


def _loop_can(q: Question) -> bool:
    return not q.case.shortest


@dataclass(frozen=True)
class Peer:
    """One implementation.

    ``build`` takes torch.nn's layer and an example of its input and returns a module with the same
    weights and call, and the same parameters if it can train. It must not change the layer.
    ``can`` tells which measurements it supports. ``factor`` bounds its error as a multiple of
    torch.nn's: 2 for fusedrnn, more for others; ``relative`` admits more, as a part of the results,
    to weights in fewer bits. ``setting`` is a context for its calls. ``rival`` is the
    implementation of ours that it is an alternative to. ``rest``: seconds for which its threads
    still spin after a call, which would take a core from the next implementation.
    """

    name: str
    build: Callable[[nn.RNNBase, object], nn.Module]
    can: Callable[[Question], bool] = _anything
    needs: tuple[str, ...] = ()  # packages
    factor: float = 2.0
    setting: Setting = nullcontext
    relative: float = 0.0
    rival: str = "fusedrnn"
    rest: float = 0.0

    def missing(self) -> str | None:
        """A required package that is not installed, if any."""
        absent = (name for name in self.needs if importlib.util.find_spec(name) is None)
        return next(absent, None)


def _torch(layer: nn.RNNBase, example: object) -> nn.Module:
    return adapters.copied(layer)


def _fused(layer: nn.RNNBase, example: object) -> nn.Module:
    return fusedrnn.swap(adapters.copied(layer)).model


def _recompute(layer: nn.RNNBase, example: object) -> nn.Module:
    module = fusedrnn.swap(adapters.copied(layer)).model
    module.recompute = True
    return module


def _in_int8(layer: nn.RNNBase, example: object) -> nn.Module:
    return fusedrnn.quantize(copy.deepcopy(layer).eval(), "int8").model


def _in_bfloat16(layer: nn.RNNBase, example: object) -> nn.Module:
    return fusedrnn.quantize(copy.deepcopy(layer).eval(), "bfloat16").model


RIGHT = 50.0  # times torch.nn's error: admits approximations, not mistakes
ROUNDED = 0.1  # of the results: admits weights and activations of 8 bits
INT8 = "fusedrnn int8"

# The others are compared with the first.
PEERS = (
    Peer("torch.nn", _torch),
    Peer("fusedrnn", _fused),
    Peer("torch.nn, no TF32", _torch, _float32_on_cuda, setting=no_tf32),
    Peer("fusedrnn, no TF32", _fused, _float32_on_cuda, setting=no_tf32),
    Peer("fusedrnn, recompute", _recompute, _training),
    Peer("torch.compile", adapters.compiled, _compile_can, (), RIGHT, adapters.compiling),
    Peer("cell loop", adapters.CellLoop, _loop_can, factor=RIGHT),
    Peer(
        "ONNX Runtime",
        adapters.OnnxRuntime,
        _onnx_can,
        ("onnxruntime", "onnx"),
        factor=RIGHT,
        rest=0.1,
    ),
    Peer("OpenVINO", adapters.OpenVino, _openvino_can, ("openvino", "onnx"), factor=RIGHT),
    Peer(INT8, _in_int8, _quantized, relative=ROUNDED, rival=INT8),
    Peer("fusedrnn bfloat16", _in_bfloat16, _quantized, relative=ROUNDED, rival=INT8),
    Peer("torch int8", adapters.torch_int8, _torch_int8_can, relative=ROUNDED, rival=INT8),
    Peer("FlashRNN", adapters.FlashRNN, _flashrnn_can, ("flashrnn",), factor=RIGHT),
)
QUICK_PEERS = PEERS[:2]


def choose(names: Sequence[str]) -> list[Peer]:
    """The first peer and those of these names; without names all that are installed.

    Raises:
        ValueError: there is no such peer, or a package that it needs is missing.
    """
    for name in names:
        peer = next((p for p in PEERS if p.name == name), None)
        if peer is None:
            raise ValueError(f"no peer is '{name}'; there are {', '.join(p.name for p in PEERS)}")
        if peer.missing():
            raise ValueError(f"{name} needs the package {peer.missing()}")
    wanted = [p for p in PEERS if not names or p.name in names or p is PEERS[0]]
    return [p for p in wanted if not p.missing()]


def absent(questions: Iterable[Question]) -> list[str]:
    """The peers that could answer one of these questions if their packages were installed."""
    asked = list(questions)
    missing = [(p, p.missing()) for p in PEERS]
    return [f"{p.name} ({name})" for p, name in missing if name and any(map(p.can, asked))]
