"""Autocast: in which dtype a call computes, and which dtypes torch.nn's results have."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrnn.layer import LayerBase


def is_on(x: Tensor) -> bool:
    if x.is_meta or not torch._C._is_any_autocast_enabled():
        return False
    return torch.is_autocast_enabled(x.device.type)


_ONEDNN = torch.backends.mkldnn.is_available()
_ONEDNN_BFLOAT16 = _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_ONEDNN_FLOAT16 = _ONEDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _by_onednn(dtype: torch.dtype) -> bool:
    """Whether torch.nn gives padded input of an LSTM without projections to oneDNN on a CPU."""
    if not torch.compiler.is_compiling() and not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.float32:
        return _ONEDNN
    if dtype == torch.bfloat16:
        return _ONEDNN_BFLOAT16
    return _ONEDNN_FLOAT16 and not torch.is_grad_enabled()


_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
}


def _refuse_some_float64(
    low: torch.dtype, input: torch.dtype, weight: torch.dtype, hx: Any, cx: Any
) -> None:
    """Raises torch.nn's error: autocast does not convert float64, so all are float64 or none."""
    states = [s.dtype for s in (hx, cx) if s is not None]
    for dtype in (input, *states):
        if (dtype == torch.float64) != (weight == torch.float64):
            found = [_NAMES.get(d if d == torch.float64 else low, d) for d in (dtype, weight)]
            raise RuntimeError(
                "mat1 and mat2 must have the same dtype, but got {} and {}".format(*found)
            )


def _cpu_dtypes(
    layer: LayerBase, given: torch.dtype, low: torch.dtype, onednn: bool
) -> tuple[torch.dtype, torch.dtype]:
    """torch.nn's dtypes under autocast on the CPU, of the output and h, and of c.

    They follow from which of ATen's paths a case takes: an element-wise product with the
    `given` state has a dtype that holds both, a matrix product that of autocast, and so has
    all that `onednn` computes, which is LSTM alone. On CUDA everything is, by cuDNN.
    """
    wide = torch.promote_types(given, low)
    if layer.mode == "GRU":
        return wide, wide
    if layer.mode == "LSTM" and layer.proj_size:
        return low, wide
    if layer.mode == "LSTM" and not onednn:
        return wide, wide
    return low, low


class Casts(NamedTuple):
    """The dtype of input, states and weights; of the output and h_n; of c_n."""

    low: torch.dtype
    output: torch.dtype
    cell: torch.dtype


def casts(
    layer: LayerBase,
    x: Tensor,
    dtype: torch.dtype,
    weight: torch.dtype,
    hx: Any,
    cx: Any,
    packed: bool,
) -> Casts | None:
    """What autocast makes of a call that computes in `dtype`; None where it changes nothing.

    Raises:
        RuntimeError: torch.nn's, where some of the tensors are float64 and others are not.
    """
    if not is_on(x):
        return None
    low = torch.get_autocast_dtype(x.device.type)
    _refuse_some_float64(low, dtype, weight, hx, cx)
    if dtype == torch.float64:
        return None
    if x.is_cuda:
        return Casts(low, low, low)
    # Elements are multiplied with the cell state, in a GRU with h.
    held = dtype if hx is None else (hx if cx is None else cx).dtype
    onednn = not packed and x.numel() > 0 and _by_onednn(dtype)
    return Casts(low, *_cpu_dtypes(layer, held, low, onednn))
