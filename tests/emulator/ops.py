"""The ops as they run on CUDA tensors, on CPU tensors: `torch.ops.fusedrnn_emulated`.

`load` builds and loads them. Inside `instead_of_cpu` the package's own ops run them, so that
modules, autograd and every test of these take the CUDA path.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import build

# Whether all that the last products of 16-bit matrices have read was a number.
products_are_finite = True


def _product(product: Any) -> Any:
    """Of 16-bit matrices with the result in float32: ATen has it for CUDA alone."""

    def dtype_out(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        assert a.dtype == b.dtype in (torch.bfloat16, torch.float16)
        assert out.dtype == out_dtype == torch.float32
        assert out.shape == (*a.shape[:-1], b.shape[-1])
        global products_are_finite
        products_are_finite &= bool(a.isfinite().all() and b.isfinite().all())
        return product(a.float(), b.float(), out=out)  # which autocast leaves alone, like this one

    return dtype_out


@functools.cache
def load(mode: str = "plain") -> Any:
    torch.ops.load_library(str(build(mode, "op.so")))
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("mm.dtype_out", _product(torch.mm), "CPU")
    aten.impl("bmm.dtype_out", _product(torch.bmm), "CPU")
    namespace = torch.ops.fusedrnn_emulated
    namespace.kept_alive = aten
    return namespace


@contextlib.contextmanager
def instead_of_cpu(mode: str = "plain", seed: int = -1) -> Iterator[None]:
    """With a seed the order of the kernels' threads is drawn at random."""
    emulated = load(mode)
    emulated.seed(seed)
    library = torch.library.Library("fusedrnn", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            for name in ("forward", "infer", "backward", "forward_tangent", "backward_tangent"):
                library.impl(name, getattr(emulated, name).default, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
        emulated.seed(-1)
