"""Which tensors have kernels, and why others have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import autocast, cuda
from fusedrnn.layer import LayerBase

# What the kernels compute in. Other dtypes and devices fall back to torch.nn.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
KERNEL_DTYPES = DTYPES + INTEGERS


def is_one_hot(data: Tensor, packed: bool) -> bool:
    """Whether `data` is integers that stand for one-hot vectors, which torch.nn refuses."""
    # dim first, as torch.nn: what is no tensor gets the words of its error.
    return data.dim() < (2 if packed else 3) and data.dtype in INTEGERS


def on_gpu(tensor: Tensor) -> bool:
    """Whether the CUDA kernels are for it."""
    return tensor.is_cuda


def no_kernel(input: Tensor) -> str | None:
    """Why no kernel takes `input`, None where one does."""
    if on_gpu(input):
        reason = cuda.missing(input.device)
        if reason:
            return reason
    elif not input.is_cpu:
        return f"there is no kernel for {input.device.type} tensors yet"
    if input.dtype not in KERNEL_DTYPES:
        return f"there is no kernel for {input.dtype}"
    return None


def fallback_reason(input: Tensor) -> str | None:
    """Why a call with `input` falls back to torch.nn, None where kernels run."""
    reason = no_kernel(input)
    if reason:
        return reason
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace records torch.nn's operators"
    return None


def sizes(layer: Any, input: Any, one_hot: bool) -> tuple[int, int]:
    """The steps and the batch size of an input of a recurrent layer."""
    if isinstance(input, PackedSequence):
        return len(input.batch_sizes), int(input.batch_sizes[0])
    if input.dim() + one_hot == 2:
        return input.shape[0], 1
    batch, steps = input.shape[:2] if layer.batch_first else input.shape[:2][::-1]
    return steps, batch


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call of these tensors."""
    return (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
        and not torch.is_inference_mode_enabled()
    )


def torch_instead(layer: LayerBase, input: Any, hx: Any) -> str | None:
    """Why torch.nn runs a call of a layer, which it can, rather than the CUDA kernels; else None.

    The call has no options that torch.nn lacks, and there are kernels for it.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    if (
        not on_gpu(data)
        or data.dim() < 2
        # Which cuDNN cannot do: torch.compile, forward mode, transforms such as vmap.
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    given = (data, *layer.parameters(), *(s for s in states if isinstance(s, Tensor)))
    graph = needs_graph(*given)
    # cuDNN has no backward of a call in eval mode, and torch.nn always saves for backward.
    if graph and (layer.recompute or not layer.training):
        return None
    steps, batch = sizes(layer, input, False)
    if not (steps and batch):
        return None
    dtype = data.dtype
    if autocast.is_on(data) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(data.device.type)
    return cuda.torch_instead(layer._config(), dtype, steps, batch, graph, data.device)
