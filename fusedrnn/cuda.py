"""Whether the binary has kernels for a GPU, and which of them would run."""

from __future__ import annotations

import os
from typing import TypedDict

import torch

from fusedrnn import _C
from fusedrnn.ops import Config

ARCHS = tuple(_C.cuda_archs().split(";")) if _C.cuda_archs() else ()


def covers(archs: tuple[str, ...], major: int, minor: int) -> bool:
    """Whether code for `archs`, such as "8.0", "9.0a" or "12.0+PTX", runs on a GPU of this kind.

    Machine code runs where the major version is the same and the minor one not lower, that of an
    "a" nowhere else; PTX is compiled further for every later GPU.
    """
    for arch in archs:
        name = arch.removesuffix("+PTX")
        exact = name[-1] in "af"
        first, _, second = name.rstrip("af").partition(".")
        found = (int(first), int(second))
        if found == (major, minor):
            return True
        if exact:
            continue
        if found[0] == major and found[1] <= minor:
            return True
        if arch != name and found <= (major, minor):
            return True
    return False


def missing(device: torch.device) -> str | None:
    """Why there is no kernel for tensors on `device`, a CUDA device; None where there is."""
    if not ARCHS:
        return "this build has no CUDA kernels"
    if torch.version.cuda is None:
        return "the CUDA kernels are for NVIDIA GPUs"
    gpu = torch.cuda.get_device_properties(device)
    if not covers(ARCHS, gpu.major, gpu.minor):
        return f"the CUDA kernels of this build are for {', '.join(ARCHS)}, not {gpu.name}"
    return None


class Spec(TypedDict):
    """The properties of a GPU that the planner uses."""

    capability: int  # 90 for 9.0
    processors: int
    shared_bytes: int  # the most that a block can have
    clusters: tuple[int, ...]  # of 1, 2, ... 16 blocks: how many run at once


def spec(device: torch.device) -> Spec:
    """The properties of a CUDA device of this machine."""
    with torch.cuda.device(device):
        return _C.cuda_device()


def plan(
    config: Config, dtype: torch.dtype, steps: int, batch: int, backward: bool, spec: Spec
) -> str:
    """Describes the plan of a call; FUSEDRNN_PLAN applies.

    Raises:
        ValueError: FUSEDRNN_PLAN asks for what cannot run.
    """
    tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return _C.cuda_plan(
        mode=config.mode,
        dtype=str(dtype).removeprefix("torch."),
        hidden_size=config.hidden_size,
        proj_size=config.proj_size,
        num_layers=config.num_layers,
        bidirectional=config.bidirectional,
        layer_norm=config.layer_norm,
        steps=steps,
        batch=batch,
        backward=backward,
        tf32=tf32 and dtype == torch.float32,
        device=spec,
        forced=os.environ.get("FUSEDRNN_PLAN", ""),
    )
