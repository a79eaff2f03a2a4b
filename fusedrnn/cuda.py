"""Whether the binary has kernels for a GPU, which of them may run, and which would."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch

from fusedrnn import _C

if TYPE_CHECKING:
    from fusedrnn.calls import Config

SWITCH = "FUSEDRNN_CUDA_KERNELS"
POSITIONS = ("off", "verified", "on")
# The namespace of torch.ops whose kernels run on CUDA tensors.
OPS: Any = torch.ops.fusedrnn

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


def cuda_kernels(position: str | None = None) -> str:
    """Sets whether this process runs CUDA kernels, and returns what holds from now on.

    Args:
        position: "off": torch.nn runs every call on CUDA, or plain PyTorch what torch.nn lacks.
            "verified", the default: kernels of a kind run on a GPU once they have computed a small
            case right there. "on": they run without that. None changes nothing.

    It sets the environment variable FUSEDRNN_CUDA_KERNELS, which is read at every call.

    Raises:
        ValueError: another position.
    """
    if position is not None:
        if position not in POSITIONS:
            raise ValueError(f"expected one of {', '.join(POSITIONS)}, got {position!r}")
        os.environ[SWITCH] = position
    return os.environ.get(SWITCH) or "verified"


_unusable: dict[int, str | None] = {}  # by the device's index; what `unusable` has found


def version_text(number: int) -> str:
    """12.8 for 12080, none for 0."""
    return "none" if number == 0 else f"{number // 1000}.{number % 1000 // 10}"


def unusable(device: torch.device) -> str | None:
    """Why the CUDA runtime in the binary cannot use a GPU that torch can use. Asked once."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _unusable and not torch.compiler.is_compiling():
        try:
            spec(device)
            _unusable[index] = None
        except RuntimeError as error:
            runtime, driver = map(version_text, _C.cuda_versions())
            _unusable[index] = (
                f"the CUDA {runtime} runtime of this build cannot use the GPU ({error}; the driver"
                f" serves CUDA up to {driver})"
            )
    return _unusable.get(index)


def missing(device: torch.device) -> str | None:
    """Why there is no kernel for tensors on `device`, a CUDA device; None where there is."""
    if os.environ.get(SWITCH) == "off":
        return f"{SWITCH}=off"
    if not ARCHS:
        return "this build has no CUDA kernels"
    if torch.version.cuda is None:
        return "the CUDA kernels are for NVIDIA GPUs"
    gpu = torch.cuda.get_device_properties(device)
    if not covers(ARCHS, gpu.major, gpu.minor):
        return f"the CUDA kernels of this build are for {', '.join(ARCHS)}, not {gpu.name}"
    return unusable(device)


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


class Plan(NamedTuple):
    """How a call is divided, in words, and the index of its kernel family."""

    text: str
    family: int

    @property
    def stepwise(self) -> bool:
        return self.text.startswith("stepwise")


def plan(
    config: Config,
    dtype: torch.dtype,
    steps: int,
    batch: int,
    backward: bool,
    spec: Spec,
    struck: tuple[int, ...] = (),
    forced: str | None = None,
    tf32: bool | None = None,
    tangent: bool = False,
    members: int = 1,
) -> Plan:
    """The plan of a call. Where it is forced, `struck` does not apply.

    `struck` are the indices of families that must not run; `forced` is in the words of
    FUSEDRNN_PLAN, whose value it replaces, and `tf32` replaces torch's switch. `tangent`: of the
    derivative of that pass in one direction. `members`: of an ensemble, that share the batch.

    Raises:
        ValueError: what is forced cannot run, or all that could is struck out.
    """
    if tf32 is None:
        tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
    if forced is None:
        forced = os.environ.get("FUSEDRNN_PLAN", "")
    return Plan(
        *_C.cuda_plan(
            **config.stack(dtype),
            steps=steps,
            batch=batch,
            backward=backward,
            tf32=tf32 and dtype == torch.float32,
            tangent=tangent,
            members=members,
            device=spec,
            forced=forced,
            struck=() if forced else struck,
        )
    )


def float32_products(spec: Spec) -> str:
    """How a GPU multiplies float32 over all steps, in words."""
    switches = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    recurrent, products = (s.fp32_precision == "tf32" for s in switches)
    return _C.cuda_products(recurrent=recurrent, products=products, capability=spec["capability"])


class Standing(NamedTuple):
    """What this process knows of a kernel family on a device."""

    state: str  # right, wrong or refused
    reason: str


@functools.lru_cache(maxsize=64)
def _standings(index: int, generation: int) -> dict[int, Standing]:
    lines = (line.split(" ", 2) for line in OPS.standings(index).splitlines())
    return {int(family): Standing(state, reason) for family, state, reason in lines}


def standings(device: torch.device) -> dict[int, Standing]:
    """Of the families that were tried on a CUDA device, by index."""
    return _standings(device.index or 0, OPS.generation())


def struck(device: torch.device) -> tuple[int, ...]:
    """The families that do not run on a device."""
    states = ("refused",) if cuda_kernels() == "on" else ("refused", "wrong")
    return tuple(i for i, s in standings(device).items() if s.state in states)


@functools.lru_cache(maxsize=4096)
def _plans(
    config: Config,
    dtype: torch.dtype,
    steps: int,
    batch: int,
    graph: bool,
    index: int,
    struck: tuple[int, ...],
    switches: tuple,  # what else `plan` reads
) -> tuple[Plan, ...] | str:
    """The plans of forward and, with a graph, of backward; or why there are none."""
    found = spec(torch.device("cuda", index))
    ways = (False, True) if graph else (False,)
    try:
        return tuple(plan(config, dtype, steps, batch, way, found, struck) for way in ways)
    except ValueError as error:
        return str(error)


def torch_instead(
    config: Config, dtype: torch.dtype, steps: int, batch: int, graph: bool, device: torch.device
) -> str | None:
    """Why torch.nn, if it can, should run a call on a CUDA device; None where kernels do.

    `graph`: backward will run too. A plan that FUSEDRNN_PLAN forces is not left to torch.nn.
    """
    forced = os.environ.get("FUSEDRNN_PLAN", "")
    tf32 = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    plans = _plans(
        config, dtype, steps, batch, graph, device.index or 0, struck(device), (forced, tf32)
    )
    if isinstance(plans, str):
        return None if forced else plans
    if not forced:
        for way, found in zip(("forward", "backward"), plans, strict=False):
            if found.stepwise:
                return f"{way} would be stepwise"
    if cuda_kernels() == "verified" and is_capturing():
        known = standings(device)
        if any(p.family not in known for p in plans):
            return "kernels cannot be checked while a CUDA graph is captured"
    return None


def is_capturing() -> bool:
    """Whether a CUDA graph captures what torch's current stream is given."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
