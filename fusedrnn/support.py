"""Which tensors have kernels, and why others have none."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrnn import cuda

# What the kernels compute in. Other dtypes and devices fall back to torch.nn.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
KERNEL_DTYPES = DTYPES + INTEGERS


def is_one_hot(data: Tensor, packed: bool) -> bool:
    """Whether `data` is integers that stand for one-hot vectors, which torch.nn refuses."""
    return data.dtype in INTEGERS and data.dim() < (2 if packed else 3)


def no_kernel(input: Tensor) -> str | None:
    """Why no kernel takes `input`, None where one does."""
    if input.is_cuda:
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
