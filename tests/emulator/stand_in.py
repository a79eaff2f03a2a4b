"""The CUDA kernels on the CPU, for processes of `python -m benchmarks.gpu --device emulator`.

FUSEDRNN_GPU_FAULTS has a fault a line, to see what the command makes of it: "fail", "hang", "die"
or "lie", and a regular expression that is looked for in a call's plan, mode, direction and dtype.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from typing import Any

import torch

from . import build
from .ops import load

FAULTS = "FUSEDRNN_GPU_FAULTS"
# The device that is played: see simt.h.
SPEC: dict[str, Any] = {
    "capability": 90,
    "processors": 132,
    "shared_bytes": 227 << 10,
    "clusters": tuple(132 // n for n in range(1, 17)),
}
_kept: list[Any] = []


class Ops:
    """The emulated ops, some of which fail; a namespace like torch.ops.fusedrnn."""

    def __init__(self) -> None:
        self._ops = load()
        self._trial = ""

    def trial(self, plan: str, tf32: bool) -> None:
        self._trial = plan
        self._ops.trial(plan, tf32)

    def forward(self, *args: Any) -> Any:
        return self._run("forward", args)

    def infer(self, *args: Any) -> Any:
        return self._run("infer", args)

    def backward(self, *args: Any) -> Any:
        return self._run("backward", args)

    def forward_tangent(self, *args: Any) -> Any:
        return self._run("forward_tangent", args)

    def backward_tangent(self, *args: Any) -> Any:
        return self._run("backward_tangent", args)

    def _run(self, name: str, args: tuple[Any, ...]) -> Any:
        mode = next(a for a in args if isinstance(a, str))
        dtype = next(a for a in args if isinstance(a, torch.Tensor)).dtype
        plan = self._trial or os.environ.get("FUSEDRNN_PLAN", "")
        way = "forward" if name == "infer" else name.replace("_", " ")
        fault = _fault(f"{plan} {mode} {way} {str(dtype).removeprefix('torch.')}")
        if fault == "fail":
            raise RuntimeError("fusedrnn: a launch failed: an illegal memory access, as planted")
        if fault == "hang":
            time.sleep(1000)
        if fault == "die":
            os.abort()
        results = getattr(self._ops, name)(*args)
        if fault == "lie":
            results[0].mul_(1.2)
        return results


def _fault(call: str) -> str | None:
    for line in os.environ.get(FAULTS, "").splitlines():
        kind, what = line.split(" ", 1)
        if re.search(what, call):
            return kind
    return None


def prepare() -> None:
    """Builds what processes will load: their time is limited."""
    for target in ("op.so", "micro.so"):
        build("plain", target)


def ops() -> Ops:
    return Ops()


def install() -> None:
    """For as long as this process runs, the package's ops on CPU tensors are the emulated ones."""
    torch.backends.cudnn.allow_tf32 = False  # what is compared with it runs on the CPU, without
    os.environ.setdefault("FUSEDRNN_GPU_MICRO", str(build("plain", "micro.so")))
    emulated = Ops()
    library = torch.library.Library("fusedrnn", "IMPL")
    _kept.append(library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for name in ("forward", "infer", "backward", "forward_tangent", "backward_tangent"):
            library.impl(name, getattr(emulated, name), "CPU", allow_override=True)
